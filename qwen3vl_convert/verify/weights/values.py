"""What may have happened to weights where they lie: rounded, scaled, set to a constant, damaged, never loaded."""

import math
from dataclasses import replace

import numpy as np

from qwen3vl_convert.storage import WEIGHT_DTYPES
from qwen3vl_convert.strided import Array
from qwen3vl_convert.verify.weights.bits import encoded, is_overflow, rounded, ulps, values
from qwen3vl_convert.verify.weights.initialisation import initialised
from qwen3vl_convert.verify.weights.part import Hypothesis, Part
from qwen3vl_convert.verify.weights.places import only_there

_MOST_FLIPS = 8
_MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23}
_LARGEST_FLOAT16 = 65504.0


def not_finite(part: Part) -> tuple[str, Part]:
    """(what is infinite or no number on one side only, the part with the other side's weights there)."""
    found = [_strange(theirs, ours, part) for theirs, ours in part.blocks()]
    if not any(where.any() for kinds in found for where in kinds.values()):
        return "", part
    kinds = {kind: np.concatenate([block[kind] for block in found]) for kind in found[0]}
    said = [
        f"{text.format(_too_large(part, where))}: {int(where.sum())} {what}, "
        f"the first at {part.index(int(where.argmax()))}"
        for (text, what), where in kinds.items()
        if where.any()
    ]
    strange = np.logical_or.reduce(list(kinds.values())).reshape(part.ours.shape)
    mended = np.where(strange, part.theirs, part.ours)
    return "; ".join(said), replace(part, ours=mended, known=strange)


def _strange(theirs: Array, ours: Array, part: Part) -> dict[tuple[str, str], Array]:
    """Where a block has what kind of number on one side only."""
    a, b = values(theirs, part.dtype), values(ours, part.dtype)
    lost = is_overflow(theirs, part.dtype) & part.cast
    infinite = np.isinf(b) & (np.isfinite(a) | lost)
    return {
        ("overflow of {}", "infinities"): infinite,
        (f"cut off at the largest {part.dtype}", "of them"): lost & ~infinite,
        ("NaN", "of them"): np.isnan(b) & ~np.isnan(a),
        ("NaN in the HF folder only", "of them"): np.isnan(a) & ~np.isnan(b) & ~lost,
    }


def _too_large(part: Part, infinite: Array) -> str:
    """The dtype that does not hold what became infinite."""
    values_there = values(part.theirs.reshape(-1)[infinite], part.dtype)
    if part.cast:
        return part.dtype
    return "float16" if np.abs(values_there).min() > _LARGEST_FLOAT16 else "something that holds less than float16"


def flipped(part: Part) -> str:
    """Single bits, of a few elements."""
    if np.count_nonzero(part.unequal) > _MOST_FLIPS:
        return ""
    where = np.flatnonzero(part.unequal)
    changes = (part.theirs.reshape(-1)[where] ^ part.ours.reshape(-1)[where]).astype(np.uint64)
    if any(int(change).bit_count() != 1 for change in changes):
        return ""
    bits = [int(change).bit_length() - 1 for change in changes]
    told = [f"at {part.index(int(at))}: {_bit(bit, part)}" for at, bit in zip(where, bits, strict=True)]
    return "one bit flipped " + (told[0] if len(told) == 1 else "in each of some elements, " + ", ".join(told))


def _bit(bit: int, part: Part) -> str:
    mantissa, last = _MANTISSA[part.dtype], 8 * part.theirs.itemsize - 1
    kind = "the sign" if bit == last else "of the mantissa" if bit < mantissa else "of the exponent"
    return f"bit {bit} ({kind})"


def constant(part: Part) -> str:
    """One value everywhere."""
    value = part.ours.reshape(-1)[0]
    if part.ours.size < 2 or not (part.ours == value).all():
        return ""
    number = float(values(part.ours.reshape(-1)[:1], part.dtype)[0])
    return "all zero" if number == 0 else f"constant ({number:.6g}): still initialised"


def zeroed(part: Part) -> str:
    """Zeros in place of some of the weights."""
    magnitude = part.ours.dtype.type((1 << (8 * part.ours.itemsize - 1)) - 1)
    if any((ours[theirs != ours] & magnitude).any() for theirs, ours in part.blocks()):
        return ""
    there = only_there(part)
    return f"zeros in place of {int(part.unequal.sum())} weights{there and f', {there}'}"


def rounding(part: Part) -> str:
    """There and back through another dtype."""
    for dtype in WEIGHT_DTYPES:
        if dtype != part.dtype and part.everywhere(lambda bits: _through(bits, part.dtype, dtype)):  # noqa: B023
            return f"rounded to {dtype}"
    return ""


def _through(bits: Array, dtype: str, other: str) -> Array:
    return rounded(rounded(bits, dtype, other), other, dtype)


def scaled(part: Part) -> str:
    """Multiplied by one number, and rounded once."""
    for factor in _factors(part):
        if part.everywhere(lambda bits: encoded(values(bits, part.dtype).astype(np.float64) * factor, part.dtype)):  # noqa: B023
            return f"scaled by {factor:.6g}" if factor != -1 else "of the other sign"
    return ""


def _factors(part: Part) -> list[float]:
    """Round numbers near the quotient of the largest weight: powers of 2, whole numbers, their roots and inverses."""
    theirs, ours = next(part.blocks())
    a, b = values(theirs, part.dtype).astype(np.float64), values(ours, part.dtype).astype(np.float64)
    at = int(np.nan_to_num(np.abs(a), nan=0.0, posinf=0.0).argmax())
    if a[at] == 0 or not np.isfinite(b[at]) or b[at] == 0:
        return []
    size, sign = abs(b[at] / a[at]), math.copysign(1.0, b[at] / a[at])
    if not 1e-6 < size < 1e6:
        return []
    near = (2.0 ** round(math.log2(size)), round(size), round(size * size) ** 0.5)
    inverse = (1 / max(1, round(1 / size)), max(1, round(1 / size**2)) ** -0.5)
    tried = dict.fromkeys(sign * number for number in (*near, *inverse) if number)
    return [number for number in tried if number != 1.0]


def shifted(part: Part) -> str:
    """A norm's weight counted from 0 where the other side counts from 1."""
    for by, what in ((-1.0, "1 subtracted"), (1.0, "1 added")):
        if part.everywhere(lambda bits: encoded(values(bits, part.dtype).astype(np.float64) + by, part.dtype)):  # noqa: B023
            return f"{what}: a norm of Megatron's layernorm_1p keeps its weight minus 1"
    return ""


def neighbours(part: Part) -> str:
    """The next number everywhere where it is another: rounding of another kind, or one time more."""
    for theirs, ours in part.blocks():
        unequal = theirs != ours
        if unequal.any() and ulps(theirs[unequal], ours[unequal], part.dtype).max() > 1:
            return ""
    there = only_there(part)
    return f"nowhere more than 1 ULP apart: rounded in another way{there and f', {there}'}"


FIRST = (
    Hypothesis("bits flipped", flipped),
    Hypothesis("constant", constant),
    Hypothesis("zeros", zeroed),
    Hypothesis("rounded", rounding),
)
"""Quick to tell, and not to be taken for anything else."""

LAST = (
    Hypothesis("scaled", scaled),
    Hypothesis("layernorm_1p", shifted),
    Hypothesis("initialised", initialised),
    Hypothesis("one ULP", neighbours),
)
