"""Lay out a Hugging Face folder to the byte, from names and shapes alone."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from qwen3vl_convert.huggingface.files import INDEX_FILE, SINGLE_FILE
from qwen3vl_convert.huggingface.safetensors import Entry, file_order, header_bytes
from qwen3vl_convert.huggingface.writer import index_json, plan_files
from qwen3vl_convert.plan import Target
from qwen3vl_convert.storage import DTYPES, Chunk, StoredTensor


def huggingface_target(
    entries: list[Entry],
    config: bytes | Path,
    auxiliary: Iterable[Path],
    max_shard_bytes: int,
    shard_of: Mapping[str, str] | None = None,
) -> Target:
    """The layout of a folder with these tensors (name, dtype, shape), in this order.

    `config` is the text of config.json, or the file to copy; `auxiliary` are copied as they are. `shard_of` is a
    source's own split, taken over when its tensors are the same.
    """
    files = plan_files(entries, max_shard_bytes, shard_of)
    tensors: dict[str, StoredTensor] = {}
    sizes, literals = {}, []
    for file, members in files.items():
        header = header_bytes(members)
        literals.append((file, 0, header))
        sizes[file] = _place(file, members, len(header), tensors)
    if list(files) != [SINGLE_FILE]:
        total = sum(tensor.nbytes for tensor in tensors.values())
        literals.append((INDEX_FILE, 0, index_json(files, total).encode()))
    if isinstance(config, bytes):
        literals.append(("config.json", 0, config))
    sizes |= {name: len(content) for name, _, content in literals if name not in files}
    copied = {path.name: path for path in (*auxiliary, *([config] if isinstance(config, Path) else []))}
    sizes |= {name: path.stat().st_size for name, path in copied.items()}
    return Target(tensors, sizes, tuple(literals), copied)


def _place(file: str, members: list[Entry], start: int, tensors: dict[str, StoredTensor]) -> int:
    """Put the tensors of a file one after another; returns the file's size."""
    for name, dtype, shape in file_order(members):
        chunk = Chunk((0,) * len(shape), shape, Path(file), start)
        tensors[name] = StoredTensor(name, dtype, shape, (chunk,))
        start += chunk.numel * DTYPES[dtype].itemsize
    return start
