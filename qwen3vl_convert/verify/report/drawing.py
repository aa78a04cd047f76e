"""What the pictures are drawn with. Places are percentages across and pixels down, so that letters keep their size.

A picture is as wide as the page lets it be. What stands to its left reaches out of it, into an inset of `INSET` pixels.
"""

from collections.abc import Sequence

from qwen3vl_convert.verify.report.markup import Markup, element

INSET = 56


def picture(parts: list[Markup], height: float, described: str, kind: str) -> Markup:
    """SVG of a height in pixels. `described`: for those who do not see it."""
    kind = f"picture {kind}"
    return element(
        "svg", parts, class_=kind, role="img", aria_label=described, width="100%", height=height, overflow="visible"
    )


def round_mark(x: str | float, y: float, kind: str) -> Markup:
    return element("circle", class_=f"good {kind}", cx=x, cy=y, r=2.8)


def square_mark(x: str | float, y: float, kind: str) -> Markup:
    """Centred; a percentage and pixels cannot be added otherwise."""
    return element("rect", class_=f"bad {kind}", x=x, y=y - 3.2, width=6.4, height=6.4, transform="translate(-3.2 0)")


def legend(items: Sequence[tuple[Markup, Markup, float]], y: float) -> Markup:
    """(mark, its meaning, pixels from the left) in a row."""
    made = [
        element("g", mark, element("text", meaning, class_="tick", x=12, y=4), transform=f"translate({x + 6:g} {y:g})")
        for mark, meaning, x in items
    ]
    return element("g", made, class_="legend")
