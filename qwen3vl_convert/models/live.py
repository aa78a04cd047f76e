"""A live, sharded Megatron model as one more stored checkpoint, whose chunks lie in the memory of its ranks.

`sharded_state_dict()` says of every parameter which box of which stored tensor it is: with that a model is read and
written by the same equations, the same plan and the same proof as a checkpoint on disk, at any TP/PP/VPP/EP/ETP layout.

    load_weights(model, open_huggingface(folder))                           # each rank reads what it holds
    for name, tensor in export_weights(open_export(model, dims)): ...       # each rank gets whole tensors

Everything here is called by all ranks at once. What fails on one rank is raised on all, so that none waits for another.
"""

import itertools
import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from qwen3vl_convert.checksum import crc32
from qwen3vl_convert.conversion import padding_of, target_dtypes
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import (
    DuplicateTensors,
    InputError,
    MisshapenTensor,
    MissingTensors,
    UnsupportedFormat,
    UsageError,
    listing,
)
from qwen3vl_convert.fill import gather
from qwen3vl_convert.huggingface.safetensors import Entry
from qwen3vl_convert.huggingface.writer import hub_order
from qwen3vl_convert.mappings import View
from qwen3vl_convert.megatron.metadata import tiling_problem
from qwen3vl_convert.megatron.stored import Stored
from qwen3vl_convert.model import HuggingFaceModel, Model, complete_megatron
from qwen3vl_convert.models.ranks import everyones, meeting_device, rank, ranks, together
from qwen3vl_convert.plan import ChunkIndex, Job, Link, Plan, Target, links, make_plan, pieces
from qwen3vl_convert.storage import DTYPES, WEIGHT_DTYPES, Chunk, StoredTensor

WHERE = Path("the live model")
PIECE_BYTES = 8 << 20
METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""How today's trainers have Megatron-Core name what it stores."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
JobsByBox = dict[tuple[str, tuple[int, ...], tuple[int, ...]], Job]
_EXACT = {("bfloat16", "float32"), ("float16", "float32")}
"""Casts that change no value."""


# ---- what one rank holds, and what all of them hold ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of a stored tensor that this rank holds: `data` lies over the parameter's memory and has the box's shape.

    `main`: of all ranks with the same box, this is the one that counts.
    """

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor
    main: bool

    @property
    def dtype(self) -> str:
        return str(self.data.dtype).removeprefix("torch.")

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def bits(self, box: tuple[slice, ...] = ()) -> Tensor:
        """The elements of a part of it as integers, so that copying them changes no NaN. Never a copy."""
        return self.data[box].view(_INTEGERS[self.data.itemsize])


@dataclass(frozen=True)
class LiveModel:
    """A model that lives on several ranks. `shards` are this rank's; `tensors` are everybody's.

    A chunk of `tensors` has for its file the rank that counts for it, and for its start that rank's shard's number.
    """

    shards: tuple[Shard, ...]
    tensors: dict[str, StoredTensor]

    @property
    def device(self) -> torch.device:
        """Where this rank's parameters are."""
        return next((shard.data.device for shard in self.shards), torch.device("cpu"))

    @cached_property
    def indices(self) -> dict[str, ChunkIndex]:
        """This rank's shards that count, found by the box that they overlap."""
        held: dict[str, list[Chunk]] = defaultdict(list)
        for number, shard in enumerate(self.shards):
            if shard.main:
                held[shard.key].append(Chunk(shard.offsets, shard.sizes, _rank_path(rank()), number))
        return {key: ChunkIndex(replace(self.tensors[key], chunks=tuple(chunks))) for key, chunks in held.items()}


