"""Rounding between dtypes: the numbers of torch, bit for bit; without torch, those of exact arithmetic."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest

from qwen3vl_convert.errors import InputError
from qwen3vl_convert.rounding import cast
from qwen3vl_convert.strided import Array

DTYPES = ("float32", "bfloat16", "float16")
PAIRS = list(permutations(DTYPES, 2))
MANTISSA, LOWEST = {"float32": 23, "bfloat16": 7, "float16": 10}, {"bfloat16": -133, "float16": -24}
"""Bits of the mantissa; the power of two of the smallest number."""
INFINITY = {"float32": 0x7F80_0000, "bfloat16": 0x7F80, "float16": 0x7C00}
LARGEST = {"float32": 0x7F7F_FFFF, "bfloat16": 0x7F7F, "float16": 0x7BFF}
LOWER_HALVES = (0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xEFFF, 0xF000, 0xF001, 0xFFFF)
"""Of a float32: ties of both narrow dtypes, what is one bit beside them, and the ends."""


def patterns(dtype: str) -> Array:
    """All of a narrow dtype. Of float32: all upper halves with lower ones around the ties, and many at random."""
    every = np.arange(1 << 16, dtype=np.uint32)
    if dtype != "float32":
        return every.astype(np.uint16)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    return np.concatenate([(every[:, None] << 16 | np.array(LOWER_HALVES, np.uint32)).reshape(-1), random])


def magnitude(bits: Array) -> Array:
    return np.asarray(bits & bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1))


def is_nan(bits: Array, dtype: str) -> Array:
    return np.asarray(magnitude(bits) > INFINITY[dtype])


def exact(bits: Array, dtype: str) -> Array:
    """The numbers, in float64."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    wide = bits if dtype == "float32" else bits.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32).astype(np.float64)


def that_fit(source: str, target: str) -> Array:
    """The patterns of one dtype whose numbers, rounded, the other has; and its infinities."""
    bits = patterns(source)
    finite = bits[magnitude(bits) < INFINITY[source]]
    half_a_step = 1 + 2.0 ** -(MANTISSA[target] + 2)
    largest = exact(np.array([LARGEST[target]], np.uint32 if target == "float32" else np.uint16), target)[0]
    infinite = bits[magnitude(bits) == INFINITY[source]]
    return np.concatenate([finite[np.abs(exact(finite, source)) < largest * half_a_step], infinite])


def rounded_exactly(numbers: Array, dtype: str) -> Array:
    """To the nearest multiple of a step that float64 holds, ties to the even multiple."""
    if dtype == "float32":
        return numbers
    with np.errstate(invalid="ignore"):
        step = np.exp2(np.maximum(np.frexp(numbers)[1] - 1 - MANTISSA[dtype], LOWEST[dtype]))
        return np.asarray(np.rint(numbers / step) * step)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_numbers_are_rounded_as_exact_arithmetic_says(source: str, target: str) -> None:
    bits = that_fit(source, target)
    found, expected = exact(cast(bits, source, target, "w"), target), rounded_exactly(exact(bits, source), target)
    assert np.array_equal(found, expected)
    assert np.array_equal(np.signbit(found), np.signbit(expected)), "zeros keep their sign"


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_numbers_are_those_of_torch_bit_for_bit(source: str, target: str) -> None:
    torch: Any = pytest.importorskip("torch", reason="torch, whose rounding this is, is not installed")
    bits = that_fit(source, target)
    numbers = torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(getattr(torch, source)).to(getattr(torch, target))
    width = torch.int32 if target == "float32" else torch.int16
    found = cast(bits, source, target, "w")
    assert np.array_equal(found, numbers.view(width).numpy().view(found.dtype))


NANS = [
    ("float32", "bfloat16", 0x7F80_0001, 0x7FC0),
    ("float32", "bfloat16", 0xFF81_2345, 0xFFC1),
    ("float32", "bfloat16", 0x7FFF_FFFF, 0x7FFF),
    ("float32", "float16", 0x7F80_0001, 0x7E00),
    ("float32", "float16", 0xFFC1_2345, 0xFE09),
    ("float32", "float16", 0x7F80_FFFF, 0x7E07),
    ("bfloat16", "float32", 0xFF81, 0xFF81_0000),
    ("bfloat16", "float16", 0x7F81, 0x7E08),
    ("float16", "float32", 0xFC01, 0xFFC0_2000),
    ("float16", "bfloat16", 0x7C01, 0x7FC0),
    ("float16", "bfloat16", 0xFFFF, 0xFFFF),
]


