"""Flash attention for prompts: one kernel for all sequences of a batch, whatever their lengths. For GPUs."""

from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen3vl_convert.inference.attention.backend import AttentionBackend, Metadata, Span
from qwen3vl_convert.inference.attention.sdpa import SDPABackend, cached
from qwen3vl_convert.inference.attention.segments import Kernel, Lengths, kernel_for
from qwen3vl_convert.inference.forward_batch import ForwardBatch

if TYPE_CHECKING:
    from qwen3vl_convert.inference.attention.radix_attention import RadixAttention


class FlashBackend(SDPABackend):
    """Decoding is that of `SDPABackend`, which a CUDA graph can hold."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def forward_extend(self, q: Tensor, k: Tensor, v: Tensor, layer: "RadixAttention", batch: ForwardBatch) -> Tensor:
        metadata: Metadata = batch.attention_metadata
        if any(span.cached for span in metadata.spans):
            parts = [self._all(k, v, span, layer, batch) for span in metadata.spans]
            k, v = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        of_q = _lengths([span.stop - span.first for span in metadata.spans])
        of_k = _lengths([span.stop - span.first + span.cached for span in metadata.spans])
        return self.kernel(q, k, v, of_q, of_k, layer.scaling, True)

    def _all(
        self, k: Tensor, v: Tensor, span: Span, layer: "RadixAttention", batch: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        part = slice(span.first, span.stop)
        return cached(span, layer, batch) if span.cached else (k[part], v[part])


def _lengths(lengths: list[int]) -> Lengths:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), max(lengths)


@cache
def backend_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """The fastest that there is for a model."""
    kernel = kernel_for(device, dtype, head_dim)
    return SDPABackend() if kernel is None else FlashBackend(kernel)
