"""`.metadata`: which tensors and objects a torch_dist checkpoint has, and in which file and bytes each chunk lies.

It is a pickle of torch.distributed.checkpoint's Metadata. What is read is checked before anybody uses it: names of
files stay in the folder, bytes lie within their file and belong to one chunk each, chunks tile their tensor exactly.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import TypeGuard

from qwen3vl_convert.errors import CorruptFile, InputError, UnsafeFile, UnsupportedFormat
from qwen3vl_convert.megatron.pickled import SIZE, Global, Instance, Reduce, decode, encode
from qwen3vl_convert.storage import DTYPES

_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA = Global(_MODULE, "Metadata")
_METADATA_0_15 = Global("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata")
_TENSOR = Global(_MODULE, "TensorStorageMetadata")
_BYTES = Global(_MODULE, "BytesStorageMetadata")
_PROPERTIES = Global(_MODULE, "TensorProperties")
_MEMORY_FORMAT = Global(_MODULE, "_MEM_FORMAT_ENCODING")
_CHUNK = Global(_MODULE, "ChunkStorageMetadata")
_INDEX = Global(_MODULE, "MetadataIndex")
_STORAGE = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_GET_LAYOUT = Global("torch.serialization", "_get_layout")
_ANEW = "Fetch or write the checkpoint again."

# In elements, one entry per dimension.
Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """A box of a tensor, in elements, and its blob: `length` bytes from byte `offset` of `relative_path`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    relative_path: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor; `dtype` is a key of DTYPES and `chunks` tile `shape`."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[ChunkEntry, ...]


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """The blob of a pickled object: `length` bytes from byte `offset` of `relative_path`."""

    relative_path: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a `.metadata` says. `flattened` are tensors that an old Megatron (up to 0.15) stored in another shape.

    `optimizer` are the keys of optimizer state: named, and not looked into, for they follow rules of their own.
    """

    tensors: dict[str, TensorEntry]
    objects: dict[str, ObjectEntry]
    version: str | None
    flattened: frozenset[str]
    optimizer: tuple[str, ...] = ()


_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")

# ---------------------------------------------------------------------------------------------------------------- read


def read_metadata(path: Path) -> Metadata:
    """The `.metadata` at `path`, checked against the files beside it, whose contents are not read.

    Raises UnsafeFile for a global or a path from outside a checkpoint, UnsupportedFormat for a dtype or layout that we
    do not know, CorruptFile for everything else that cannot be true: a chunk without storage, outside of its tensor or
    its file, over another one, or missing. Raises InputError if the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). A torch_dist checkpoint needs it.") from None
    return _Reader(path).metadata(decode(data, str(path)))


# Where blobs lie: file, first byte, length.
_Blob = tuple[str, int, int]
_Offsets = tuple[int, ...]


