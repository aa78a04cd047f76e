"""Weights that were never loaded: random numbers as training starts with them. The one guess that is statistics."""

import math
from dataclasses import dataclass

import numpy as np

from qwen3vl_convert.strided import Array
from qwen3vl_convert.verify.weights.bits import values
from qwen3vl_convert.verify.weights.part import Part

_STDS = (0.02, 0.01, 0.006, 0.014142)
"""Standard deviations that training starts with: transformers' and Megatron's defaults, and usual choices."""
_ENOUGH = 4096
"""Elements from which on a distribution can be told."""


def initialised(part: Part) -> str:
    """Normal, with a usual standard deviation that the weights do not have, and unrelated to them."""
    if part.ours.size < _ENOUGH or not part.unequal.mean() > 0.9:
        return ""
    moments = _Moments()
    for theirs, ours in part.blocks():
        moments.add(*(values(side, part.dtype).astype(np.float64) for side in (theirs, ours)))
        if moments.usual(tolerance=0.1) is None:
            return ""
    usual = moments.usual(tolerance=0.02)
    if usual is None or not moments.is_noise or abs(moments.std_of_weights / usual - 1) < 0.05:
        return ""
    return (
        f"looks still initialised: normal with std {usual:g} (the weights' is {moments.std_of_weights:.3g}), and has "
        f"nothing in common with the weights"
    )


@dataclass(slots=True)
class _Moments:
    """Sums over the elements so far: of ours to the powers 1, 2 and 4, of theirs squared, of the products."""

    count: int = 0
    first: float = 0.0
    second: float = 0.0
    fourth: float = 0.0
    weights: float = 0.0
    products: float = 0.0

    def add(self, theirs: Array, ours: Array) -> None:
        square = ours * ours
        self.count += ours.size
        self.first += float(ours.sum())
        self.second += float(square.sum())
        self.fourth += float((square * square).sum())
        self.weights += float((theirs * theirs).sum())
        self.products += float((theirs * ours).sum())

    @property
    def std(self) -> float:
        return math.sqrt(self.second / self.count)

    @property
    def std_of_weights(self) -> float:
        return math.sqrt(self.weights / self.count)

    @property
    def is_noise(self) -> bool:
        """Normally distributed around 0, and no more like the weights than chance has it."""
        chance = 5 / math.sqrt(self.count)
        centred = abs(self.first / self.count) < chance * self.std
        normal = abs(self.fourth * self.count / self.second**2 - 3) < 0.2
        return centred and normal and abs(self.products / self.count) < chance * self.std * self.std_of_weights

    def usual(self, tolerance: float) -> float | None:
        return next((std for std in _STDS if abs(self.std / std - 1) < tolerance), None)
