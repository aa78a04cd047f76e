"""Weights in another dtype: rounded once, to nearest even, on bits, in blocks that stay in the cache.

The numbers are torch's, bit for bit, on any machine. A NaN stays a NaN with its sign and the highest bits of its
payload, and becomes quiet where it is rounded: the hardware's rule. (torch's NaNs are others with other instruction
sets and other lengths of a tensor.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3vl_convert.errors import InputError

_Bits = NDArray[Any]

_BLOCK = 1 << 15
"""Elements at a time: they and what is computed of them stay in the second-level cache."""


@dataclass(frozen=True, slots=True)
class _Float:
    """Where a dtype has its sign, exponent and mantissa."""

    bits: int
    mantissa: int

    @property
    def raw(self) -> type[np.unsignedinteger[Any]]:
        return np.uint32 if self.bits == 32 else np.uint16

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def infinity(self) -> int:
        return self.sign - (1 << self.mantissa)

    @property
    def quiet(self) -> int:
        return 1 << (self.mantissa - 1)


_FLOATS = {"float32": _Float(32, 23), "bfloat16": _Float(16, 7), "float16": _Float(16, 10)}

_INFINITE_FROM = {
    ("float32", "bfloat16"): 0x7F7F_8000,
    ("float32", "float16"): 0x477F_F000,
    ("bfloat16", "float16"): 0x4780,
}
"""The least magnitude that rounds to infinity, as bits of the source: half a step above the largest number."""
_LARGEST = {"bfloat16": "3.3895e+38", "float16": "65504"}


def cast(bits: _Bits, source: str, target: str, name: str) -> _Bits:
    """Bits of one weight dtype in another, in the same shape. Raises `InputError` when a finite value becomes infinite.

    Both are unsigned integers as wide as their dtypes.
    """
    if source == target:
        return bits
    flat, out = np.ascontiguousarray(bits).reshape(-1), np.empty(bits.size, _FLOATS[target].raw)
    with np.errstate(all="ignore"):  # of infinities and NaNs, which are put right afterwards
        for first in range(0, flat.size, _BLOCK):
            here = slice(first, first + _BLOCK)
            _check(flat[here], source, target, name)
            _convert(flat[here], out[here], source, target)
    return out.reshape(bits.shape)


def _convert(block: _Bits, out: _Bits, source: str, target: str) -> None:
    if source == "float32":
        _NARROWING[target](block, out)
        if _reaches(block, _FLOATS[source].infinity, source):
            _put_right(block, out, _FLOATS[source], _FLOATS[target])
    elif (source, target) == ("bfloat16", "float32"):
        out[...] = block
        np.left_shift(out, 16, out=out)
    else:
        np.take(_table(source, target), block, out=out, mode="clip")


@cache
def _table(source: str, target: str) -> _Bits:
    """What each of the 65536 patterns of a narrow dtype becomes."""
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    if (source, target) == ("float16", "float32"):
        table = every.view(np.float16).astype(np.float32).view(np.uint32)
    else:
        wide, table = np.empty(every.size, np.uint32), np.empty(every.size, np.uint16)
        _convert(every, wide, source, "float32")
        _NARROWING[target](wide, table)
    _put_right(every, table, _FLOATS[source], _FLOATS[target])
    return table


def _float32_to_bfloat16(block: _Bits, out: _Bits) -> None:
    """Half a step is added, less one bit unless the last bit that stays is set: a tie goes to even."""
    wide = block >> 16
    np.bitwise_and(wide, 1, out=wide)
    np.add(wide, block, out=wide)
    np.add(wide, 0x7FFF, out=wide)
    np.right_shift(wide, 16, out=wide)
    out[...] = wide


_LEAST_NORMAL = 113 << 23
"""2^-14 in float32: below it float16 has one step size, that of the exponent before it."""
_TO_STEPS = 13 << 23


def _float32_to_float16(block: _Bits, out: _Bits) -> None:
    """The processor rounds: a number plus 2^13 times its power of two has float16's last bit as its own last bit.

    The bits of that sum, less those of what was added, count steps of float16 in the number: they and its exponent make
    float16's bits, whether it is normal there or not.
    """
    magnitude = block & 0x7FFF_FFFF
    power = magnitude & 0x7F80_0000
    np.maximum(power, _LEAST_NORMAL, out=power)
    added = power + np.uint32(_TO_STEPS)
    np.add(magnitude.view(np.float32), added.view(np.float32), out=magnitude.view(np.float32))
    np.subtract(magnitude, added, out=magnitude)
    np.subtract(power, _LEAST_NORMAL, out=power)
    np.right_shift(power, 13, out=power)
    np.add(magnitude, power, out=magnitude)
    np.right_shift(block, 16, out=power)
    np.bitwise_and(power, 0x8000, out=power)
    np.bitwise_or(magnitude, power, out=magnitude)
    out[...] = magnitude


_NARROWING: dict[str, Callable[[_Bits, _Bits], None]] = {
    "bfloat16": _float32_to_bfloat16,
    "float16": _float32_to_float16,
}
"""From float32: right for finite numbers that fit."""


def _put_right(block: _Bits, out: _Bits, source: _Float, target: _Float) -> None:
    """Infinities and NaNs: sign, all ones, and of the payload what there is room for."""
    strange = (block & source.infinity) == source.infinity
    bits = block[strange].astype(np.uint32)
    payload = bits & ((1 << source.mantissa) - 1)
    is_nan = payload != 0
    shift = target.mantissa - source.mantissa
    payload = payload << shift if shift > 0 else payload >> -shift
    payload[is_nan] |= target.quiet
    sign = np.where(bits & source.sign, np.uint32(target.sign), np.uint32(0))
    out[strange] = (sign | target.infinity | payload).astype(out.dtype)


def _check(block: _Bits, source: str, target: str, name: str) -> None:
    """Raise `InputError` for a finite value that would become infinite."""
    limit = _INFINITE_FROM.get((source, target))
    if limit is None or not _reaches(block, limit, source):
        return
    magnitude = block & (_FLOATS[source].sign - 1)
    lost = magnitude[(magnitude >= limit) & (magnitude < _FLOATS[source].infinity)]
    if lost.size:
        largest = float(cast(lost.max(keepdims=True), source, "float32", name).view(np.float32)[0])
        other = "bf16 or fp32" if target == "float16" else "fp32"
        raise InputError(
            f"{name}: a value of {largest:.4g} does not fit {target} (largest {_LARGEST[target]}). Use --dtype {other}."
        )


def _reaches(block: _Bits, magnitude: int, source: str) -> bool:
    """Whether any element is as large, without a copy of them: the largest positive one is the signed maximum, the
    largest negative one the unsigned.
    """
    signed = block.view(f"i{block.itemsize}")
    return bool(signed.max() >= magnitude or block.max() >= (magnitude | _FLOATS[source].sign))
