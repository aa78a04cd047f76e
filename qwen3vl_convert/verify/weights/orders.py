"""Axes that lie in memory in another order: transposed, heads by another axis, parts interleaved.

A part is opened by its axes, as the mapping names them, once as it should be and once in every other order. That also
finds what nobody has thought of; the usual ones have names.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from qwen3vl_convert.strided import Array
from qwen3vl_convert.verify.weights.part import Group, Hypothesis, Part, drawn

_MOST_AXES = 5
_HALVES = "halves"
"""An axis of two that the head dimension is split in: rotary embedding pairs its halves, or neighbours."""

_EXCHANGED = {
    frozenset(("kv", "g")): "q heads are in another order",
    frozenset(("t", "n")): "vision q, k, v are cut by head in another order",
    frozenset(("s", "i")): "gate and up are interleaved",
    frozenset((_HALVES, "d")): "rotary pairs are neighbours on one side and halves on the other",
}
"""What it is called when two axes have changed places."""
_CONCATENATED = "vision q, k, v left concatenated (not cut by head)"


def reordered(part: Part) -> str:
    """The order of axes in which one side is the other, if there is one."""
    for axes in _spellings(part.axes):
        for order in _orders(len(axes)):
            found = _fits(part, axes, order)
            if found:
                return _said(part, axes, order, found)
    return ""


def _spellings(axes: Group) -> Iterator[Group]:
    """The axes, and the axes with the head dimension in halves."""
    if len(axes) <= _MOST_AXES:
        yield axes
    split = tuple(
        half for axis in axes for half in (((_HALVES, 2), ("d", axis[1] // 2)) if _is_head(axis) else (axis,))
    )
    if len(axes) < len(split) <= _MOST_AXES:
        yield split


def _is_head(axis: tuple[str, int]) -> bool:
    return axis[0] == "d" and axis[1] % 2 == 0 and axis[1] > 2


def _orders(count: int) -> list[tuple[int, ...]]:
    """Every other order, those that move the fewest axes first."""
    identity = tuple(range(count))
    others = [order for order in itertools.permutations(identity) if order != identity]
    return sorted(others, key=lambda order: sum(at != axis for at, axis in enumerate(order)))


def _fits(part: Part, axes: Group, order: tuple[int, ...]) -> str:
    """Whether ours is theirs "read" as if it lay in that order, or ours is "laid" in that order; or neither: ""."""
    for kind, one, other in (("read", part.theirs, part.ours), ("laid", part.ours, part.theirs)):
        opened, straight = _opened(one, axes, order), other.reshape([size for _, size in axes])
        some = drawn(straight.shape)
        if np.array_equal(opened[some], straight[some]) and np.array_equal(opened, straight):
            return kind
    return ""


def _opened(array: Array, axes: Group, order: tuple[int, ...]) -> Array:
    """A view with the axes as they are named, of memory that lies in another order."""
    return array.reshape([axes[axis][1] for axis in order]).transpose(np.argsort(order))


def _said(part: Part, axes: Group, order: tuple[int, ...], kind: str) -> str:
    names = [name for name, _ in axes]
    found = [names[axis] for axis in order]
    moved = frozenset(name for name, other in zip(names, found, strict=True) if name != other)
    detail = f"({' '.join(found)}) instead of ({' '.join(names)})"
    if _is_transposed(part, found):
        square = len({size for _, size in part.dims}) == 1
        return "transposed" if square else f"transposed, and read with the shape of the other: {detail}"
    if moved == {"t", "n"} and kind == "read":
        return f"{_CONCATENATED}: {detail}"
    return f"{_EXCHANGED.get(moved, 'axes in another order')}: {detail}"


def _is_transposed(part: Part, found: list[str]) -> bool:
    groups = [[name for name, size in group if size > 1] for group in part.groups]
    kept = [group for group in groups if group]
    return len(kept) == 2 and found == [*kept[1], *kept[0]]


ORDERS = (Hypothesis("axes in another order", reordered),)
