"""Which files of a model folder are its weights, and which travel with them unchanged."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_convert.dims import CONFIG_FILE
from qwen3vl_convert.errors import CorruptFile, InputError, MissingTensors, UnsafeFile, UnsupportedFormat, listing
from qwen3vl_convert.huggingface.foreign import OTHER_WEIGHTS
from qwen3vl_convert.strict_json import parse_object

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MANIFEST_FILE = "qwen3vl_convert.json"
_SHARD = re.compile(r".*-\d+-of-0*(\d+)\.safetensors")
_REMEDY = "Download the folder again."


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """A model folder's files, each sorted by name. `index` is the weight map (tensor to file name), or None."""

    weights: tuple[Path, ...]
    auxiliary: tuple[Path, ...]
    index: dict[str, str] | None
    notes: tuple[str, ...]


def folder_files(folder: Path) -> FolderFiles:
    """Sorts a folder's files. Raises InputError's kinds if the weights are not clear, or a link leaves the folder."""
    names = _visible(folder)
    files = {name: path for name, path in names.items() if path.is_file()}
    index = _read_index(files[INDEX_FILE]) if INDEX_FILE in files else None
    weights = _weight_names(folder, files, index)
    for name in weights:
        _refuse_link_outside(files[name], folder)
    return FolderFiles(
        tuple(files[name] for name in weights), auxiliary_files(folder), index, _notes(names, files, weights)
    )


def auxiliary_files(folder: Path) -> tuple[Path, ...]:
    """The files that travel unchanged, sorted by name, of a folder that need not have weights."""
    files = tuple(path for name, path in _visible(folder).items() if path.is_file() and _is_auxiliary(name))
    for path in files:
        _refuse_link_outside(path, folder)
    return files


def has_weights(folder: Path) -> bool:
    """Whether it has any safetensors file, of this model or another; a config may come without."""
    return any(name.endswith(".safetensors") for name in _visible(folder))


def weight_map(folder: Path) -> dict[str, str] | None:
    """Which file each tensor is in, as the index says, whether the files are there or not; None without an index."""
    index = folder / INDEX_FILE
    return _read_index(index) if index.is_file() else None


def _visible(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise InputError(f"{folder}: expected a model folder, found {found}. Name the folder that holds config.json.")
    return {path.name: path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def _is_auxiliary(name: str) -> bool:
    """Tokenizer, processors, template, licence, and whatever else no converter understands better than its owner."""
    suffix = Path(name).suffix.lower()
    ours = name in (CONFIG_FILE, MANIFEST_FILE) or name.endswith(".index.json")
    return not ours and suffix != ".safetensors" and suffix not in OTHER_WEIGHTS


def _notes(names: Mapping[str, Path], files: Mapping[str, Path], weights: list[str]) -> tuple[str, ...]:
    folders = [name for name, path in names.items() if path.is_dir()]
    broken = [name for name, path in names.items() if path.is_symlink() and not path.exists()]
    others = [name for name in files if Path(name).suffix.lower() in OTHER_WEIGHTS]
    unread = [name for name in files if name.endswith(".safetensors") and name not in weights]
    kinds = (
        ("subfolders are not copied", folders),
        ("broken links are not copied", broken),
        ("weights in other formats are not read and not copied", others),
        (f"not in {INDEX_FILE}, so not read and not copied", unread),
    )
    return tuple(f"{what}: {listing(found)}" for what, found in kinds if found)


def _weight_names(folder: Path, files: Mapping[str, Path], index: Mapping[str, str] | None) -> list[str]:
    found = [name for name in files if name.endswith(".safetensors")]
    if index is None:
        return _without_index(folder, files, found)
    named = sorted(set(index.values()))
    if missing := [name for name in named if name not in files]:
        raise MissingTensors(f"{folder}: {INDEX_FILE} names {listing(missing)}, found no such file. {_REMEDY}")
    if SINGLE_FILE in found and SINGLE_FILE not in named:
        raise InputError(
            f"{folder}: found both {SINGLE_FILE} and {INDEX_FILE}, which names other files; programs differ on which "
            "they read. Remove the one that is not the model's."
        )
    return named


def _without_index(folder: Path, files: Mapping[str, Path], found: list[str]) -> list[str]:
    """One file is the model whatever its name, unless the name says that there are more."""
    if not found:
        raise _no_weights(folder, files)
    if len(found) > 1:
        raise InputError(
            f"{folder}: found {listing(found)} and no {INDEX_FILE} to say which belong to the model. "
            f"Add the index, or leave only {SINGLE_FILE}."
        )
    if (match := _SHARD.fullmatch(found[0])) and int(match[1]) != 1:
        raise MissingTensors(
            f"{folder}: expected {match[1]} weight files and {INDEX_FILE}, found {found[0]} alone. {_REMEDY}"
        )
    return found


def _no_weights(folder: Path, files: Mapping[str, Path]) -> InputError:
    others = {name: OTHER_WEIGHTS[Path(name).suffix] for name in files if Path(name).suffix in OTHER_WEIGHTS}
    if others:
        name, what = next(iter(others.items()))
        return UnsupportedFormat(
            f"{folder}: expected *.safetensors, found {listing(others)}: {name} is {what}. "
            "Use the model's safetensors folder, or save it so (save_pretrained in transformers)."
        )
    return MissingTensors(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE} with its files, found neither. {_REMEDY}")


def _read_index(path: Path) -> dict[str, str]:
    """The weight map: tensor to file name. Raises UnsafeFile for a name that is a path."""
    weight_map = parse_object(path.read_bytes(), str(path), CorruptFile, _REMEDY).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile(f"{path}: expected a weight_map of tensors to files, found {weight_map!r:.100}. {_REMEDY}")
    for tensor, name in weight_map.items():
        _check_plain_name(name, f"{path}: {tensor}")
    return weight_map


def _check_plain_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or name != Path(name).name or name[:1] in ("", ".") or set(name) & set("\\/:\0"):
        raise UnsafeFile(
            f"{where}: expected the name of a file in the folder, found {name!r}. Do not trust this folder."
        )
    if not name.endswith(".safetensors"):
        raise UnsupportedFormat(f"{where}: expected a safetensors file, found {name!r}. Save the model as safetensors.")


def _refuse_link_outside(path: Path, folder: Path) -> None:
    """A link may stay in the folder, or lead to the blobs of the Hub's cache, where all snapshots keep their files."""
    if not path.is_symlink():
        return
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    if home in real.parents or (home.parent.name == "snapshots" and real.parent == blobs.resolve()):
        return
    raise UnsafeFile(
        f"{path}: expected a file of the folder, found a link to {real}, outside of it. "
        "If you trust it, put the file itself in its place."
    )
