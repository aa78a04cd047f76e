"""How a config.json is asked: one fact under several spellings, typed, with the defaults that both generations share.

`dims.py` says which facts; here is what transformers 4.57 and 5.x write, take for missing, and disagree about.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_convert.errors import ConfigError, UnsupportedFormat

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")

_TEXT_BOTH = {
    "vocab_size": 151936,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
}
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        **_TEXT_BOTH,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    "qwen3_vl_moe": {
        **_TEXT_BOTH,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
    },
}
"""What transformers 4.57 and 5.x both take for a missing key, by model_type. MoE's head_dim: hidden // heads."""
VISION_DEFAULTS: dict[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
TOKEN_DEFAULTS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
MROPE_SECTION = (24, 20, 20)
"""What both generations take where the rope has no mrope_section."""
SPELLINGS = {
    "num_experts": ("num_experts", "num_local_experts"),
    "depth": ("depth", "num_hidden_layers"),
    "num_heads": ("num_heads", "num_attention_heads"),
}
"""Keys of text_config and vision_config that 5.x also knows, or writes, under another name."""
_MOST = {"num_hidden_layers": 4096, "depth": 4096, "num_experts": 65536}
"""Numbers that the program loops over: a config.json must not be able to keep it busy for ever."""


def merged_rope(text: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rope of a text config in one dict, `rope_theta` included, from both generations' spellings.

    4.57 writes `rope_scaling` beside `rope_theta`, 5.x `rope_parameters`, some trainers both. Raises ConfigError.
    """
    named = {key: text[key] for key in ("rope_scaling", "rope_parameters") if text.get(key) is not None}
    if not named:
        raise ConfigError(
            f"{where}: expected rope_scaling (transformers 4.57) or rope_parameters (5.x), found neither. "
            f'Copy the model\'s published config.json; Qwen3-VL has "rope_theta": 5000000.'
        )
    if text.get("rope_theta") is not None:
        named = {"rope_theta": {"rope_theta": text["rope_theta"]}, **named}
    merged: dict[str, Any] = {}
    source: dict[str, str] = {}
    for spelling, values in named.items():
        _check_object(values, f"{where}: {spelling}")
        for key, value in values.items():
            if key in merged and merged[key] != value:
                first, second = f"{source[key]} says {merged[key]!r}", f"{spelling} says {value!r}"
                raise ConfigError(f"{where}: {key}: {first}, {second}. Remove the wrong one.")
            merged[key], source[key] = value, spelling
    return merged


def written_by_5(config: Mapping[str, Any]) -> bool:
    """Whether transformers 5 or newer wrote this config, by its own word or else by its form."""
    major = str(config.get("transformers_version") or "").partition(".")[0]
    if major.isdigit():
        return int(major) >= 5
    text = config.get("text_config")
    return isinstance(text, Mapping) and text.get("rope_parameters") is not None


@dataclass(frozen=True, slots=True)
class Section:
    """An object of config.json that is asked for values of one type, under one or several spellings."""

    values: Mapping[str, Any]
    where: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def find(self, *spellings: str) -> Any:
        """The value under any of the spellings, the first of which names the default. ConfigError if none or two."""
        found = {key: self.values[key] for key in spellings if key in self.values}
        if not found and spellings[0] not in self.defaults:
            raise ConfigError(f"{self.where}: expected {' or '.join(spellings)}, found neither. Add it to config.json.")
        values = list(found.values()) or [self.defaults[spellings[0]]]
        if any(value != values[0] for value in values):
            both = ", ".join(f"{key} says {value!r}" for key, value in found.items())
            raise ConfigError(f"{self.where}: {both}. Remove the wrong one.")
        return values[0]

    def integer(self, key: str, least: int = 1) -> int:
        value, most = self.find(*SPELLINGS.get(key, (key,))), _MOST.get(key)
        if not _is_integer(value) or value < least or (most and value > most):
            bounds = f"of at least {least}" + (f" and at most {most}" if most else "")
            raise self.unexpected(key, f"a whole number {bounds}", value)
        return int(value)

    def number(self, key: str) -> float:
        value = self.find(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.unexpected(key, "a finite number above 0", value)
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.find(key)
        if not isinstance(value, bool):
            raise self.unexpected(key, "true or false", value)
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.find(key)
        valid = isinstance(value, list | tuple) and all(_is_integer(item) and item >= 0 for item in value)
        if not valid or len(value) > _MOST["depth"]:
            raise self.unexpected(key, "a list of whole numbers", value)
        return tuple(value)

    def unexpected(self, key: str, expected: str, found: Any) -> ConfigError:
        return ConfigError(f"{self.where}: {key}: expected {expected}, found {found!r}. Correct config.json.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_object(value: object, where: str) -> None:
    if not isinstance(value, Mapping):
        found = "nothing" if value is None else repr(value)
        raise ConfigError(f"{where}: expected a JSON object, found {found}. Copy the model's published config.json.")


def model_type_of(config: Mapping[str, Any], where: str) -> str:
    model_type = config.get("model_type")
    if model_type is None:
        raise ConfigError(f"{where}: expected model_type, found none. Qwen3-VL has one of {', '.join(MODEL_TYPES)}.")
    if model_type not in MODEL_TYPES:
        raise UnsupportedFormat(
            f"{where}: the model is a {model_type!r}; expected one of {', '.join(MODEL_TYPES)}. "
            "Only complete Qwen3-VL models are converted."
        )
    return str(model_type)


def text_section(config: Mapping[str, Any], model_type: str, where: str) -> Section:
    """text_config, or the whole config where the text fields stand flat in it."""
    defaults = TEXT_DEFAULTS[model_type]
    text = config.get("text_config")
    if text is None and "hidden_size" in config:
        return Section(config, where, defaults)
    _check_object(text, f"{where}: text_config")
    section = Section(text or {}, f"{where}: text_config", defaults)
    for key in defaults:
        outside = config.get(key)
        inside = section.find(*SPELLINGS.get(key, (key,)))
        if outside is not None and outside != inside:
            said = f"text_config says {inside!r} (or nothing, which means that), the top level says {outside!r}"
            raise ConfigError(f"{where}: {key}: {said}. Remove the wrong one.")
    return section


def vision_section(config: Mapping[str, Any], where: str) -> Section:
    vision = config.get("vision_config")
    _check_object(vision, f"{where}: vision_config")
    return Section(vision or {}, f"{where}: vision_config", VISION_DEFAULTS)


def refuse_dense_layers(text: Section) -> None:
    """Every layer must be a layer of experts: no published Qwen3-VL mixes them."""
    for key, plain in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        value = text.values.get(key)
        if value is not None and value != plain:
            raise UnsupportedFormat(
                f"{text.where}: {key}: expected {plain!r}, found {value!r}. "
                "Models that mix dense layers and layers of experts are not supported."
            )


def is_tied(config: Mapping[str, Any], text: Mapping[str, Any], moe: bool, where: str) -> bool:
    """Whether the head is the embedding. 4.57 obeys text_config, 5.x the top level; no flag at all means no in both."""
    key = "tie_word_embeddings"
    top, inner = (Section(values, where, {key: None}).find(key) for values in (config, text))
    for value in (top, inner):
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{where}: {key}: expected true or false, found {value!r}. Correct config.json.")
    newer = written_by_5(config)
    if top is None:
        # 5.17 and newer write `true` into the text_config of MoE models, which are untied.
        return bool(inner) and not (moe and newer)
    if inner is not None and inner != top and not moe and not newer:
        shown = f"the top level says {top!r}, text_config says {inner!r}"
        raise ConfigError(
            f"{where}: {key}: {shown}. transformers 4.57 obeys the second and 5.x the first: make them equal."
        )
    return bool(top)


def claimed_dtype(sections: tuple[Section, ...]) -> str | None:
    """What the config claims, the text's word first; the tensors are the truth."""
    spellings = ("dtype", "torch_dtype")
    for section in sections:
        values = {key: section.values[key] for key in spellings if section.values.get(key) is not None}
        if values:
            return str(Section(values, section.where).find(*spellings)).removeprefix("torch.")
    return None


def token_of(config: Mapping[str, Any], text: Section, key: str) -> int | tuple[int, ...] | None:
    """A token id, or several. Not a size: the text's word counts, and another at the top is no contradiction."""
    value = text.values.get(key, config.get(key))
    if value is None or _is_integer(value):
        return value  # type: ignore[no-any-return]
    return text.integers(key)


def first_id(token: int | tuple[int, ...] | None) -> int | None:
    return next(iter(token), None) if isinstance(token, tuple) else token
