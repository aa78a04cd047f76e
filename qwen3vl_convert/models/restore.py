"""Weights of a Megatron checkpoint for a live model of any layout, parameter by parameter: neither the loader of
Megatron-Core is needed nor the layout that it was written in.

Both store the same axes, maybe under other names or stacked in another way (see `stored`). So a live tensor is an
equation of stored ones, and the plan and the proof of a conversion hold for it too.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qwen3vl_convert.mappings import Equation, Layout, Term
from qwen3vl_convert.mappings.equation import PARTS
from qwen3vl_convert.megatron.stored import Stored, on_disk
from qwen3vl_convert.model import MegatronModel
from qwen3vl_convert.models.live import (
    PIECE_BYTES,
    WHERE,
    JobsByBox,
    OpenedModel,
    Shard,
    fill_shard,
    job_of,
    jobs_by_box,
    open_live,
    parameter_shards,
    read_live,
    unwrapped,
)
from qwen3vl_convert.plan import Plan, Target, check_names, links, make_plan


@dataclass(frozen=True, slots=True)
class LiveParameter:
    """A parameter's shape, and the shards that lie over its memory."""

    shape: tuple[int, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Restoring:
    """Where each parameter of a live model, or of one without memory, lies in a checkpoint: proven complete.

    `opened` is the model with its equations. `parameters` are this rank's, by (chunk number, name).
    """

    opened: OpenedModel
    plan: Plan
    parameters: dict[tuple[int, str], "LiveParameter"]

    def parameter(self, name: str, chunk: int = 0) -> Tensor:
        """A parameter of this rank newly read, in the checkpoint's dtype, on the CPU; memory is its own."""
        found = self.parameters[chunk, name]
        dtype = getattr(torch, self.plan.target.tensors[found.shards[0].key].dtype)
        memory = torch.empty(found.shape, dtype=dtype)
        for shard in found.shards:
            place = memory.as_strided(shard.data.shape, shard.data.stride(), shard.data.storage_offset())
            real = replace(shard, data=place)
            fill_shard(real, job_of(real, self._jobs), self.plan, bytearray(min(PIECE_BYTES, memory.nbytes)))
        return memory

    def expert(self, name: str, number: int) -> Tensor:
        """One expert of a stack in memory, of which Megatron-Core's layers have none here."""
        return self.parameter(name)[number]

    @cached_property
    def _jobs(self) -> JobsByBox:
        return jobs_by_box(self.plan)


def plan_restoring(model: Any, source: MegatronModel, *, experts_layout: str = "hub") -> Restoring:
    """Plan it; all ranks call it. Raises `TensorError`'s kinds unless model and checkpoint are the same tensors.

    Padding of the vocabulary is read as it lies there: build the model with the checkpoint's padded vocabulary.
    """
    live = read_live(model, weightless=True)
    opened = open_live(live, source.model.dims, experts_layout)
    sizes = {**source.model.sizes, "vocab": source.model.padded_vocab}
    equations: list[Equation] = []
    for equation in opened.model.equations:
        ours, theirs = on_disk((equation,), live.tensors), on_disk((equation,), source.tensors)
        width = equation.known(sizes).get(PARTS, 1)
        sizes[_parts(width)] = width
        equations += _equated(ours, theirs, _parts(width))
    linked = links(equations, sizes, source.tensors, to="megatron")
    check_names(linked, live.tensors, str(WHERE), "Was it built from another model's config?")
    targets = {
        key: replace(tensor, dtype=source.tensors[linked[key][0].source_name].dtype)
        for key, tensor in live.tensors.items()
    }
    return Restoring(opened, make_plan(source.tensors, Target(targets, {}), linked, {}), _by_parameter(model))


def _parts(width: int) -> str:
    """What `*` is called where nobody needs to tell the parts apart; an axis has one size in all equations."""
    return f"parts{width}"


def _equated(ours: Sequence[Stored], theirs: Sequence[Stored], parts: str) -> Iterator[Equation]:
    """A parameter's live tensors as equations of its stored ones. Live ones have the default style: one tensor."""
    (whole,), sources = (one.equation.megatron for one in ours), [one.equation.megatron for one in theirs]
    if len(sources) == 1:
        whole, sources = _plain(whole, parts), [_plain(sources[0], parts)]
    yield Equation(whole, tuple(sources))


def _plain(term: Term, parts: str) -> Term:
    return Term(term.name, Layout(term.layout.text.replace(PARTS, parts)))


def _by_parameter(model: Any) -> dict[tuple[int, str], LiveParameter]:
    chunks = unwrapped(model)
    named = {id(p): ((at, name), p) for at, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}
    found: dict[int, list[Shard]] = defaultdict(list)
    for parameter, shard in parameter_shards(chunks):
        found[id(parameter)].append(shard)
    return {name: LiveParameter(tuple(p.shape), tuple(found[key])) for key, (name, p) in named.items()}