def read_live(model: Any, *, weightless: bool = False) -> LiveModel:
    """The shards of a model, a MegatronModule or its virtual-pipeline chunks, put together from all ranks.

    `weightless`: it may be on the meta device, without memory. Raises `TensorError`'s kinds unless the shards that
    count tile every tensor exactly.
    """
    with together():
        shards = tuple(shard for _, shard in parameter_shards(unwrapped(model)))
        for shard in shards:
            _check_plain(shard.key, shard.data, weightless)
        said = [(s.key, s.shape, s.dtype, s.offsets, s.sizes, n) for n, s in enumerate(shards) if s.main]
    tensors: dict[str, StoredTensor] = {}
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    for holder, theirs in enumerate(everyones(said)):
        for key, shape, dtype, offsets, sizes, number in theirs:
            chunks[key].append(Chunk(offsets, sizes, _rank_path(holder), number))
            known = tensors.setdefault(key, StoredTensor(key, dtype, shape, ()))
            if (known.dtype, known.shape) != (dtype, shape):
                raise MisshapenTensor(
                    f"{WHERE}: {key}: {known.dtype} {known.shape} on one rank, {dtype} {shape} on another. "
                    f"Build every rank's part from one configuration."
                )
    tensors = {key: replace(tensor, chunks=tuple(chunks[key])) for key, tensor in tensors.items()}
    for tensor in tensors.values():
        _check_tiled(tensor)
    return LiveModel(shards, tensors)


def unwrapped(model: Any) -> list[Any]:
    """The model's chunks without what trainers wrap them in (data parallelism, float16)."""
    chunks = []
    for chunk in model if isinstance(model, Sequence | torch.nn.ModuleList) else [model]:
        while isinstance(getattr(chunk, "module", None), torch.nn.Module):
            chunk = chunk.module
        if not hasattr(chunk, "sharded_state_dict"):
            raise UsageError(f"{type(chunk).__name__}: expected a Megatron model, or a list of its pipeline chunks.")
        chunks.append(chunk)
    return chunks


def parameter_shards(chunks: Iterable[Any]) -> Iterator[tuple[Tensor, Shard]]:
    """Every shard of this rank with the parameter whose memory it lies over, in the order of `sharded_state_dict`."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    if not parallel_state.model_parallel_is_initialized():
        raise UsageError(
            f"{WHERE}: expected the process groups that it was built with, found none. Load and save within the same "
            f"single_process() or parallel_world(...)."
        )
    for chunk in chunks:
        for value in nested_values(chunk.sharded_state_dict(prefix="", metadata=dict(METADATA))):
            # gate and up of a SwiGLU are one parameter and two chunks
            parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else (value,)
            for part in parts:
                if isinstance(part, ShardedTensor):
                    data = part.data.detach()[(None,) * part.prepend_axis_num]
                    shape, offsets = tuple(map(int, part.global_shape)), tuple(map(int, part.global_offset))
                    yield value.data, Shard(part.key, shape, offsets, data, is_main_replica(part.replica_id))


def _check_plain(key: str, data: Tensor, weightless: bool) -> None:
    if weightless and data.is_meta:
        return
    dtype = str(data.dtype).removeprefix("torch.")
    if type(data) is not Tensor or data.is_meta or dtype not in WEIGHT_DTYPES:
        kind = "without memory (meta)" if data.is_meta else f"{type(data).__name__} of {dtype}"
        raise UnsupportedFormat(
            f"{WHERE}: {key}: expected a plain tensor of one of {', '.join(WEIGHT_DTYPES)}, found {kind}. "
            f"Quantised parameters and those of FSDP are not read."
        )


def _check_tiled(tensor: StoredTensor) -> None:
    """Every element on one rank that counts."""
    problem = tiling_problem(tensor.shape, [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks])
    if problem is None:
        return
    kind = DuplicateTensors if "overlaps" in problem else MissingTensors
    raise kind(f"{WHERE}: {tensor.name} {tensor.shape}: {problem}. Are all pipeline chunks of every rank passed?")


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A live model that is complete: what it is, and the equations against its stored keys."""

    model: Model
    stored: tuple[Stored, ...]


def open_live(live: LiveModel, dims: Dims, experts_layout: str) -> OpenedModel:
    """The live model with its equations against this HF expert layout: what `open_megatron` gives of a checkpoint.

    Raises `TensorError`'s kinds, naming tensors, when it is not a complete model of these sizes.
    """
    model, stored, surplus = complete_megatron(
        dict(live.tensors), dims, experts_layout, False, str(WHERE), "Was it built from another model's config?"
    )
    if surplus is not None:
        raise UsageError(
            f"{WHERE}: {surplus.name} is a parameter of its own, and the config says that it is tied to the embedding. "
            f"Build the model with share_embeddings_and_output_weights=True."
        )
    return OpenedModel(model, stored)


