"""The config.json that is written: one that transformers 4.57 and 5.x both read, with the same meaning.

That is the hub's form. 4.57 crashes on `rope_parameters`, takes 60 experts where it finds `num_local_experts`, and
obeys text_config's tie flag; 5.x reads the hub's spelling of all these, and obeys the top level's.
"""

import copy
import json
from collections.abc import Mapping
from typing import Any

from qwen3vl_convert.config_fields import TEXT_DEFAULTS, merged_rope
from qwen3vl_convert.dims import CONFIG_FILE, Dims

HUB_VERSION = "4.57.0.dev0"
"""The transformers_version of the published configs."""
V5_VERSION = "5.2.0"
"""The first transformers that stores experts the `v5` way."""
_TEXT_ONLY = {
    "attention_dropout",
    "hidden_act",
    "head_dim",
    "initializer_range",
    "mlp_only_layers",
    "norm_topk_prob",
    "num_local_experts",
    "output_router_logits",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "router_aux_loss_coef",
    "sliding_window",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
"""Keys beside the sizes that go into text_config where a config has its text fields flat."""


def portable_config(config: Mapping[str, Any], dims: Dims, dtype: str, experts_layout: str) -> dict[str, Any]:
    """`config` in the hub's form, for weights of `dtype` and of that experts layout; every other key stays.

    Equal to `config` if that has the form already and says the truth: then copy its bytes. Idempotent.
    """
    result = copy.deepcopy(dict(config))
    text = _nested_text(result, dims)
    _hub_rope(text)
    _hub_experts(text)
    _hub_vision(result, dims)
    _true_dtype(result, text, dtype)
    _true_ties(result, text, dims.tied)
    if dims.moe:
        _true_version(result, experts_layout)
    return result


def config_json(config: Mapping[str, Any]) -> str:
    """The text of a config.json as transformers and the hub write it: sorted keys, two spaces, a newline at the end."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def rebuild_config(dims: Dims) -> tuple[dict[str, Any], list[str]]:
    """A config.json from sizes alone, in the hub's form, and what sizes do not tell: that has the values which all
    published Qwen3-VL models share. For a published model's Dims this is its published config.json.
    """
    text, vision = _rebuilt_text(dims), _rebuilt_vision(dims)
    filled = {
        "text_config": {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True},
        "vision_config": {"hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.02},
    }
    if dims.moe:
        filled["text_config"] |= {"norm_topk_prob": True}
    if dims.dtype is None:
        filled["text_config"] |= {"dtype": "bfloat16"}
    kind = "Qwen3VLMoe" if dims.moe else "Qwen3VL"
    config = {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "image_token_id": dims.image_token_id,
        "model_type": dims.model_type,
        "text_config": text | filled["text_config"],
        "tie_word_embeddings": dims.tied,
        "transformers_version": HUB_VERSION,
        "video_token_id": dims.video_token_id,
        "vision_config": vision | filled["vision_config"],
        "vision_end_token_id": dims.vision_end_token_id,
        "vision_start_token_id": dims.vision_start_token_id,
    }
    return config, [f"{section}.{key} = {value!r}" for section, keys in filled.items() for key, value in keys.items()]


def _nested_text(config: dict[str, Any], dims: Dims) -> dict[str, Any]:
    """text_config, which takes over the text fields of a flat config."""
    if config.get("text_config") is None:
        fields = [key for key in config if key in TEXT_DEFAULTS[dims.model_type] or key in _TEXT_ONLY]
        config["text_config"] = {key: config.pop(key) for key in fields} | {"model_type": f"{dims.model_type}_text"}
    text: dict[str, Any] = config["text_config"]
    return text


def _hub_rope(text: dict[str, Any]) -> None:
    rope = merged_rope(text, f"{CONFIG_FILE}: text_config")
    text["rope_theta"] = rope.pop("rope_theta")
    # 4.57 knows only the newer of the two names that a rope's type has, and neither knows Qwen2-VL's "mrope".
    kind = rope.pop("type", "default")
    text["rope_scaling"] = {"rope_type": "default" if kind == "mrope" else kind, **rope}
    text.pop("rope_parameters", None)


def _hub_experts(text: dict[str, Any]) -> None:
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")


def _hub_vision(config: dict[str, Any], dims: Dims) -> None:
    """4.57 knows the vision model by the whole model's name, and one vision rope, which 5.x spells out."""
    vision = config["vision_config"]
    vision["model_type"] = dims.model_type
    for hub, other in (("depth", "num_hidden_layers"), ("num_heads", "num_attention_heads")):
        if other in vision:
            vision[hub] = vision.pop(other)
    for key, only in (("patch_size", dims.patch), ("temporal_patch_size", dims.temporal_patch)):
        if isinstance(vision.get(key), list):
            vision[key] = only
    if vision.get("rope_parameters", 0) in (None, {"rope_theta": 10000.0, "rope_type": "axial"}):
        del vision["rope_parameters"]


def _true_dtype(config: dict[str, Any], text: dict[str, Any], dtype: str) -> None:
    """The hub says it in text_config; a claim that stands elsewhere stays there, and becomes true."""
    for section in (config, text, config["vision_config"]):
        if section is text or any(section.get(key) is not None for key in ("dtype", "torch_dtype")):
            section.pop("torch_dtype", None)
            section["dtype"] = dtype


def _true_ties(config: dict[str, Any], text: dict[str, Any], tied: bool) -> None:
    """Each generation obeys another of the two flags, and takes a missing one for untied."""
    for section in (config, text):
        if section.get("tie_word_embeddings", False) is not tied:
            section["tie_word_embeddings"] = tied


def _true_version(config: dict[str, Any], experts_layout: str) -> None:
    """Readers that meet experts of square shape go by transformers_version: it must not say the other layout."""
    stored = str(config.get("transformers_version") or "0").split(".")
    newer = [int(part) if part.isdigit() else 0 for part in stored[:2]] >= [5, 2]
    if newer != (experts_layout == "v5"):
        config["transformers_version"] = V5_VERSION if experts_layout == "v5" else HUB_VERSION


def _rebuilt_text(dims: Dims) -> dict[str, Any]:
    mrope = {"mrope_interleaved": True, "mrope_section": list(dims.mrope_section), "rope_type": "default"}
    text: dict[str, Any] = {
        "attention_bias": dims.attention_bias,
        "head_dim": dims.head_dim,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.ffn,
        "max_position_embeddings": dims.max_positions,
        "model_type": f"{dims.model_type}_text",
        "num_attention_heads": dims.heads,
        "num_hidden_layers": dims.layers,
        "num_key_value_heads": dims.kv_heads,
        "rms_norm_eps": dims.rms_eps,
        "rope_scaling": mrope,
        "rope_theta": int(dims.rope_theta) if dims.rope_theta.is_integer() else dims.rope_theta,
        "vocab_size": dims.vocab,
    }
    eos = list(dims.eos_token_id) if isinstance(dims.eos_token_id, tuple) else dims.eos_token_id
    optional = {"bos_token_id": dims.bos_token_id, "eos_token_id": eos, "dtype": dims.dtype}
    text |= {key: value for key, value in optional.items() if value is not None}
    if dims.tied:
        text["tie_word_embeddings"] = True
    return text | _rebuilt_experts(dims)


def _rebuilt_experts(dims: Dims) -> dict[str, Any]:
    if not dims.moe:
        return {}
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": dims.expert_ffn,
        "num_experts": dims.experts,
        "num_experts_per_tok": dims.top_k,
    }


def _rebuilt_vision(dims: Dims) -> dict[str, Any]:
    return {
        "deepstack_visual_indexes": list(dims.deepstack),
        "depth": dims.vision_depth,
        "hidden_size": dims.vision_hidden,
        "in_channels": dims.channels,
        "intermediate_size": dims.vision_ffn,
        "model_type": dims.model_type,
        "num_heads": dims.vision_heads,
        "num_position_embeddings": dims.position_embeddings,
        "out_hidden_size": dims.vision_out,
        "patch_size": dims.patch,
        "spatial_merge_size": dims.spatial_merge,
        "temporal_patch_size": dims.temporal_patch,
    }
