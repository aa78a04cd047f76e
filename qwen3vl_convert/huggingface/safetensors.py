"""The header of a safetensors file, read strictly and written as the safetensors library writes it.

A file is 8 bytes of length (little endian), a JSON header of that length, and the tensors' bytes without holes.
Headers come from strangers: nothing in one is believed before it agrees with the rest and with the file's size.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qwen3vl_convert.errors import CorruptFile, InputError
from qwen3vl_convert.strict_json import parse_object

Entry = tuple[str, str, tuple[int, ...]]
"""A tensor to be written: name, dtype (torch's name), shape."""
METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
"""What the hub's files carry; transformers refuses a file without it."""
LONGEST_HEADER = 100_000_000
_LENGTH = 8
_REMEDY = "Download or copy the file again."

# In the library's ascending order, which its writer sorts by: safetensors name, torch name, bits per element.
_DTYPES = (
    ("BOOL", "bool", 8),
    ("F4", "float4_e2m1fn_x2", 4),
    ("F6_E2M3", "float6_e2m3fn", 6),
    ("F6_E3M2", "float6_e3m2fn", 6),
    ("U8", "uint8", 8),
    ("I8", "int8", 8),
    ("F8_E5M2", "float8_e5m2", 8),
    ("F8_E4M3", "float8_e4m3fn", 8),
    ("F8_E8M0", "float8_e8m0fnu", 8),
    ("F8_E4M3FNUZ", "float8_e4m3fnuz", 8),
    ("F8_E5M2FNUZ", "float8_e5m2fnuz", 8),
    ("I16", "int16", 16),
    ("U16", "uint16", 16),
    ("F16", "float16", 16),
    ("BF16", "bfloat16", 16),
    ("I32", "int32", 32),
    ("U32", "uint32", 32),
    ("F32", "float32", 32),
    ("C64", "complex64", 64),
    ("F64", "float64", 64),
    ("I64", "int64", 64),
    ("U64", "uint64", 64),
)
_TORCH_NAME = {stored: torch for stored, torch, _ in _DTYPES}
_STORED_NAME = {torch: stored for stored, torch, _ in _DTYPES}
_BITS = {torch: bits for _, torch, bits in _DTYPES}
_RANK = {torch: rank for rank, (_, torch, _) in enumerate(_DTYPES)}


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """A tensor of a file: its bytes are [start, stop) counted from the file's beginning. `dtype` is torch's name."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A whole file's tensors, in the order of their bytes."""

    tensors: dict[str, HeaderEntry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The checked header of a file. Raises CorruptFile for contradictions, InputError if it cannot be opened."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _checked_length(file.read(_LENGTH), size, path)
            raw = file.read(length)
    except OSError as cause:
        raise InputError(
            f"{path}: cannot be read ({cause.strerror or cause}). Check the path and its rights."
        ) from None
    if len(raw) != length:
        raise CorruptFile(f"{path}: expected a header of {length} bytes, found {len(raw)}. {_REMEDY}")
    return _checked_header(raw, size, path)


def file_order(entries: Iterable[Entry]) -> list[Entry]:
    """The order in which the library lays tensors out: dtypes of wide alignment first, then by name."""
    return sorted(entries, key=lambda entry: (-_RANK[entry[1]], entry[0]))


def header_bytes(entries: Iterable[Entry], metadata: Mapping[str, str] = METADATA) -> bytes:
    """Length and header of the file that the library would write for these tensors; their bytes follow in `file_order`.

    Padded with spaces so that the tensors start at a multiple of 8.
    """
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name, dtype, shape in file_order(entries):
        stop = start + _nbytes(dtype, shape)
        table[name] = {"dtype": _STORED_NAME[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH, "little") + text


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _BITS[dtype] // 8


def _checked_length(raw: bytes, size: int, path: Path) -> int:
    if raw == b"version ":
        raise CorruptFile(f"{path}: this is a Git LFS pointer, not the file itself. Run `git lfs pull` in the folder.")
    length = int.from_bytes(raw, "little")
    if len(raw) < _LENGTH or length > size - _LENGTH:
        raise CorruptFile(
            f"{path}: expected a header of {length} bytes in a file of {size}: it is cut short. {_REMEDY}"
        )
    if length > LONGEST_HEADER:
        raise CorruptFile(f"{path}: expected a header of at most {LONGEST_HEADER} bytes, found {length}. {_REMEDY}")
    return length


def _checked_header(raw: bytes, size: int, path: Path) -> Header:
    table = parse_object(raw, f"{path}: header", CorruptFile, _REMEDY)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFile(f"{path}: __metadata__: expected text under each key, found {metadata!r:.200}. {_REMEDY}")
    first = _LENGTH + len(raw)
    entries = {name: _checked_entry(value, first, f"{path}: {name}") for name, value in table.items()}
    tensors = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_tiling(tensors, first, size, path)
    return Header(tensors, metadata)


def _checked_entry(value: Any, first: int, where: str) -> HeaderEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFile(f"{where}: expected dtype, shape and data_offsets, found {value!r:.200}. {_REMEDY}")
    stored, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(stored, str) or stored not in _TORCH_NAME:
        raise CorruptFile(f"{where}: expected a dtype that safetensors knows, found {stored!r}. {_REMEDY}")
    if not _are_counts(shape):
        raise CorruptFile(f"{where}: expected a shape of whole numbers, found {shape!r:.200}. {_REMEDY}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise CorruptFile(f"{where}: expected two data_offsets, found {offsets!r:.200}. {_REMEDY}")
    dtype, (start, stop) = _TORCH_NAME[stored], offsets
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (stop - start):
        needed = f"{stored} {tuple(shape)} needs {bits / 8 if bits % 8 else bits // 8} bytes"
        raise CorruptFile(f"{where}: {needed}, but its data_offsets {offsets} hold {stop - start}. {_REMEDY}")
    return HeaderEntry(dtype, tuple(shape), first + start, first + stop)


def _are_counts(value: Any) -> bool:
    """Whole numbers that a file can have; larger ones would make every product after them expensive."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value)
    )


def _check_tiling(tensors: Mapping[str, HeaderEntry], first: int, size: int, path: Path) -> None:
    """The tensors cover the rest of the file: nothing hides in a hole, no byte is two tensors'."""
    end, before = first, "the header"
    for name, entry in tensors.items():
        if entry.start != end:
            what = "overlaps" if entry.start < end else "leaves a hole after"
            found = f"it starts at byte {entry.start}, expected {end}"
            raise CorruptFile(f"{path}: {name}: {what} {before}: {found}. {_REMEDY}")
        end, before = entry.stop, name
    if end != size:
        what = "it is cut short" if end > size else "there are bytes that no tensor claims"
        raise CorruptFile(f"{path}: expected {end} bytes from its header, found {size}: {what}. {_REMEDY}")