class _Reader:
    """Turns what the pickle holds into entries. Every access says what it expects."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blobs: dict[tuple[str, _Offsets | None], _Blob] = {}

    def metadata(self, value: object) -> Metadata:
        fields = self.fields(value, _METADATA_0_15 if _is(value, _METADATA_0_15) else _METADATA)
        items = self.mapping(fields, "state_dict_metadata")
        self.blobs = self.storage(self.mapping(fields, "storage_data"))
        names = [self.text(name) for name in items]
        optimizer = [name for name in names if _OPTIMIZER.match(name)]
        kept = [name for name in names if not _OPTIMIZER.match(name)]
        tensors = {name: self.tensor(name, items[name]) for name in kept if _is(items[name], _TENSOR)}
        objects = {name: self.stored_object(name, items[name]) for name in kept if name not in tensors}
        self.check_blobs(tensors, objects)
        version = fields.get("version")
        version = version if isinstance(version, str) else None
        return Metadata(tensors, objects, version, _flattened(fields), tuple(optimizer))

    def corrupt(self, what: str) -> CorruptFile:
        return CorruptFile(f"{self.path}: {what}. {_ANEW}")

    def fields(self, value: object, cls: Global) -> dict[str, object]:
        """The attributes of an instance of `cls`."""
        if not _is(value, cls) or not isinstance(value.state, dict):
            raise self.corrupt(f"{_kind(value)} where a {cls.name} belongs")
        return value.state

    def mapping(self, fields: Mapping[str, object], name: str) -> dict[object, object]:
        value = fields.get(name)
        if isinstance(value, dict):
            return value
        raise self.corrupt(f"{_kind(value)} where the dict {name} belongs")

    def text(self, value: object) -> str:
        if type(value) is not str:
            raise self.corrupt(f"{_kind(value)} where a name belongs")
        if not value.isprintable():  # a NUL cuts a path short, an escape sequence rewrites a terminal
            raise UnsafeFile(f"{self.path}: the name {value[:200]!r} has control characters. Do not use the file.")
        return value

    def count(self, value: object, of: str) -> int:
        if _is_count(value):
            return value
        raise self.corrupt(f"{of}: {str(value)[:40]!r} where a number of 0 or more belongs")

    def counts(self, value: object, of: str) -> tuple[int, ...]:
        if type(value) is tuple and all(map(_is_count, value)):
            return value
        raise self.corrupt(f"{of}: {_kind(value)} where numbers of 0 or more belong")

    def storage(self, items: Mapping[object, object]) -> dict[tuple[str, _Offsets | None], _Blob]:
        """Where each chunk or object is stored, by name and offsets (None for an object)."""
        blobs: dict[tuple[str, _Offsets | None], _Blob] = {}
        for index, info in items.items():
            where = self.fields(index, _INDEX)
            name, offsets = self.text(where.get("fqn")), where.get("offset")
            key = name, None if offsets is None else self.counts(offsets, name)
            if key in blobs:
                raise self.corrupt(f"{_chunk_name(*key)} is stored twice")
            blobs[key] = self.blob(name, self.fields(info, _STORAGE))
        return blobs

    def blob(self, name: str, fields: Mapping[str, object]) -> _Blob:
        if fields.get("transform_descriptors"):
            raise UnsupportedFormat(f"{self.path}: {name} is stored transformed (compressed). Save it without.")
        file = self.text(fields.get("relative_path"))
        return file, self.count(fields.get("offset"), name), self.count(fields.get("length"), name)

    def located(self, name: str, offsets: _Offsets | None) -> _Blob:
        found = self.blobs.get((name, offsets))
        if found is None:
            raise self.corrupt(f"{_chunk_name(name, offsets)} has no storage")
        return found

    def stored_object(self, name: str, value: object) -> ObjectEntry:
        if not _is(value, _BYTES):
            raise self.corrupt(f"{name}: {_kind(value)} where a tensor or object belongs")
        return ObjectEntry(*self.located(name, None))

    def tensor(self, name: str, value: object) -> TensorEntry:
        fields = self.fields(value, _TENSOR)
        dtype, shape = self.dtype(name, fields.get("properties")), self.counts(fields.get("size"), name)
        boxes = self.boxes(name, fields.get("chunks"))
        if problem := tiling_problem(shape, boxes):
            raise self.corrupt(f"{name} {shape}: {problem}")
        itemsize = DTYPES[dtype].itemsize
        return TensorEntry(dtype, shape, tuple(self.chunk(name, box, itemsize) for box in boxes))

    def chunk(self, name: str, box: Box, itemsize: int) -> ChunkEntry:
        offsets, sizes = box
        file, start, length = self.located(name, offsets)
        if length < (needed := prod(sizes) * itemsize):
            raise self.corrupt(f"{_chunk_name(name, offsets)} lies in {length} bytes, and has {needed} bytes of data")
        return ChunkEntry(offsets, sizes, file, start, length)

    def boxes(self, name: str, chunks: object) -> list[Box]:
        if not isinstance(chunks, list):
            raise self.corrupt(f"{name}: {_kind(chunks)} where the list of chunks belongs")
        fields = [self.fields(chunk, _CHUNK) for chunk in chunks]
        return [(self.counts(chunk.get("offsets"), name), self.counts(chunk.get("sizes"), name)) for chunk in fields]

    def dtype(self, name: str, properties: object) -> str:
        state = properties.state if _is(properties, _PROPERTIES) else None
        found, layout = state[:2] if isinstance(state, tuple) and len(state) >= 2 else (None, None)
        if type(found) is not Global:
            raise self.corrupt(f"{name}: a tensor without a dtype")
        if found.module != "torch" or found.name not in DTYPES:
            raise UnsupportedFormat(f"{self.path}: {name} is of dtype {found}, expected one of {', '.join(DTYPES)}.")
        if not isinstance(layout, Reduce) or layout.callable != _GET_LAYOUT or layout.args != ("torch.strided",):
            raise UnsupportedFormat(f"{self.path}: {name} is sparse, which no weight of this model is.")
        return found.name

    # Against the files.

    def check_blobs(self, tensors: Mapping[str, TensorEntry], objects: Mapping[str, ObjectEntry]) -> None:
        """All blobs lie in files of the folder, and no two of them share a byte."""
        spans: dict[str, list[tuple[int, int, str]]] = {}
        for label, file, offset, length in _spans(tensors, objects):
            spans.setdefault(file, []).append((offset, offset + length, label))
        for file, found in spans.items():
            size = self.size_of(file)
            found.sort()
            for (_, end, before), (start, _, after) in pairwise(found):
                if start < end:
                    raise self.corrupt(f"{before} and {after} share bytes {start} to {end} of {file}")
            if found[-1][1] > size:
                raise self.corrupt(f"{found[-1][2]} ends at byte {found[-1][1]} of {file}, which has {size}")

    def size_of(self, file: str) -> int:
        """Size in bytes of a file beside `.metadata`; refuses names and links that lead out of the folder."""
        if file in ("", ".", "..") or "/" in file or "\\" in file or len(file.encode()) > 255:
            raise UnsafeFile(f"{self.path}: the path {file[:200]!r} is no name of a file in its folder. Do not use it.")
        found = self.path.parent / file
        if found.is_symlink() and found.resolve().parent != self.path.parent.resolve():
            raise UnsafeFile(f"{found}: a link out of the checkpoint, to {found.resolve()}. Copy the file instead.")
        if not found.is_file():
            raise self.corrupt(f"names the file {file!r}, which is not there")
        return found.stat().st_size


def _is(value: object, cls: Global) -> TypeGuard[Instance]:
    return type(value) is Instance and value.cls == cls


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 63


def _kind(value: object) -> str:
    """What a value is, for messages; never its content, which may be endless."""
    if isinstance(value, Instance):
        return f"a {value.cls.name}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _chunk_name(name: str, offsets: _Offsets | None) -> str:
    return name if offsets is None else f"{name} chunk {offsets}"


def _spans(
    tensors: Mapping[str, TensorEntry], objects: Mapping[str, ObjectEntry]
) -> Iterator[tuple[str, str, int, int]]:
    """Label, file, first byte and length of every blob."""
    for name, entry in objects.items():
        yield name, entry.relative_path, entry.offset, entry.length
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            yield _chunk_name(name, chunk.offsets), chunk.relative_path, chunk.offset, chunk.length


def _flattened(fields: Mapping[str, object]) -> frozenset[str]:
    """Keys of mcore_data that carry a shape to go back to (`nd_reformulated_orig_global_shape`)."""
    data = fields.get("mcore_data")
    if not isinstance(data, dict):
        return frozenset()
    return frozenset(key for key, value in data.items() if isinstance(key, str) and value)


# -------------------------------------------------------------------------------------------------------------- tiling


# How often a chunk may be looked at on average, where chunks are no grid. Only a made-up table needs more.
_MOST_VISITS = 50


def tiling_problem(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """Why `boxes` do not tile a tensor of `shape` exactly; None if they do. Empty boxes count for nothing."""
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(shape):
            return f"chunk {offsets} of {sizes} has another number of dimensions"
        if any(start + size > limit for start, size, limit in zip(offsets, sizes, shape, strict=True)):
            return f"chunk {offsets} of {sizes} is not within it"
    filled = [box for box in boxes if 0 not in box[1]]
    if not _is_grid(shape, filled) and (problem := _overlap(filled, len(shape))):
        return problem
    # They are within the tensor and disjoint, so they tile it exactly if they have as many elements as it.
    found, expected = sum(prod(sizes) for _, sizes in filled), prod(shape)
    if found == expected:
        return None
    return f"its chunks have {found} elements of {expected}{_missing_cell(shape, filled)}"


def _missing_cell(shape: tuple[int, ...], boxes: Sequence[Box]) -> str:
    """Says where in the grid of the offsets that occur the first chunk is missing, if that is what is wrong."""
    there = {offsets for offsets, _ in boxes}
    grid = product(*(sorted({0, *(offsets[dim] for offsets in there)}) for dim in range(len(shape))))
    missing = next((cell for cell in grid if cell not in there), None)
    return "" if missing is None else f"; there is none at {missing}"


def _is_grid(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Whether each box is one cell of a grid, and no cell occurs twice. Then no two boxes can overlap."""
    for dim in range(len(shape)):
        starts = sorted({offsets[dim] for offsets, _ in boxes})
        ends = dict(pairwise([*starts, shape[dim]]))
        if any(offsets[dim] + sizes[dim] > ends[offsets[dim]] for offsets, sizes in boxes):
            return False
    return len({offsets for offsets, _ in boxes}) == len(boxes)


