"""The pictures of a report, for a page that has their style, or each as a file of its own."""

import re

from qwen3vl_convert.verify.report.drawing import INSET
from qwen3vl_convert.verify.report.style import COLOURS, PICTURES
from qwen3vl_convert.verify.report.tokens import kl_picture
from qwen3vl_convert.verify.report.towers import layer_picture
from qwen3vl_convert.verify.report.ulps import ulp_picture

__all__ = ["kl_picture", "layer_picture", "stand_alone", "ulp_picture"]

_HEIGHT = re.compile(r' height="([\d.]+)"')
_EDGE = 16


def stand_alone(picture: str, width: int = 960) -> str:
    """The picture as an SVG file, light or dark as the reader's screen, on a ground of its own."""
    found = _HEIGHT.search(picture)
    inner = float(found[1]) if found else 0.0
    height, room = inner + 2 * _EDGE, width - INSET - 2 * _EDGE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:g}" '
        f'viewBox="0 0 {width} {height:g}">\n'
        f"<style>{COLOURS}{PICTURES}.paper {{ fill: var(--paper); }}</style>\n"
        f'<rect class="paper" width="100%" height="100%" rx="4"/>\n'
        f'<svg x="{INSET + _EDGE}" y="{_EDGE}" width="{room}" height="{inner:g}" overflow="visible">{picture}</svg>\n'
        "</svg>\n"
    )
