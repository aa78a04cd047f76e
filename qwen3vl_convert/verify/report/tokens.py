"""The picture of the divergence per token: a block per prompt, a cell per token."""

import math
from itertools import groupby

from qwen3vl_convert.quantities import amount, figure
from qwen3vl_convert.verify.report.axis import power_of_ten
from qwen3vl_convert.verify.report.drawing import legend, picture
from qwen3vl_convert.verify.report.markup import Markup, element, joined, text
from qwen3vl_convert.verify.report.words import worst
from qwen3vl_convert.verify.result import LogitsReport, PromptResult

BINS = 11
_LOWEST = -9
"""Cells are coloured by decade: up to 1e-9 nats, up to 1e-8, ..., up to 1, more."""
_MOST_CELLS = 6000
"""Of all prompts, before a cell stands for several tokens."""
_COLUMNS = (16, 24, 32, 48)
"""Cells in a line: the fewest that hold the longest prompt, or the last."""
_CELL, _LINE, _NAME, _BETWEEN = 13.0, 18.0, 22.0, 14.0
"""Pixels: height of a cell, of a line of them, of a prompt's name, and between two prompts."""
KINDS = {"t": "text", "i": "image", "v": "video"}


def kl_picture(report: LogitsReport) -> str:
    """SVG: the colour of a cell is KL(HF || Megatron) in nats, by decade; a bar below marks images and videos."""
    step = -(-sum(len(prompt.kl) for prompt in report.prompts) // _MOST_CELLS) or 1
    longest = max((-(-len(prompt.kl) // step) for prompt in report.prompts), default=0)
    columns = next((width for width in _COLUMNS if longest <= width), _COLUMNS[-1])
    parts, y = [], 0.0
    for prompt in report.prompts:
        block, y = _prompt(prompt, columns, step, y)
        parts.append(block)
    said = (
        f"Divergence per token of {amount(len(report.prompts), 'prompt')}, the largest {figure(_largest(report))} nats."
    )
    return picture([*parts, _legend(y + 8)], y + 86, said, "tokens")


def _largest(report: LogitsReport) -> float:
    return worst([value for prompt in report.prompts for value in prompt.kl])


def _prompt(prompt: PromptResult, columns: int, step: int, top: float) -> tuple[Markup, float]:
    """The block of a prompt, and where the next begins."""
    cells = [(first, prompt.kl[first : first + step]) for first in range(0, len(prompt.kl), step)]
    lines = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    drawn = [_line(prompt, line, columns, top + _NAME + number * _LINE) for number, line in enumerate(lines)]
    name = element("text", prompt.name, class_="title" if prompt.passed else "title wrong", x=0, y=top + 14)
    most = f"largest {figure(worst(prompt.kl))}" if prompt.kl else "no tokens"
    largest = element("text", most, class_="tick", x="100%", y=top + 14, text_anchor="end")
    return joined([name, largest, *drawn]), top + _NAME + max(len(lines), 1) * _LINE + _BETWEEN


def _line(prompt: PromptResult, line: list[tuple[int, tuple[float, ...]]], columns: int, y: float) -> Markup:
    number = element("text", str(line[0][0]), class_="tick", x=-8, y=y + 11, text_anchor="end")
    width = 100 / columns
    cells = [_cell(prompt, first, values, column * width, y, width) for column, (first, values) in enumerate(line)]
    bars, column = [], 0
    for kind, run in groupby(_kind(prompt, first) for first, _ in line):
        length = len(list(run))
        if kind in ("i", "v"):
            bars.append(_bar(kind, column * width, y + _CELL, length * width))
        column += length
    return joined([number, *cells, *bars])


def _cell(prompt: PromptResult, first: int, values: tuple[float, ...], x: float, y: float, width: float) -> Markup:
    kl = worst(values)
    which = f"token {first}" if len(values) == 1 else f"tokens {first} to {first + len(values) - 1}, the worst"
    said = element("title", f"{prompt.name}, {which} ({KINDS.get(_kind(prompt, first), '?')}): {figure(kl)} nats")
    kind = f"cell {shade(kl)}"
    return element("rect", said, class_=kind, x=f"{x:.3f}%", y=y, width=f"{width:.3f}%", height=_CELL)


def _kind(prompt: PromptResult, token: int) -> str:
    return prompt.kinds[token : token + 1]


def shade(kl: float) -> str:
    """The class of a cell: `k0` ... `k10`, or `odd` for what is not finite."""
    if not math.isfinite(kl):
        return "odd"
    decade = math.ceil(math.log10(kl) - 1e-9) if kl > 0 else _LOWEST
    return f"k{min(max(decade - _LOWEST, 0), BINS - 1)}"


def _bar(kind: str, x: float, y: float, width: float) -> Markup:
    return element("rect", class_=f"kind-{kind}", x=f"{x:.3f}%", y=y + 1, width=f"{width:.3f}%", height=2.5)


def _legend(y: float) -> Markup:
    width = 100 / BINS
    bins = [
        element(
            "rect", class_=f"cell k{number}", x=f"{number * width:.3f}%", y=y + 20, width=f"{width:.3f}%", height=10
        )
        for number in range(BINS)
    ]
    edges = [
        element(
            "text",
            power_of_ten(_LOWEST + number),
            class_="tick",
            x=f"{(number + 1) * width:.3f}%",
            y=y + 45,
            text_anchor="middle",
        )
        for number in range(0, BINS - 1, 3)
    ]
    title = element("text", "KL divergence in nats, up to", class_="tick", x=0, y=y + 12)
    marks = [
        (element("rect", class_="cell odd", x=-6, y=-6, width=12, height=12), text("NaN, ∞"), 0),
        (element("rect", class_="kind-i", x=-6, y=-1, width=12, height=2.5), text("image"), 80),
        (element("rect", class_="kind-v", x=-6, y=-1, width=12, height=2.5), text("video"), 146),
    ]
    return joined([title, *bins, *edges, legend(marks, y + 64)])
