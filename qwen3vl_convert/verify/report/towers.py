"""The picture of the difference per layer: both towers, every point in the order of execution."""

from qwen3vl_convert.quantities import figure
from qwen3vl_convert.verify.report.axis import Decades
from qwen3vl_convert.verify.report.drawing import legend, picture, round_mark, square_mark
from qwen3vl_convert.verify.report.groups import MERGERS, Group, grouped
from qwen3vl_convert.verify.report.markup import Markup, element, joined, text
from qwen3vl_convert.verify.report.words import excess, place_name
from qwen3vl_convert.verify.result import LogitsReport, PointResult

_FEW_MARKS, _MOST_MARKS = 80, 420
"""Of a tower, before there is one mark per layer instead of one per point: on a telephone; anywhere."""
_PLOT, _NAME, _LABEL, _BELOW, _ROW = 220.0, 34.0, 30.0, 32.0, 14.0
"""Pixels of a tower: the plot, its name above, a label of two lines in between, the numbers of layers below, and each
row of names below these.
"""
_LETTER, _TICK_LETTER = 7.0, 6.4
"""Pixels of a letter of a label, and of a tick, in wide fonts."""
_NARROW, _WIDE = 280, 640
"""Pixels of a picture on a telephone; the least without what is `roomy`."""
_TITLES = {"vision": "Vision tower", "text": "Text model"}


def layer_picture(report: LogitsReport) -> str:
    """SVG: one mark per point, the line of what is allowed, and the first point that is wrong."""
    first = report.place.point if report.place is not None else None
    parts, y = [], 0.0
    for tower in _TITLES:
        groups = grouped(report.points, tower, report.deepstack)
        if groups:
            drawn, y = _tower(_TITLES[tower], groups, y, first)
            parts.append(drawn)
    return picture([*parts, _legend(y + 14)], y + 44, _described(report, first), "layers")


def _described(report: LogitsReport, first: PointResult | None) -> str:
    wrong = sum(not point.passed for point in report.points)
    start = f"Difference per layer: {len(report.points)} points, {wrong} beyond what is allowed"
    return f"{start}, the first at {place_name(first)}." if first else f"{start}."


def _tower(name: str, groups: list[Group], top: float, first: PointResult | None) -> tuple[Markup, float]:
    """The picture of a tower, and where the next begins."""
    points = [point for group in groups for point in group.points]
    flagged = [
        (point, group.at(number)) for group in groups for number, point in enumerate(group.points) if _is(point, first)
    ]
    values = [value for one in points for value in (one.difference, one.allowed)]
    axis = Decades.of(values, top + _NAME + _LABEL * bool(flagged), _PLOT)
    title = element("text", name, class_="title", x=0, y=top + 16)
    marks = _marks(groups, axis, len(points))
    flags = [part for point, x in flagged for part in _flag(point, x, axis)]
    bottom = axis.top + _PLOT
    names, rows = _spread([group for group in groups if group.layer is None], bottom + _BELOW)
    parts = [title, *_numbers(groups, axis), *names, *axis.grid(), _allowed(groups, axis), *marks, *flags]
    return joined(parts), bottom + _BELOW + rows * _ROW


def _is(point: PointResult, first: PointResult | None) -> bool:
    return first is not None and (point.module, point.side) == (first.module, first.side)


def _marks(groups: list[Group], axis: Decades, count: int) -> list[Markup]:
    """Every point where there is room for them, else one mark per group."""
    every = [_every(group, axis) for group in groups]
    if count <= _FEW_MARKS:
        return every
    summary = [_summary(group, axis) for group in groups]
    if count > _MOST_MARKS:
        return summary
    return [element("g", every, class_="every"), element("g", summary, class_="summary")]


def _every(group: Group, axis: Decades) -> Markup:
    width = (group.stop - group.start) / len(group.points)
    placed = [(point, group.at(number)) for number, point in enumerate(group.points)]
    marks = [_mark(one, x, axis.y(one.difference)) for one, x in placed]
    return joined([*marks, *(_hover(_said(one), x, width, axis) for one, x in placed)])


def _summary(group: Group, axis: Decades) -> Markup:
    """One mark for a group, and from where to where its points reach."""
    heights = [axis.y(point.difference) for point in group.points]
    at = f"{group.middle:.3f}%"
    reach = element("line", class_="reach", x1=at, x2=at, y1=min(heights), y2=max(heights))
    said = f"{group.name}, {len(group.points)} points, the worst: {_said(group.worst)}"
    mark = _mark(group.worst, group.middle, axis.y(group.worst.difference))
    return joined([reach, mark, _hover(said, group.middle, group.stop - group.start, axis)])


def _mark(point: PointResult, x: float, y: float) -> Markup:
    made = round_mark if point.passed else square_mark
    return made(f"{x:.3f}%", y, "into" if point.side == "input" else "out")


def _hover(said: str, x: float, width: float, axis: Decades) -> Markup:
    area = {"x": f"{x - width / 2:.3f}%", "width": f"{width:.3f}%"}
    return element("rect", element("title", said), class_="hover", y=axis.top, height=axis.height, **area)


