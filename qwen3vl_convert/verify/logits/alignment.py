"""Which module of our model is which of transformers', told by the equations of their parameters.

A linear layer whose weight is put together from several (q, k and v; gate and up) gives its output in the order of its
rows: the equation of the weight, with tokens in the place of inputs, is the equation of the outputs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from qwen3vl_convert.mappings import Equation
from qwen3vl_convert.mappings.equation import Place
from qwen3vl_convert.megatron.stored import on_disk
from qwen3vl_convert.model import EMBEDDING, OUTPUT
from qwen3vl_convert.verify.logits.programs import owner_of

if TYPE_CHECKING:
    from qwen3vl_convert.models.restore import LiveParameter, Restoring

_EXPERTS = ".mlp.experts."


@dataclass(frozen=True, slots=True)
class Aligned:
    """A module of ours, and the modules of transformers that have the same parameters. `layer` is the model's.

    `parameters` are the HF names of all its parameters; `before` those of what goes into it and has no point of its
    own. `arranged`: the equation of its outputs, if they are in another
    order than transformers'.
    """

    module: str
    hf_modules: tuple[str, ...]
    parameters: tuple[str, ...]
    tower: str
    layer: int | None
    arranged: Equation | None
    before: tuple[str, ...] = ()

    @property
    def is_expert(self) -> bool:
        return _EXPERTS in self.module

    def outputs(self, theirs: Sequence[Tensor], sizes: Mapping[str, int]) -> Tensor:
        """What transformers' modules gave, each [tokens, features], as ours has it [tokens, features]."""
        if self.arranged is None:
            return theirs[0]
        inputs = self.arranged.megatron.layout.groups[-1][0]
        full = {**sizes, inputs: len(theirs[0])}
        place = dict.fromkeys(self.arranged.place_axes, 0)
        arranged = theirs[0].new_empty(self.arranged.megatron.layout.shape(self.arranged.full(full)))
        for pair, part in zip(self.arranged.pairs(full, place), theirs, strict=True):
            pair.megatron.of(arranged).copy_(pair.hf.of(part.T))
        return arranged.T


def align(restoring: "Restoring") -> tuple[Aligned, ...]:
    """Every module of our model that has parameters of its own, in the model's order."""
    keys = restoring.plan.target.tensors
    stored = [
        (one.equation.megatron.pattern, one.stack, equation)
        for equation in restoring.opened.model.equations
        for one in on_disk((equation,), keys)
    ]
    found: dict[str, list[tuple[str, Equation, Place]]] = {}
    for (_, name), parameter in restoring.parameters.items():
        module, _, own = name.rpartition(".")
        pattern, stack, equation = next(entry for entry in stored if entry[0].fullmatch(parameter.shards[0].key))
        found.setdefault(owner_of(module), []).append((own, equation, _place(parameter, pattern, stack)))
    aligned = tuple(_aligned(module, entries) for module, entries in found.items())
    output, theirs = (name.removesuffix(".weight") for name in OUTPUT)
    if output in found:
        return aligned
    return (*aligned, Aligned(output, (theirs,), (OUTPUT[1], EMBEDDING[1]), "text", None, None))  # tied


def _place(parameter: "LiveParameter", pattern: re.Pattern[str], stack: Sequence[str]) -> dict[str, int]:
    """Which layer, block, merger and expert a parameter belongs to."""
    shard = parameter.shards[0]
    match = pattern.fullmatch(shard.key)
    named = {} if match is None else {axis: int(text) for axis, text in match.groupdict().items() if text.isdecimal()}
    return named | dict(zip(stack, shard.offsets, strict=False))


def _aligned(module: str, entries: Sequence[tuple[str, Equation, Place]]) -> Aligned:
    names = tuple(part.at(place) for _, equation, place in entries for part in equation.hf)
    _, weight, place = next((entry for entry in entries if entry[0] == "weight"), entries[0])
    modules = tuple(owner_of(part.at(place).rpartition(".")[0]) for part in weight.hf)
    layer = next((place[axis] for axis in ("l", "b") if axis in place), None)
    tower = "vision" if module.startswith("vision_model.") else "text"
    return Aligned(module, modules, names, tower, layer, weight if _rearranged(weight) else None)


def _rearranged(equation: Equation) -> bool:
    """Whether rows of the weight, and so outputs, lie in another order."""
    if len(equation.megatron.layout.groups) != 2 or "e" in equation.megatron.name_axes:
        return False
    return len(equation.hf) > 1 or equation.hf[0].layout.groups[0] != equation.megatron.layout.groups[0]
