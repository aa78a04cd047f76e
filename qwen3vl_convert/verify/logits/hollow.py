"""A model without weights, and the shelf that lends it what it needs, while it needs it.

Every parameter has its shape, dtype and device, and the memory of one number, NaN: whatever asks where it lies gets the
right answer, and whatever computes with one that was not lent gets NaN, a mistake that cannot be overlooked.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qwen3vl_convert.errors import UnsupportedFormat


class _RealRanges(TorchFunctionMode):
    """`torch.arange` on the CPU: what models compute from it are frequencies, which no checkpoint has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.arange:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


_M_MMAP_THRESHOLD = -3
_MOST_IN_A_HEAP = 32 << 20
"""Where glibc leaves the threshold by itself, once a block of that size was freed; it cannot be asked for it."""


def give_back_memory() -> None:
    """Return what was freed to the system, where the C library is glibc: each of its heaps, and there is one for every
    thread, would else keep what a layer took.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def apart(least: int = 1 << 20) -> Iterator[None]:
    """Within it each block of memory of `least` bytes or more is the system's again as soon as it is freed.

    By itself glibc takes blocks of up to 32 MiB, which are most weights, from its heaps. There what is freed in one
    thread serves no other, and leaves gaps: as much again as all that is in use, and more with every layer.
    """
    set_option = _of_glibc("mallopt")
    if set_option is None:
        yield
        return
    set_option(_M_MMAP_THRESHOLD, least)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, _MOST_IN_A_HEAP)


def _of_glibc(name: str) -> Any:
    """A function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


@contextmanager
def weightless() -> Iterator[None]:
    """Within it models are built on the meta device, all but their rotary frequencies."""
    with torch.device("meta"), _RealRanges():
        yield


def hollow_out(model: nn.Module, device: torch.device) -> None:
    """Put placeholders for parameters, and buffers on the device. Raises `UnsupportedFormat` for a buffer on meta."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = _placeholder(parameter, device)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                _check_real(model, f"{name}.{key}", buffer)
                module._buffers[key] = buffer.to(device)


def _placeholder(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    nan = torch.full((1,), float("nan"), dtype=parameter.dtype, device=device)
    made = nn.Parameter(nan.expand(parameter.shape), requires_grad=False)
    made.__dict__.update(parameter.__dict__)  # Megatron-Core's tags
    return made


def _check_real(model: nn.Module, name: str, buffer: Tensor) -> None:
    if buffer.is_meta:
        raise UnsupportedFormat(
            f"{type(model).__name__}: {name} is no parameter, and made of more than a range of numbers while the model "
            "is built: this release of the library is not known here. Use one that the documentation names."
        )


Named = str | tuple[str, int]
"""A parameter by its name, or one expert of a stack of them."""


class Shelf:
    """Weights that were read, by name: the first, and more while all fit into `most` bytes. The rest is read each time.

    Every pass needs the weights of a layer in the same order, so to drop the oldest for the newest would help none.
    """

    def __init__(self, read: Callable[[Named], Tensor], most: int) -> None:
        self.read, self.most = read, most
        self.held: dict[Named, Tensor] = {}
        self.nbytes = 0

    def get(self, name: Named) -> Tensor:
        """A weight, read unless it is there."""
        found = self.held.get(name)
        if found is None:
            found = self.read(name)
            if not self.held or self.nbytes + found.nbytes <= self.most:
                self.held[name] = found
                self.nbytes += found.nbytes
        return found

    def clear(self) -> None:
        """Drop all."""
        self.held.clear()
        self.nbytes = 0


Lender = Callable[[Named], Tensor]
"""Gives a weight in the dtype that the model computes in."""


class LentStack:
    """In the place of a stack of experts [experts, ...]: gives the one that is asked for."""

    def __init__(self, get: Lender, name: str) -> None:
        self.get, self.name = get, name

    def __getitem__(self, number: int | Tensor) -> Tensor:
        """One expert; as a stack of one if the number is a tensor of one, as indexing has it."""
        found = self.get((self.name, int(number)))
        return found[None] if isinstance(number, Tensor) and number.dim() else found


def lend(module: nn.Module, names: Mapping[str, str], get: Lender) -> None:
    """Have a module take parameters for each forward. `names`: where they are in it (`weight`, `proj.weight`), and what
    the lender calls them.

    One that the module has not got is handed to it as an argument: the weight of a tied output layer.
    """
    kept = {path: parameter for path, parameter in module.named_parameters() if path in names}

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        for path in kept:
            _put(module, path, nn.Parameter(get(names[path]), requires_grad=False))
        return args, {**kwargs, **{path: get(name) for path, name in names.items() if path not in kept}}

    def after(module: nn.Module, args: Any, output: Any) -> None:
        for path, parameter in kept.items():
            _put(module, path, parameter)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def _put(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    owner, _, name = path.rpartition(".")
    module.get_submodule(owner)._parameters[name] = parameter
