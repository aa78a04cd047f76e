"""Lay out a torch_dist checkpoint to the byte, from names and shapes alone.

<target>/latest_checkpointed_iteration.txt, latest_train_state.pt
<target>/iter_0000000/__R_0.distcp          R: the rank that would have written it
                     .metadata  metadata.json  common.pt  run_config.yaml  train_state.pt
                     hf/                    config.json and auxiliary files of the source, for the way back
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.mappings.layout import Sizes
from qwen3vl_convert.mappings.registry import names
from qwen3vl_convert.megatron.blob import object_blob, tensor_blob
from qwen3vl_convert.megatron.metadata import ChunkEntry, ObjectEntry, TensorEntry, metadata_bytes
from qwen3vl_convert.megatron.placement import Shard, shards, writers
from qwen3vl_convert.megatron.run_config import common_state, run_config_yaml, train_state
from qwen3vl_convert.megatron.stored import Stored
from qwen3vl_convert.parallel import ParallelLayout
from qwen3vl_convert.plan import Frame, Target
from qwen3vl_convert.storage import DTYPES, Chunk, StoredTensor

MEGATRON_CORE = ("any", "0.16", "0.19")
COMMON_STATE = "common_state/shard_0_1"
_ALIGN = 64
_NO_EXTRA_STATE = (
    ".router.weight",
    ".word_embeddings.weight",
    ".output_layer.weight",
    ".patch_embed.proj.weight",
    ".pos_embed.weight",
)
"""Modules that are no Transformer Engine modules."""


@dataclass(frozen=True, slots=True)
class MegatronOptions:
    """What of a written checkpoint is a choice.

    `megatron_core`: "0.16" (up to 0.18: `common.pt`), "0.19" (from there on: `common_state`) or "any", which both read.
    `iteration`: a number, or "release" for Megatron-LM. `hf_model_id`, `hf_model_revision`: where on the Hub the model
    is from, which Megatron-Bridge wants to know.
    """

    layout: ParallelLayout = field(default_factory=ParallelLayout)
    megatron_core: str = "any"
    iteration: int | str = 0
    hf_model_id: str | None = None
    hf_model_revision: str | None = None

    def __post_init__(self) -> None:
        if self.megatron_core not in MEGATRON_CORE:
            raise UsageError(f"--for-megatron-core {self.megatron_core}: expected one of {', '.join(MEGATRON_CORE)}.")
        if self.iteration != "release" and not (isinstance(self.iteration, int) and 0 <= self.iteration < 10**7):
            raise UsageError(f"--iteration {self.iteration}: expected a number from 0 to 9999999, or release.")

    @property
    def folder(self) -> str:
        return "release" if self.iteration == "release" else f"iter_{self.iteration:07d}"


@dataclass(frozen=True)
class _Item:
    """Something that one rank writes into its file: a tensor's chunk, or an object's bytes."""

    rank: int
    key: str
    shard: Shard | None
    dtype: str = ""
    content: bytes = b""


def megatron_target(
    parameters: Iterable[Stored],
    sizes: Sizes,
    dims: Dims,
    dtype_of: Callable[[str], str],
    options: MegatronOptions,
    extra_files: dict[str, bytes | Path],
) -> Target:
    """The layout of a whole checkpoint. `dtype_of` gives a stored tensor's dtype by its key.

    `extra_files`: files to put under the iteration's `hf/`, as bytes or as a path to copy.
    """
    known = list(parameters)
    state = common_state(dims, sizes, options.layout, options.iteration)
    items = [
        *_objects(known, sizes, options.layout),
        *_common_item(state, options),
        *_chunks(known, sizes, dtype_of, options),
    ]
    files = _Files(options.folder)
    for item in items:
        files.place(item)
    small = {
        f"{options.folder}/.metadata": files.metadata(
            {key: one for one in known for key in names(one.equation.megatron, sizes)}, sizes, dtype_of
        ),
        **_small_files(dims, sizes, dtype_of, state, options),
    }
    for name, content in extra_files.items():
        if isinstance(content, bytes):
            small[f"{options.folder}/hf/{name}"] = content
    copied = {f"{options.folder}/hf/{n}": c for n, c in extra_files.items() if isinstance(c, Path)}
    return files.target(small, copied)


def _chunks(
    parameters: list[Stored], sizes: Sizes, dtype_of: Callable[[str], str], options: MegatronOptions
) -> Iterator[_Item]:
    everything = [
        (replace(shard, nbytes=shard.nbytes * DTYPES[dtype].itemsize), dtype)
        for one in parameters
        for shard in shards(one, sizes, 1, options.layout)
        for dtype in [dtype_of(shard.key)]
    ]
    chosen = writers((shard for shard, _ in everything), options.layout)
    for shard, dtype in everything:
        yield _Item(chosen[shard.key, shard.offsets], shard.key, shard, dtype)


def _objects(parameters: list[Stored], sizes: Sizes, layout: ParallelLayout) -> Iterator[_Item]:
    """`_extra_state` of every module that has one in Transformer Engine: strict loaders insist on them, None satisfies
    all.
    """
    empty = object_blob([None])
    for one in parameters:
        name = one.equation.megatron.name
        if not name.endswith(".weight") or ("." + name).endswith(_NO_EXTRA_STATE):
            continue
        for key, offsets, holder in _extra_states(one, sizes, layout):
            shape = [sizes[axis] for axis in one.stack]
            at = f"{_dotted(offsets or (0,))}_{_dotted(shape or [1])}"
            yield _Item(holder, f"{key.removesuffix('weight')}_extra_state/shard_{at}", None, content=empty)


def _dotted(numbers: Iterable[int]) -> str:
    return ".".join(str(number) for number in numbers)


def _extra_states(one: Stored, sizes: Sizes, layout: ParallelLayout) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(key of the weight, index along the stacked axes, global rank) of each object of a module."""
    seen = set()
    for shard in shards(one, sizes, 1, layout):
        index = shard.offsets[: len(one.stack)]
        if (shard.key, index) not in seen:
            seen.add((shard.key, index))
            yield shard.key, index, shard.stage * layout.stage_ranks + shard.writers[0]


