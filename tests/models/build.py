"""Models for tests: one process on the CPU, any settings, weights of any checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch

from qwen3vl_convert.dims import Dims


def vision_config(dims: Dims) -> SimpleNamespace:
    """What a Hugging Face vision configuration would say."""
    return SimpleNamespace(
        depth=dims.vision_depth,
        hidden_size=dims.vision_hidden,
        num_heads=dims.vision_heads,
        intermediate_size=dims.vision_ffn,
        out_hidden_size=dims.vision_out,
        hidden_act="gelu_pytorch_tanh",
        patch_size=dims.patch,
        temporal_patch_size=dims.temporal_patch,
        in_channels=dims.channels,
        spatial_merge_size=dims.spatial_merge,
        num_position_embeddings=dims.position_embeddings,
        deepstack_visual_indexes=list(dims.deepstack),
    )


def text_settings(dims: Dims, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the provider of the text model alone is told."""
    moe = {
        "num_moe_experts": dims.experts,
        "moe_ffn_hidden_size": dims.expert_ffn,
        "moe_router_topk": dims.top_k,
    }
    return {
        "num_layers": dims.layers,
        "hidden_size": dims.hidden,
        "num_attention_heads": dims.heads,
        "num_query_groups": dims.kv_heads,
        "kv_channels": dims.head_dim,
        "ffn_hidden_size": dims.ffn,
        "vocab_size": dims.vocab,
        "mrope_section": list(dims.mrope_section),
        "share_embeddings_and_output_weights": dims.tied,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        **(moe if dims.moe else {}),
    }


def provider(dims: Dims, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The provider of a model of these sizes, written by hand: what bridges derive is tested against it."""
    from qwen3vl_convert.models.provider import Qwen3VLModelProvider, Qwen3VLMoEModelProvider

    kind: Any = Qwen3VLMoEModelProvider if dims.moe else Qwen3VLModelProvider
    made = kind(
        **text_settings(dims, dtype),
        vision_config=vision_config(dims),
        image_token_id=dims.image_token_id,
        video_token_id=dims.video_token_id,
        vision_start_token_id=dims.vision_start_token_id,
        **({"freeze_language_model": False, "freeze_vision_model": False} if dims.moe else {}),
    )
    for name, value in settings.items():
        assert name in {field.name for field in fields(made)}, name
        setattr(made, name, value)
    return made


@contextmanager
def lone_process() -> Iterator[None]:
    """One process, its process groups, and stand-ins for a GPU."""
    from qwen3vl_convert.models import single_process

    with single_process():
        yield
