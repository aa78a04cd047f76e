r"""A blob is what torch.save writes: a zip of stored members with the pickle of a value and the bytes of its tensors.

A `.distcp` file is blobs end to end, one per chunk. Here they are written to the byte as torch 2.13 writes them, before
their data are known, and read with two small reads, without torch and without unpickling anything.

    archive/data.pkl                  the value; a tensor is a call of torch._utils._rebuild_tensor_v2 (or _v3)
    archive/.format_version           "1"       (torch 2.7 and later)
    archive/.storage_alignment        "64"      (torch 2.7 and later)
    archive/byteorder                 "little"
    archive/data/0 ...                the storages, each from a multiple of 64 bytes of the blob
    archive/version                   "3\n"
    archive/.data/serialization_id    40 digits; torch makes them from hashes, we write zeros
"""

import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import BinaryIO, NamedTuple, TypeGuard

from qwen3vl_convert.errors import CorruptFile, InputError, UnsupportedFormat
from qwen3vl_convert.megatron.pickled import Builder, Global, Instance, PersistentId, Reduce, decode, encode
from qwen3vl_convert.storage import DTYPES

_REBUILD_V2 = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_V3 = Global("torch._utils", "_rebuild_tensor_v3")
_UNTYPED = Global("torch.storage", "UntypedStorage")
_STORAGES = {
    "float64": Global("torch", "DoubleStorage"),
    "float32": Global("torch", "FloatStorage"),
    "float16": Global("torch", "HalfStorage"),
    "bfloat16": Global("torch", "BFloat16Storage"),
    "int64": Global("torch", "LongStorage"),
    "int32": Global("torch", "IntStorage"),
    "int16": Global("torch", "ShortStorage"),
    "int8": Global("torch", "CharStorage"),
    "uint8": Global("torch", "ByteStorage"),
    "bool": Global("torch", "BoolStorage"),
}
_DTYPE_OF_STORAGE = {storage: dtype for dtype, storage in _STORAGES.items()}

