"""What Megatron-Bridge and Megatron-LM want to know beside the weights, written from the sizes alone; and read back as
data.

Nothing here is ever instantiated: `_target_` entries are names for the reader on the other side.
"""

import struct
from pathlib import Path
from typing import Any

import yaml

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import ConfigError
from qwen3vl_convert.mappings.layout import Sizes
from qwen3vl_convert.megatron.blob import TensorValue
from qwen3vl_convert.megatron.pickled import Global, Instance
from qwen3vl_convert.parallel import ParallelLayout

_PROVIDER = "megatron.bridge.models.qwen_vl.qwen3_vl_provider."
_FLOAT_OPERATIONS = "floating_point_operations_so_far"


def _torch(name: str) -> dict[str, Any]:
    return {"_target_": f"torch.{name}", "_call_": False}


def run_config_yaml(
    dims: Dims, sizes: Sizes, layout: ParallelLayout, dtype: str, origin: tuple[str | None, str | None] = (None, None)
) -> bytes:
    """The `run_config.yaml` with which Megatron-Bridge loads the checkpoint; `origin` is a Hub id and its commit."""
    known = {"hf_model_id": origin[0], "hf_model_revision": origin[1]} if origin[0] else {}
    model = {**provider_fields(dims, sizes, dtype), **_parallel(layout), **known}
    config = {
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": True},
        "model": model,
    }
    return yaml.safe_dump(config, sort_keys=True).encode()


def provider_fields(dims: Dims, sizes: Sizes, dtype: str) -> dict[str, Any]:
    """The fields of the provider that builds a model of these sizes; dicts with a `_target_` stand for its objects."""
    return {**_model(dims, sizes, dtype), **(_experts(dims) if dims.moe else {})}


def _model(dims: Dims, sizes: Sizes, dtype: str) -> dict[str, Any]:
    provider = "Qwen3VLMoEModelProvider" if dims.moe else "Qwen3VLModelProvider"
    return {
        "_target_": _PROVIDER + provider,
        "num_layers": dims.layers,
        "hidden_size": dims.hidden,
        "ffn_hidden_size": dims.ffn,
        "num_attention_heads": dims.heads,
        "num_query_groups": dims.kv_heads,
        "kv_channels": dims.head_dim,
        "vocab_size": sizes.get("padded_vocab", dims.vocab),
        "should_pad_vocab": False,
        "seq_length": dims.max_positions,
        "layernorm_epsilon": dims.rms_eps,
        "rotary_base": _plain_number(dims.rope_theta),
        "position_embedding_type": "mrope",
        "mrope_section": list(dims.mrope_section),
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": _torch("nn.functional.silu"),
        "add_bias_linear": False,
        "add_qkv_bias": dims.attention_bias,
        "qk_layernorm": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "share_embeddings_and_output_weights": dims.tied,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": _torch(dtype),
        "pipeline_dtype": _torch(dtype),
        "image_token_id": dims.image_token_id,
        "video_token_id": dims.video_token_id,
        "vision_start_token_id": dims.vision_start_token_id,
        "vision_end_token_id": dims.vision_end_token_id,
        "bos_token_id": dims.bos_token_id,
        "eos_token_id": _listed(dims.eos_token_id),
        "vision_config": _vision(dims, dtype),
        "hf_text_config": _text(dims, dtype),
    }


def _plain_number(value: float) -> int | float:
    """5000000 rather than 5000000.0, as configs have it."""
    return int(value) if value.is_integer() else value


def _listed(token: int | tuple[int, ...] | None) -> int | list[int] | None:
    return list(token) if isinstance(token, tuple) else token


def _parallel(layout: ParallelLayout) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
        "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
    }


def _experts(dims: Dims) -> dict[str, Any]:
    # The MoE provider's class defaults freeze both towers; a converted checkpoint is to be trained.
    return {
        "head_dim": dims.head_dim,
        "num_moe_experts": dims.experts,
        "moe_ffn_hidden_size": dims.expert_ffn,
        "moe_router_topk": dims.top_k,
        "moe_grouped_gemm": True,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1.0e-3,
        "freeze_language_model": False,
        "freeze_vision_model": False,
    }


def _hf_class(dims: Dims, kind: str) -> str:
    module, name = ("qwen3_vl_moe", "Qwen3VLMoe") if dims.moe else ("qwen3_vl", "Qwen3VL")
    return f"transformers.models.{module}.configuration_{module}.{name}{kind}Config"


def _vision(dims: Dims, dtype: str) -> dict[str, Any]:
    return {
        "_target_": _hf_class(dims, "Vision"),
        "depth": dims.vision_depth,
        "hidden_size": dims.vision_hidden,
        "num_heads": dims.vision_heads,
        "intermediate_size": dims.vision_ffn,
        "out_hidden_size": dims.vision_out,
        "patch_size": dims.patch,
        "temporal_patch_size": dims.temporal_patch,
        "in_channels": dims.channels,
        "spatial_merge_size": dims.spatial_merge,
        "num_position_embeddings": dims.position_embeddings,
        "deepstack_visual_indexes": list(dims.deepstack),
        "hidden_act": "gelu_pytorch_tanh",
        "dtype": _torch(dtype),
    }