def _overlap(boxes: Sequence[Box], rank: int) -> str | None:
    """Two boxes that overlap, if there are any, whatever their arrangement."""
    try:
        return _shared(boxes, 0, rank, iter(range(_MOST_VISITS * (len(boxes) + 1000))))
    except StopIteration:
        return "its chunks are of no regular kind, and too many to check"


def _shared(boxes: Sequence[Box], dim: int, rank: int, budget: Iterator[int]) -> str | None:
    """Two boxes that overlap from dimension `dim` on, given that all overlap in the dimensions before it."""
    if len(boxes) < 2:
        return None
    if dim == rank:
        (first, _), (second, sizes) = boxes[:2]
        return f"chunk {second} of {sizes} overlaps chunk {first}"
    for slab in _slabs(boxes, dim):
        for _ in slab:
            next(budget)
        if problem := _shared(slab, dim + 1, rank, budget):
            return problem
    return None


def _slabs(boxes: Sequence[Box], dim: int) -> Iterator[list[Box]]:
    """The boxes that cover each start of a box in dimension `dim`. Of two that overlap, one starts within the other."""
    starting: dict[int, list[Box]] = {}
    for box in boxes:
        starting.setdefault(box[0][dim], []).append(box)
    covering: list[Box] = []
    for start in sorted(starting):
        covering = [box for box in covering if box[0][dim] + box[1][dim] > start] + starting[start]
        yield covering