_LOCAL, _DESCRIPTOR, _CENTRAL = b"PK\3\4", b"PK\7\10", b"PK\1\2"
_END64, _LOCATOR, _END = b"PK\6\6", b"PK\6\7", b"PK\5\6"
_LOCAL_SIZE, _CENTRAL_SIZE, _END64_SIZE, _LOCATOR_SIZE, _END_SIZE = 30, 46, 56, 20, 22
_MAX32 = 0xFFFFFFFF
_FLAGS = 0x0808  # sizes and CRC follow the data in a descriptor; names are UTF-8
_FLAGS_EMPTY = 0x0800  # nothing follows a member without data
_STORED = 0
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class TensorValue:
    """A tensor inside a value: `data` holds its elements, row major and little endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


# --------------------------------------------------------------------------------------------------------------- write


class _Member(NamedTuple):
    name: str
    size: int
    crc: int

    @property
    def flags(self) -> int:
        return _FLAGS if self.size else _FLAGS_EMPTY


class _Placed(NamedTuple):
    """A member and where its local header begins, in bytes from the start of the blob."""

    member: _Member
    at: int


def _zip64_extra(size: int, packed: int, at: int) -> bytes:
    fields = [size, packed] if size >= _MAX32 else []
    fields += [at] if at >= _MAX32 else []
    return struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""


def _local_header(member: _Member, at: int) -> bytes:
    """The header that ends where the data begin, at a multiple of 64: an extra field "FB" fills the gap."""
    name = member.name.encode()
    extra = _zip64_extra(member.size, 0, at)  # the packed size is not known yet when torch writes this
    gap = -(at + _LOCAL_SIZE + len(name) + len(extra) + 4) % _ALIGNMENT
    extra += struct.pack("<2sH", b"FB", gap) + b"Z" * gap
    fixed = (_LOCAL, 0, member.flags, _STORED, 0, 0, 0, 0, 0, len(name), len(extra))
    return struct.pack("<4s5H3I2H", *fixed) + name + extra


def _descriptor(member: _Member, at: int) -> bytes:
    if not member.size:
        return b""
    wide = "Q" if max(member.size, at) >= _MAX32 else "I"
    return struct.pack(f"<4sI2{wide}", _DESCRIPTOR, member.crc, member.size, member.size)


def _central_entry(member: _Member, at: int) -> bytes:
    name = member.name.encode()
    extra = _zip64_extra(member.size, member.size, at)
    size = min(member.size, _MAX32)
    lengths = (len(name), len(extra), 0, 0, 0)
    fixed = struct.pack("<4s6H3I", _CENTRAL, 0, 0, member.flags, _STORED, 0, 0, member.crc, size, size)
    return fixed + struct.pack("<5H2I", *lengths, 0, min(at, _MAX32)) + name + extra


def _end(start: int, length: int, count: int) -> bytes:
    """What follows the central directory of `count` members at bytes start..start+length: both forms, always."""
    end64 = struct.pack("<4sQ2H2I4Q", _END64, 44, 0x031E, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sIQI", _LOCATOR, 0, start + length, 1)
    return end64 + locator + struct.pack("<4s4H2IH", _END, 0, 0, count, count, length, min(start, _MAX32), 0)


class _Zip:
    """Collects the bytes of an archive, `at` bytes long so far including data that are left out."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.placed: list[_Placed] = []
        self.at = 0

    def put(self, data: bytes) -> None:
        self.parts.append(data)
        self.at += len(data)

    def open(self, name: str, size: int, crc: int) -> None:
        placed = _Placed(_Member(f"archive/{name}", size, crc), self.at)
        self.placed.append(placed)
        self.put(_local_header(*placed))

    def close(self) -> None:
        self.put(_descriptor(*self.placed[-1]))

    def add(self, name: str, data: bytes) -> None:
        self.open(name, len(data), zlib.crc32(data))
        self.put(data)
        self.close()

    def begin(self, pickle: bytes) -> None:
        self.add("data.pkl", pickle)
        self.add(".format_version", b"1")
        self.add(".storage_alignment", b"64")
        self.add("byteorder", b"little")

    def finish(self) -> None:
        self.add("version", b"3\n")
        self.add(".data/serialization_id", b"0" * 40)
        start = self.at
        for placed in self.placed:
            self.put(_central_entry(*placed))
        self.put(_end(start, self.at - start, len(self.placed)))

    def take(self) -> bytes:
        taken = b"".join(self.parts)
        self.parts.clear()
        return taken


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor, in elements; a dimension without elements counts as one, as in torch."""
    return tuple(prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))


def _tensor_call(dtype: str, shape: tuple[int, ...], key: str) -> Reduce:
    """The call that makes a tensor of storage `key`, as torch pickles it; dtypes without a storage class use v3."""
    storage = _STORAGES.get(dtype, _UNTYPED)
    count = prod(shape) * (1 if dtype in _STORAGES else DTYPES[dtype].itemsize)
    place = PersistentId(("storage", storage, key, "cpu", count))
    args = (place, 0, shape, _strides(shape), False, OrderedDict[object, object]())
    return Reduce(_REBUILD_V2, args) if dtype in _STORAGES else Reduce(_REBUILD_V3, (*args, Global("torch", dtype)))


@dataclass(frozen=True, slots=True)
class Blob:
    """torch.save of one contiguous tensor, less its `nbytes` bytes of data, which lie between `head` and the tail."""

    head: bytes
    nbytes: int
    _tail: bytes
    _crc_at: tuple[int, ...]

    def tail(self, crc: int) -> bytes:
        """All that follows the data, whose CRC-32 (as of zlib.crc32) is `crc`."""
        tail = bytearray(self._tail)
        for at in self._crc_at:
            tail[at : at + 4] = crc.to_bytes(4, "little")
        return bytes(tail)

    @property
    def tail_size(self) -> int:
        return len(self._tail)

    @property
    def size(self) -> int:
        return len(self.head) + self.nbytes + len(self._tail)


@lru_cache(maxsize=4096)
def tensor_blob(dtype: str, shape: tuple[int, ...]) -> Blob:
    """The blob of a contiguous tensor of a dtype of DTYPES. Equal to torch 2.13's except for the serialization id."""
    nbytes = prod(shape) * DTYPES[dtype].itemsize
    archive = _Zip()
    archive.begin(encode(_tensor_call(dtype, shape, "0")))
    archive.open("data/0", nbytes, 0)
    head = archive.take()
    archive.at += nbytes
    archive.close()
    archive.finish()
    tail = archive.take()
    # The CRC stands in the descriptor, which begins the tail, and in the member's entry of the central directory.
    entry = tail.index(_central_entry(*archive.placed[4]))
    return Blob(head, nbytes, tail, (4, entry + 16) if nbytes else ())


