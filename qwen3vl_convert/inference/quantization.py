"""How a linear layer keeps its weight and multiplies by it: as it is, or as whole numbers of eight bits.

A layer asks its method to make the weight, to take the parts of it that a checkpoint holds, and to apply it. Legend:
N rows (outputs), K columns (inputs), E experts.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3vl_convert.errors import UsageError

SCALE = "_scale"
"""What follows a weight's name in the name of its scales."""


class LinearMethod(ABC):
    """What a linear layer does with a weight [..., N, K] that is its attribute `name`."""

    @abstractmethod
    def create_weights(self, layer: nn.Module, name: str, shape: tuple[int, ...]) -> None:
        """Register what the weight is kept in, empty, on the current default device, in the default dtype."""

    @abstractmethod
    def load(self, layer: nn.Module, name: str, at: tuple[int, ...], tensor: Tensor) -> None:
        """Put [rows, K] where `at` says: the expert, where there are several, then the first row."""

    @abstractmethod
    def apply(
        self, layer: nn.Module, name: str, x: Tensor, bias: Tensor | None = None, index: int | None = None
    ) -> Tensor:
        """[..., K] to [..., N]. `index` says which weight of a stack."""

    @abstractmethod
    def weight(self, layer: nn.Module, name: str, dtype: torch.dtype, index: int | Tensor | None = None) -> Tensor:
        """The weight as numbers, or those of a stack that `index` picks, for kernels that want them so."""

    @abstractmethod
    def parameters_of(self, name: str) -> tuple[str, ...]:
        """Names of what `create_weights` registers."""


class UnquantizedLinearMethod(LinearMethod):
    """The weight as it is."""

    def create_weights(self, layer: nn.Module, name: str, shape: tuple[int, ...]) -> None:
        layer.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))

    def load(self, layer: nn.Module, name: str, at: tuple[int, ...], tensor: Tensor) -> None:
        _part(layer.get_parameter(name), at, len(tensor)).copy_(tensor)

    def apply(
        self, layer: nn.Module, name: str, x: Tensor, bias: Tensor | None = None, index: int | None = None
    ) -> Tensor:
        return product(x, _picked(getattr(layer, name), index), bias)

    def weight(self, layer: nn.Module, name: str, dtype: torch.dtype, index: int | Tensor | None = None) -> Tensor:
        return _picked(layer.get_parameter(name), index).to(dtype)

    def parameters_of(self, name: str) -> tuple[str, ...]:
        return (name,)


_SOME_ROWS = range(3, 25)
"""A batch that decodes on a CPU."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] by a weight [N, K] to [..., N].

    For a few rows in fp32 on a CPU the other way round: MKL then spreads the work over N, in up to 1.7 times less time.
    """
    few = x.dim() == 2 and x.device.type == "cpu" and x.dtype == torch.float32 and len(x) in _SOME_ROWS
    if not few or bias is not None:
        return F.linear(x, weight, bias)
    return torch.mm(weight, x.T).T.contiguous()


class QuantizationConfig(ABC):
    """Which layers of a model keep their weights otherwise, and how."""

    @abstractmethod
    def get_name(self) -> str:
        """The name that it is registered under."""

    @abstractmethod
    def get_quant_method(self, layer: nn.Module | None, prefix: str) -> LinearMethod | None:
        """The method for a layer by its name in the model; None for a layer that keeps its weights as they are."""


_REGISTERED: dict[str, type[QuantizationConfig]] = {}


def register_quantization(name: str) -> Callable[[type[QuantizationConfig]], type[QuantizationConfig]]:
    """Make a config known by a name: a decorator of its class, which is called without arguments."""

    def registered(config: type[QuantizationConfig]) -> type[QuantizationConfig]:
        _REGISTERED[name.lower()] = config
        return config

    return registered


def get_quantization_config(name: str) -> QuantizationConfig:
    """The config of that name. Raises UsageError for one that is not registered."""
    if name.lower() not in _REGISTERED:
        known = f"{', '.join(sorted(_REGISTERED))} {'is' if len(_REGISTERED) == 1 else 'are'}"
        raise UsageError(f"quantization {name!r} is not supported; {known}. Weights are rounded as they are loaded.")
    return _REGISTERED[name.lower()]()


def _part(whole: Tensor, at: tuple[int, ...], rows: int) -> Tensor:
    """`rows` rows of a weight, or of what belongs to its rows, from `at` on."""
    *stack, first = at
    return whole.detach()[tuple(stack)].narrow(0, first, rows)


def _picked(whole: Tensor, index: int | Tensor | None) -> Tensor:
    return whole if index is None else whole[index]


# ---- weight-only int8 ------------------------------------------------------------------------------------------------

