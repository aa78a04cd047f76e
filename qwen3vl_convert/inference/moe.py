"""The mixture of experts: a router, and per token the few experts that it chooses.

Axes: T tokens, h features, E experts, k experts of a token, I features inside an expert.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwen3vl_convert.inference.layers import Linear, Slot, Slots, method_for
from qwen3vl_convert.inference.quantization import QuantizationConfig, UnquantizedLinearMethod

_GROUPING = (9, 10)
"""Compute capabilities of GPUs on which torch multiplies groups by itself; elsewhere it asks the host, too."""


class SparseMLP(nn.Module):
    """softmax over all experts, the `top_k` largest, which are made to sum to one: what the model was trained with."""

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        experts: int,
        top_k: int,
        quant: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = Linear(hidden_size, experts)
        self.experts = Experts(hidden_size, expert_size, experts, quant, f"{prefix}.experts")

    def forward(self, x: Tensor) -> Tensor:
        """x [T, h]."""
        chances = functional.softmax(self.gate(x), dim=-1, dtype=torch.float32)
        weights, chosen = chances.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.experts(x, chosen, weights.to(x.dtype))  # type: ignore[no-any-return]

    def slots(self, prefix: str) -> Slots:
        yield from self.gate.slots(f"{prefix}.gate")
        yield from self.experts.slots(f"{prefix}.experts")


class Experts(nn.Module):
    """All experts of a layer: gate_up_proj [E, 2I, h] and down_proj [E, h, I]."""

    def __init__(
        self, hidden_size: int, expert_size: int, experts: int, quant: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.hidden_size, self.expert_size, self.count = hidden_size, expert_size, experts
        self.method = method_for(quant, prefix) or UnquantizedLinearMethod()
        self.method.create_weights(self, "gate_up_proj", (experts, 2 * expert_size, hidden_size))
        self.method.create_weights(self, "down_proj", (experts, hidden_size, expert_size))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [T, h] with `chosen` experts [T, k] and their `weights` [T, k]."""
        expert_of_row, order = chosen.flatten().sort(stable=True)
        experts = torch.arange(self.count, device=x.device)
        ends = torch.searchsorted(expert_of_row, experts, right=True, out_int32=True)
        found = (self._grouped if self.on_device(x.device, x.dtype) else self._one_by_one)(
            x[order // chosen.shape[1]], ends
        )
        # Back in the order of tokens, to add in the same order every time.
        apart = torch.empty_like(found).index_copy_(0, order, found).view(*chosen.shape, -1)
        return (apart * weights[..., None]).sum(1)

    def on_device(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether one kernel multiplies all experts, and the host need not know how many tokens each has."""
        plain = isinstance(self.method, UnquantizedLinearMethod)
        if device.type != "cuda" or dtype != torch.bfloat16 or not plain or grouped_product() is None:
            return False
        return torch.cuda.get_device_capability(device)[0] in _GROUPING

    def _one_by_one(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [T * k, h] sorted by expert; `ends` [E]: where those of each end. Weights of experts that have none are
        not touched.
        """
        apply, out, first = self.method.apply, torch.empty_like(rows), 0
        for expert, end in enumerate(ends.tolist()):
            if end > first:
                gate, up = apply(self, "gate_up_proj", rows[first:end], index=expert).chunk(2, dim=-1)
                out[first:end] = apply(self, "down_proj", functional.silu(gate) * up, index=expert)
            first = end
        return out

    def _grouped(self, rows: Tensor, ends: Tensor) -> Tensor:
        """The same without the host."""
        multiply = grouped_product()
        gate_up, down = (self.get_parameter(name).transpose(1, 2) for name in ("gate_up_proj", "down_proj"))
        gate, up = multiply(rows, gate_up, offs=ends).chunk(2, dim=-1)
        found: Tensor = multiply(functional.silu(gate) * up, down, offs=ends)
        return found

    def slots(self, prefix: str) -> Slots:
        """Expert by expert."""
        inner, outer = self.expert_size, self.hidden_size
        for expert in range(self.count):
            for name, whole, first, shape in (
                ("gate_proj", "gate_up_proj", 0, (inner, outer)),
                ("up_proj", "gate_up_proj", inner, (inner, outer)),
                ("down_proj", "down_proj", 0, (outer, inner)),
            ):
                put = partial(self.method.load, self, whole, (expert, first))
                yield f"{prefix}.{expert}.{name}.weight", Slot(shape, put)


def grouped_product() -> Any:
    """torch's product of sorted rows with a stack of matrices; None in releases that have none."""
    return getattr(functional, "grouped_mm", None)
