"""Weights that are another tensor's: those of another layer, expert or merger, of k for v, of up for gate.

Every tensor of the folder has a place, an index for each axis that lives in its name; an expert of a stack one more.
Candidates for what a tensor holds are those of its shape that differ from it in one of these.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from qwen3vl_convert.mappings import Term
from qwen3vl_convert.mappings.registry import names
from qwen3vl_convert.model import HuggingFaceModel
from qwen3vl_convert.plan import Box
from qwen3vl_convert.verify.weights.part import Part
from qwen3vl_convert.verify.weights.sides import Sides

EXPERT = "e"
_WORDS = {"l": "layer", "b": "vision block", "m": "deepstack merger", "e": "expert"}
_PAIRS = {
    frozenset(("gate_proj", "up_proj")): "gate and up",
    frozenset(("k_proj", "v_proj")): "k and v",
    frozenset(("q_norm", "k_norm")): "the norms of q and k",
}
_SAMPLE, _PIECE = 64, 8 << 20


@dataclass(frozen=True, slots=True)
class Spot:
    """A tensor of the folder, or one expert of a stack: the kind that it is of and the place."""

    name: str
    term: Term
    place: dict[str, int]
    expert: int | None = None

    @property
    def indices(self) -> dict[str, int]:
        return self.place if self.expert is None else {**self.place, EXPERT: self.expert}

    @property
    def kind(self) -> str:
        """The module that the weights are of: `k_proj`."""
        parts = self.name.split(".")
        return parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What was found: ours at `here` holds theirs at `there`; `exchanged`: and the other way round."""

    here: Spot
    there: Spot
    exchanged: bool

    def __str__(self) -> str:
        axis = self.axis
        if not axis:
            return self._other_kind()
        around = place_text({a: index for a, index in self.here.indices.items() if a != axis})
        word, one, other = _WORDS.get(axis, axis), self.here.indices[axis], self.there.indices[axis]
        if self.exchanged:
            low, high = sorted((one, other))
            text = f"{word}s {low} and {high} are exchanged"
        else:
            text = f"{word} {one} holds the weights of {word} {other}"
        return f"{around}, {text}" if around else text

    @property
    def axis(self) -> str:
        """The axis whose index is another; "" if it is another kind of tensor."""
        if self.here.term is not self.there.term:
            return ""
        return next(axis for axis, index in self.here.indices.items() if index != self.there.indices[axis])

    def without_expert(self) -> "Elsewhere":
        """The same of a whole stack."""
        if self.axis == EXPERT:
            return self
        return replace(self, here=replace(self.here, expert=None), there=replace(self.there, expert=None))

    def _other_kind(self) -> str:
        pair = _PAIRS.get(frozenset((self.here.kind, self.there.kind)))
        around = place_text(self.here.indices)
        if self.exchanged and pair:
            text = f"{pair} are {'swapped' if pair.startswith('gate') else 'exchanged'}"
        else:
            text = f"holds the weights of {self.there.name}" + (", and the other way round" if self.exchanged else "")
        return f"{around}: {text}" if around else text


def place_text(indices: dict[str, int]) -> str:
    """`layer 3, expert 5`."""
    return ", ".join(f"{_WORDS.get(axis, axis)} {index}" for axis, index in indices.items())