# ---- in --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a rank loaded: how many parameters' shards, elements (padding included), and bytes of the source's weights.

    `mapped_bytes` are those of the windows through which it read: more where a shard is every other run of bytes.
    """

    shards: int
    elements: int
    read_bytes: int
    mapped_bytes: int
    notes: tuple[str, ...]


def load_weights(
    model: Any,
    source: HuggingFaceModel,
    *,
    allow_dtype_cast: bool = False,
    piece_bytes: int = PIECE_BYTES,
) -> Loaded:
    """Read the weights of a folder straight into the parameters; all ranks call it, each reads its own slices.

    Memory is one buffer of `piece_bytes`. Padding of the vocabulary becomes zero. A parameter of a wider dtype than the
    source takes it exactly; one of another is refused unless `allow_dtype_cast`, which rounds to nearest even.

    Raises `TensorError`'s kinds when the model and the folder are not the same tensors, before a parameter is touched.
    """
    live = read_live(model)
    with together():
        _check_parameters(unwrapped(model), live.shards)
        plan = _loading_plan(live, source, allow_dtype_cast)
        jobs = jobs_by_box(plan)
        mine = [(shard, job_of(shard, jobs)) for shard in live.shards]
        notes = source.check_data() if rank() == 0 else []
    with together(), torch.no_grad():
        buffer = bytearray(piece_bytes)
        counts = [fill_shard(shard, job, plan, buffer) for shard, job in mine]
    read, mapped = (sum(column) for column in zip((0, 0), *counts, strict=True))
    return Loaded(len(mine), sum(shard.data.numel() for shard, _ in mine), read, mapped, tuple(notes))


def _loading_plan(live: LiveModel, source: HuggingFaceModel, allow_dtype_cast: bool) -> Plan:
    """The conversion that fills the live model as if it were files, proven complete in both directions."""
    layout = source.model.experts_layout
    opened = open_live(live, source.model.dims, "hub" if layout == "none" else layout)
    linked = links([one.equation for one in opened.stored], opened.model.sizes, source.tensors, to="megatron")
    for key, into in linked.items():
        tensor = live.tensors[key]
        _check_shape(tensor, into[0], opened)
        if not allow_dtype_cast:
            _check_exact(tensor, (source.tensors[link.source_name] for link in into))
    return make_plan(source.tensors, Target(live.tensors, {}), linked, padding_of(opened.model, live.tensors))


def _check_shape(tensor: StoredTensor, link: Link, opened: OpenedModel) -> None:
    if tensor.shape != link.target.shape:
        raise MisshapenTensor(
            f"{WHERE}: {tensor.name}: expected {link.target.shape} for a {opened.model.dims.model_type} of the "
            f"config's sizes, found {tensor.shape}. Build the model from this checkpoint's config."
        )


def _check_exact(tensor: StoredTensor, sources: Iterable[StoredTensor]) -> None:
    for source in sources:
        if source.dtype != tensor.dtype and (source.dtype, tensor.dtype) not in _EXACT:
            raise UsageError(
                f"{source.name} is {source.dtype} and {tensor.name} of the live model is {tensor.dtype}: its values "
                f"would be rounded. Build the model in {source.dtype}, or pass allow_dtype_cast=True."
            )


def jobs_by_box(plan: Plan) -> JobsByBox:
    """The jobs of a plan by the box of the tensor that each fills."""
    return {(job.name, job.chunk.offsets, job.chunk.sizes): job for job in plan.jobs}


def job_of(shard: Shard, jobs: JobsByBox) -> Job:
    """What fills a shard. Raises `MissingTensors` for a replica of what no rank holds first."""
    job = jobs.get((shard.key, shard.offsets, shard.sizes))
    if job is None:
        raise MissingTensors(
            f"{WHERE}: {shard.key}: this rank holds {shard.sizes} at {shard.offsets} as a replica, and no rank holds "
            f"it as the first. The model's sharded_state_dict contradicts itself."
        )
    return job


def fill_shard(shard: Shard, job: Job, plan: Plan, buffer: bytearray) -> tuple[int, int]:
    """Fill a shard piece by piece; returns bytes (read, mapped). What has no source is padding, and becomes zero."""
    itemsize = DTYPES[job.dtype].itemsize
    read = mapped = 0
    for box in pieces(job.chunk, itemsize, len(buffer)):
        whole = memoryview(buffer)[: math.prod(box[1]) * itemsize]
        copies = list(plan.copies(job, box))
        gather(copies, job, whole)
        part = torch.frombuffer(whole, dtype=_INTEGERS[itemsize]).reshape(box[1])
        first = tuple(o - start for o, start in zip(box[0], shard.offsets, strict=True))
        shard.bits(tuple(slice(o, o + size) for o, size in zip(first, box[1], strict=True))).copy_(part)
        for copy in copies:
            width = DTYPES[copy.dtype].itemsize
            read += copy.numel * width
            steps = zip(copy.sizes, copy.source_strides, strict=True)
            mapped += (1 + sum((size - 1) * stride for size, stride in steps)) * width
    return read, mapped


def _check_parameters(chunks: Sequence[torch.nn.Module], shards: Iterable[Shard]) -> None:
    """Every element of every parameter of this rank is in one shard, and every shard in a parameter's own memory."""
    memory = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        for chunk in chunks
        for tensor in itertools.chain(chunk.parameters(), chunk.buffers())
    )
    starts = [start for start, _ in memory]
    covered: Counter[int] = Counter()
    for shard in shards:
        first, stop = _extent(shard.data)
        at = bisect_right(starts, first) - 1
        if at < 0 or stop > memory[at][1]:
            raise UnsupportedFormat(
                f"{WHERE}: {shard.key}: its sharded_state_dict gives a copy, not the parameter's own memory (as "
                f"Megatron-Core's GroupedMLP does). Use moe_grouped_gemm=False, or Transformer Engine's experts."
            )
        covered[starts[at]] += shard.data.numel()
    for name, parameter in itertools.chain.from_iterable(chunk.named_parameters() for chunk in chunks):
        if covered[parameter.data_ptr()] != parameter.numel():
            raise MissingTensors(
                f"{WHERE}: {name}: {covered[parameter.data_ptr()]} of its {parameter.numel()} elements are in "
                f"sharded_state_dict. Load the weights before parameters are added to the model."
            )


