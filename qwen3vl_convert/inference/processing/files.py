"""The small files beside a checkpoint's weights: where they are, and what the ones in JSON say."""

import json
from pathlib import Path
from typing import Any

from qwen3vl_convert.errors import ConfigError, InputError
from qwen3vl_convert.huggingface.hub import resolve
from qwen3vl_convert.inspection import is_megatron
from qwen3vl_convert.megatron.checkpoint import read_megatron
from qwen3vl_convert.strict_json import parse_object

TOKENIZER = ("tokenizer.json", "vocab.json")
"""A tokenizer is read from the first of these that is there."""
GENERATION = "generation_config.json"
_TEMPLATES = ("chat_template.json", "tokenizer_config.json")
_DEFAULT = "default"
"""The template that is meant where a file has several by name."""
_PROCESSORS = {
    "image_processor": ("preprocessor_config.json",),
    "video_processor": ("video_preprocessor_config.json", "preprocessor_config.json"),
}
"""Where transformers 4.57 keeps the settings of its processors; 5.x: processor_config.json, by these names."""
_MENDED = "Mend the file, or pass --config with the folder or Hub id of the model that it was made from."
_SAMPLING = {"top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float}


def find_files(checkpoint: str | Path, config: str | None = None, iteration: int | str | None = None) -> Path | None:
    """The folder with the tokenizer and the like of a checkpoint of either format, or of `config` if that is named.

    None for a Megatron checkpoint with which no files travelled along. Raises `InputError`'s kinds.
    """
    if config is not None:
        return resolve(config, weights=False).folder
    if iteration is None and not is_megatron(Path(checkpoint)):
        return resolve(checkpoint, weights=True).folder
    auxiliary = read_megatron(Path(checkpoint), iteration).auxiliary
    return auxiliary[0].parent if auxiliary else None


def has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).is_file() for name in TOKENIZER)


def read_json(path: Path) -> dict[str, Any]:
    """What is in a file of settings; nothing if there is no such file. Raises `ConfigError`."""
    return parse_object(path.read_bytes(), str(path), ConfigError, _MENDED) if path.is_file() else {}


def chat_template(folder: Path) -> str | None:
    """The text of the chat's template, from any of the places where releases of transformers have put it.

    chat_template.jinja (5.x, and 4.57 when it saves), chat_template.json (as published), tokenizer_config.json.
    """
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8", errors="replace")
    for name in _TEMPLATES:
        found = _one_template(read_json(folder / name).get("chat_template"), folder / name)
        if found is not None:
            return found
    return None


def _one_template(value: Any, path: Path) -> str | None:
    """A template alone, or the default of several: a list of {name, template}, or the templates by name."""
    if isinstance(value, list):
        value = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
    if isinstance(value, dict):
        value = value.get(_DEFAULT)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{path}: chat_template: expected a text, found {value!r:.60}. {_MENDED}")
    return value


def processor_settings(folder: Path, kind: str) -> dict[str, Any]:
    """Settings of the `image_processor` or `video_processor`, as saved by transformers 4.57 or 5.x.

    Raises `InputError` where there are none: pictures of a wrong size would be taken without a word.
    """
    nested = read_json(folder / "processor_config.json").get(kind)
    if isinstance(nested, dict):
        return nested
    for name in _PROCESSORS[kind]:
        if settings := read_json(folder / name):
            return settings
    names = " or ".join((*_PROCESSORS[kind], f"{kind} in processor_config.json"))
    raise InputError(
        f"{folder}: expected {names}, found neither, so nobody knows how the model wants its pictures. "
        "Pass --config with the folder or Hub id of the model that it was made from."
    )


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that end an answer, as generation_config.json says; none if it says nothing."""
    path = folder / GENERATION
    value = read_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise ConfigError(f"{path}: eos_token_id: expected a token or a list of them, found {value!r:.60}. {_MENDED}")
    return tuple(ids)


def sampling_settings(folder: Path) -> dict[str, float | int]:
    """top_p, top_k and the like that the model's makers recommend, as far as generation_config.json has them."""
    path = folder / GENERATION
    found = read_json(path)
    settings: dict[str, float | int] = {}
    for name, kind in _SAMPLING.items():
        value = found.get(name)
        if value is None:
            continue
        if type(value) not in (int, kind):
            raise ConfigError(f"{path}: {name}: expected a number, found {json.dumps(value):.60}. {_MENDED}")
        settings[name] = kind(value)
    return settings
