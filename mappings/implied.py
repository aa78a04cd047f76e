"""Axes that names imply: those that a model's own table gives to the same Megatron parameter, and those of layer norms.

`AutoMapping("a", "b")` says that two tensors are the same, element by element. So what is needed is how the one lies,
and that is known of Megatron's names alone: the module decides which axis is cut. Nothing is taken from a Hugging Face
name, and nothing is guessed: what is not implied is an error that says how to write it.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.mappings.equation import Equation, Term
from qwen3vl_convert.mappings.layout import Layout
from qwen3vl_convert.mappings.mapping import ANYTHING, Mapping, laid_out, stands_for_several, with_axes

_SPELLINGS = (
    # The text model by itself, without what its tower's neighbour is called in the whole.
    (re.compile(r"^(?=(decoder|embedding|output_layer)\.)"), "language_model."),
    # Experts that are modules of their own (SequentialMLP), for those of one module (grouped).
    (re.compile(r"\.local_experts\.({e}|\d+)\.(linear_fc[12]\.(?:weight|bias))$"), r".\2\1"),
)
"""Other spellings that Megatron-Core has for a name of the tables."""

_NORM = re.compile(r"(layer_norm_|layernorm\.)(weight|bias)$")
"""The layer norms of Megatron-Core's transformer layers, of which every rank has the whole. (Mamba's `norm` is cut.)"""


def implied(megatron: str, hf: str) -> Equation:
    """The equation of a parameter that is one HF tensor, from their names alone (indices as `{l}`, or numbers).

    Raises `UsageError` where nothing implies the axes, or a table says that the two are not the same tensor.
    """
    for name in (megatron, hf):
        if ANYTHING in name:
            raise stands_for_several(name)
    known = tuple(_known(megatron))
    if not known:
        if _NORM.search(megatron):
            return Equation(Term(megatron, Layout("...")), (Term(hf, Layout("...")),), uncut=True)
        raise UsageError(
            f"{megatron!r}: nothing implies its axes; no model's table has it, and it is no layer norm. "
            f"Write them, as in {with_axes(megatron)}."
        )
    same = [one.equation for one in known if _is_identity(one.equation)]
    if not same:
        raise _not_the_same(megatron, hf, known[0])
    _check_partner(megatron, hf, same)
    found = same[0]
    return replace(found, megatron=Term(megatron, found.megatron.layout), hf=(Term(hf, found.megatron.layout),))


def rests(megatron: str, *hf: str) -> tuple[str, ...]:
    """What `**` stands for in the names of one mapping: the rests that a model's table has under all of them."""
    found = dict.fromkeys(
        match[1]
        for mapping in _tables()
        if (match := _pattern(megatron).fullmatch(mapping.equation.megatron.name))
        and [part.name for part in mapping.equation.hf] == [name.replace(ANYTHING, match[1]) for name in hf]
    )
    if not found:
        raise UsageError(
            f"{megatron}: no model's table says what `**` stands for here, beside {', '.join(hf)}. "
            f"Write a mapping for each tensor, as in `{megatron.replace(ANYTHING, 'weight')}`."
        )
    return tuple(found)


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(re.escape(ANYTHING), "(.+)", 1))


@cache
def _tables() -> tuple[Mapping, ...]:
    """Every mapping of every model's table, experts in both ways that have HF tensors of their own."""
    from qwen3vl_convert.mappings.qwen3_vl import TABLES

    every = dict.fromkeys(mapping for table in TABLES.values() for mapping in table)
    return tuple(dict.fromkeys(one for mapping in every for one in (mapping, laid_out(mapping, "per-expert"))))


def _known(megatron: str) -> Iterator[Mapping]:
    """The tables' mappings of a Megatron parameter, however it is spelled."""
    for pattern, spelled in _SPELLINGS:
        megatron = pattern.sub(spelled, megatron)
    return (mapping for mapping in _tables() if _names(mapping.equation.megatron, megatron))


def _names(term: Term, name: str) -> bool:
    """Whether a name is of this kind, each of its indices an axis in braces or a number."""
    either = re.sub(r"\\{(\w+)\\}", r"(?:{\1}|\\d+)", re.escape(term.name))
    return re.fullmatch(either, name) is not None


def _is_identity(equation: Equation) -> bool:
    return len(equation.hf) == 1 and equation.hf[0].layout == equation.megatron.layout


def _check_partner(megatron: str, hf: str, same: list[Equation]) -> None:
    """An HF name that the tables know must be one that they have against this parameter."""
    others = [one for one in _tables() if any(_names(part, hf) for part in one.equation.hf)]
    if others and not any(_names(equation.hf[0], hf) for equation in same):
        raise _not_the_same(megatron, hf, others[0])


def _not_the_same(megatron: str, hf: str, mapping: Mapping) -> UsageError:
    kind = type(mapping).__name__
    remedy = "Pair it with its own" if kind == "AutoMapping" else f"Use {kind}"
    return UsageError(
        f"{megatron} and {hf} are not the same tensor, element by element. What is known of them:\n{mapping}\n{remedy}."
    )