def _said(point: PointResult) -> str:
    beyond = "" if point.passed else f"; {figure(excess(point))} times that"
    values = f"difference {figure(point.difference)}, allowed {figure(point.allowed)}{beyond}"
    return f"{place_name(point)}\n{values}\nHugging Face: {point.hf_module}"


def _allowed(groups: list[Group], axis: Decades) -> Markup:
    """A line in steps, and the room below it, stretched to the width of the picture."""
    steps = [step for group in groups for step in _steps(group, axis)]
    if not steps:
        return Markup("")
    bottom = axis.top + axis.height
    line = " ".join(f"{'L' if number else 'M'}{x:.2f} {y:.1f}" for number, (x, y) in enumerate(steps))
    area = f"{line} L{steps[-1][0]:.2f} {bottom:.1f} L{steps[0][0]:.2f} {bottom:.1f} Z"
    shapes = [element("path", class_="room", d=area), element("path", class_="allowed", d=line)]
    return element(
        "svg",
        shapes,
        viewBox=f"0 {axis.top:g} 100 {axis.height:g}",
        preserveAspectRatio="none",
        x=0,
        width="100%",
        y=axis.top,
        height=axis.height,
    )


def _steps(group: Group, axis: Decades) -> list[tuple[float, float]]:
    half = (group.stop - group.start) / len(group.points) / 2
    middles = [(group.at(number), axis.y(point.allowed)) for number, point in enumerate(group.points)]
    return [(x + side, y) for x, y in middles for side in (-half, half)]


def _numbers(groups: list[Group], axis: Decades) -> list[Markup]:
    """Those of layers, below the plot, as many as there is room for."""
    bottom = axis.top + axis.height
    layers = [group for group in groups if group.layer is not None]
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, 1000) if len(layers) <= 12 * step)
    shown = [group for group in layers if (group.layer or 0) % step == 0]
    ticks = [_name(str(group.layer), group.middle, bottom + 16, "tick") for group in shown]
    ends = [element("line", class_="edge", x1=at, x2=at, y1=axis.top, y2=bottom + 4) for at in map(_start, shown)]
    return [*ends, *ticks]


def _start(group: Group) -> str:
    return f"{group.start:.3f}%"


def _spread(groups: list[Group], y: float) -> tuple[list[Markup], int]:
    """The names of all modules outside of layers, in as many rows as they need where the picture is wide, and where it
    is narrow; and the most rows.
    """
    names = [(_short(group.name), group.middle) for group in groups]
    wide, narrow = (_rows(names, pixels) for pixels in (_WIDE, _NARROW))
    made = []
    for (name, x), *rows in zip(names, wide, narrow, strict=True):
        kinds = {"tick": rows[0]} if rows[0] == rows[1] else {"tick roomy": rows[0], "tick tight": rows[1]}
        made += [_name(name, x, y + row * _ROW, kind, len(name) * _TICK_LETTER) for kind, row in kinds.items()]
    return made, max((*wide, *narrow), default=-1) + 1


def _short(name: str) -> str:
    """`deepstack 0` of `deepstack_merger_list 0`."""
    return name.replace(MERGERS, "deepstack").replace("_", " ")


def _rows(names: list[tuple[str, float]], pixels: int) -> list[int]:
    """For each name the first row where it begins to the right of the one before; places in percent of the pixels."""
    free: list[float] = []
    found = []
    for name, x in names:
        width = len(name) * _TICK_LETTER
        left = x / 100 * (pixels - width)
        row = next((row for row, end in enumerate(free) if left > end), len(free))
        free[row:] = [left + width + 10, *free[row + 1 :]]
        found.append(row)
    return found


def _name(name: str, x: float, y: float, kind: str, width: float = 0.0) -> Markup:
    """A text at x percent across. With its width in pixels it stays inside: at 30 %, 30 % of it are to the left."""
    shift, anchor = (-x / 100 * width, None) if width else (None, "middle")
    return element("text", name, class_=kind, x=f"{x:.3f}%", y=y, dx=shift, text_anchor=anchor)


def _flag(point: PointResult, x: float, axis: Decades) -> list[Markup]:
    """A line from the point to its name above the plot."""
    name = point.name.removeprefix(f"{point.tower} ")
    name = name if len(name) <= 42 else f"{name[:20]}…{name[-21:]}"
    at, y = f"{x:.3f}%", axis.y(point.difference)
    line = element("line", class_="flag", x1=at, x2=at, y1=axis.top - 8, y2=y - 8)
    ring = _mark(point, x, y) + element("circle", class_="ring", cx=at, cy=y, r=7.5)
    said = "first that is wrong"
    labels = [
        _name(said, x, axis.top - 28, "flagged strong", len(said) * _LETTER),
        _name(name, x, axis.top - 13, "flagged", len(name) * _LETTER),
    ]
    return [line, Markup(ring), *labels]


def _legend(y: float) -> Markup:
    items = [
        (round_mark(0, 0, "out"), text("within rounding"), 0),
        (square_mark(0, 0, "out"), text("beyond rounding"), 130),
    ]
    lower = [
        (round_mark(0, 0, "into"), text("into a module"), 0),
        (element("line", class_="allowed", x1=-7, x2=7, y1=0, y2=0), text("most allowed"), 130),
    ]
    return joined([legend(items, y), legend(lower, y + 20)])