class _Pickler:
    """Replaces the tensors of a value by calls with numbered storages, as torch does."""

    def __init__(self) -> None:
        self.storages: list[bytes] = []

    def plain(self, value: object) -> object:
        if isinstance(value, TensorValue):
            return self.tensor(value)
        if isinstance(value, dict):  # also an OrderedDict
            return type(value)((key, self.plain(item)) for key, item in value.items())
        if isinstance(value, list):
            return [self.plain(item) for item in value]
        if type(value) is tuple:  # and not a Global, which is one too
            return tuple(map(self.plain, value))
        if isinstance(value, Instance):
            return Instance(value.cls, self.plain(value.state), value.args)
        return value

    def tensor(self, value: TensorValue) -> Reduce:
        if len(value.data) != prod(value.shape) * DTYPES[value.dtype].itemsize:
            raise ValueError(f"{len(value.data)} bytes of data for {value.dtype} {value.shape}")
        self.storages.append(value.data)
        return _tensor_call(value.dtype, value.shape, str(len(self.storages) - 1))


def object_blob(value: object) -> bytes:
    """torch.save of what `pickled.encode` takes, plus `TensorValue`s within dicts, lists, tuples and states."""
    pickler = _Pickler()
    archive = _Zip()
    archive.begin(encode(pickler.plain(value)))
    for index, data in enumerate(pickler.storages):
        archive.add(f"data/{index}", data)
    archive.finish()
    return archive.take()


# ---------------------------------------------------------------------------------------------------------------- read


@dataclass(frozen=True, slots=True)
class TensorBlob:
    """Where the data of a tensor lie: `nbytes` from byte `data_start` of the file, row major and little endian."""

    dtype: str
    shape: tuple[int, ...]
    data_start: int
    nbytes: int


class _Found(NamedTuple):
    """A member as the central directory has it; `at` is its local header, in bytes from the start of the blob."""

    name: str
    at: int
    size: int


class _Window:
    """A blob within a file. Its first and last bytes are fetched at once, as they hold all but the data."""

    HEAD, TAIL = 1024, 2048

    def __init__(self, read: Callable[[int, int], bytes], length: int, where: str) -> None:
        self.read = read
        self.length = length
        self.where = where
        self.tail_at = max(0, length - self.TAIL)
        self.tail = self.fetch(self.tail_at, length - self.tail_at)
        self.head = self.tail if self.tail_at == 0 else self.fetch(0, min(self.HEAD, self.tail_at))

    def fetch(self, start: int, count: int) -> bytes:
        data = self.read(start, count)
        if len(data) != count:
            raise self.corrupt(f"the file ends before byte {start + count} of the blob")
        return data

    def bytes(self, start: int, count: int) -> bytes:
        """Bytes start..start+count of the blob, checked against its length."""
        if start < 0 or count < 0 or start + count > self.length:
            raise self.corrupt(f"it refers to bytes {start} to {start + count} of {self.length}")
        if start + count <= len(self.head):
            return self.head[start : start + count]
        if start >= self.tail_at:
            return self.tail[start - self.tail_at : start - self.tail_at + count]
        return self.fetch(start, count)

    def fields(self, format: str, start: int) -> tuple[int, ...]:
        return struct.unpack(format, self.bytes(start, struct.calcsize(format)))

    def corrupt(self, what: str) -> CorruptFile:
        return CorruptFile(f"{self.where}: not a whole torch.save archive: {what}. Fetch or write the file again.")


