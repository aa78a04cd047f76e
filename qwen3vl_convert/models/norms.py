"""RMSNorm and LayerNorm for the layers that run without Transformer Engine.

They compute what transformers computes, to the bit in bfloat16 too, and store what Transformer Engine's norms store.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from qwen3vl_convert.models.transformer_config import parameter_device


class _Norm(nn.Module):
    """What both have: a scale over the last axis, in the model's dtype, and the tag for sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.hidden_size = hidden_size
        self.weight = self._parameter(config, 1.0)

    def _parameter(self, config: TransformerConfig, value: float) -> nn.Parameter:
        device = parameter_device(config)
        parameter = nn.Parameter(torch.full((self.hidden_size,), value, dtype=config.params_dtype, device=device))
        # Under sequence parallelism each rank sees a part of the sequence: Megatron-Core sums the gradients of what
        # carries this tag over the tensor parallel ranks.
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return parameter


class _Stored(nn.Module):
    """A module that Transformer Engine stores an `_extra_state` for, so that its keys are in every checkpoint."""

    def get_extra_state(self) -> Tensor:
        """Nothing, as Transformer Engine has it outside of fp8: zero bytes."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Scaling factors of fp8, which these modules have no use for."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)  # plain state dicts may lack it
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class RMSNorm(_Norm):
    """x / rms(x) in float32, rounded to x's dtype, then scaled: the order in which transformers rounds."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden]; same shape and dtype."""
        exact = x.float()
        normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class LayerNorm(_Norm):
    """torch's layer norm, with a shift."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = self._parameter(config, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden]; same shape and dtype."""
        return nn.functional.layer_norm(x, (self.hidden_size,), self.weight, self.bias, self.eps)


class StoredRMSNorm(_Stored, RMSNorm):
    """An RMSNorm that is a module of its own under Transformer Engine too."""


class StoredLayerNorm(_Stored, LayerNorm):
    """A LayerNorm that is a module of its own under Transformer Engine too."""