@pytest.mark.parametrize(("source", "target", "before", "after"), NANS)
def test_a_nan_keeps_its_sign_and_what_fits_of_its_payload(source: str, target: str, before: int, after: int) -> None:
    bits = np.array([before], np.uint32 if source == "float32" else np.uint16)
    assert hex(cast(bits, source, target, "w")[0]) == hex(after)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_nan_stays_one_and_nothing_else_becomes_one(source: str, target: str) -> None:
    bits = np.concatenate([that_fit(source, target), patterns(source)[is_nan(patterns(source), source)]])
    found = cast(bits, source, target, "w")
    assert np.array_equal(is_nan(found, target), is_nan(bits, source))
    sign = 8 * bits.itemsize - 1, 8 * found.itemsize - 1
    assert np.array_equal(bits >> bits.dtype.type(sign[0]), found >> found.dtype.type(sign[1]))


@pytest.mark.parametrize(("source", "target"), [("float32", "float16"), ("bfloat16", "float16")])
def test_nans_are_those_of_torch_where_it_has_but_one_answer(source: str, target: str) -> None:
    """To bfloat16 it makes other NaNs with AVX2 than without, and from float16 others of short tensors than of long."""
    torch: Any = pytest.importorskip("torch", reason="torch, whose rounding this is, is not installed")
    if source == "bfloat16" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch has another answer on this processor")
    bits = patterns(source)[is_nan(patterns(source), source)]
    numbers = torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(getattr(torch, source)).to(getattr(torch, target))
    assert np.array_equal(cast(bits, source, target, "w"), numbers.view(torch.int16).numpy().view(np.uint16))


OVERFLOWS = [
    ("float32", "bfloat16", 0x7F7F_7FFF, 0x7F7F, "3.396e.38 does not fit bfloat16 .largest 3.3895e.38.*--dtype fp32"),
    ("float32", "float16", 0x477F_EFFF, 0x7BFF, "6.552e.04 does not fit float16 .largest 65504.*--dtype bf16 or fp32"),
    ("bfloat16", "float16", 0x477F, 0x7BF8, "6.554e.04 does not fit float16"),
]


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("place", [0, 40_000, 99_999])
@pytest.mark.parametrize(("source", "target", "last", "becomes", "says"), OVERFLOWS)
def test_the_largest_number_that_fits_and_the_next(
    source: str, target: str, last: int, becomes: int, says: str, place: int, sign: int
) -> None:
    """Wherever it is among the blocks, and beside numbers of the other sign."""
    raw = np.uint32 if source == "float32" else np.uint16
    top, minus = sign << (31 if source == "float32" else 15), (1 - sign) << (31 if source == "float32" else 15)
    bits = np.full(100_000, minus | 0x3F80 << (16 if source == "float32" else 0), raw)
    bits[place] = top | last
    assert cast(bits, source, target, "w")[place] == sign << 15 | becomes
    bits[place] = top | (last + 1)
    with pytest.raises(InputError, match=f"w: a value of {says}"):
        cast(bits, source, target, "w")


def test_what_is_largest_of_what_does_not_fit_is_told_beside_infinities() -> None:
    bits = np.array([1.0, -1e10, 1e20, np.inf, np.nan], np.float32).view(np.uint32)
    with pytest.raises(InputError, match="a value of 1e.20 does not fit float16"):
        cast(bits, "float32", "float16", "w")


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 70_000)])
def test_any_shape_and_order_in_memory(source: str, target: str, shape: tuple[int, ...]) -> None:
    raw = np.uint32 if source == "float32" else np.uint16
    bits = np.full(shape, 0x3F80 << (16 if source == "float32" else 0), raw)
    found = cast(bits.T, source, target, "w")
    assert found.shape == shape[::-1]
    assert np.array_equal(
        found, np.full(shape[::-1], cast(bits.reshape(-1)[:1], source, target, "w")[:1] if bits.size else 0)
    )


def test_what_is_read_from_a_file_is_not_written_to() -> None:
    bits = patterns("float32")[: 1 << 16]
    bits = np.where(magnitude(bits) > 0x4000_0000, np.uint32(1), bits)
    bits.setflags(write=False)
    before = bits.copy()
    cast(bits, "float32", "float16", "w")
    assert np.array_equal(bits, before)