def _common_item(state: dict[str, Any], options: MegatronOptions) -> Iterator[_Item]:
    if options.megatron_core != "0.16":
        yield _Item(0, COMMON_STATE, None, content=object_blob([state]))


class _Files:
    """The `.distcp` files being laid out."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.ends: dict[str, int] = defaultdict(int)
        self.literals: list[tuple[str, int, bytes]] = []
        self.frames: dict[tuple[str, int], Frame] = {}
        self.chunks: dict[str, list[tuple[Chunk, ChunkEntry]]] = defaultdict(list)
        self.objects: dict[str, ObjectEntry] = {}

    def place(self, item: _Item) -> None:
        name = f"__{item.rank}_0.distcp"
        path = f"{self.folder}/{name}"
        start = -(-self.ends[path] // _ALIGN) * _ALIGN
        if item.shard is None:
            self.literals.append((path, start, item.content))
            self.objects[item.key] = ObjectEntry(name, start, len(item.content))
            self.ends[path] = start + len(item.content)
            return
        blob = tensor_blob(item.dtype, item.shard.sizes)
        chunk = Chunk(item.shard.offsets, item.shard.sizes, Path(path), start + len(blob.head))
        self.frames[path, chunk.start] = blob
        entry = ChunkEntry(item.shard.offsets, item.shard.sizes, name, start, blob.size)
        self.chunks[item.key].append((chunk, entry))
        self.ends[path] = start + blob.size

    def metadata(self, parameters: dict[str, Stored], sizes: Sizes, dtype_of: Callable[[str], str]) -> bytes:
        tensors = {}
        for key, found in self.chunks.items():
            equation = parameters[key].equation
            shape = equation.megatron.layout.shape(equation.full(sizes))
            tensors[key] = TensorEntry(dtype_of(key), shape, tuple(entry for _, entry in found))
        self.stored = {
            key: StoredTensor(key, entry.dtype, entry.shape, tuple(chunk for chunk, _ in self.chunks[key]))
            for key, entry in tensors.items()
        }
        return metadata_bytes(tensors, self.objects)

    def target(self, small: dict[str, bytes], copied: dict[str, Path]) -> Target:
        sizes = {**self.ends, **{name: len(content) for name, content in small.items()}}
        literals = (*self.literals, *((name, 0, content) for name, content in small.items()))
        sizes |= {name: path.stat().st_size for name, path in copied.items()}
        return Target(self.stored, sizes, tuple(literals), copied, self.frames)


def _small_files(
    dims: Dims, sizes: Sizes, dtype_of: Callable[[str], str], state: dict[str, Any], options: MegatronOptions
) -> dict[str, bytes]:
    """Everything but `.distcp` and `.metadata`."""
    backend: dict[str, object] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    files = run_files(dims, sizes, dtype_of("language_model.embedding.word_embeddings.weight"), options)
    if options.megatron_core != "0.19":
        backend |= {"common_backend": "torch", "common_backend_version": 1}
        files[f"{options.folder}/common.pt"] = object_blob(state)
    return {**files, f"{options.folder}/metadata.json": json.dumps(backend).encode()}


def run_files(dims: Dims, sizes: Sizes, dtype: str, options: MegatronOptions) -> dict[str, bytes]:
    """What trainers want to find beside what Megatron-Core stores: trackers, settings, how far training is."""
    step = 0 if options.iteration == "release" else int(options.iteration)
    origin = (options.hf_model_id, options.hf_model_revision)
    files = {
        "latest_checkpointed_iteration.txt": str(options.iteration).encode(),
        f"{options.folder}/train_state.pt": object_blob(train_state(step)),
        f"{options.folder}/run_config.yaml": run_config_yaml(dims, sizes, options.layout, dtype, origin),
    }
    if (
        options.iteration != "release"
    ):  # Megatron-Bridge takes its step for the folder's name, before the tracker's word
        files["latest_train_state.pt"] = object_blob(train_state(step))
    return files
