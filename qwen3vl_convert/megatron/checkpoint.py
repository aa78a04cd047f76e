"""A torch_dist checkpoint as named tensors in files: headers and small objects are read, nothing is executed."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_convert.dims import CONFIG_FILE, Dims, read_config
from qwen3vl_convert.errors import ConfigError, CorruptFile, InputError, UnsafeFile, UnsupportedFormat, listing
from qwen3vl_convert.megatron.blob import read_object_blob, read_tensor_blob
from qwen3vl_convert.megatron.metadata import ChunkEntry, Metadata, ObjectEntry, TensorEntry, read_metadata
from qwen3vl_convert.megatron.run_config import config_of_run, read_run_config
from qwen3vl_convert.storage import WEIGHT_DTYPES, Chunk, StoredTensor
from qwen3vl_convert.strict_json import parse_object

TRACKER = "latest_checkpointed_iteration.txt"
_MARKER = "metadata.json"
HF_FOLDER = "hf"
"""Where a checkpoint that we wrote keeps the config and the auxiliary files of its source."""

_ANEW = "Fetch or write the checkpoint again."
_ITERATION = re.compile(r"iter_\d{7}|release")
_FOREIGN = (
    (re.compile(r".*\bprojection\.encoder\.|.*\bdeepstack_norm_list\b"), "Pai-Megatron-Patch"),
    (re.compile(r"visual\."), "ms-swift (mcore-bridge)"),
    (re.compile(r"(module|model)\."), "Megatron-FSDP or a wrapped model"),
    (re.compile(r"(decoder|embedding)\."), "a text-only Megatron-Core GPTModel"),
)


@dataclass(frozen=True, slots=True)
class MegatronCheckpoint:
    """One iteration of a checkpoint. `tensors` are its weights, by their key on disk; what else there is is `ignored`.

    `config` is a config.json as far as the checkpoint knows one, and `config_from` says from where; `config_error` is
    what stands against the one that is there, and matters only where no other is given. `auxiliary` are the files that
    travelled along. `notes` are what a user should know, a sentence each.
    """

    folder: Path
    iteration: str
    tensors: dict[str, StoredTensor]
    ignored: tuple[str, ...]
    common: dict[str, Any]
    config: dict[str, Any] | None
    config_from: Path | None
    auxiliary: tuple[Path, ...]
    notes: tuple[str, ...]
    config_error: InputError | None = None

    def dims(self) -> Dims:
        """The model's sizes. Raises `ConfigError` when the checkpoint does not say them."""
        if self.config_error is not None:
            raise self.config_error
        if self.config is None:
            raise ConfigError(
                f"{self.folder}: has neither {HF_FOLDER}/{CONFIG_FILE} nor a run_config.yaml with the model's sizes. "
                f"Pass --config with the folder or Hub id of the model that it was made from."
            )
        return Dims.from_config(self.config, str(self.config_from))


def read_megatron(path: Path, iteration: int | str | None = None) -> MegatronCheckpoint:
    """The checkpoint at `path`, a run folder or one `iter_*` or `release` folder. Raises `InputError`'s kinds."""
    folder = iteration_folder(path, iteration)
    metadata = read_metadata(folder / ".metadata")
    _refuse_foreign(metadata.tensors, folder)
    _refuse_flattened(metadata, folder)
    tensors = _stored(metadata.tensors, folder)
    config, config_from, config_error = _config_if_sound(folder)
    common, common_notes = _common(metadata, folder)
    return MegatronCheckpoint(
        folder=folder,
        iteration=folder.name,
        tensors=tensors,
        ignored=metadata.optimizer,
        common=common,
        config=config,
        config_from=config_from,
        auxiliary=_auxiliary(folder),
        notes=(*_notes(metadata, config_error), *common_notes),
        config_error=config_error,
    )