@dataclass(frozen=True)
class Atlas:
    """Where every tensor of the folder stands."""

    sides: Sides
    theirs: HuggingFaceModel

    @cached_property
    def spots(self) -> dict[str, Spot]:
        found = {}
        for equation in self.theirs.model.equations:
            for term in equation.hf:
                for name in names(term, self.theirs.model.sizes):
                    found[name] = Spot(name, term, term.match(name) or {})
        return {name: spot for name, spot in found.items() if name in self.sides.theirs}

    @cached_property
    def _by_shape(self) -> dict[tuple[int, ...], list[Spot]]:
        found: dict[tuple[int, ...], list[Spot]] = defaultdict(list)
        for name, spot in self.spots.items():
            found[self.sides.theirs[name].shape].append(spot)
        return found

    def stacked(self, name: str) -> int:
        """How many experts a tensor stacks; 0 if it does not."""
        spot = self.spots.get(name)
        is_stack = spot is not None and spot.term.layout.groups[0] == (EXPERT,)
        return self.sides.theirs[name].shape[0] if is_stack else 0

    def look(self, part: Part, expert: int | None) -> Elsewhere | None:
        """Whose weights a part holds, if they are another's."""
        spot = self.spots.get(part.name)
        if spot is None or part.ours.size < 2:
            return None
        here = Spot(part.name, spot.term, spot.place, expert)
        sample = _sample_of(part)
        if (part.ours[sample.inside] == part.ours[sample.inside].reshape(-1)[0]).all():
            return None  # anything constant is like anything else that is
        for there in self._candidates(here):
            if self._is(part, there, sample):
                return Elsewhere(here, there, self._exchanged(part, there))
        return None

    def _candidates(self, here: Spot) -> Iterator[Spot]:
        for expert in range(self.stacked(here.name)):
            if expert != here.expert:
                yield Spot(here.name, here.term, here.place, expert)
        for spot in self._by_shape[self.sides.theirs[here.name].shape]:
            shared = here.place.keys() & spot.place.keys()
            apart = sum(here.place[axis] != spot.place[axis] for axis in shared)
            if apart == (1 if spot.term is here.term else 0):
                yield Spot(spot.name, spot.term, spot.place, here.expert)

    def _is(self, part: Part, there: Spot, sample: "_Sample") -> bool:
        """Whether ours in a part is theirs at another spot: a sample first."""
        if part.dtype not in self.sides.common(there.name):
            return False
        box = _at(there, sample.box)
        if not np.array_equal(self.sides.read_theirs(there.name, box, part.dtype), part.ours[sample.inside]):
            return False
        return self._same(part.box, part.ours, there, "theirs", part.dtype)

    def _exchanged(self, part: Part, there: Spot) -> bool:
        return self._same(part.box, part.theirs, there, "ours", part.dtype)

    def _same(self, box: Box, bits: np.ndarray, there: Spot, side: str, dtype: str) -> bool:
        read = self.sides.read_theirs if side == "theirs" else self.sides.read_ours
        rows = max(1, _PIECE * box[1][_cut(box)] // max(bits.nbytes, 1))
        for inner, index in _slabs(box, rows):
            if not np.array_equal(read(there.name, _at(there, inner), dtype), bits[index]):
                return False
        return True


@dataclass(frozen=True, slots=True)
class _Sample:
    """A few neighbours in the middle of a part: their box in the tensor, and where that is in the part."""

    box: Box
    inside: tuple[slice, ...]


def _sample_of(part: Part) -> _Sample:
    offsets, sizes = part.box
    starts = [size // 2 for size in sizes[:-1]] + [0]
    counts = [1 for _ in sizes[:-1]] + [min(_SAMPLE, sizes[-1])]
    box = tuple(o + s for o, s in zip(offsets, starts, strict=True)), tuple(counts)
    return _Sample(box, tuple(slice(s, s + c) for s, c in zip(starts, counts, strict=True)))


def _at(there: Spot, box: Box) -> Box:
    """The same box of another spot: at its own expert."""
    return box if there.expert is None else ((there.expert, *box[0][1:]), box[1])


def _cut(box: Box) -> int:
    """The first dimension of more than one entry."""
    return next((dim for dim, size in enumerate(box[1]) if size > 1), 0)


def _slabs(box: Box, rows: int) -> Iterator[tuple[Box, tuple[slice, ...]]]:
    """(box in the tensor, slice of the part) of `rows` entries each."""
    offsets, sizes = box
    dim = _cut(box)
    for first in range(0, sizes[dim], rows):
        count = min(rows, sizes[dim] - first)
        inner = (
            tuple(o + first if d == dim else o for d, o in enumerate(offsets)),
            tuple(count if d == dim else s for d, s in enumerate(sizes)),
        )
        yield inner, tuple(slice(first, first + count) if d == dim else slice(None) for d in range(len(sizes)))
