"""Tiny checkpoints of both formats, and the tools that damage a copy of one in exactly one place.

What is damaged was written by the program itself. The damage is done by hand: with bytes, json, torch's own classes.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwen3vl_convert.checksum import crc32
from qwen3vl_convert.convert import RunOptions
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import ConvertError
from qwen3vl_convert.make import SIZES, make_checkpoint
from qwen3vl_convert.megatron.blob import tensor_blob
from qwen3vl_convert.megatron.metadata import ChunkEntry, Metadata, TensorEntry, metadata_bytes, read_metadata
from qwen3vl_convert.storage import DTYPES

REPOSITORY = Path(__file__).resolve().parents[1]
INDEX = "model.safetensors.index.json"
ITERATION = "iter_0000000"
QUICK = RunOptions(fsync=False)
"""The tests do not pull the plug."""

_SMALLER: dict[str, Any] = {
    "layers": 2,
    "hidden": 32,
    "head_dim": 8,
    "ffn": 48,
    "vocab": 96,
    "vision_depth": 2,
    "vision_hidden": 32,
    "vision_ffn": 40,
    "vision_out": 32,
    "position_embeddings": 16,
    "deepstack": (0, 1),
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
DENSE: Dims = replace(SIZES["tiny"], **_SMALLER)
TIED: Dims = replace(DENSE, tied=True)
MOE: Dims = replace(SIZES["tiny-moe"], **_SMALLER, expert_ffn=24)


def make(folder: Path, dims: Dims, files: int = 1, experts_layout: str = "hub") -> Path:
    """A Hugging Face folder of random weights in `files` files or so."""
    limit = 5 * 10**9 if files == 1 else 2 * sum(prod(s) for s in _shapes(dims)) // files
    make_checkpoint(folder, dims, max_shard_bytes=limit, experts_layout=experts_layout)
    return folder


def _shapes(dims: Dims) -> Iterable[tuple[int, ...]]:
    from qwen3vl_convert.mappings import mapping_registry

    return (
        shape or () for shape in mapping_registry(dims.model_type, head=not dims.tied).hf_names(dims.sizes()).values()
    )


def copied(source: Path, target: Path) -> Path:
    """A copy of a checkpoint to damage."""
    shutil.copytree(source, target)
    return target


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder with the hash of its bytes, every link with where it leads, every folder."""

    def told(path: Path) -> str:
        if path.is_symlink():
            return f"to {os.readlink(path)}"
        return "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()

    return {str(path.relative_to(folder)): told(path) for path in sorted(folder.rglob("*"))}


# ------------------------------------------------------------------------------------------------------ one refusal


@dataclass(frozen=True)
class Case:
    """A damage, and what the program has to say about it: the type of error, and texts that its message contains."""

    error: type[ConvertError]
    says: tuple[str, ...]
    damage: Callable[[Path], object] = lambda folder: None
    options: dict[str, Any] = field(default_factory=dict)


def table(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def check_refusal(case: Case, convert: Callable[..., object], source: Path, target: Path, exit_code: int) -> None:
    """The conversion ends in the error of the case, leaves nothing behind, and has not touched its source."""
    before = contents(source)
    with pytest.raises(case.error) as caught:
        convert(source, target, **{"run": QUICK, **case.options})
    message = str(caught.value)
    assert type(caught.value) is case.error, message
    assert caught.value.exit_code == exit_code, message
    for text in case.says:
        assert text in message
    assert not target.parent.exists() or not list(target.parent.iterdir())
    assert contents(source) == before


# ------------------------------------------------------------------------------------------------------ Hugging Face


class Raw(NamedTuple):
    """A tensor of a safetensors file: its dtype as the format spells it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def zeros(dtype: str, *shape: int) -> Raw:
    itemsize = {stored.safetensors: stored.itemsize for stored in DTYPES.values()}[dtype]
    return Raw(dtype, shape, bytes(prod(shape) * itemsize))


def read_safetensors(path: Path) -> dict[str, Raw]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {name: Raw(e["dtype"], tuple(e["shape"]), data[slice(*e["data_offsets"])]) for name, e in header.items()}


def write_safetensors(path: Path, tensors: dict[str, Raw]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + len(data)]}
        start += len(data)
    write_header(path, header, b"".join(tensor.data for tensor in tensors.values()))


def write_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_tensors(change: Callable[[dict[str, Raw]], object], file: str = "model.safetensors") -> Callable[[Path], None]:
    """A damage to the tensors of a file."""

    def damage(folder: Path) -> None:
        tensors = read_safetensors(folder / file)
        change(tensors)
        write_safetensors(folder / file, tensors)

    return damage


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A damage to the header of a file, whose data stay as they are."""

    def damage(folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        write_header(folder / "model.safetensors", header, content[8 + length :])

    return damage


def edit_json(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return damage


def edit_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return edit_json("config.json", change)


# ---------------------------------------------------------------------------------------------------------- Megatron


def edit_metadata(change: Callable[[Metadata], object]) -> Callable[[Path], None]:
    """A damage to what `.metadata` says; the files stay as they are."""

    def damage(run: Path) -> None:
        metadata = read_metadata(run / ITERATION / ".metadata")
        change(metadata)
        (run / ITERATION / ".metadata").write_bytes(metadata_bytes(metadata.tensors, metadata.objects))

    return damage


def edit_chunk(key: str, number: int, **fields: Any) -> Callable[[Path], None]:
    """A damage to the fields of one chunk's entry in `.metadata`."""

    def change(metadata: Metadata) -> None:
        entry = metadata.tensors[key]
        chunks = list(entry.chunks)
        chunks[number] = replace(chunks[number], **fields)
        metadata.tensors[key] = replace(entry, chunks=tuple(chunks))

    return edit_metadata(change)


def put(run: Path, key: str, dtype: str, shape: tuple[int, ...], data: bytes | None = None) -> None:
    """Store a tensor, of zeros by default, in a file of its own; one that had its name before is forgotten."""
    blob = tensor_blob(dtype, shape)
    filled = bytes(blob.nbytes) if data is None else data
    assert len(filled) == blob.nbytes
    name = f"{key}.distcp"
    (run / ITERATION / name).write_bytes(blob.head + filled + blob.tail(crc32(filled)))
    chunk = ChunkEntry((0,) * len(shape), shape, name, 0, blob.size)
    edit_metadata(lambda m: m.tensors.update({key: TensorEntry(dtype, shape, (chunk,))}))(run)


def stored(run: Path, key: str) -> tuple[str, tuple[int, ...], bytes]:
    """The dtype, shape and bytes of a tensor that one chunk per index of its first dimension, or one chunk, holds."""
    from qwen3vl_convert.megatron.checkpoint import read_megatron
    from qwen3vl_convert.reader import read_box

    tensor = read_megatron(run).tensors[key]
    box = ((0,) * len(tensor.shape), tensor.shape)
    return tensor.dtype, tensor.shape, read_box(tensor, box).tobytes()


# ------------------------------------------------------------------------------------------------------- processes


def command(*arguments: object, program: str | None = None, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run the command line, or a program of its own that ends in `main()`, as a user would: in another process."""
    environment = user_environment()
    line = command_line(*arguments, program=program)
    return subprocess.run(line, capture_output=True, text=True, env=environment, **options)


def command_line(*arguments: object, program: str | None = None) -> list[str]:
    start = ["-m", "qwen3vl_convert.cli.app"] if program is None else ["-c", program]
    return [sys.executable, *start, *map(str, arguments)]


def user_environment() -> dict[str, str]:
    """The environment of a process that finds the program in the checkout, installed or not, whatever its folder."""
    paths = (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