def iteration_folder(path: Path, iteration: int | str | None = None) -> Path:
    """The folder of one iteration: `path` itself, the one asked for, or the one that the tracker names."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder. Expected a Megatron checkpoint.")
    if iteration is None and any((path / name).is_file() for name in (".metadata", _MARKER)):
        return _checked_format(path)
    if iteration is None and _is_legacy(path):
        raise _legacy(path)
    found = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and _ITERATION.fullmatch(entry.name))
    name = _asked(path, found) if iteration is None else _folder_name(iteration)
    if name not in found:
        raise InputError(f"{path}: expected the iteration {name}, found {listing(found) or 'none'}. Pass --iteration.")
    return _checked_format(path / name)


def _folder_name(iteration: int | str) -> str:
    return f"iter_{int(iteration):07d}" if str(iteration).isdecimal() else str(iteration)


def _asked(path: Path, found: list[str]) -> str:
    """The iteration of a run folder: the tracker's word, or the only one there is."""
    tracker = path / TRACKER
    if tracker.is_file():
        text = tracker.read_text(errors="replace").strip()
        if text != "release" and not (text.isdecimal() and len(text) <= 7):
            raise CorruptFile(f"{tracker}: expected an iteration or `release`, found {text[:40]!r}. Pass --iteration.")
        return _folder_name(text)
    if len(found) > 1:
        raise InputError(f"{path}: found {listing(found)} and no {TRACKER} to say which. Pass --iteration.")
    if not found:
        raise InputError(
            f"{path}: is no Megatron checkpoint: expected .metadata, {TRACKER} or one iter_* folder, "
            f"found none of them. Name the run folder or one of its iterations."
        )
    return found[0]


def _is_legacy(folder: Path) -> bool:
    return any(re.fullmatch(r"mp_rank_\d\d.*", entry.name) for entry in folder.iterdir())


def _legacy(folder: Path) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"{folder}: is a legacy `torch` checkpoint (mp_rank_*), which is not read yet. "
        f"Save it as torch_dist with Megatron-LM (--ckpt-convert-format torch_dist)."
    )


def _checked_format(folder: Path) -> Path:
    """The folder, when it is torch_dist. Raises `UnsupportedFormat` naming the format that it is instead."""
    if _is_legacy(folder):
        raise _legacy(folder)
    marker = folder / _MARKER
    if marker.is_file():
        backend = parse_object(marker.read_bytes(), str(marker), CorruptFile, _ANEW).get("sharded_backend")
        if backend != "torch_dist":
            raise UnsupportedFormat(f"{marker}: expected the backend torch_dist, found {backend!r}, which is not read.")
    if not (folder / ".metadata").is_file():
        raise InputError(
            f"{folder}: expected a .metadata file, found none: no torch_dist checkpoint, or an incomplete one. {_ANEW}"
        )
    if not marker.is_file():
        raise UnsupportedFormat(
            f"{folder}: has .metadata and no {_MARKER}: a checkpoint of torch.distributed or Megatron-FSDP "
            f"(fsdp_dtensor), which is not read. Save it with --ckpt-format torch_dist."
        )
    return folder


def _refuse_foreign(keys: Iterable[str], folder: Path) -> None:
    for pattern, writer in _FOREIGN:
        if found := [key for key in keys if pattern.match(key)]:
            raise UnsupportedFormat(
                f"{folder}: expected Megatron-Bridge's names under language_model. and vision_model., "
                f"found {listing(found, 3)}: names of {writer}, which are not read."
            )


def _refuse_flattened(metadata: Metadata, folder: Path) -> None:
    flattened = metadata.flattened & metadata.tensors.keys()
    if flattened:
        raise UnsupportedFormat(
            f"{folder}: {listing(flattened, 3)} is stored flattened, as Megatron-Core up to 0.15 did. "
            f"Load it with that version, and save it with 0.16 or later."
        )