def _extent(data: Tensor) -> tuple[int, int]:
    """(first, one past the last) byte of a tensor in memory."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(data.shape, data.stride(), strict=True))
    return data.data_ptr(), data.data_ptr() + span * data.itemsize


# ---- out -------------------------------------------------------------------------------------------------------------


class HFWeightTuple(NamedTuple):
    """A Hugging Face tensor by its name."""

    param_name: str
    weight: Tensor


@dataclass(frozen=True)
class Export:
    """A live model about to be written as Hugging Face tensors: `entries` are (name, dtype, shape) in hub order."""

    live: LiveModel
    opened: OpenedModel
    linked: dict[str, list[Link]]
    entries: tuple[Entry, ...]

    def plan(self, target: Target | None = None) -> Plan:
        """The export proven complete: into the files of `target`, or into memory, a job per tensor."""
        whole = ((name, dtype, shape, Chunk((0,) * len(shape), shape, WHERE, 0)) for name, dtype, shape in self.entries)
        memory = Target({name: StoredTensor(name, dtype, shape, (chunk,)) for name, dtype, shape, chunk in whole}, {})
        return make_plan(
            self.live.tensors, target or memory, self.linked, padding_of(self.opened.model, self.live.tensors)
        )

    def tensor(self, job: Job, only_rank0: bool = False) -> Tensor:
        """One whole tensor on every rank, or of use on rank 0 only; on the device that the ranks speak through.

        Each element comes from the one rank that counts for it and is zero on all others: the sum is its bits.
        """
        with together(), torch.no_grad():
            device = meeting_device(self.live.device)
            dtype: torch.dtype = getattr(torch, job.dtype)
            bits = torch.zeros(job.chunk.sizes, dtype=_INTEGERS[dtype.itemsize], device=device)
            for link in job.links:
                self._place(link, bits, job)
        if ranks() > 1:
            flat = bits.view(-1).view(torch.uint8)
            dist.reduce(flat, 0) if only_rank0 else dist.all_reduce(flat)
        return bits.view(dtype)

    def _place(self, link: Link, bits: Tensor, job: Job) -> None:
        """Put this rank's part of a link into the HF tensor."""
        index = self.live.indices.get(link.source_name)
        for chunk in () if index is None else index.overlapping(link.source.bounds()):
            shard = self.live.shards[chunk.start]
            for ranges in link.source.clip(chunk.offsets, chunk.sizes):
                theirs = _inside(link.source.narrowed(ranges), chunk)
                ours = link.target.narrowed(ranges).of(bits)
                if shard.dtype == job.dtype:
                    ours.copy_(theirs.of(shard.bits()))
                else:
                    ours.copy_(_rounded(theirs.of(shard.data), job).view(bits.dtype))

    def check_replicas(self) -> None:
        """Raise `InputError` on all ranks, naming one, unless every replica has the bits of the shard that counts."""
        boxes = [(key, chunk.offsets) for key, tensor in self.live.tensors.items() for chunk in tensor.chunks]
        number = {box: at for at, box in enumerate(boxes)}
        with together():
            sums = {number[shard.key, shard.offsets]: _crc(shard) for shard in self.live.shards}
            least, most = (torch.full((len(boxes),), value, dtype=torch.int64) for value in (1 << 32, -1))
            for at, crc in sums.items():
                least[at] = most[at] = crc
            device = meeting_device(self.live.device)
            least, most = least.to(device), most.to(device)
        if ranks() > 1:
            dist.all_reduce(least, dist.ReduceOp.MIN)
            dist.all_reduce(most, dist.ReduceOp.MAX)
        if different := [boxes[at] for at in torch.nonzero(least != most).flatten().tolist()]:
            raise InputError(
                f"{WHERE}: {len(different)} shards are not the same on all ranks that hold them: "
                f"{listing(f'{key} at {offsets}' for key, offsets in different)}. The ranks were not kept in step."
            )


