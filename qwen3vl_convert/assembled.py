"""A checkpoint of either format as the tensors that the hub would have of it, put together in memory box by box.

Megatron's chunks come by their equations. Experts of another Hugging Face layout come by two equations at once: the
layout that is wanted and theirs stand against the same Megatron parameter, and what reaches the same box of it is the
same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwen3vl_convert.conversion import padding_of
from qwen3vl_convert.fill import gather, is_run, mapped_run
from qwen3vl_convert.mappings import Equation, Layout, View, mapping_registry
from qwen3vl_convert.mappings.equation import Pair
from qwen3vl_convert.mappings.layout import Axis
from qwen3vl_convert.model import HuggingFaceModel, MegatronModel, Model
from qwen3vl_convert.plan import Box, ChunkIndex, Job, Link, Plan, Target, links, make_plan
from qwen3vl_convert.storage import DTYPES, Chunk, StoredTensor
from qwen3vl_convert.strided import Array, raw

if TYPE_CHECKING:
    from torch import Tensor

Linked = dict[str, list[Link]]


@dataclass(frozen=True)
class Assembled:
    """Tensors put together from the chunks of a checkpoint, a box at a time, in the dtype that they are stored in."""

    source: dict[str, StoredTensor]
    links: dict[str, tuple[Link, ...]]

    @cached_property
    def _plan(self) -> Plan:
        indices = {name: ChunkIndex(tensor) for name, tensor in self.source.items()}
        return Plan(self.source, Target({}, {}), (), indices)

    @cached_property
    def _spans(self) -> dict[str, tuple[tuple[int, int, Link], ...]]:
        """The rows that each link reaches: a stack has a link per expert, and a piece of it needs one or two."""
        return {name: tuple((*_rows(link), link) for link in into) for name, into in self.links.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: into[0].target.shape for name, into in self.links.items()}

    def keys(self, name: str) -> tuple[str, ...]:
        """The stored tensors that one is made of."""
        return tuple(dict.fromkeys(link.source_name for link in self.links[name]))

    def dtypes(self, name: str) -> tuple[str, ...]:
        """More than one only where a tensor is made of tensors of several dtypes."""
        return tuple(sorted({self.source[key].dtype for key in self.keys(name)}))

    def read(self, name: str, box: Box, dtype: str, linked: tuple[Link, ...] | None = None) -> Array:
        """The bits of a box in a dtype: the stored one, or one that holds all its numbers. `linked`: as other links
        than the right ones would have it.
        """
        buffer = np.empty(int(np.prod(box[1])) * DTYPES[dtype].itemsize, np.uint8)
        job = Job(name, dtype, Chunk(*box, Path(), 0), self._reaching(name, box) if linked is None else linked)
        gather(list(self._plan.copies(job, box)), job, buffer.data)
        return raw(buffer, dtype).reshape(box[1])

    def tensor(self, name: str) -> "Tensor":
        """A whole tensor on the CPU: in its stored dtype, or float32 where it is stored in several.

        One that lies in a file as it is, is mapped, and read as it is used; writing to it changes no file.
        """
        import torch

        dtypes, shape = self.dtypes(name), self.shapes[name]
        dtype = dtypes[0] if len(dtypes) == 1 else "float32"
        whole = (0,) * len(shape), shape
        buffer = self._mapped(name, dtype, whole)
        bits = self.read(name, whole, dtype) if buffer is None else raw(buffer, dtype)
        found: Tensor = torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(getattr(torch, dtype))
        return found.view(shape)

    def _mapped(self, name: str, dtype: str, whole: Box) -> memoryview | None:
        """The bytes of a tensor that is one run of a file's, where processors expect elements to begin."""
        copies = list(self._plan.copies(Job(name, dtype, Chunk(*whole, Path(), 0), self.links[name]), whole))
        itemsize = DTYPES[dtype].itemsize
        nbytes = int(np.prod(whole[1])) * itemsize
        if len(copies) != 1 or not is_run(copies[0], dtype, nbytes) or copies[0].start % itemsize:
            return None
        return mapped_run(copies[0], nbytes)

    def _reaching(self, name: str, box: Box) -> tuple[Link, ...]:
        first, stop = box[0][0], box[0][0] + box[1][0]
        return tuple(link for start, end, link in self._spans[name] if start < stop and first < end)