# A blob of one tensor has seven members, one of an object two or three per tensor. Large enough for any of those.
_MOST_DIRECTORY = 1 << 24
_MOST_PICKLE = 1 << 28


def _directory(window: _Window) -> tuple[int, int, int]:
    """Start, length and number of members of the central directory."""
    end_at = window.length - _END_SIZE
    signature, disks, count, length, start, comment = struct.unpack("<4sI2xH2IH", window.bytes(end_at, _END_SIZE))
    if signature != _END or disks or comment:
        raise window.corrupt("it does not end in a zip directory")
    locator_at = end_at - _LOCATOR_SIZE
    if locator_at >= 0 and window.bytes(locator_at, 4) == _LOCATOR:
        (end_at,) = window.fields("<8xQ4x", locator_at)
        signature, count, length, start = struct.unpack("<4s28xQ2Q", window.bytes(end_at, _END64_SIZE))
        if signature != _END64:
            raise window.corrupt("its zip64 directory is not where it says")
    if start + length != end_at or length > _MOST_DIRECTORY:
        raise window.corrupt(f"a directory of bytes {start} to {start + length}, expected it to end at {end_at}")
    return start, length, count


def _members(window: _Window) -> dict[str, _Found]:
    """The members by their name within the archive, whose own name stands before the first slash."""
    start, length, count = _directory(window)
    directory = window.bytes(start, length)
    found: dict[str, _Found] = {}
    at = 0
    while at < length:
        member, at = _entry(window, directory, at, start)
        if member.name in found:
            raise window.corrupt(f"two members {member.name!r}")
        found[member.name] = member
    if len(found) != count:
        raise window.corrupt(f"{len(found)} members in a directory of {count}")
    return found


def _entry(window: _Window, directory: bytes, at: int, limit: int) -> tuple[_Found, int]:
    """The member at byte `at` of the directory, and where the next one begins. `limit` bytes precede the directory."""
    fixed = directory[at : at + _CENTRAL_SIZE]
    if len(fixed) != _CENTRAL_SIZE or fixed[:4] != _CENTRAL:
        raise window.corrupt("a damaged directory entry")
    flags, method, packed, size, name_size, extra_size, note_size, header_at = struct.unpack("<8x2H8x2I3H8xI", fixed)
    name_at = at + _CENTRAL_SIZE
    extra_at = name_at + name_size
    end = extra_at + extra_size + note_size
    if end > len(directory):
        raise window.corrupt("a damaged directory entry")
    name = directory[name_at:extra_at].decode("utf-8", "replace").partition("/")[2]
    size, packed, header_at = _widened(window, directory[extra_at : extra_at + extra_size], (size, packed, header_at))
    if method != _STORED or packed != size or flags & 1:
        raise window.corrupt(f"the member {name!r} is compressed or encrypted, which torch.save never does")
    if header_at + _LOCAL_SIZE + size > limit:
        raise window.corrupt(f"the member {name!r} of {size} bytes at {header_at} does not fit into it")
    return _Found(name, header_at, size), end


def _widened(window: _Window, extra: bytes, values: tuple[int, int, int]) -> tuple[int, int, int]:
    """`values` with those that are 0xFFFFFFFF taken from the zip64 field of `extra`, where they stand in order."""
    if _MAX32 not in values:
        return values
    wide = _zip64_field(extra)
    if len(wide) < 8 * values.count(_MAX32):
        raise window.corrupt("a member of more than 4 GiB without its size")
    numbers = iter(struct.unpack_from(f"<{values.count(_MAX32)}Q", wide))
    first, second, third = (next(numbers) if value == _MAX32 else value for value in values)
    return first, second, third


