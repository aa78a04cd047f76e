"""A part of a tensor in memory, both sides of it, and what was found to have happened to it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qwen3vl_convert.plan import Box
from qwen3vl_convert.strided import Array

Group = tuple[tuple[str, int], ...]
"""The axes of one memory dimension, outermost first: (name, size)."""

_BLOCK = 1 << 20
"""Elements that are widened to float64 at once."""


@dataclass(frozen=True)
class Part:
    """A box of a HF tensor, as bits of one `dtype`: all of a matrix, one expert of a stack, some rows of a table.

    `groups`: the axes of each memory dimension of the part. `cast`: the sides are of different dtypes on disk.
    `known`: what has been explained already, and is the same on both sides here.
    """

    name: str
    box: Box
    dtype: str
    theirs: Array
    ours: Array
    groups: tuple[Group, ...]
    cast: bool = False
    known: Array | None = None

    @cached_property
    def unequal(self) -> Array:
        unequal: Array = self.theirs != self.ours
        return unequal

    @cached_property
    def axes(self) -> Group:
        """All axes of more than one entry, in the order of memory."""
        return tuple(axis for group in self.groups for axis in group if axis[1] > 1)

    @property
    def dims(self) -> tuple[tuple[str, int], ...]:
        """The memory dimensions of more than one entry, called by what a matrix has: rows and columns."""
        sizes = [math.prod(size for _, size in group) for group in self.groups]
        kept = [size for size in sizes if size > 1]
        words = {1: ("elements",), 2: ("rows", "columns")}.get(len(kept), tuple(f"dim {i}" for i in range(len(kept))))
        return tuple(zip(words, kept, strict=True))

    def index(self, flat: int) -> list[int]:
        """Where an element lies in the whole tensor."""
        inside = np.unravel_index(flat, self.theirs.shape)
        return [int(i) + offset for i, offset in zip(inside, self.box[0], strict=True)]

    def blocks(self) -> Iterator[tuple[Array, Array]]:
        """(theirs, ours), flat, a block at a time, without what is known already."""
        theirs, ours = self.theirs.reshape(-1), self.ours.reshape(-1)
        for first in range(0, theirs.size, _BLOCK):
            here = slice(first, first + _BLOCK)
            kept = slice(None) if self.known is None else ~self.known.reshape(-1)[here]
            yield theirs[here][kept], ours[here][kept]

    def everywhere(self, undo: Callable[[Array], Array]) -> bool:
        """Whether `undo` makes theirs ours, bit for bit."""
        return all(np.array_equal(undo(theirs), ours) for theirs, ours in self.blocks())


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One of the usual things. `find` says in words what happened to a part, if it is this and nothing else; or ""."""

    name: str
    find: Callable[[Part], str]


def drawn(sizes: tuple[int, ...], count: int = 64) -> tuple[Array, ...]:
    """Index arrays of a few elements, the same for the same sizes: what a hypothesis is tried on before it is checked.

    The corners are among them.
    """
    generator = np.random.default_rng(list(sizes))
    return tuple(np.concatenate([[0, size - 1], generator.integers(0, size, count - 2)]) for size in sizes)
