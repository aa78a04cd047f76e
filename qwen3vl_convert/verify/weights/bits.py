"""Weights as bits: their values, how far apart they are on the line of representable numbers, and rounding.

Arrays are unsigned integers as wide as the dtype (`strided.raw`), so that NaN payloads and zeros of either sign pass
untouched. numpy is enough: what is compared in bulk must not wait for torch.
"""

import numpy as np

from qwen3vl_convert.storage import DTYPES
from qwen3vl_convert.strided import Array

_NAN = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC0_0000}
_MARK = 1
"""Payload of the NaN that stands for a finite value too large for the dtype: no weight is equal to it."""


def values(bits: Array, dtype: str) -> Array:
    """The numbers, in float32, which holds those of every weight dtype exactly."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "float16":
        return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)
    return np.ascontiguousarray(bits).view(np.float32)


def encoded(numbers: Array, dtype: str) -> Array:
    """float32 or float64 numbers as bits of a dtype, rounded once, to nearest even; NaNs become one and the same."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "float16":
            bits = numbers.astype(np.float16).view(np.uint16)
        elif dtype == "float32":
            bits = numbers.astype(np.float32).view(np.uint32)
        else:
            bits = _to_bfloat16(numbers)
    return np.where(np.isnan(numbers), bits.dtype.type(_NAN[dtype]), bits)


def _to_bfloat16(numbers: Array) -> Array:
    wide = _to_odd(numbers).view(np.uint32)
    lowest = (wide >> np.uint32(16)) & np.uint32(1)
    return ((wide + np.uint32(0x7FFF) + lowest) >> np.uint32(16)).astype(np.uint16)


def _to_odd(numbers: Array) -> Array:
    """float32 with the last bit set where float64 says more: rounding it again is then rounding once."""
    narrow = numbers.astype(np.float32)
    if numbers.dtype == np.float32:
        return narrow
    back = narrow.astype(np.float64)
    bits = narrow.view(np.uint32)
    away = np.abs(back) > np.abs(numbers)
    truncated = np.where(away & (bits & np.uint32(0x7FFF_FFFF) != 0), bits - np.uint32(1), bits)
    return np.where(back == numbers, bits, truncated | np.uint32(1)).astype(np.uint32).view(np.float32)


def rounded(bits: Array, source: str, target: str) -> Array:
    """Weights of one dtype in another. A finite value that does not fit becomes a NaN that nothing is equal to.

    NaNs lose their payload, even between equal dtypes.
    """
    numbers = values(bits, source)
    result = encoded(numbers, target)
    lost = np.isfinite(numbers) & np.isinf(values(result, target))
    return np.where(lost, result.dtype.type(_NAN[target] | _MARK), result)


def is_overflow(bits: Array, dtype: str) -> Array:
    """Where `rounded` found a finite value too large for the dtype."""
    found: Array = bits == bits.dtype.type(_NAN[dtype] | _MARK)
    return found


def ulps(theirs: Array, ours: Array, dtype: str) -> Array:
    """Representable numbers from one to the other, for elements whose bits differ: 1 for neighbours.

    Zeros of either sign are one number on that line; since their bits differ they count as 1 apart, not 0. Infinity
    follows the largest number, and NaNs, by payload, follow infinity.
    """
    distance: Array = np.maximum(np.abs(_on_line(theirs, dtype) - _on_line(ours, dtype)), 1)
    return distance


def _on_line(bits: Array, dtype: str) -> Array:
    """Sign and magnitude as one integer that grows with the number."""
    if DTYPES[dtype].itemsize == 2:
        return _LINE[bits]
    return _placed(bits.view(np.int32).astype(np.int64), 31)


def _placed(signed: Array, magnitude_bits: int) -> Array:
    magnitude = signed & ((1 << magnitude_bits) - 1)
    placed: Array = np.where(signed < 0, -magnitude, magnitude)
    return placed


_LINE = _placed(np.arange(1 << 16, dtype=np.uint16).view(np.int16).astype(np.int32), 15)
"""Of every pattern of 16 bits: looking it up is several times as fast as computing it."""