def _zip64_field(extra: bytes) -> bytes:
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            return extra[4 : 4 + size]
        extra = extra[4 + size :]
    return b""


def _data_start(window: _Window, member: _Found) -> int:
    """Where the data of a member begin, in bytes from the start of the blob."""
    signature, name_size, extra_size = struct.unpack("<4s22x2H", window.bytes(member.at, _LOCAL_SIZE))
    start = member.at + _LOCAL_SIZE + name_size + extra_size
    if signature != _LOCAL or start + member.size > window.length:
        raise window.corrupt(f"the member {member.name!r} is not where the directory says")
    return int(start)


def _member(window: _Window, members: Mapping[str, _Found], name: str) -> _Found:
    if name not in members:
        raise window.corrupt(f"the member {name!r} is missing")
    return members[name]


def _content(window: _Window, members: Mapping[str, _Found], name: str) -> bytes:
    member = _member(window, members, name)
    if member.size > _MOST_PICKLE:
        raise window.corrupt(f"the member {name!r} has {member.size} bytes")
    return window.bytes(_data_start(window, member), member.size)


def _check_byte_order(window: _Window, members: Mapping[str, _Found]) -> None:
    # Absent before torch 2.1, which wrote the byte order of the machine; Megatron has only run on little endian ones.
    if "byteorder" in members and (order := _content(window, members, "byteorder")) != b"little":
        raise UnsupportedFormat(f"{window.where}: byte order {order[:20]!r}, not little. Save it on x86 or Arm.")


class _Tensor(NamedTuple):
    """A tensor as data.pkl describes it: `start` bytes into the storage of `storage_size` bytes named `key`."""

    dtype: str
    shape: tuple[int, ...]
    key: str
    start: int
    nbytes: int
    storage_size: int


def _are_sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    """Whether it is a tuple of counts as they can occur: whole numbers of 0 to 2**63 - 1."""
    return type(value) is tuple and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _tensor(version: int, args: tuple[object, ...]) -> _Tensor:
    """What the arguments of _rebuild_tensor_v2 or _v3 say: checked against each other and for contiguity."""
    if len(args) < (6 if version == 2 else 7):
        raise CorruptFile(f"data.pkl: a tensor described by {len(args)} values. Fetch or write the file again.")
    place, start, shape, strides = args[:4]
    dtype, key, storage_size = _storage(place, args[6] if version == 3 else None)
    if type(start) is not int or start < 0 or not _are_sizes(shape) or not _are_sizes(strides):
        raise CorruptFile("data.pkl: a tensor whose shape or strides are no numbers. Fetch or write the file again.")
    itemsize = DTYPES[dtype].itemsize
    found = _Tensor(dtype, shape, key, start * itemsize, prod(shape) * itemsize, storage_size)
    if found.nbytes and not _is_contiguous(shape, strides):
        raise UnsupportedFormat(f"data.pkl: a tensor {shape} with strides {strides}. Save it contiguous.")
    if found.start + found.nbytes > storage_size:
        raise CorruptFile(
            f"data.pkl: a tensor {dtype} {shape} from byte {found.start} of a storage of {storage_size} bytes. "
            "Fetch or write the file again."
        )
    return found


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """A dimension of one element may have any stride."""
    return len(shape) == len(strides) and all(
        size == 1 or stride == expected for size, stride, expected in zip(shape, strides, _strides(shape), strict=True)
    )


def _storage(place: object, dtype: object) -> tuple[str, str, int]:
    """What elements, key and size in bytes a tensor's storage has; `dtype` is given where the storage has none."""
    fields = place.value if isinstance(place, PersistentId) else None
    if type(fields) is not tuple or len(fields) != 5 or fields[0] != "storage" or type(fields[1]) is not Global:
        raise CorruptFile("data.pkl: a tensor without a storage. Fetch or write the file again.")
    _, kind, key, _, count = fields
    found = _DTYPE_OF_STORAGE.get(kind) if kind != _UNTYPED or type(dtype) is not Global else dtype.name
    if found is None or found not in DTYPES:
        raise UnsupportedFormat(f"data.pkl: a tensor of {kind} {dtype or ''}, expected one of {', '.join(DTYPES)}.")
    if type(key) is not str or not _are_sizes((count,)):
        raise CorruptFile(f"data.pkl: a storage {key!r} of {count!r} elements. Fetch or write the file again.")
    return found, key, count * (1 if kind == _UNTYPED else DTYPES[found].itemsize)


