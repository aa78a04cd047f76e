"""An equation between a Megatron parameter and the Hugging Face tensors that it is made of.

    language_model.decoder.layers.{l}.self_attention.linear_qkv.weight : (kv * d) h
        model.language_model.layers.{l}.self_attn.q_proj.weight        : (kv g d) h
        model.language_model.layers.{l}.self_attn.k_proj.weight        : (kv d) h
        model.language_model.layers.{l}.self_attn.v_proj.weight        : (kv d) h

Axes in braces live in the name. `Equation.pairs` opens both sides and aligns them by axis name: pairs of equal-shaped
views, which is all that either direction needs.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from qwen3vl_convert.errors import MisshapenTensor, UsageError
from qwen3vl_convert.mappings.layout import Layout, Sizes, View

PARTS = "*"
_BRACES = re.compile(r"{(\w+)}")
_LABELS = {"s": "wv"}
"""How an axis is spelled in a name, where it is not a number: Megatron names the halves of a SwiGLU `_w` and `_v`."""

Place = Mapping[str, int]


@dataclass(frozen=True)
class Term:
    """`name : layout`, one tensor kind. Braces in the name are axes that live there."""

    name: str
    layout: Layout

    @classmethod
    def parse(cls, text: str) -> "Term":
        name, colon, layout = text.partition(" : ")
        if not colon or not name.strip():
            raise UsageError(f"{text!r}: expected `name : layout`, as in `score.weight : c h`.")
        return cls(name.strip(), Layout(layout.strip()))

    def __post_init__(self) -> None:
        both = set(self.name_axes) & set(self.layout.axes)
        if both:
            raise UsageError(f"{self}: the axis {', '.join(sorted(both))} lives in the name and in memory at once.")

    def __str__(self) -> str:
        return f"{self.name} : {self.layout.text}"

    @cached_property
    def name_axes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_BRACES.findall(self.name)))

    @cached_property
    def axes(self) -> frozenset[str]:
        return frozenset((*self.name_axes, *self.layout.axes))

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names of this kind, with a group per axis in braces."""
        seen: set[str] = set()
        parts = []
        for literal, axis in itertools.zip_longest(_BRACES.split(self.name)[::2], _BRACES.findall(self.name)):
            parts.append(re.escape(literal))
            if axis:
                parts.append(f"(?P={axis})" if axis in seen else f"(?P<{axis}>{_spelling(axis)})")
                seen.add(axis)
        return re.compile("".join(parts))

    def at(self, place: Place) -> str:
        """The name with its axes filled in."""
        return _BRACES.sub(lambda m: _spell(m[1], place[m[1]]), self.name)

    def match(self, name: str) -> dict[str, int] | None:
        """The place that a name stands for, or None."""
        found = self.pattern.fullmatch(name)
        return None if found is None else {a: _read(a, text) for a, text in found.groupdict().items()}


def _spelling(axis: str) -> str:
    return f"[{_LABELS[axis]}]" if axis in _LABELS else r"0|[1-9]\d*"


def _spell(axis: str, index: int) -> str:
    return _LABELS[axis][index] if axis in _LABELS else str(index)


def _read(axis: str, text: str) -> int:
    return _LABELS[axis].index(text) if axis in _LABELS else int(text)


@dataclass(frozen=True, slots=True)
class Pair:
    """One Megatron tensor and one HF tensor, as views of equal axes in equal order."""

    megatron_name: str
    hf_name: str
    megatron: View
    hf: View