def _text(dims: Dims, dtype: str) -> dict[str, Any]:
    experts = {
        "num_experts": dims.experts,
        "num_experts_per_tok": dims.top_k,
        "moe_intermediate_size": dims.expert_ffn,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return {
        "_target_": _hf_class(dims, "Text"),
        "num_hidden_layers": dims.layers,
        "hidden_size": dims.hidden,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "intermediate_size": dims.ffn,
        "vocab_size": dims.vocab,
        "max_position_embeddings": dims.max_positions,
        "rms_norm_eps": dims.rms_eps,
        "attention_bias": dims.attention_bias,
        "hidden_act": "silu",
        "tie_word_embeddings": dims.tied,
        "bos_token_id": dims.bos_token_id,
        "eos_token_id": _listed(dims.eos_token_id),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _plain_number(dims.rope_theta),
            "mrope_section": list(dims.mrope_section),
            "mrope_interleaved": True,
        },
        "dtype": _torch(dtype),
        **(experts if dims.moe else {}),
    }


def config_of_run(run_config: dict[str, Any], where: str) -> dict[str, Any]:
    """A config.json from a `run_config.yaml`, Megatron-Bridge's or ours. Raises `ConfigError` when it is of another
    model.
    """
    model = run_config.get("model")
    if not isinstance(model, dict) or not all(
        isinstance(model.get(k), dict) for k in ("vision_config", "hf_text_config")
    ):
        raise ConfigError(f"{where}: expected model.vision_config and model.hf_text_config. Pass --config instead.")
    text, vision = (_plain(model[key]) for key in ("hf_text_config", "vision_config"))
    moe = model.get("num_moe_experts") is not None
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = {
        "architectures": ["Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl_moe" if moe else "qwen3_vl",
        "tie_word_embeddings": bool(model.get("share_embeddings_and_output_weights")),
        "text_config": {**text, "tie_word_embeddings": bool(model.get("share_embeddings_and_output_weights"))},
        "vision_config": vision,
        "transformers_version": "4.57.0",
    }
    return config | {key: model[key] for key in tokens if key in model}


_NOISE = {
    "_target_",
    "architectures",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
}
"""What transformers' base class adds to every config."""


def _plain(node: dict[str, Any]) -> dict[str, Any]:
    """A config node without noise, dtypes as names."""
    kept = {key: value for key, value in node.items() if key not in _NOISE}
    if isinstance(kept.get("dtype"), dict):
        kept["dtype"] = str(kept["dtype"].get("_target_", "")).removeprefix("torch.")
    return kept


def read_run_config(path: Path) -> dict[str, Any] | None:
    """The parsed `run_config.yaml` of an iteration folder, as plain data, or None when there is none."""
    if not path.is_file():
        return None
    try:
        loaded = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that is none
        raise ConfigError(f"{path}: is no plain YAML ({error}). Pass --config, or remove the file.") from None
    return loaded if isinstance(loaded, dict) else None


def common_state(dims: Dims, sizes: Sizes, layout: ParallelLayout, iteration: int | str) -> dict[str, Any]:
    """What Megatron-Core calls the common state: plain values, and Megatron-LM's `args`."""
    return {
        "args": Instance(Global("argparse", "Namespace"), _arguments(dims, sizes, layout)),
        "checkpoint_version": 3.0,
        "iteration": 0 if iteration == "release" else iteration,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def _arguments(dims: Dims, sizes: Sizes, layout: ParallelLayout) -> dict[str, Any]:
    """The attributes of `args` that Megatron-LM compares, or takes with `--use-checkpoint-args`."""
    arguments = {
        "num_layers": dims.layers,
        "hidden_size": dims.hidden,
        "ffn_hidden_size": dims.ffn,
        "num_attention_heads": dims.heads,
        "group_query_attention": True,
        "num_query_groups": dims.kv_heads,
        "kv_channels": dims.head_dim,
        "max_position_embeddings": dims.max_positions,
        "seq_length": dims.max_positions,
        "position_embedding_type": "mrope",
        "mrope_section": list(dims.mrope_section),
        "rotary_base": int(dims.rope_theta),
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "norm_epsilon": dims.rms_eps,
        "swiglu": True,
        "add_position_embedding": True,  # its deprecated opposite makes Megatron-LM refuse any type but rope
        "add_bias_linear": False,
        "add_qkv_bias": dims.attention_bias,
        "qk_layernorm": True,
        "untie_embeddings_and_output_weights": not dims.tied,
        "vocab_size": dims.vocab,
        "padded_vocab_size": sizes.get("padded_vocab", dims.vocab),
        "make_vocab_size_divisible_by": 1,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "decoder_first_pipeline_num_layers": layout.first_stage_layers,
        "decoder_last_pipeline_num_layers": layout.last_stage_layers,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
        "ckpt_format": "torch_dist",
    }
    experts = {"num_experts": dims.experts, "moe_ffn_hidden_size": dims.expert_ffn, "moe_router_topk": dims.top_k}
    return arguments | (experts if dims.moe else {"num_experts": None})


def train_state(step: int) -> dict[str, TensorValue]:
    """Megatron-Bridge's `train_state.pt` of a checkpoint that has not been trained."""
    counts = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    return {
        "step": TensorValue("int64", (), struct.pack("<q", step)),
        **{name: TensorValue("int64", (), struct.pack("<q", 0)) for name in counts},
        _FLOAT_OPERATIONS: TensorValue("float32", (), struct.pack("<f", 0.0)),
        **{name: TensorValue("bool", (), b"\0") for name in ("do_train", "do_valid", "do_test")},
    }