def _rows(link: Link) -> tuple[int, int]:
    """The first row that it reaches, and the one after the last."""
    offsets, sizes = link.target.bounds()
    return offsets[0], offsets[0] + sizes[0]


def assemble_megatron(opened: MegatronModel) -> Assembled:
    """A Megatron checkpoint in the expert layout that it was opened with, proven complete as a conversion is."""
    linked = links([one.equation for one in opened.stored], opened.model.sizes, opened.tensors, to="hf")
    return _assembled(opened.tensors, linked, padding_of(opened.model, opened.tensors))


def assemble_huggingface(opened: HuggingFaceModel, experts_layout: str = "hub") -> Assembled:
    """A Hugging Face folder with its experts laid out like this, proven complete as a conversion is."""
    experts = _experts(opened.model, experts_layout)
    return _assembled(opened.tensors, _as_they_are(opened.tensors, experts) | _laid_out(opened.model, experts), {})


def _assembled(source: dict[str, StoredTensor], linked: Linked, padding: dict[str, int]) -> Assembled:
    target = {name: _virtual(name, into, source) for name, into in linked.items()}
    make_plan(source, Target(target, {}), linked, padding)
    return Assembled(source, {name: tuple(into) for name, into in linked.items()})


def _virtual(name: str, into: list[Link], source: dict[str, StoredTensor]) -> StoredTensor:
    shape = into[0].target.shape
    return StoredTensor(name, source[into[0].source_name].dtype, shape, (Chunk((0,) * len(shape), shape, Path(), 0),))


Respelled = list[tuple[Equation, Equation]]
"""(the equation of the folder's experts, the one that is wanted) where they are not the same."""


def _experts(model: Model, wanted: str) -> Respelled:
    registry = mapping_registry(
        model.dims.model_type, attention_bias=model.dims.attention_bias, head=model.output_layer
    )
    own = "hub" if model.experts_layout == "none" else model.experts_layout
    layouts = (registry.with_experts(layout) for layout in (own, wanted))
    pairs = zip(*(registered.equations for registered in layouts), strict=True)
    return [(stored, published) for stored, published in pairs if stored != published]


def _as_they_are(tensors: dict[str, StoredTensor], experts: Respelled) -> Linked:
    """Every tensor but those of experts that are wanted otherwise."""
    linked = {}
    own = {term for equation, _ in experts for term in equation.hf}
    for name, tensor in tensors.items():
        if not any(term.match(name) is not None for term in own):
            layout = Layout(" ".join(f"dim{i}" for i in range(len(tensor.shape))))
            view = layout.open({f"dim{i}": size for i, size in enumerate(tensor.shape)})
            linked[name] = [Link(view, name, view)]
    return linked


def _laid_out(model: Model, experts: Respelled) -> Linked:
    """Links from experts of one layout into the tensors of another."""
    linked: Linked = {}
    for stored, wanted in experts:
        for place in stored.places(model.sizes):
            sources = list(stored.pairs(model.sizes, place))
            for target in wanted.pairs(model.sizes, place):
                into = linked.setdefault(target.hf_name, [])
                into += [link for source in sources for link in _joined(target, source)]
    return linked


def _joined(target: Pair, source: Pair) -> Iterator[Link]:
    """What two HF tensors have in common by way of one Megatron parameter: each box of it that both reach."""
    for ranges in target.megatron.clip(*source.megatron.bounds()):
        middle, into = target.megatron.narrowed(ranges), target.hf.narrowed(ranges)
        for others in source.megatron.clip(*middle.bounds()):
            by_step = _by_step(source.megatron.narrowed(others), source.hf.narrowed(others))
            axes = _by_step(middle, into)
            same = tuple(replace(by_step[step], name=axis.name) for step, axis in axes.items())
            out = replace(source.hf.narrowed(others), axes=same)
            yield Link(replace(into, axes=tuple(axes.values())), source.hf_name, out)


def _by_step(megatron: View, hf: View) -> dict[tuple[int, int], Axis]:
    """The axes of the HF view, by the Megatron dimension and the step there that are the same axis."""
    pairs = zip(megatron.axes, hf.axes, strict=True)
    return {(ours.dim, ours.step): theirs for ours, theirs in pairs if ours.size > 1}
