"""The interface that users were promised: every class, argument, default, attribute and method of the API document.

The tables are that document, written as Python. What the parts do is tested elsewhere.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qwen3vl_convert.inference as api
from qwen3vl_convert.inference.loading import uninitialised
from qwen3vl_convert.make import SIZES

NONE = inspect.Parameter.empty
TEXT_SIZES = {"hidden_size": NONE, "num_heads": NONE, "num_kv_heads": NONE, "head_dim": NONE}
ROPE = {
    "rope_theta": 5000000.0,
    "rms_norm_eps": 1e-06,
    "mrope_section": (24, 20, 20),
    "mrope_interleaved": True,
    "max_position_embeddings": 32768,
    "quant_config": None,
}
ROTARY = ["x", "cu_seqlens", "rotary_pos_emb_cos", "rotary_pos_emb_sin"]

CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "Qwen3VisionMLP": {"in_features": NONE, "hidden_features": NONE, "hidden_act": "silu", "bias": True},
    "Qwen3VLVisionPatchEmbed": {"patch_size": 16, "temporal_patch_size": 2, "in_channels": 3, "embed_dim": 1152},
    "Qwen3VisionAttention": {"embed_dim": NONE, "num_heads": NONE},
    "Qwen3VisionBlock": {
        "dim": NONE,
        "num_heads": NONE,
        "intermediate_dim": NONE,
        "hidden_act": "silu",
        "norm_eps": 1e-06,
    },
    "Qwen3VLVisionPatchMerger": {
        "dim": NONE,
        "context_dim": NONE,
        "spatial_merge_size": 2,
        "use_postshuffle_norm": False,
        "norm_eps": 1e-06,
    },
    "Qwen3VLVisionModel": {
        "depth": 27,
        "hidden_size": 1152,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 4304,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 3584,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": None,
        "norm_eps": 1e-06,
    },
    "Qwen3VLAttention": {**TEXT_SIZES, "layer_id": NONE, **ROPE, "prefix": ""},
    "Qwen3VLDecoderLayer": {**TEXT_SIZES, "intermediate_size": NONE, "layer_id": NONE, **ROPE, "prefix": ""},
    "Qwen3VLTextModel": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        **ROPE,
    },
    "Qwen3VLForConditionalGeneration": {"config": NONE, "quant_config": None},
}
METHODS: dict[str, dict[str, list[str]]] = {
    "Qwen3VisionMLP": {"forward": ["x"]},
    "Qwen3VLVisionPatchEmbed": {"forward": ["hidden_states"]},
    "Qwen3VisionAttention": {"forward": ROTARY},
    "Qwen3VisionBlock": {"forward": ROTARY},
    "Qwen3VLVisionPatchMerger": {"forward": ["x"]},
    "Qwen3VLVisionModel": {
        "forward": ["x", "grid_thw"],
        "rot_pos_emb": ["grid_thw"],
        "fast_pos_embed_interpolate": ["grid_thw"],
    },
    "Qwen3VLAttention": {"forward": ["positions", "hidden_states", "forward_batch"]},
    "Qwen3VLDecoderLayer": {"forward": ["positions", "hidden_states", "forward_batch", "deepstack_embeds"]},
    "Qwen3VLTextModel": {
        "forward": ["input_ids", "positions", "forward_batch", "input_embeds", "input_deepstack_embeds"]
    },
    "Qwen3VLForConditionalGeneration": {
        "get_input_embeddings": [],
        "forward": ["input_ids", "positions", "forward_batch"],
        "load_weights": ["weights"],
    },
}
ATTRIBUTES: dict[str, list[str]] = {
    "Qwen3VisionMLP": ["linear_fc1", "linear_fc2"],
    "Qwen3VLVisionPatchEmbed": ["patch_size", "temporal_patch_size", "in_channels", "embed_dim", "proj"],
    "Qwen3VisionAttention": ["embed_dim", "num_heads", "head_dim", "qkv_proj", "out_proj"],
    "Qwen3VisionBlock": ["norm1", "norm2", "attn", "mlp"],
    "Qwen3VLVisionPatchMerger": ["hidden_size", "use_postshuffle_norm", "norm", "linear_fc1", "act_fn", "linear_fc2"],
    "Qwen3VLVisionModel": [
        "hidden_size",
        "num_heads",
        "num_position_embeddings",
        "num_grid_per_side",
        "patch_size",
        "spatial_merge_size",
        "temporal_patch_size",
        "deepstack_visual_indexes",
        "out_hidden_size",
        "patch_embed",
        "pos_embed",
        "blocks",
        "merger",
        "deepstack_merger_list",
        "dtype",
        "device",
    ],
    "Qwen3VLAttention": [
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "q_size",
        "kv_size",
        "scaling",
        "mrope_section",
        "mrope_interleaved",
        "use_fused_qkv",
        "o_proj",
        "q_norm",
        "k_norm",
        "attn",
    ],
    "Qwen3VLDecoderLayer": ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"],
    "Qwen3VLTextModel": ["hidden_size", "num_hidden_layers", "embed_tokens", "layers", "norm"],
    "Qwen3VLForConditionalGeneration": [
        "config",
        "quant_config",
        "model",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "spatial_merge_size",
    ],
}


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults in their order, without self."""
    found = inspect.signature(function).parameters
    return {name: one.default for name, one in found.items() if name != "self"}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors(name: str) -> None:
    """Those arguments first, in that order and with those defaults; ours may have more behind them."""
    promised = CONSTRUCTORS[name]
    found = parameters(getattr(api, name).__init__)
    assert dict(list(found.items())[: len(promised)]) == promised
    assert list(found)[: len(promised)] == list(promised)
    assert NONE not in list(found.values())[len(promised) :]


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in METHODS for method in METHODS[name]])
def test_methods(name: str, method: str) -> None:
    assert list(parameters(inspect.unwrap(getattr(getattr(api, name), method)))) == METHODS[name][method]


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    """An instance of each class, out of a tiny model."""
    with uninitialised(torch.device("cpu"), torch.float32):
        model = api.Qwen3VLForConditionalGeneration(SIZES["tiny"])
    return {type(module).__name__: module for module in model.modules()}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(name: str, parts: dict[str, nn.Module]) -> None:
    missing = [attribute for attribute in ATTRIBUTES[name] if getattr(parts[name], attribute, None) is None]
    assert missing == (["quant_config"] if name == "Qwen3VLForConditionalGeneration" else [])


def test_functions_and_data() -> None:
    assert list(parameters(api.get_rope_index))[:5] == [
        "input_ids",
        "image_grid_thw",
        "image_token_id",
        "vision_start_token_id",
        "spatial_merge_size",
    ]
    assert isinstance(api.logger, logging.Logger)
    assert set(CONSTRUCTORS) | {"get_rope_index", "logger"} <= set(dir(api))
