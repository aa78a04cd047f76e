"""Are a Hugging Face folder and a Megatron checkpoint the same weights? Every element of both, read from disk, bit for
bit.

No model is built. Both sides are aligned by the equations; a piece of a HF tensor is put together from the Megatron
chunks and compared with the bytes that the folder has.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import ConvertError
from qwen3vl_convert.fill import FillOptions, Progress, gather
from qwen3vl_convert.huggingface.hub import resolve
from qwen3vl_convert.model import HuggingFaceModel, MegatronModel, open_huggingface, open_megatron
from qwen3vl_convert.plan import Box, Job, Plan, Target, links, make_plan, pieces
from qwen3vl_convert.reader import read_box
from qwen3vl_convert.storage import DTYPES
from qwen3vl_convert.strided import Array, raw

_NOT_FUNCTION = ("dtype", "max_positions", "bos_token_id", "eos_token_id")
"""Sizes that do not change what a model computes, and that the formats do not all record."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A HF tensor that is not what Megatron's side says: how many elements differ, and the index of the first.

    `dtypes`: (HF, Megatron) when they differ; then the elements are not compared.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    first: tuple[int, ...]
    dtypes: tuple[str, str] | None = None

    def __str__(self) -> str:
        if self.dtypes:
            return f"{self.name}: {self.dtypes[0]} in the HF folder, {self.dtypes[1]} in the Megatron checkpoint"
        total = int(np.prod(self.shape))
        return f"{self.name}: {self.count} of {total} elements differ, the first at {list(self.first)}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer of `verify`. `settings` are facts that the two configs state differently: (HF, Megatron) by name."""

    huggingface: str
    megatron: str
    tensors: int
    elements: int
    differences: tuple[Difference, ...]
    settings: dict[str, tuple[Any, Any]]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return not self.differences and not self.settings

    def to_json(self) -> dict[str, Any]:
        return {"equal": self.equal, **asdict(self)}


def verify(
    huggingface: str | Path,
    megatron: str | Path,
    *,
    iteration: int | str | None = None,
    headless: bool = False,
    options: FillOptions | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> Verdict:
    """Compare every weight of a HF folder with a Megatron checkpoint of any layout. Raises `InputError`'s kinds."""
    theirs = open_huggingface(resolve(huggingface, weights=True).folder, headless=headless)
    layout = theirs.model.experts_layout
    ours = open_megatron(Path(megatron), iteration, theirs.model.dims, layout if layout != "none" else "hub", headless)
    plan = _plan(theirs, ours)
    tell, total, done = report or (lambda stage, done, total: None), plan.data_bytes, 0

    def progress(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell("compare", done, total)

    return Verdict(
        huggingface=str(huggingface),
        megatron=str(megatron),
        tensors=len(plan.target.tensors),
        elements=sum(tensor.numel for tensor in plan.target.tensors.values()),
        differences=tuple(_differences(plan, options or FillOptions(), progress)),
        settings=_settings(theirs.model.dims, ours),
        notes=(*theirs.check_data(), *ours.check_data(), *theirs.checkpoint.notes, *ours.checkpoint.notes),
    )


def _plan(theirs: HuggingFaceModel, ours: MegatronModel) -> Plan:
    """The conversion Megatron to HF that would have made the folder."""
    linked = links([one.equation for one in ours.stored], ours.model.sizes, ours.tensors, to="hf")
    surplus = (ours.model.padded_vocab - ours.model.dims.vocab) * ours.model.dims.hidden
    padding = {
        name: surplus for name in ours.tensors if name.endswith(("word_embeddings.weight", "output_layer.weight"))
    }
    for name, tensor in theirs.tensors.items():
        if any(link.target.shape != tensor.shape for link in linked.get(name, ())):
            raise ConvertError(f"{name}: expected {linked[name][0].target.shape}, found {tensor.shape}.")
    return make_plan(ours.tensors, Target(theirs.tensors, {}), linked, padding)


def _settings(dims: Dims, ours: MegatronModel) -> dict[str, tuple[Any, Any]]:
    """What both configs state and state differently."""
    if ours.checkpoint.config is None:
        return {}
    stated = ours.checkpoint.dims()
    pairs = {
        f.name: (getattr(dims, f.name), getattr(stated, f.name)) for f in fields(Dims) if f.name not in _NOT_FUNCTION
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _differences(plan: Plan, options: FillOptions, progress: Progress) -> list[Difference]:
    """All tensors that differ, in the order of the folder."""
    found: dict[str, Difference] = {}
    lock = threading.Lock()

    def compare(job: Job) -> None:
        for box in pieces(job.chunk, DTYPES[job.dtype].itemsize, options.piece_bytes):
            difference = _compare(plan, job, box)
            with lock:
                if difference is not None:
                    found[job.name] = _merged(found.get(job.name), difference)
                progress(int(np.prod(box[1])) * DTYPES[job.dtype].itemsize)

    with ThreadPoolExecutor(options.workers) as pool:
        for _ in pool.map(compare, plan.jobs):
            pass
    return [found[name] for name in plan.target.tensors if name in found]


def _merged(one: Difference | None, other: Difference) -> Difference:
    if one is None:
        return other
    return replace(one, count=one.count + other.count, first=min(one.first, other.first))


def _compare(plan: Plan, job: Job, box: Box) -> Difference | None:
    """One piece of a HF tensor against the same piece put together from Megatron's chunks."""
    tensor = plan.target.tensors[job.name]
    copies = list(plan.copies(job, box))
    dtypes = (tensor.dtype, copies[0].dtype)
    if dtypes[0] != dtypes[1]:
        return Difference(job.name, tensor.shape, 0, (), dtypes)
    theirs = read_box(tensor, box)
    buffer = bytearray(theirs.nbytes)
    gather(copies, job, memoryview(buffer))
    return _unequal(job.name, tensor.shape, box, theirs, raw(buffer, job.dtype).reshape(box[1]))


def _unequal(name: str, shape: tuple[int, ...], box: Box, theirs: Array, ours: Array) -> Difference | None:
    if np.array_equal(theirs, ours):
        return None
    unequal = theirs != ours
    first = np.unravel_index(int(unequal.argmax()), unequal.shape)
    index = tuple(int(i) + o for i, o in zip(first, box[0], strict=True))
    return Difference(name, shape, int(unequal.sum()), index)
