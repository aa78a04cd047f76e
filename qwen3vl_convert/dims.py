"""The sizes of a model, from `config.json` in every spelling that transformers 4.57 to 5.x, trainers and people write.

Both generations leave a key out when they may, so what is missing is what *both* take for missing; where their class
defaults differ (rope_theta: 5000000 and 500000) it is an error. One fact spelled twice with two values is an error too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_convert.config_fields import (
    MROPE_SECTION,
    TOKEN_DEFAULTS,
    Section,
    claimed_dtype,
    first_id,
    is_tied,
    merged_rope,
    model_type_of,
    refuse_dense_layers,
    text_section,
    token_of,
    vision_section,
)
from qwen3vl_convert.errors import ConfigError
from qwen3vl_convert.strict_json import parse_object

CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class Dims:
    """The sizes of one Qwen3-VL model, in elements. `experts`, `expert_ffn` and `top_k` are 0 if it is dense."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    experts: int
    expert_ffn: int
    top_k: int
    attention_bias: bool
    tied: bool
    rms_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    max_positions: int
    vision_depth: int
    vision_hidden: int
    vision_heads: int
    vision_ffn: int
    vision_out: int
    patch: int
    temporal_patch: int
    channels: int
    spatial_merge: int
    position_embeddings: int
    deepstack: tuple[int, ...]
    dtype: str | None
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None

    @property
    def moe(self) -> bool:
        return self.experts > 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = CONFIG_FILE) -> "Dims":
        """Sizes of the model that `config` (a parsed config.json) describes; `where` names the file in errors.

        Raises ConfigError for what is missing, contradictory or no size, UnsupportedFormat for another model.
        """
        model_type = model_type_of(config, where)
        text = text_section(config, model_type, where)
        vision = vision_section(config, where)
        tokens = Section(config, where, TOKEN_DEFAULTS)
        moe = model_type == "qwen3_vl_moe"
        if moe:
            refuse_dense_layers(text)
        rope = merged_rope(text.values, text.where)
        heads = text.integer("num_attention_heads")
        dims = cls(
            model_type=model_type,
            layers=text.integer("num_hidden_layers"),
            hidden=text.integer("hidden_size"),
            heads=heads,
            kv_heads=_or_if_null(text, "num_key_value_heads", heads),
            head_dim=_head_dim(text, heads, moe),
            ffn=text.integer("intermediate_size"),
            vocab=text.integer("vocab_size"),
            experts=text.integer("num_experts") if moe else 0,
            expert_ffn=text.integer("moe_intermediate_size") if moe else 0,
            top_k=text.integer("num_experts_per_tok") if moe else 0,
            attention_bias=text.flag("attention_bias"),
            tied=is_tied(config, text.values, moe, where),
            rms_eps=text.number("rms_norm_eps"),
            rope_theta=Section(rope, text.where).number("rope_theta"),
            mrope_section=Section(rope, text.where, {"mrope_section": MROPE_SECTION}).integers("mrope_section"),
            max_positions=text.integer("max_position_embeddings"),
            vision_depth=vision.integer("depth"),
            vision_hidden=vision.integer("hidden_size"),
            vision_heads=vision.integer("num_heads"),
            vision_ffn=vision.integer("intermediate_size"),
            vision_out=vision.integer("out_hidden_size"),
            patch=_square(vision, "patch_size"),
            temporal_patch=_square(vision, "temporal_patch_size"),
            channels=vision.integer("in_channels"),
            spatial_merge=vision.integer("spatial_merge_size"),
            position_embeddings=vision.integer("num_position_embeddings"),
            deepstack=vision.integers("deepstack_visual_indexes"),
            dtype=claimed_dtype((text, Section(config, where), vision)),
            image_token_id=tokens.integer("image_token_id", least=0),
            video_token_id=tokens.integer("video_token_id", least=0),
            vision_start_token_id=tokens.integer("vision_start_token_id", least=0),
            vision_end_token_id=tokens.integer("vision_end_token_id", least=0),
            bos_token_id=first_id(token_of(config, text, "bos_token_id")),
            eos_token_id=token_of(config, text, "eos_token_id"),
        )
        _check_divisions(dims, where)
        return dims

    def sizes(self) -> dict[str, int]:
        """The named axes of the mapping tables (their legend stands at the top of `mappings/qwen3_vl.py`)."""
        merged = self.vision_hidden * self.spatial_merge**2
        text = {
            "l": self.layers,
            "kv": self.kv_heads,
            "g": self.heads // self.kv_heads,
            "d": self.head_dim,
            "h": self.hidden,
            "f": self.ffn,
            "vocab": self.vocab,
            "s": 2,
        }
        experts = {"e": self.experts, "i": self.expert_ffn, "half": self.hidden // 2} if self.moe else {}
        vision = {
            "b": self.vision_depth,
            "n": self.vision_heads,
            "t": 3,
            "vd": self.vision_hidden // self.vision_heads,
            "v": self.vision_hidden,
            "u": self.vision_ffn,
            "m": len(self.deepstack),
            "w": merged,
            "j": merged,
            "o": self.vision_out,
            "pos": self.position_embeddings,
            "rgb": self.channels,
            "time": self.temporal_patch,
            "y": self.patch,
            "x": self.patch,
        }
        return text | experts | vision


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder. Raises ConfigError if it is missing or no JSON object."""
    path = folder / CONFIG_FILE
    remedy = "Download it again, or repair it."
    try:
        return parse_object(path.read_bytes(), str(path), ConfigError, remedy)
    except OSError as cause:
        reason = cause.strerror or str(cause)
        raise ConfigError(
            f"{path}: cannot be read ({reason}). A model folder has a config.json; copy it from the model's Hub page."
        ) from None


def _or_if_null(section: Section, key: str, otherwise: int) -> int:
    """Both generations give a null a meaning of its own, which the class default for a missing key is not."""
    return otherwise if section.values.get(key, 0) is None else section.integer(key)


def _head_dim(text: Section, heads: int, moe: bool) -> int:
    """As given: heads x head_dim is not hidden in most sizes. Dense defaults to 128, MoE to hidden // heads."""
    if moe and text.values.get("head_dim") is None:
        return text.integer("hidden_size") // heads
    return text.integer("head_dim")


def _square(section: Section, key: str) -> int:
    """A number, which 5.x may spell as a list with one number per dimension."""
    value = section.values.get(key)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return Section({key: value[0]}, section.where).integer(key)
    return section.integer(key)


def _check_divisions(dims: Dims, where: str) -> None:
    for whole, parts, value, by in (
        ("num_attention_heads", "num_key_value_heads", dims.heads, dims.kv_heads),
        ("vision_config.hidden_size", "vision_config.num_heads", dims.vision_hidden, dims.vision_heads),
    ):
        if value % by:
            raise ConfigError(f"{where}: {whole}: expected a multiple of {parts} = {by}, found {value}.")
    if dims.top_k > dims.experts:
        raise ConfigError(
            f"{where}: num_experts_per_tok: expected at most num_experts = {dims.experts}, found {dims.top_k}."
        )
