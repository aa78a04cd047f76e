"""The histogram of the weights that differ: by how many units in the last place."""

import math

from qwen3vl_convert.quantities import amount, share
from qwen3vl_convert.verify.report.drawing import picture
from qwen3vl_convert.verify.report.markup import Markup, element, joined
from qwen3vl_convert.verify.result import ULP_BUCKETS, WeightsReport

_ROW, _BAR, _TOP = 26.0, 16.0, 26.0
_WIDEST = 56.0
"""Percent of the width; the count stands beside the bar."""


def ulp_picture(weights: WeightsReport) -> str:
    """SVG: a bar per bucket, as long as the logarithm of its count; a count of 1 is not nothing."""
    total = sum(weights.ulps)
    most = math.log10(max(weights.ulps, default=0) + 1)
    rows = [
        _row(label, count, _WIDEST * math.log10(count + 1) / most if most else 0, total, _TOP + number * _ROW)
        for number, (label, count) in enumerate(zip(ULP_BUCKETS, weights.ulps, strict=False))
    ]
    title = element("text", "Elements that differ, by ULPs", class_="title", x=-56, y=14)
    described = f"Histogram: {amount(total, 'element')} differ by units in the last place."
    return picture([title, *rows], _TOP + len(rows) * _ROW + 6, described, "ulps")


def _row(label: str, count: int, width: float, total: int, y: float) -> Markup:
    name = element("text", _spelled(label), class_="tick", x=18, y=y + 13, text_anchor="end")
    part = f" · {share(count / total)}" if count else ""
    said = element("title", f"{count:,}{part}")
    bar = element("rect", said, class_="bar", x=0, y=y, width=f"{width:.3f}%", height=_BAR)
    values = [element("tspan", f"{count:,}"), element("tspan", part, class_="roomy")]
    value = element("text", values, class_="value", x=f"{width:.3f}%", dx=8, y=y + 13)
    shifted = element("g", [bar, value], transform="translate(28 0)")
    return joined([name, shifted])


def _spelled(bucket: str) -> str:
    """`257-65536` with the dash of a range and commas."""
    return "–".join(f"{int(end):,}" if end.isdecimal() else end for end in bucket.split("-"))
