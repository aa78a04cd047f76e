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
        top_k = chosen.shape[1]
        expert_of_row, order = chosen.flatten().sort(stable=True)
        token_of_row = order // top_k
        rows = x[token_of_row]
        counts = torch.bincount(expert_of_row, minlength=self.count)
        found = (self._grouped if self._on_gpu(x) else self._one_by_one)(rows, counts)
        found = found * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, token_of_row, found)

    def _on_gpu(self, x: Tensor) -> bool:
        """Whether one kernel can multiply all experts, and the host need not know how many tokens each has."""
        plain = isinstance(self.method, UnquantizedLinearMethod)
        return x.is_cuda and x.dtype == torch.bfloat16 and plain and grouped_product() is not None

    def _one_by_one(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [T * k, h] sorted by expert. Weights of experts that nobody chose are not touched."""
        apply, out, first = self.method.apply, torch.empty_like(rows), 0
        for expert, count in enumerate(counts.tolist()):
            part = slice(first, first + count)
            if count:
                gate, up = apply(self, "gate_up_proj", rows[part], index=expert).chunk(2, dim=-1)
                out[part] = apply(self, "down_proj", functional.silu(gate) * up, index=expert)
            first += count
        return out

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The same without the host."""
        multiply, ends = grouped_product(), counts.cumsum(0).to(torch.int32)
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
