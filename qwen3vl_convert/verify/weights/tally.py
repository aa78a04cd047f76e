"""How two tensors differ, added up piece by piece."""

import math
from dataclasses import dataclass, field

import numpy as np

from qwen3vl_convert.strided import Array
from qwen3vl_convert.verify.result import ULP_BUCKETS, Difference
from qwen3vl_convert.verify.weights.bits import ulps, values

_BUCKET_OF = np.searchsorted([1, 2, 4, 16, 256, 65536], np.arange(65538)).astype(np.uint8)
"""Which of `ULP_BUCKETS` a distance falls into; those beyond the end are in the last."""

BLOCK = 64 << 10
"""Elements that are measured at once: what is computed on the way stays in the cache."""


@dataclass(slots=True)
class Tally:
    """What is known of a tensor's difference so far. Pieces come in the order of memory, so that `first` is first."""

    count: int = 0
    first: tuple[int, ...] = ()
    max_abs: float = 0.0
    max_ulp: int = 0
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ulps: list[int] = field(default_factory=lambda: [0] * len(ULP_BUCKETS))

    def add(self, offsets: tuple[int, ...], theirs: Array, ours: Array, dtype: str) -> None:
        """A piece at `offsets` of the tensor, in the same dtype on both sides."""
        shape, theirs, ours = theirs.shape, theirs.reshape(-1), ours.reshape(-1)
        for first in range(0, theirs.size, BLOCK):
            block = slice(first, first + BLOCK)
            unequal = theirs[block] != ours[block]
            if not self.count and unequal.any():
                index = np.unravel_index(first + int(unequal.argmax()), shape)
                self.first = tuple(int(i) + o for i, o in zip(index, offsets, strict=True))
            self._add_block(theirs[block], ours[block], unequal, dtype)

    def _add_block(self, theirs: Array, ours: Array, unequal: Array, dtype: str) -> None:
        a, b = (values(side, dtype).astype(np.float64) for side in (theirs, ours))
        self._add_squares(a, b)
        if unequal.any():
            self.max_abs = max(self.max_abs, _largest(a, b, unequal))
            self._add_ulps(ulps(theirs[unequal], ours[unequal], dtype))

    def _add_squares(self, a: Array, b: Array) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            added = (dot(a, a), dot(b, b), dot(a, b))
        aa, bb, ab = (one + more for one, more in zip(self.squares, added, strict=True))
        self.squares = (aa, bb, ab)

    def _add_ulps(self, distance: Array) -> None:
        self.count += distance.size
        self.max_ulp = max(self.max_ulp, int(distance.max()))
        buckets = np.bincount(_BUCKET_OF[np.minimum(distance, _BUCKET_OF.size - 1)], minlength=len(ULP_BUCKETS))
        self.ulps = [one + int(more) for one, more in zip(self.ulps, buckets, strict=True)]

    @property
    def cosine(self) -> float:
        """NaN where either tensor is zero or not finite."""
        aa, bb, ab = self.squares
        if not (aa > 0 and bb > 0 and math.isfinite(aa) and math.isfinite(bb)):
            return math.nan
        return max(-1.0, min(1.0, ab / math.sqrt(aa) / math.sqrt(bb)))

    def difference(self, name: str, megatron_name: str, shape: tuple[int, ...]) -> Difference:
        return Difference(name, megatron_name, shape, self.count, self.first, self.max_abs, self.max_ulp, self.cosine)


def dot(a: Array, b: Array) -> float:
    """Of two flat arrays. Not BLAS, whose threads would stand in the way of those that take a tensor each."""
    return float(np.einsum("i,i->", a, b))


def _largest(a: Array, b: Array, unequal: Array) -> float:
    """Of |a - b|; infinite where one side is infinite or no number."""
    with np.errstate(invalid="ignore"):
        step = a - b
        largest = max(float(step.max()), -float(step.min()))
        if not math.isfinite(largest):  # maybe of elements that are infinite on both sides
            largest = float(np.abs(step[unequal]).max())
    return largest if math.isfinite(largest) else math.inf
