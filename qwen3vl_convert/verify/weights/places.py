"""Where in a tensor the elements that differ lie, by the names of its axes: `only kv group 3`."""

import numpy as np

from qwen3vl_convert.strided import Array
from qwen3vl_convert.verify.weights.part import Part

_WORDS = {"kv": "kv group", "g": "query head of its group", "n": "vision head", "pos": "position", "vocab": "token"}
_NAMED = {"s": ("gate", "up"), "t": ("q", "k", "v")}
_MOST_LISTED = 4


def only_there(part: Part) -> str:
    """The entries of axes to which the difference is confined; "" if it is nowhere confined.

    The axes of the mapping first; rows and columns where those say nothing.
    """
    known = [told for axis in part.axes if (told := _told(axis[0], _touched(part, part.axes, axis[0])))]
    if not known and len(part.dims) == 2:
        known = [told for dim in part.dims if (told := _range_of(dim[0], _touched(part, part.dims, dim[0])))]
    return "only " + ", ".join(known) if known else ""


def _touched(part: Part, axes: tuple[tuple[str, int], ...], name: str) -> Array:
    """Per entry of an axis: whether anything differs there."""
    at = [axis for axis, _ in axes].index(name)
    opened = part.unequal.reshape([size for _, size in axes])
    return np.asarray(opened.any(axis=tuple(i for i in range(len(axes)) if i != at)))


def _told(name: str, touched: Array) -> str:
    if touched.all() or name not in {**_WORDS, **_NAMED}:
        return ""
    entries = np.flatnonzero(touched)
    labels = [_NAMED[name][entry] if name in _NAMED else str(entry) for entry in entries]
    word = f"{_WORDS[name]}{'s' if len(labels) > 1 else ''} " if name in _WORDS else ""
    return word + listed(labels)


def _range_of(word: str, touched: Array) -> str:
    entries = np.flatnonzero(touched)
    first, last = int(entries[0]), int(entries[-1])
    if touched.all() or len(entries) != last - first + 1:
        return ""
    return f"{word} {first}:{last + 1}" if last > first else f"{word.removesuffix('s')} {first}"


def listed(labels: list[str]) -> str:
    """`1, 2, 3, 4 and 5 more`."""
    rest = len(labels) - _MOST_LISTED
    return ", ".join(labels[:_MOST_LISTED]) + (f" and {rest} more" if rest > 0 else "")
