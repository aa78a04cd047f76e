"""The points of a tower from input to output, grouped by layer, each with its place from left to right."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from qwen3vl_convert.verify.report.words import badness, excess
from qwen3vl_convert.verify.result import PointResult

MERGERS = "deepstack_merger_list"
"""How both programs call the deepstack mergers."""
_GAP = 1.0
"""Between two groups, in widths of a point."""
_ROOTS = ("vision_model", "language_model", "decoder", "model", "visual")
"""What the names of modules outside of layers begin with."""


@dataclass(frozen=True, slots=True)
class Group:
    """The points of one layer, or of a module outside of layers; `start` and `stop` in percent of the width."""

    name: str
    layer: int | None
    points: tuple[PointResult, ...]
    start: float
    stop: float

    @property
    def middle(self) -> float:
        return (self.start + self.stop) / 2

    @property
    def worst(self) -> PointResult:
        """The one that is furthest beyond, or closest to, what is allowed."""
        return max(self.points, key=lambda point: (not point.passed, badness(excess(point))))

    def at(self, number: int) -> float:
        """The middle of a point, in percent of the width."""
        return self.start + (self.stop - self.start) * (number + 0.5) / len(self.points)


def grouped(points: tuple[PointResult, ...], tower: str, deepstack: Sequence[int] = ()) -> list[Group]:
    """The groups of a tower. They fill the width, with a gap between any two."""
    own = _merged([one for one in points if one.tower == tower], deepstack)
    found = [list(group) for _, group in groupby(own, key=_key)]
    total = sum(len(group) + _GAP for group in found) or 1
    groups, used = [], _GAP / 2
    for group in found:
        start, used = used, used + len(group) + _GAP
        ends = (100 * start / total, 100 * (used - _GAP) / total)
        groups.append(Group(_key(group[0])[1], group[0].layer, tuple(group), *ends))
    return groups


def _merged(points: list[PointResult], deepstack: Sequence[int]) -> list[PointResult]:
    """With every deepstack merger after the block that it takes from; our model runs them when all blocks have."""
    last = {point.layer: number for number, point in enumerate(points)}
    places = [
        last.get(deepstack[merger], number) if (merger := _merger(point)) in range(len(deepstack)) else number
        for number, point in enumerate(points)
    ]
    return [points[number] for number in sorted(range(len(points)), key=lambda number: (places[number], number))]


def _merger(point: PointResult) -> int:
    """Which deepstack merger a point is of; -1: of none."""
    number = point.module.rpartition(f"{MERGERS}.")[2].partition(".")[0]
    return int(number) if MERGERS in point.module and number.isdecimal() else -1


def _key(point: PointResult) -> tuple[int | None, str]:
    return point.layer, _outside(point.module) if point.layer is None else f"layer {point.layer}"


def _outside(module: str) -> str:
    """`merger` of `vision_model.merger.linear_fc1`; the number belongs to it where there are several."""
    parts = module.split(".")
    while len(parts) > 1 and parts[0] in _ROOTS:
        parts = parts[1:]
    return " ".join(parts[:2]) if len(parts) > 1 and parts[1].isdecimal() else parts[0]