_TEXT = frozenset(
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "experts")
)
"""Last parts of the names of layers that are rounded: where nearly all weights of the text model are."""
_BLOCK = 1 << 22
"""Elements of a weight that are rounded, or on a CPU made numbers of again, at once."""
_FEW = 16
"""Rows of activations for which torch's kernel for a CPU that supports bfloat16 is faster than the two steps."""
_SCRATCH = threading.local()
"""A block of a weight as numbers, by dtype: fresh memory costs a CPU more than what is put there."""


@register_quantization("int8")
class Int8Config(QuantizationConfig):
    """Weights of the text model's linear layers and experts in eight bits; activations stay as they are."""

    def get_name(self) -> str:
        return "int8"

    def get_quant_method(self, layer: nn.Module | None, prefix: str) -> LinearMethod | None:
        parts = prefix.split(".")
        return Int8LinearMethod() if parts[-1] in _TEXT and "visual" not in parts else None


class Int8LinearMethod(LinearMethod):
    """Weight = q * scale: q whole numbers in [-127, 127], and a scale per row, in fp32."""

    def create_weights(self, layer: nn.Module, name: str, shape: tuple[int, ...]) -> None:
        weight, scale = torch.empty(shape, dtype=torch.int8), torch.empty(shape[:-1], dtype=torch.float32)
        layer.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        layer.register_parameter(name + SCALE, nn.Parameter(scale, requires_grad=False))

    def load(self, layer: nn.Module, name: str, at: tuple[int, ...], tensor: Tensor) -> None:
        weight = _part(layer.get_parameter(name), at, len(tensor))
        scale = _part(layer.get_parameter(name + SCALE), at, len(tensor))
        for part in _blocks(tensor):
            weight[part], scale[part] = quantized(tensor[part].to(weight.device, torch.float32))

    def apply(
        self, layer: nn.Module, name: str, x: Tensor, bias: Tensor | None = None, index: int | None = None
    ) -> Tensor:
        weight = _picked(layer.get_parameter(name), index)
        scale = _picked(layer.get_parameter(name + SCALE), index)
        out = multiplied(x.reshape(-1, x.shape[-1]), weight, scale).view(*x.shape[:-1], len(weight))
        return out if bias is None else out + bias

    def weight(self, layer: nn.Module, name: str, dtype: torch.dtype, index: int | Tensor | None = None) -> Tensor:
        weight = _picked(layer.get_parameter(name), index)
        scale = _picked(layer.get_parameter(name + SCALE), index)
        return weight.to(dtype).mul_(scale.unsqueeze(-1))

    def parameters_of(self, name: str) -> tuple[str, ...]:
        return (name, name + SCALE)


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [N, K], scale [N]) of finite fp32 rows: nearest, half to even. A row of zeros has the scale 0.

    A scale is the least with which the row fits that has the eight significant bits of bfloat16: so it is the same
    number in whatever dtype a model computes.
    """
    least = rows.abs().amax(-1) / 127
    scale = ((least.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    steps = rows / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return steps.round_().clamp_(-127, 127).to(torch.int8), scale


def multiplied(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [T, K] by the int8 weight [N, K] with scales [N], to [T, N] in the dtype of x."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(x) <= _FEW:
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight, scale.to(x.dtype))  # type: ignore[no-any-return]
    if x.device.type != "cpu":
        return _by_block(x, weight, scale, torch.empty(weight.shape, dtype=x.dtype, device=x.device))
    out = x.new_empty(len(x), len(weight))
    for part in _blocks(weight):
        out[:, part] = _by_block(x, weight[part], scale[part], _scratch(weight[part].shape, x.dtype))
    return out


def _by_block(x: Tensor, weight: Tensor, scale: Tensor, scratch: Tensor) -> Tensor:
    """With the weight made numbers of x's dtype in `scratch` [N, K]."""
    scratch.copy_(weight)
    if x.dtype == torch.float16:  # the sums of whole numbers would be too large for it
        return F.linear(x, scratch.mul_(scale.unsqueeze(-1)))
    return F.linear(x, scratch).mul_(scale.to(x.dtype))


def _scratch(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """This thread's memory for a block on a CPU."""
    kept: Tensor | None = getattr(_SCRATCH, str(dtype), None)
    if kept is None or kept.numel() < shape.numel():
        with torch.inference_mode(False):  # what is made in inference mode cannot be written outside of it
            kept = torch.empty(shape.numel(), dtype=dtype)
        setattr(_SCRATCH, str(dtype), kept)
    return kept[: shape.numel()].view(shape)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of at most `_BLOCK` elements, or one."""
    rows = max(1, _BLOCK // max(1, weight.shape[-1]))
    for first in range(0, len(weight), rows):
        yield slice(first, min(first + rows, len(weight)))
