"""A Hugging Face folder as a checkpoint: its tensors under the hub's names, where their bytes lie, what travels along.

Everything is read from headers and checked against the index; the plan decides later whether the
tensors are the model's.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_convert.dims import CONFIG_FILE, Dims, read_config
from qwen3vl_convert.errors import (
    DuplicateTensors,
    InputError,
    MissingTensors,
    UnknownTensors,
    UnsupportedFormat,
    listing,
)
from qwen3vl_convert.huggingface.experts import experts_layout
from qwen3vl_convert.huggingface.files import INDEX_FILE, folder_files
from qwen3vl_convert.huggingface.foreign import (
    canonical,
    naming_of,
    refuse_quantised_config,
    refuse_quantised_tensors,
)
from qwen3vl_convert.huggingface.safetensors import Header, HeaderEntry, read_header
from qwen3vl_convert.storage import WEIGHT_DTYPES, Chunk, StoredTensor

__all__ = ["HuggingFaceCheckpoint", "experts_layout", "read_folder"]


@dataclass(frozen=True, slots=True)
class HuggingFaceCheckpoint:
    """A folder whose files agree with each other.

    `tensors`, `order` and `shard_of` use the hub's names, in order of file and then of bytes; `total_size` is in bytes.
    `auxiliary` are the files to copy as they are; `notes` say what a user should know, one sentence each.
    """

    folder: Path
    config: dict[str, Any]
    dims: Dims
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    auxiliary: tuple[Path, ...]
    prefix: str
    order: tuple[str, ...]
    shard_of: dict[str, str]
    total_size: int
    notes: tuple[str, ...]


def read_folder(path: Path) -> HuggingFaceCheckpoint:
    """Reads config.json and every header of a folder. Raises InputError's kinds; see there."""
    files = folder_files(path)
    config = read_config(path)
    refuse_quantised_config(config, str(path / CONFIG_FILE))
    dims = Dims.from_config(config, str(path / CONFIG_FILE))
    headers = {file: read_header(file) for file in files.weights}
    entries = _one_table(headers)
    if files.index is not None:
        _check_index(files.index, {name: file.name for name, (file, _) in entries.items()}, path)
    dtypes = {name: entry.dtype for name, (_, entry) in entries.items()}
    _refuse_unreadable(dtypes, headers, path)
    prefix = naming_of(entries, str(path))
    tensors = {}
    for name, (file, entry) in entries.items():
        tensors[canonical(name)] = _stored(canonical(name), file, entry)
    return HuggingFaceCheckpoint(
        folder=path,
        config=config,
        dims=dims,
        tensors=tensors,
        files=files.weights,
        auxiliary=files.auxiliary,
        prefix=prefix,
        order=tuple(tensors),
        shard_of={name: tensor.chunks[0].file.name for name, tensor in tensors.items()},
        total_size=sum(tensor.nbytes for tensor in tensors.values()),
        notes=files.notes + _dtype_notes(dtypes, dims.dtype),
    )


def _one_table(headers: Mapping[Path, Header]) -> dict[str, tuple[Path, HeaderEntry]]:
    """All tensors with their file, in order of file and then of bytes. Raises DuplicateTensors, naming both files."""
    table: dict[str, tuple[Path, HeaderEntry]] = {}
    for file, header in headers.items():
        for name, entry in header.tensors.items():
            if name in table:
                raise DuplicateTensors(
                    f"{file.parent}: {name}: expected in one file, found in {table[name][0].name} and {file.name}. "
                    "Remove the file that is not this model's."
                )
            table[name] = (file, entry)
    return table


def _check_index(index: Mapping[str, str], found: Mapping[str, str], folder: Path) -> None:
    """The index and the files say the same. Both maps: tensor to file name."""
    remedy = "The index and the files are not from the same save; download the folder again."
    if missing := [name for name in index if name not in found]:
        files = listing({index[name] for name in missing}, 3)
        raise MissingTensors(f"{folder}: {INDEX_FILE} expects {listing(missing)} in {files}, found none. {remedy}")
    if unknown := [name for name in found if name not in index]:
        files = listing({found[name] for name in unknown}, 3)
        raise UnknownTensors(f"{folder}: found {listing(unknown)} in {files}, not in {INDEX_FILE}. {remedy}")
    for name, file in index.items():
        if found[name] != file:
            raise InputError(f"{folder}: {name}: {INDEX_FILE} expects it in {file}, found in {found[name]}. {remedy}")


def _refuse_unreadable(dtypes: Mapping[str, str], headers: Mapping[Path, Header], folder: Path) -> None:
    refuse_quantised_tensors(dtypes, str(folder))
    for file, header in headers.items():
        if header.metadata.get("format") == "mlx":
            raise UnsupportedFormat(
                f"{file}: the file is MLX's, whose convolutions lie otherwise. Use the original model."
            )
    if strange := [name for name, dtype in dtypes.items() if dtype not in WEIGHT_DTYPES]:
        expected, found = ", ".join(WEIGHT_DTYPES), f"{strange[0]} is {dtypes[strange[0]]}"
        raise UnsupportedFormat(
            f"{folder}: {listing(strange)}: expected {expected}; {found}. Save the weights in one of these."
        )


def _stored(name: str, file: Path, entry: HeaderEntry) -> StoredTensor:
    chunk = Chunk((0,) * len(entry.shape), entry.shape, file, entry.start)
    return StoredTensor(name, entry.dtype, entry.shape, (chunk,))


def _dtype_notes(dtypes: Mapping[str, str], claimed: str | None) -> tuple[str, ...]:
    counts = Counter(dtypes.values()).most_common()
    notes = []
    if len(counts) > 1:
        (most, count), *rest = counts
        others = [f"{dtype} in {number}" for dtype, number in rest]
        notes.append(", ".join([f"mixed dtypes: {most} in {count} tensors", *others]))
    if claimed is not None and claimed != counts[0][0]:
        notes.append(f"{CONFIG_FILE} says {claimed}, the tensors are {counts[0][0]}; the tensors count")
    return tuple(notes)
