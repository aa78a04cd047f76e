"""Headers in, a complete plan out: which bytes of which file go where, and the proof that nothing is missing or double.

A plan is made of views alone. `Plan.copies(box)` names the strided copies that fill a contiguous box of a target
tensor; what carries them out (`fill.py`) needs no knowledge of models, and what proves them (`prove`) reads no data.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from qwen3vl_convert.errors import ConvertError, MisshapenTensor, MissingTensors, UnknownTensors, listing
from qwen3vl_convert.mappings import Equation, View
from qwen3vl_convert.mappings.layout import Sizes
from qwen3vl_convert.storage import DTYPES, Chunk, StoredTensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) in elements, an entry per memory dimension."""


class Frame(Protocol):
    """What lies around a chunk's data in its file, when the format wraps it."""

    @property
    def head(self) -> bytes: ...
    def tail(self, crc: int) -> bytes: ...


@dataclass(frozen=True)
class Target:
    """Every byte of the output that does not come from a tensor, and the place of every byte that does.

    `tensors` have chunks whose `file` is relative to the target folder. `literals` are bytes at an offset of a file,
    `copied` whole files taken over from the source, `frames` what wraps the chunk that starts at a byte of a file.
    """

    tensors: dict[str, StoredTensor]
    sizes: dict[str, int]
    literals: tuple[tuple[str, int, bytes], ...] = ()
    copied: dict[str, Path] = field(default_factory=dict)
    frames: dict[tuple[str, int], Frame] = field(default_factory=dict)

    @cached_property
    def nbytes(self) -> int:
        return sum(self.sizes.values())


@dataclass(frozen=True, slots=True)
class Link:
    """Equal-shaped views of one target and one source tensor: this element is that element."""

    target: View
    source_name: str
    source: View


@dataclass(frozen=True, slots=True)
class Copy:
    """A strided box of a source file, and where it goes in a contiguous target box. Strides and offsets in elements."""

    file: Path
    start: int
    dtype: str
    sizes: tuple[int, ...]
    source_first: int
    source_strides: tuple[int, ...]
    target_first: int
    target_strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True, slots=True)
class Job:
    """One chunk of a target tensor, and the links that reach into it."""

    name: str
    dtype: str
    chunk: Chunk
    links: tuple[Link, ...]

    @property
    def nbytes(self) -> int:
        return self.chunk.numel * DTYPES[self.dtype].itemsize


class ChunkIndex:
    """The chunks of a tensor, found by the box that they overlap without looking at all of them."""

    def __init__(self, tensor: StoredTensor) -> None:
        self.tensor = tensor
        rank = len(tensor.shape)
        self.leading = next((d for d in range(rank) if any(chunk.sizes[d] != 1 for chunk in tensor.chunks)), rank)
        self.buckets: dict[tuple[int, ...], list[Chunk]] = defaultdict(list)
        for chunk in tensor.chunks:
            self.buckets[chunk.offsets[: self.leading]].append(chunk)

    def overlapping(self, box: Box) -> Iterator[Chunk]:
        offsets, sizes = box
        leading = (range(o, o + s) for o, s in zip(offsets[: self.leading], sizes, strict=False))
        for key in itertools.product(*leading):
            for chunk in self.buckets.get(key, ()):
                spans = zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
                if all(o < co + cs and co < o + s for o, s, co, cs in spans):
                    yield chunk


@dataclass(frozen=True)
class Plan:
    """A conversion, ready to be carried out. `jobs` lie in the order of the target's tensors and chunks.

    `padding`: elements of a tensor, on either side, that have no counterpart on the other.
    """

    source: dict[str, StoredTensor]
    target: Target
    jobs: tuple[Job, ...]
    indices: dict[str, ChunkIndex]
    padding: dict[str, int] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    def copies(self, job: Job, box: Box) -> Iterator[Copy]:
        """The copies that fill a box of a job's chunk, as if the box lay in memory contiguously."""
        for link in job.links:
            for ranges in link.target.clip(*box):
                target, source = link.target.narrowed(ranges), link.source.narrowed(ranges)
                for chunk in self.indices[link.source_name].overlapping(source.bounds()):
                    for inner in source.clip(chunk.offsets, chunk.sizes):
                        yield self._copy(link.source_name, chunk, box, target.narrowed(inner), source.narrowed(inner))

    def _copy(self, name: str, chunk: Chunk, box: Box, target: View, source: View) -> Copy:
        source_first, source_strides = source.strides(chunk.offsets, chunk.sizes)
        target_first, target_strides = target.strides(*box)
        dtype = self.source[name].dtype
        return Copy(
            chunk.file, chunk.start, dtype, source.sizes, source_first, source_strides, target_first, target_strides
        )


