"""Parts that lie in a Megatron parameter in another way: q, k, v not by group, gate and up row by row or by shards.

The suspicion is itself an equation. If the folder is what the checkpoint says under that one, it is what was used.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from qwen3vl_convert.mappings import Equation, Layout, Term
from qwen3vl_convert.mappings.equation import PARTS
from qwen3vl_convert.model import MegatronModel
from qwen3vl_convert.plan import Link
from qwen3vl_convert.verify.weights.part import Part
from qwen3vl_convert.verify.weights.sides import Sides

_RANK = "r"
"""The axis of tensor parallel ranks, of which an equation has none."""
_RANKS = (2, 4, 8)
_USUAL = {
    "(kv * d)": ("q, k, v left concatenated (not cut by kv group)", "q, k, v concatenated within each shard of TP{}"),
    "(* f)": ("", "gate and up concatenated shard by shard of TP{}, as if they were one matrix"),
    "(* i)": ("", "gate and up concatenated shard by shard of TP{}, as if they were one matrix"),
}
"""By the right order: what it is called when the parts lie end to end, each with its own axes; and when they do so in
each shard.
"""
_ROW_BY_ROW = "gate and up are interleaved, row by row"


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another equation for a parameter, with the sizes of axes that only it has."""

    text: str
    equation: Equation
    sizes: dict[str, int]


def find_alternative(part: Part, sides: Sides, ours: MegatronModel) -> str:
    """The way in which the parts of a parameter lie, in words, if another than the right one explains the bits."""
    for one in ours.stored:
        for term in one.equation.hf:
            place = term.match(part.name)
            if place is not None and PARTS in one.equation.megatron.layout.axes:
                return _first_that_fits(part, sides, one.equation, ours.model.sizes, place)
    return ""


def _first_that_fits(part: Part, sides: Sides, equation: Equation, sizes: dict[str, int], place: dict[str, int]) -> str:
    for alternative in alternatives(equation, sizes):
        linked = _links(alternative, sizes, place, part.name)
        if _explains(part, sides, linked):
            return alternative.text
    return ""


def _explains(part: Part, sides: Sides, linked: tuple[Link, ...]) -> bool:
    """Whether ours under other links is theirs: the first row, then everything."""
    offsets, sizes = part.box
    first = (offsets, (1, *sizes[1:]))
    if not np.array_equal(sides.read_ours(part.name, first, part.dtype, linked), part.theirs[:1]):
        return False
    return np.array_equal(sides.read_ours(part.name, part.box, part.dtype, linked), part.theirs)


def _links(alternative: Alternative, sizes: dict[str, int], place: dict[str, int], name: str) -> tuple[Link, ...]:
    pairs = alternative.equation.pairs({**sizes, **alternative.sizes}, place)
    return tuple(Link(pair.hf, pair.megatron_name, pair.megatron) for pair in pairs if pair.hf_name == name)


def alternatives(equation: Equation, sizes: dict[str, int]) -> Iterator[Alternative]:
    """Parts end to end, the other orders of their dimension, then the same within each tensor parallel rank."""
    at, here = _where(equation)
    end_to_end, by_rank = _USUAL.get(_text([here]), ("", ""))
    if here[0] != PARTS:
        yield _alternative(equation, at, (PARTS,), end_to_end)
    for order in itertools.permutations(here):
        if order != here:
            yield _alternative(equation, at, order, _ROW_BY_ROW if order in (("f", PARTS), ("i", PARTS)) else "")
    outer = next(axis for axis in here if axis != PARTS)
    for ranks in (n for n in _RANKS if sizes[outer] % n == 0):
        cut = {_RANK: ranks, outer: sizes[outer] // ranks}
        yield _alternative(_cut(equation, outer), at, (_RANK, PARTS), by_rank.format(ranks), cut)


def _where(equation: Equation) -> tuple[int, tuple[str, ...]]:
    """(the memory dimension in which the parts lie, its axes)."""
    groups = equation.megatron.layout.groups
    at = next(i for i, group in enumerate(groups) if PARTS in group)
    return at, groups[at]


def _alternative(
    equation: Equation, at: int, order: tuple[str, ...], usual: str, cut: dict[str, int] | None = None
) -> Alternative:
    groups = [order if i == at else group for i, group in enumerate(equation.megatron.layout.groups)]
    detail = f"{_text([order])} instead of {_text([equation.megatron.layout.groups[at]])}"
    megatron = Term(equation.megatron.name, Layout(_text(groups)))
    text = f"{usual or 'the parts lie in another order'}: {detail}"
    return Alternative(text, replace(equation, megatron=megatron), cut or {})


def _cut(equation: Equation, outer: str) -> Equation:
    """The same, with an axis of every part as ranks and the rest."""
    return replace(equation, hf=tuple(Term(term.name, _with_ranks(term.layout, outer)) for term in equation.hf))


def _with_ranks(layout: Layout, outer: str) -> Layout:
    """The same memory, with the axis that is cut as ranks and the rest."""
    return Layout(
        _text([tuple(a for axis in g for a in ((_RANK, axis) if axis == outer else (axis,))) for g in layout.groups])
    )


def _text(groups: list[tuple[str, ...]] | tuple[tuple[str, ...], ...]) -> str:
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)
