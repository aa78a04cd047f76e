"""Named axes of memory: the notation, and strided views whose dimensions have names.

    (kv g d) h          two memory dimensions; the first is made of kv, g and d, outermost first
    (kv * d) h          `*`: several parts lie end to end there
    ...                 any shape, the same on both sides

A `View` never holds data. It says where in a tensor of a given shape its elements lie, one entry per named axis, so
the same value gives strides into a `torch.Tensor`, bytes into a file, and the coverage proof of a plan.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qwen3vl_convert.errors import MisshapenTensor, UsageError

Sizes = Mapping[str, int]
Ranges = dict[str, tuple[int, int]]
"""Per axis name: (first, length)."""

_TOKEN = re.compile(r"\(([^()]*)\)|(\S+)")
_AXIS = re.compile(r"[A-Za-z]\w*|\*|\.\.\.")


@dataclass(frozen=True, slots=True)
class Axis:
    """One named dimension of a view: `step` is how far one index moves within memory dimension `dim`."""

    name: str
    size: int
    dim: int
    step: int


@dataclass(frozen=True, slots=True)
class View:
    """Where the elements of a view lie in a tensor of shape `shape`: `start` (an index per dimension) plus the axes."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    axes: tuple[Axis, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.axes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def numel(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    def _at(self, name: str) -> int:
        return self.names.index(name)

    def _moved(self, axis: Axis, index: int) -> tuple[int, ...]:
        return tuple(s + index * axis.step if dim == axis.dim else s for dim, s in enumerate(self.start))

    def narrow(self, name: str, first: int, length: int) -> "View":
        """Keep `length` entries of an axis, from `first`."""
        at = self._at(name)
        axis = self.axes[at]
        kept = Axis(name, length, axis.dim, axis.step)
        return View(self.shape, self._moved(axis, first), (*self.axes[:at], kept, *self.axes[at + 1 :]))

    def select(self, name: str, index: int) -> "View":
        """Keep one entry of an axis, and drop the axis."""
        at = self._at(name)
        return View(self.shape, self._moved(self.axes[at], index), self.axes[:at] + self.axes[at + 1 :])

    def split(self, name: str, into: Iterable[str], sizes: Sizes) -> "View":
        """Replace an axis by the axes it is made of, outermost first (none: it has one entry and goes)."""
        at = self._at(name)
        axis, step, parts = self.axes[at], self.axes[at].step, []
        for part in reversed(tuple(into)):
            parts.append(Axis(part, sizes[part], axis.dim, step))
            step *= sizes[part]
        return View(self.shape, self.start, (*self.axes[:at], *reversed(parts), *self.axes[at + 1 :]))

    def ordered(self, names: Iterable[str]) -> "View":
        by_name = {axis.name: axis for axis in self.axes}
        return View(self.shape, self.start, tuple(by_name[name] for name in names))

    def narrowed(self, ranges: Ranges) -> "View":
        view = self
        for name, (first, length) in ranges.items():
            if (first, length) != (0, view.axes[view._at(name)].size):
                view = view.narrow(name, first, length)
        return view

    def bounds(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest box around the view: (offsets, sizes) per memory dimension."""
        extent = [1] * len(self.shape)
        for axis in self.axes:
            extent[axis.dim] += (axis.size - 1) * axis.step
        return self.start, tuple(extent)

    def clip(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Ranges]:
        """The part of the view inside a box of its tensor, as disjoint axis ranges that together are exactly it."""
        found: list[Ranges] = [{}]
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            axes = sorted((a for a in self.axes if a.dim == dim), key=lambda a: -a.step)
            low = offset - self.start[dim]
            here = list(_clip(axes, low, low + size))
            found = [{**one, **other} for one in found for other in here]
        yield from found

    def strides(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """(first element, stride per axis), in elements, when the box (offsets, sizes) is stored contiguously."""
        pitch = row_major(sizes)
        first = sum((s - o) * p for s, o, p in zip(self.start, offsets, pitch, strict=True))
        return first, tuple(axis.step * pitch[axis.dim] for axis in self.axes)

    def of(self, tensor: Any) -> Any:
        """The view of a `torch.Tensor` (of any strides): never a copy."""
        pitch = tensor.stride()
        first = tensor.storage_offset() + sum(s * p for s, p in zip(self.start, pitch, strict=True))
        return tensor.as_strided(self.sizes, tuple(a.step * pitch[a.dim] for a in self.axes), first)


def _clip(axes: list[Axis], low: int, high: int) -> Iterator[Ranges]:
    """Axis ranges of one memory dimension whose positions lie in [low, high); `axes` outermost first."""
    if not axes:
        if low <= 0 < high:
            yield {}
        return
    outer, inner = axes[0], axes[1:]
    extent = 1 + sum((a.size - 1) * a.step for a in inner)
    whole_first = max(0, -(-low // outer.step))
    whole_stop = min(outer.size, (high - extent) // outer.step + 1)
    if whole_stop > whole_first:
        yield {outer.name: (whole_first, whole_stop - whole_first), **{a.name: (0, a.size) for a in inner}}
    first_touched = max(0, (low - extent) // outer.step + 1)
    stop_touched = min(outer.size, (high - 1) // outer.step + 1)
    if whole_stop <= whole_first:
        whole_first = whole_stop = stop_touched
    for index in itertools.chain(range(first_touched, whole_first), range(whole_stop, stop_touched)):
        for ranges in _clip(inner, low - index * outer.step, high - index * outer.step):
            yield {outer.name: (index, 1), **ranges}


def row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Layout:
    """The axes of a tensor's memory, as text: `Layout("(kv g d) h")`.

    Raises `UsageError` when the text is malformed or repeats an axis.
    """

    text: str

    def __post_init__(self) -> None:
        rest = _TOKEN.sub("", self.text).strip()
        axes = self.axes
        bad = [a for a in axes if not _AXIS.fullmatch(a)]
        if rest or bad or not axes:
            raise UsageError(
                f"layout {self.text!r}: expected axes like `(kv g d) h`, found {rest or bad or 'nothing'}."
            )
        twice = sorted({a for a in axes if axes.count(a) > 1})
        if twice:
            raise UsageError(
                f"layout {self.text!r} repeats the axis {', '.join(twice)}: each axis lies in memory once."
            )
        if "..." in axes and axes != ("...",):
            raise UsageError(f"layout {self.text!r}: `...` stands alone, for any shape.")

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Per memory dimension, its axes, outermost first."""
        return tuple(tuple(m[1].split()) if m[1] is not None else (m[2],) for m in _TOKEN.finditer(self.text))

    @cached_property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for group in self.groups for axis in group)

    def ranked(self, rank: int) -> "Layout":
        """`...` written out for a tensor of `rank` dimensions; any other layout is returned as it is."""
        return Layout(" ".join(f"dim{i}" for i in range(rank))) if self.axes == ("...",) else self

    def stacked(self, *axes: str) -> "Layout":
        """The same memory with more dimensions in front."""
        return Layout(" ".join((*axes, self.text)))

    def without(self, axis: str) -> "Layout":
        groups = [[a for a in group if a != axis] for group in self.groups]
        return Layout(" ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups if g))

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups)

    def open(self, sizes: Sizes) -> View:
        """The view of a whole tensor, one dimension per axis."""
        axes = []
        for dim, group in enumerate(self.groups):
            step = math.prod(sizes[axis] for axis in group)
            for axis in group:
                step //= sizes[axis]
                axes.append(Axis(axis, sizes[axis], dim, step))
        return View(self.shape(sizes), (0,) * len(self.groups), tuple(axes))

    def solve(self, shape: tuple[int, ...], known: Sizes, where: str) -> dict[str, int]:
        """Sizes of the axes that a shape determines; `known` ones are checked against it.

        Raises `MisshapenTensor` naming `where` when the shape contradicts the layout.
        """
        wrong = MisshapenTensor(f"{where}: expected {self.describe(known)}, found {shape}.")
        if len(shape) != len(self.groups):
            raise wrong
        solved: dict[str, int] = {}
        for size, group in zip(shape, self.groups, strict=True):
            unknown = [a for a in group if a not in known]
            fixed = math.prod(known[a] for a in group if a in known)
            if fixed == 0 or size % fixed or (not unknown and size != fixed):
                raise wrong
            if len(unknown) == 1:
                solved[unknown[0]] = size // fixed
        return solved

    def describe(self, sizes: Sizes) -> str:
        """`(kv g d) h = (2048, 1024)`, as far as the sizes are known."""
        known = [
            str(math.prod(sizes[a] for a in group)) if all(a in sizes for a in group) else "?" for group in self.groups
        ]
        return f"{self.text} = ({', '.join(known)})"
