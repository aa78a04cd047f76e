"""The layers that every part of the model is built of, and how each takes its weights from a checkpoint.

Axes: T tokens, h features; N rows and K columns of a weight.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwen3vl_convert.inference.quantization import LinearMethod, QuantizationConfig, UnquantizedLinearMethod

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """By its name in a config. Raises ValueError for one that is not known, where a default would be another model."""
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act: expected one of {', '.join(ACTIVATIONS)}, found {name!r}.")
    return ACTIVATIONS[name]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor of a checkpoint goes: the shape that it must have, and what puts it there."""

    shape: tuple[int, ...]
    put: Callable[[Tensor], object]


Slots = Iterator[tuple[str, Slot]]
"""(the name of a tensor on the Hugging Face Hub, its slot)."""


def parameter_slot(parameter: nn.Parameter) -> Slot:
    """The slot of a parameter that is stored as it is used."""
    return Slot(tuple(parameter.shape), parameter.detach().copy_)


def module_slots(module: nn.Module, prefix: str) -> Slots:
    """The slots of a module whose parameters are all stored as they are used."""
    for name, parameter in module.named_parameters():
        yield f"{prefix}.{name}", parameter_slot(parameter)


class MergedLinear(nn.Module):
    """Linear layers with the same input, computed as one: `sizes` are their outputs.

    A checkpoint stores each by itself; `slots` says where. `method`: how the weight is kept, as it is without it.
    """

    def __init__(
        self, in_features: int, sizes: Sequence[int], bias: bool = False, method: LinearMethod | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.sizes = in_features, tuple(sizes)
        self.out_features = sum(sizes)
        self.method = method or UnquantizedLinearMethod()
        self.method.create_weights(self, "weight", (self.out_features, in_features))
        self.bias = nn.Parameter(torch.empty(self.out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., sum of sizes]."""
        return self.method.apply(self, "weight", x, self.bias)

    def slots(self, *prefixes: str) -> Slots:
        """One prefix per layer that is merged."""
        firsts = [0, *accumulate(self.sizes)]
        for prefix, first, size in zip(prefixes, firsts, self.sizes, strict=False):
            put = partial(self.method.load, self, "weight", (first,))
            yield f"{prefix}.weight", Slot((size, self.in_features), put)
            if self.bias is not None:
                yield f"{prefix}.bias", Slot((size,), self.bias.detach()[first : first + size].copy_)


class Linear(MergedLinear):
    """One linear layer."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, method: LinearMethod | None = None):
        super().__init__(in_features, (out_features,), bias, method)


def method_for(config: QuantizationConfig | None, prefix: str) -> LinearMethod | None:
    """What a quantisation says about a layer by its name."""
    return None if config is None else config.get_quant_method(None, prefix)


class RMSNorm(nn.Module):
    """x / rms(x) in float32 at least, rounded to x's dtype, and only then times the weight: as it was trained."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size]."""
        exact = x if x.dtype == torch.float64 else x.float()
        normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        sizes = (intermediate_size, intermediate_size)
        self.gate_up_proj = MergedLinear(hidden_size, sizes, method=method_for(quant, f"{prefix}.gate_up_proj"))
        self.down_proj = Linear(intermediate_size, hidden_size, method=method_for(quant, f"{prefix}.down_proj"))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, h]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)  # type: ignore[no-any-return]

    def slots(self, prefix: str) -> Slots:
        yield from self.gate_up_proj.slots(f"{prefix}.gate_proj", f"{prefix}.up_proj")
        yield from self.down_proj.slots(f"{prefix}.down_proj")