@dataclass(frozen=True)
class Equation:
    """One side is Megatron's parameter, the other the HF tensors that it is made of.

    `padded`: an axis that may be longer on Megatron's side, where the rest is padding.
    `apart`:  the axis whose entries Megatron stores as chunks of their own (the halves of a SwiGLU).
    `uncut`:  never divided between tensor parallel ranks, whatever its axes are called.

    Raises `UsageError` at declaration unless every element of one side stands for exactly one element of the other.
    """

    megatron: Term
    hf: tuple[Term, ...]
    padded: str | None = None
    apart: str | None = None
    uncut: bool = False

    def __post_init__(self) -> None:
        parts = PARTS in self.megatron.layout.axes
        if not self.hf or (len(self.hf) > 1 and not parts):
            raise self._wrong(f"{len(self.hf)} HF tensors: several need a `*` that says where they lie end to end")
        for part in self.hf:
            self._check_part(part, parts)

    def _check_part(self, part: Term, parts: bool) -> None:
        if PARTS in part.layout.axes:
            raise self._wrong("`*` belongs to Megatron's side: the HF tensors are the parts")
        missing = self.megatron.axes - part.axes - {PARTS}
        surplus = frozenset() if parts else part.axes - self.megatron.axes
        if missing:
            raise self._wrong(
                f"{part.name} lacks the axis {', '.join(sorted(missing))}, so it would have to be repeated"
            )
        if surplus:
            raise self._wrong(
                f"{part.name} has the axis {', '.join(sorted(surplus))}, which Megatron's side has no place for"
            )
        if not self.megatron.axes.issuperset(part.name_axes):
            raise self._wrong(f"{part.name}: an axis that `*` stands for cannot live in the name")

    def _wrong(self, reason: str) -> UsageError:
        return UsageError(f"{self}\n  is not a bijection: {reason}.")

    def __str__(self) -> str:
        return "\n".join((str(self.megatron), *(f"    {part}" for part in self.hf)))

    def own(self, part: Term) -> tuple[str, ...]:
        """The axes of a part that stand where `*` is."""
        return tuple(a for a in part.layout.axes if a not in self.megatron.axes) if PARTS in self.megatron.axes else ()

    def width(self, part: Term, sizes: Sizes) -> int:
        return math.prod(sizes[axis] for axis in self.own(part))

    def full(self, sizes: Sizes) -> dict[str, int]:
        """Sizes of Megatron's side: with the width of `*`, and the padded axis at its padded size."""
        full = self.known(sizes)
        if self.padded:
            full[self.padded] = sizes.get(f"padded_{self.padded}", sizes[self.padded])
        return full

    def known(self, sizes: Sizes) -> dict[str, int]:
        """The sizes, and the width of `*` where they determine it."""
        parts = PARTS in self.megatron.axes and all(a in sizes for part in self.hf for a in self.own(part))
        return {**sizes, PARTS: sum(self.width(part, sizes) for part in self.hf)} if parts else dict(sizes)

    @cached_property
    def place_axes(self) -> tuple[str, ...]:
        """The axes that live in a name on either side."""
        return tuple(dict.fromkeys(a for term in (self.megatron, *self.hf) for a in term.name_axes))

    def places(self, sizes: Sizes) -> Iterator[dict[str, int]]:
        """Every combination of indices of the axes that live in names."""
        for indices in itertools.product(*(range(sizes[a]) for a in self.place_axes)):
            yield dict(zip(self.place_axes, indices, strict=True))

    def pairs(self, sizes: Sizes, place: Place) -> Iterator[Pair]:
        """The aligned views for one place: one pair per HF tensor."""
        full, start = self.full(sizes), 0
        for part in self.hf:
            ours = self.megatron.layout.open(full)
            theirs = part.layout.open(sizes)
            if PARTS in self.megatron.axes:
                width = self.width(part, sizes)
                ours = ours.narrow(PARTS, start, width).split(PARTS, self.own(part), sizes)
                start += width
            if self.padded:
                ours = ours.narrow(self.padded, 0, sizes[self.padded])
            for axis, index in place.items():
                ours, theirs = (v.select(axis, index) if axis in v.names else v for v in (ours, theirs))
            yield Pair(self.megatron.at(place), part.at(place), ours, theirs.ordered(ours.names))

    def ranked(self, rank: int) -> "Equation":
        """`...` written out for tensors of `rank` dimensions."""
        if self.megatron.layout.axes != ("...",):
            return self
        terms = [Term(t.name, t.layout.ranked(rank)) for t in (self.megatron, *self.hf)]
        return replace(self, megatron=terms[0], hf=tuple(terms[1:]))

    def solve(self, shapes: Mapping[str, tuple[int, ...]], known: Sizes) -> dict[str, int]:
        """Sizes of all axes from the shapes of the HF tensors (by part name), helped by the known ones.

        Raises `MisshapenTensor` where shapes contradict, `UsageError` where they do not suffice.
        """
        sizes = dict(known)
        for _ in range(2):
            for part in self.hf:
                sizes.update(part.layout.solve(shapes[part.name], sizes, part.name))
        unknown = {a for part in self.hf for a in part.layout.axes} - sizes.keys()
        if unknown:
            raise UsageError(
                f"{self}\n  needs the size of {', '.join(sorted(unknown))}: pass sizes={{...}} or the model's dims."
            )
        return sizes


def check_shape(term: Term, name: str, shape: tuple[int, ...], sizes: Sizes) -> None:
    """Raise `MisshapenTensor` unless a tensor of `shape` is what the term says."""
    if shape != term.layout.shape(sizes):
        raise MisshapenTensor(f"{name}: expected {term.layout.describe(sizes)}, found {shape}.")
