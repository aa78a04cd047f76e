"""A logarithmic axis that has a place for zero and for what is no number."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qwen3vl_convert.verify.report.markup import Markup, element

_MOST_DECADES = 18
"""What is smaller than the largest value by more than that is drawn at the bottom."""
_ROW, _EDGE = 30.0, 8.0
"""Pixels of the rows for zero and for what is not finite, and how far within them these are drawn."""


@dataclass(frozen=True, slots=True)
class Decades:
    """From `10**low` to `10**high` in `height` pixels below `top`, without the rows for `zero` and `odd` values."""

    low: int
    high: int
    zero: bool
    odd: bool
    top: float
    height: float

    @classmethod
    def of(cls, values: Iterable[float], top: float, height: float) -> "Decades":
        known = list(values)
        sizes = [math.log10(value) for value in known if value > 0 and math.isfinite(value)] or [-1.0]
        high = math.floor(max(sizes)) + 1
        low = max(min(math.floor(min(sizes)), high - 2), high - _MOST_DECADES)
        return cls(low, high, 0 in known, not all(map(math.isfinite, known)), top, height)

    @property
    def _first(self) -> float:
        return self.top + _ROW * self.odd

    @property
    def _last(self) -> float:
        return self.top + self.height - _ROW * self.zero

    def y(self, value: float) -> float:
        """In pixels from the top of the picture."""
        if not math.isfinite(value) or value < 0:
            return self.top + _EDGE
        if value == 0:
            return self.top + self.height - _EDGE
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return self._last - min(max(part, 0.0), 1.0) * (self._last - self._first)

    def grid(self) -> list[Markup]:
        """Lines across the picture and their names to the left of it."""
        lines = [_line(self.y(10.0**power), power_of_ten(power)) for power in self._ticks()]
        rows = [_line(self.y(0), Markup("0"), "zero")] if self.zero else []
        return lines + rows + ([_line(self.y(math.nan), Markup("NaN, ∞"), "zero")] if self.odd else [])

    def _ticks(self) -> Iterator[int]:
        step = -(-(self.high - self.low) // 6)
        yield from range(self.high, self.low - 1, -step)


def power_of_ten(power: int) -> Markup:
    """10 with a raised exponent, for an SVG text."""
    raised = element("tspan", str(power).replace("-", "\N{MINUS SIGN}"), dy=-4, font_size=9)
    return Markup(f"10{raised}")


def _line(y: float, name: Markup, kind: str = "grid") -> Markup:
    line = element("line", class_=kind, x1="0", x2="100%", y1=y, y2=y)
    return Markup(line + element("text", name, class_="tick", x=-8, y=y + 4, text_anchor="end"))