def pieces(chunk: Chunk, itemsize: int, limit: int) -> Iterator[Box]:
    """Contiguous boxes of at most `limit` bytes (at least one row of the innermost dimension) that tile a chunk, in
    order.
    """
    inner = itemsize
    cut = len(chunk.sizes)
    while cut and inner * chunk.sizes[cut - 1] <= limit:
        cut -= 1
        inner *= chunk.sizes[cut]
    if cut == 0:
        yield chunk.offsets, chunk.sizes
        return
    dim, rows = cut - 1, max(1, limit // inner)
    for outer in itertools.product(*(range(size) for size in chunk.sizes[:dim])):
        for first in range(0, chunk.sizes[dim], rows):
            count = min(rows, chunk.sizes[dim] - first)
            index = (*outer, first, *(0 for _ in chunk.sizes[cut:]))
            offsets = tuple(o + i for o, i in zip(chunk.offsets, index, strict=True))
            yield offsets, (*(1 for _ in outer), count, *chunk.sizes[cut:])


def links(
    equations: Iterable[Equation], sizes: Sizes, source: dict[str, StoredTensor], to: str
) -> dict[str, list[Link]]:
    """The links into every target tensor; `to` is "megatron" or "hf".

    Raises `MisshapenTensor` when a source tensor is not shaped as its equation says, `UsageError` when two equations
    write one tensor.
    """
    found: dict[str, list[Link]] = defaultdict(list)
    owner: dict[str, Equation] = {}
    for equation in equations:
        for pair in (pair for place in equation.places(sizes) for pair in equation.pairs(sizes, place)):
            ours, theirs = (pair.megatron_name, pair.megatron), (pair.hf_name, pair.hf)
            (target_name, target), (source_name, view) = (ours, theirs) if to == "megatron" else (theirs, ours)
            _check_source(source, source_name, view, equation, sizes)
            if owner.setdefault(target_name, equation) is not equation:
                raise ConvertError(f"{target_name} is written by two mappings:\n{owner[target_name]}\nand\n{equation}")
            found[target_name].append(Link(target, source_name, view))
    return dict(found)


def _check_source(source: dict[str, StoredTensor], name: str, view: View, equation: Equation, sizes: Sizes) -> None:
    if name in source and source[name].shape != view.shape:
        axes = sorted({axis for term in (equation.megatron, *equation.hf) for axis in term.axes if axis in sizes})
        known = ", ".join(f"{axis} = {sizes[axis]}" for axis in axes)
        raise MisshapenTensor(
            f"{name}: expected {view.shape}, found {source[name].shape}. "
            f"Its equation is\n{equation}\nwith this model's {known}."
        )


def check_names(expected: Iterable[str], found: Iterable[str], where: str, hint: str = "") -> None:
    """Raise `MissingTensors` or `UnknownTensors` unless exactly the expected tensors are there."""
    missing, unknown = set(expected) - set(found), set(found) - set(expected)
    if missing:
        also = f" (and {len(unknown)} that no mapping claims: {listing(unknown, 3)})" if unknown else ""
        raise MissingTensors(f"{where} lacks {len(missing)} tensors: {listing(missing)}{also}. {hint}".rstrip())
    if unknown:
        raise UnknownTensors(
            f"{where} has {len(unknown)} tensors that no mapping claims: {listing(unknown)}. "
            f"Remove them, or register a mapping for them (register_mapping)."
        )


def make_plan(
    source: dict[str, StoredTensor], target: Target, linked: dict[str, list[Link]], padding: dict[str, int]
) -> Plan:
    """Put the links to the chunks that they reach, and prove that the whole is complete."""
    indices = {name: ChunkIndex(tensor) for name, tensor in source.items()}
    jobs = [job for name, tensor in target.tensors.items() for job in _jobs(tensor, linked[name])]
    plan = Plan(source, target, tuple(jobs), indices, padding)
    prove(plan)
    return plan


def _jobs(tensor: StoredTensor, linked: list[Link]) -> Iterator[Job]:
    index = ChunkIndex(tensor)
    reached: dict[int, list[Link]] = defaultdict(list)
    for link in linked:
        for chunk in index.overlapping(link.target.bounds()):
            reached[id(chunk)].append(link)
    for chunk in tensor.chunks:
        yield Job(tensor.name, tensor.dtype, chunk, tuple(reached[id(chunk)]))


@dataclass(frozen=True, slots=True)
class Coverage:
    """Elements written and read, per tensor; padding is what a target has beyond its source, or a source beyond use."""

    written: dict[str, int]
    read: dict[str, int]


def coverage(plan: Plan) -> Coverage:
    """Count every element that the copies write and read."""
    written: dict[str, int] = dict.fromkeys(plan.target.tensors, 0)
    read: dict[str, int] = dict.fromkeys(plan.source, 0)
    for job in plan.jobs:
        for link in job.links:
            for ranges in link.target.clip(job.chunk.offsets, job.chunk.sizes):
                numel = link.target.narrowed(ranges).numel
                written[job.name] += numel
                read[link.source_name] += numel
    return Coverage(written, read)


def prove(plan: Plan) -> Coverage:
    """Every source element is read exactly once and every target element written exactly once, save declared padding.

    The links are bijections (an equation that is not is refused when declared) and the chunks of a tensor tile it, so
    that counting suffices: an element that is written twice would have to be missing elsewhere.
    """
    counted = coverage(plan)
    for verb, counts, tensors in (
        ("written", counted.written, plan.target.tensors),
        ("read", counted.read, plan.source),
    ):
        for name, tensor in tensors.items():
            expected = tensor.numel - plan.padding.get(name, 0)
            if counts[name] != expected:
                raise ConvertError(
                    f"{name}: {counts[name]} elements would be {verb}, expected {expected}. Nothing was written."
                )
    return counted