def _stored(weights: dict[str, TensorEntry], folder: Path) -> dict[str, StoredTensor]:
    files = sorted({chunk.relative_path for entry in weights.values() for chunk in entry.chunks})
    descriptors = {name: os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC) for name in files}
    try:
        return {
            key: StoredTensor(
                key,
                _weight_dtype(key, entry.dtype, folder),
                entry.shape,
                tuple(_chunk(key, entry, chunk, folder, descriptors[chunk.relative_path]) for chunk in entry.chunks),
            )
            for key, entry in weights.items()
        }
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _weight_dtype(key: str, dtype: str, folder: Path) -> str:
    if dtype not in WEIGHT_DTYPES:
        raise UnsupportedFormat(f"{folder}: {key}: expected one of {', '.join(WEIGHT_DTYPES)}, found {dtype}.")
    return dtype


def _chunk(key: str, entry: TensorEntry, chunk: ChunkEntry, folder: Path, descriptor: int) -> Chunk:
    """Where a chunk's data lie; the blob must be what `.metadata` says."""
    path = folder / chunk.relative_path
    blob = read_tensor_blob(descriptor, chunk.offset, chunk.length, str(path))
    if (blob.dtype, blob.shape) != (entry.dtype, chunk.sizes):
        raise CorruptFile(
            f"{path}: chunk {chunk.offsets} of {key}: expected {entry.dtype} {chunk.sizes} as .metadata says, "
            f"found {blob.dtype} {blob.shape}. Save the checkpoint again."
        )
    return Chunk(chunk.offsets, chunk.sizes, path, blob.data_start)


def _config_if_sound(folder: Path) -> tuple[dict[str, Any] | None, Path | None, InputError | None]:
    """The config and its file, or why it is not to be had: only who has no other config needs to know."""
    try:
        return *_config(folder), None
    except InputError as error:
        return None, None, error


def _config(folder: Path) -> tuple[dict[str, Any] | None, Path | None]:
    if (folder / HF_FOLDER / CONFIG_FILE).is_file():
        return read_config(folder / HF_FOLDER), folder / HF_FOLDER / CONFIG_FILE
    path = folder / "run_config.yaml"
    run_config = read_run_config(path)
    return (None, None) if run_config is None else (config_of_run(run_config, str(path)), path)


def _auxiliary(folder: Path) -> tuple[Path, ...]:
    """Files of the source that travelled along: ours under hf/, Megatron's own under tokenizer/."""
    for name in (HF_FOLDER, "tokenizer"):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            files = (path for path in sorted((folder / name).iterdir()) if path.is_file() and not path.is_symlink())
            return tuple(path for path in files if path.name != CONFIG_FILE and path.suffix != ".safetensors")
    return ()


def _common(metadata: Metadata, folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The common state, of 0.19 (in a `.distcp`) or of 0.18 and before (`common.pt`), and notes.

    Weights do not need it: one that names classes of its own (a trainer's `args`) is left alone, and said so.
    """
    entry = next((e for key, e in metadata.objects.items() if key.startswith("common_state/")), None)
    path = folder / (entry.relative_path if entry else "common.pt")
    if not path.is_file():
        return {}, ()
    try:
        value = read_object_blob(_object_bytes(path, entry), str(path))
    except UnsafeFile as error:
        return {}, (f"The arguments in the checkpoint are not read: {error}",)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return (value if isinstance(value, dict) else {}), ()


def _object_bytes(path: Path, entry: ObjectEntry | None) -> bytes:
    if entry is None:
        return path.read_bytes()
    with path.open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.length)


def _notes(metadata: Metadata, config_error: InputError | None) -> tuple[str, ...]:
    states = [k for k in metadata.objects if "_extra_state" not in k and not k.startswith("common_state/")]
    notes = []
    if metadata.optimizer or states:
        notes.append(
            f"Training state is left out: {len(metadata.optimizer)} entries of the optimizer and {len(states)} objects "
            f"({listing(states, 2) or 'none'})."
        )
    if config_error is not None:
        notes.append(f"The checkpoint's own sizes are not compared: {config_error}")
    return tuple(notes)