def open_export(
    model: Any,
    dims: Dims,
    *,
    experts_layout: str = "hub",
    dtype: str = "keep",
    source_dtypes: Mapping[str, str] | None = None,
) -> Export:
    """Plan an export; all ranks call it. Raises `TensorError`'s kinds when the model is not a complete one of `dims`.

    `dtype`: "keep" what the parameters have, bf16, fp16 or fp32, as on the command line; or "source": what the tensor
    of that name has in `source_dtypes`, and what the parameters have where it is not there.
    """
    live = read_live(model)
    with together():
        opened = open_live(live, dims, experts_layout)
        linked = links([one.equation for one in opened.stored], opened.model.sizes, live.tensors, to="hf")
        known = dict(source_dtypes or {}) if dtype == "source" else {}
        other = {name: into for name, into in linked.items() if name not in known}
        dtypes = known | target_dtypes(other, live.tensors, "keep" if dtype == "source" else dtype)
        shapes = {name: into[0].target.shape for name, into in linked.items()}
        entries = [(name, dtypes[name], shapes[name]) for name in hub_order(shapes, dims)]
        return Export(live, opened, linked, tuple(entries))


def export_weights(export: Export, *, cpu: bool = False, only_rank0: bool = False) -> Iterator[HFWeightTuple]:
    """Every tensor, whole, one at a time in hub order. All ranks go through it to the end; with `only_rank0` the others
    take part and are given nothing. The memory is that of one tensor.
    """
    for job in export.plan().jobs:
        tensor = export.tensor(job, only_rank0)
        if rank() == 0 or not only_rank0:
            yield HFWeightTuple(job.name, tensor.cpu() if cpu else tensor)


def _inside(view: View, chunk: Chunk) -> View:
    """A view of the whole tensor as one of a chunk that it lies in."""
    start = tuple(first - offset for first, offset in zip(view.start, chunk.offsets, strict=True))
    return View(chunk.sizes, start, view.axes)


def _rounded(data: Tensor, job: Job) -> Tensor:
    """In the job's dtype, rounded to nearest even; raises `InputError` when a finite value becomes infinite."""
    narrow = data.to(getattr(torch, job.dtype))
    if bool((narrow.isinf() & data.isfinite()).any()):
        raise InputError(f"{job.name}: a value does not fit {job.dtype}. Export it as fp32.")
    return narrow


def _crc(shard: Shard) -> int:
    return int(crc32(shard.bits().cpu().contiguous().numpy().data))


def _rank_path(number: int) -> Path:
    return Path(f"rank {number}")