_BUILD_TENSOR: dict[Global, Builder] = {_REBUILD_V2: partial(_tensor, 2), _REBUILD_V3: partial(_tensor, 3)}


@lru_cache(maxsize=4096)
def _described(pickle: bytes) -> _Tensor:
    """The one tensor that `pickle` describes. Cached because the blobs of a checkpoint have few distinct shapes."""
    value = decode(pickle, "data.pkl", _BUILD_TENSOR)
    if isinstance(value, _Tensor):
        return value
    raise UnsupportedFormat("data.pkl: something else than one tensor, which a chunk of a tensor must be.")


def _place(window: _Window, members: Mapping[str, _Found], tensor: _Tensor) -> int:
    """Where the elements of `tensor` begin, in bytes from the start of the blob."""
    member = _member(window, members, f"data/{tensor.key}")
    if member.size != tensor.storage_size:
        raise window.corrupt(f"a storage of {member.size} bytes that data.pkl calls {tensor.storage_size}")
    return _data_start(window, member) + tensor.start


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Puts `where` before the message of an error that does not know it, as cached functions do not."""
    try:
        yield
    except InputError as error:
        raise error if str(error).startswith(where) else type(error)(f"{where}: {error}") from None


def read_tensor_blob(file: int | BinaryIO, offset: int, length: int, where: str) -> TensorBlob:
    """The tensor of the blob at bytes offset..offset+length of `file`, a descriptor or a binary file that can seek.

    Reads at most a few KiB, never the data. `where` names the file in errors. Raises CorruptFile for anything that is
    not one whole uncompressed archive, UnsafeFile for a foreign global, UnsupportedFormat for a tensor that is not
    contiguous, has a dtype outside DTYPES or another byte order. A descriptor may be shared between threads.
    """
    where = f"{where}: blob at byte {offset}"
    read = _pread(file) if isinstance(file, int) else _seek_and_read(file)
    window = _Window(lambda start, count: read(offset + start, count), length, where)
    members = _members(window)
    _check_byte_order(window, members)
    with _naming(where):
        tensor = _described(_content(window, members, "data.pkl"))
    return TensorBlob(tensor.dtype, tensor.shape, offset + _place(window, members, tensor), tensor.nbytes)


def _pread(descriptor: int) -> Callable[[int, int], bytes]:
    return lambda start, count: os.pread(descriptor, count, start)


def _seek_and_read(file: BinaryIO) -> Callable[[int, int], bytes]:
    def read(start: int, count: int) -> bytes:
        file.seek(start)
        return file.read(count)

    return read


def read_object_blob(data: bytes, where: str) -> object:
    """The value in the blob `data`: what `pickled.decode` returns, with a `TensorValue` for each tensor.

    Tensors that have no TensorValue (not contiguous, exotic dtype) stay the Reduce that describes them. Raises as
    `read_tensor_blob` does.
    """
    window = _Window(lambda start, count: data[start : start + count], len(data), where)
    members = _members(window)
    _check_byte_order(window, members)
    builders = {name: partial(_value, window, members, name) for name in _BUILD_TENSOR}
    with _naming(where):
        return decode(_content(window, members, "data.pkl"), f"{where}: data.pkl", builders)


def _value(window: _Window, members: Mapping[str, _Found], name: Global, args: tuple[object, ...]) -> object:
    try:
        tensor = _tensor(2 if name == _REBUILD_V2 else 3, args)
    except UnsupportedFormat:
        return Reduce(name, args)
    return TensorValue(tensor.dtype, tensor.shape, window.bytes(_place(window, members, tensor), tensor.nbytes))