# --------------------------------------------------------------------------------------------------------------- write


def metadata_bytes(tensors: Mapping[str, TensorEntry], objects: Mapping[str, ObjectEntry]) -> bytes:
    """The `.metadata` of these entries, in their order, as torch 2.11 to 2.13 and Megatron-Core load it.

    The path of the checkpoint and the random id that torch adds are left out: equal entries give equal bytes. Nothing
    is checked; what a plan proves is not proven again here.
    """
    state = {
        "state_dict_metadata": {
            **{name: _tensor_metadata(entry) for name, entry in tensors.items()},
            **{name: Instance(_BYTES) for name in objects},
        },
        "planner_data": None,
        "storage_data": dict(_storage_data(tensors, objects)),
        "storage_meta": None,
        "version": "1.0.0",
    }
    return encode(Instance(_METADATA, state), protocol=4)


def _size(sizes: tuple[int, ...]) -> Reduce:
    return Reduce(SIZE, (sizes,))


@lru_cache
def _properties(dtype: str) -> Instance:
    layout, memory_format = Reduce(_GET_LAYOUT, ("torch.strided",)), Reduce(_MEMORY_FORMAT, (0,))
    # dtype, layout, requires_grad, memory format (contiguous), pin_memory
    return Instance(_PROPERTIES, (Global("torch", dtype), layout, False, memory_format, False))


def _tensor_metadata(entry: TensorEntry) -> Instance:
    chunks = [
        Instance(_CHUNK, {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)}) for chunk in entry.chunks
    ]
    return Instance(_TENSOR, {"properties": _properties(entry.dtype), "size": _size(entry.shape), "chunks": chunks})


def _storage_data(
    tensors: Mapping[str, TensorEntry], objects: Mapping[str, ObjectEntry]
) -> Iterator[tuple[Instance, Instance]]:
    for name, entry in objects.items():
        yield Instance(_INDEX, {"fqn": name, "index": None}), _storage_info(entry)
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            index = {"fqn": name, "index": None, "offset": _size(chunk.offsets)}
            yield Instance(_INDEX, index), _storage_info(chunk)


def _storage_info(entry: ChunkEntry | ObjectEntry) -> Instance:
    where = {"relative_path": entry.relative_path, "offset": entry.offset, "length": entry.length}
    return Instance(_STORAGE, where)
