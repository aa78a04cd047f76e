"""torch's scaled_dot_product_attention over a paged pool: on every device, in every dtype.

Axes: as in `backend`; G heads that share one head of keys and values.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from qwen3vl_convert.inference.attention.backend import AttentionBackend, Metadata, Span, paged
from qwen3vl_convert.inference.forward_batch import ForwardBatch

if TYPE_CHECKING:
    from qwen3vl_convert.inference.attention.radix_attention import RadixAttention

_GATHERED = 1 << 28
"""Bytes of keys that are put together at once for decoding, and as many of values."""


class SDPABackend(AttentionBackend):
    """Decoding is one call for the whole batch, padded to its longest sequence; prompts are one call each."""

    def forward_decode(self, q: Tensor, layer: "RadixAttention", batch: ForwardBatch) -> Tensor:
        """The G heads of a group stand as so many queries: keys need not be repeated."""
        metadata: Metadata = batch.attention_metadata
        assert metadata.pages is not None
        assert metadata.seen is not None
        stored, grouped = paged(batch, layer), q.view(len(q), layer.num_kv_heads, -1, layer.head_dim)
        found = []
        for rows in _few(len(q), metadata.pages.shape[1] * stored[0][0].nbytes):
            k, v = (_gathered(one, metadata.pages[rows]) for one in stored)
            seen = metadata.seen[rows]
            one = functional.scaled_dot_product_attention(grouped[rows], k, v, attn_mask=seen, scale=layer.scaling)
            found.append(one.flatten(1, 2))
        return found[0] if len(found) == 1 else torch.cat(found)

    def forward_extend(self, q: Tensor, k: Tensor, v: Tensor, layer: "RadixAttention", batch: ForwardBatch) -> Tensor:
        metadata: Metadata = batch.attention_metadata
        if len(metadata.spans) == 1:
            return self._extend_one(q, k, v, metadata.spans[0], layer, batch)
        parts = [slice(span.first, span.stop) for span in metadata.spans]
        found = (
            self._extend_one(q[part], k[part], v[part], span, layer, batch)
            for part, span in zip(parts, metadata.spans, strict=True)
        )
        return torch.cat(list(found))

    def _extend_one(
        self, q: Tensor, k: Tensor, v: Tensor, span: Span, layer: "RadixAttention", batch: ForwardBatch
    ) -> Tensor:
        mask = None
        if span.cached:
            k, v = cached(span, layer, batch)
            at = torch.arange(span.cached, len(k), device=q.device)
            mask = torch.arange(len(k), device=q.device) <= at[:, None]
        q, k, v = (one.transpose(0, 1)[None] for one in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        if q.is_cuda and mask is not None and groups > 1:  # no kernel there but the plain one has a mask and groups
            k, v = (one.repeat_interleave(groups, dim=1) for one in (k, v))
            groups = 1
        found = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=layer.scaling, enable_gqa=groups > 1
        )
        return found[0].transpose(0, 1)


def _gathered(stored: Tensor, pages: Tensor) -> Tensor:
    """Pages [B, P] of stored [pages, page size, K, D] as [B, K, L, D].

    `index_select` copies whole pages on a CPU, where an index in brackets goes number by number.
    """
    found = stored.index_select(0, pages.flatten())
    return found.view(len(pages), -1, *stored.shape[2:]).transpose(1, 2)


def _few(rows: int, nbytes: int) -> Iterator[slice]:
    """Rows of so many bytes each, as many together as `_GATHERED` holds."""
    count = max(1, _GATHERED // nbytes)
    for first in range(0, rows, count):
        yield slice(first, first + count)


def cached(span: Span, layer: "RadixAttention", batch: ForwardBatch) -> tuple[Tensor, Tensor]:
    """All keys and values [cached + new, K, D] of a sequence. Raises ValueError where there is no pool to have them."""
    if span.slots is None or batch.token_to_kv_pool is None:
        raise ValueError(
            f"A sequence says that {span.cached} of its tokens are cached, and the batch has no token_to_kv_pool. "
            "Pass the pool, or whole sequences."
        )
    k, v = batch.token_to_kv_pool.get_kv_buffer(layer.layer_id)
    return k.index_select(0, span.slots), v.index_select(0, span.slots)
