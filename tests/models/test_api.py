"""The interface that users were promised: every class, argument, attribute and default of the API documents.

The tables are those documents, written as Python. What the parts do is tested elsewhere.
"""

import inspect
from dataclasses import fields
from typing import Any

import pytest

pytestmark = pytest.mark.megatron

TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
BOTH_PROVIDERS = {
    **TOKENS,
    "hf_text_config": None,
    "head_dim": 128,
    "qk_layernorm": True,
    "attention_softmax_in_fp32": True,
    "attention_dropout": 0.0,
    "position_embedding_type": "mrope",
    "mrope_section": [24, 20, 20],
    "rotary_base": 5000000.0,
    "scatter_embedding_sequence_parallel": False,
    "language_max_sequence_length": 2048,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "freeze_vision_projection": False,
}
DENSE_PROVIDER = {
    **BOTH_PROVIDERS,
    "patch_size": 14,
    "in_channels": 3,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2304,
    "apply_rotary_pos_emb_in_fp32": False,
    "deepstack_visual_indexes": [8, 16, 24],
    "fp16_lm_cross_entropy": False,
    "rotary_percent": 1.0,
    "apply_rope_fusion": False,
    "freeze_language_model": False,
    "freeze_vision_model": False,
    "sequence_parallel": False,
    "num_query_groups": 8,
}
MOE_PROVIDER = {
    **BOTH_PROVIDERS,
    "pretrained_model_name": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "patch_size": 16,
    "num_moe_experts": 128,
    "moe_router_topk": 8,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-3,
    "moe_grouped_gemm": True,
    "moe_router_pre_softmax": False,
    "moe_router_dtype": "fp32",
    "moe_router_score_function": "softmax",
    "moe_router_bias_update_rate": 0.001,
    "moe_permute_fusion": True,
    "moe_token_dispatcher_type": "alltoall",
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "freeze_language_model": True,
    "freeze_vision_model": True,
    "persist_layer_norm": True,
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "masked_softmax_fusion": False,
    "deallocate_pipeline_outputs": True,
    "async_tensor_model_parallel_allreduce": True,
    "distribute_saved_activations": False,
    "cp_comm_type": "p2p",
}
PROVIDERS = {"Qwen3VLModelProvider": DENSE_PROVIDER, "Qwen3VLMoEModelProvider": MOE_PROVIDER}

SIGNATURES = {
    "model.Qwen3VLModel": (
        "language_transformer_config", "language_transformer_layer_spec", "vision_transformer_config",
        "parallel_output=True", "pre_process=True", "post_process=True", "add_encoder=True", "add_decoder=True",
    ),
    "model.Qwen3VLModel.shared_embedding_or_output_weight": (),
    "model.Qwen3VLModel.set_input_tensor": ("input_tensor",),
    "model.Qwen3VLModel.freeze": ("freeze_language_model", "freeze_vision_model", "freeze_vision_projection"),
    "model.Qwen3VLModel.forward": (
        "input_ids", "position_ids=None", "attention_mask=None", "labels=None", "inference_params=None",
        "packed_seq_params=None", "extra_block_kwargs=None", "pixel_values=None", "pixel_values_videos=None",
        "image_grid_thw=None", "video_grid_thw=None", "image_input_mask=None",
    ),
    "vision_model.Qwen3VLVisionModel": (
        "transformer_config", "transformer_layer_spec", "patch_merger_spec", "pre_process=True", "post_process=True",
        "pg_collection=None",
    ),
    "vision_model.Qwen3VLVisionModel.set_input_tensor": ("input_tensor",),
    "vision_model.Qwen3VLVisionModel.rot_pos_emb": ("grid_thw",),
    "vision_model.Qwen3VLVisionModel.fast_pos_embed_interpolate": ("grid_thw",),
    "vision_model.Qwen3VLVisionModel._get_max_vision_seq_length": (),
    "vision_model.Qwen3VLVisionModel._uses_vision_cuda_graph": (),
    "vision_model.Qwen3VLVisionModel.forward": (
        "hidden_states", "grid_thw", "inference_params=None", "extra_block_kwargs=None",
    ),
    "vision_model.Qwen3VLVisionModel.build_packed_seq_params": ("grid_thw",),
    "vision_model._maybe_pad_vision_sequence_for_cuda_graph": (
        "hidden_states", "rotary_pos_emb", "seq_len", "max_seq_len",
    ),
    "vision_model._vision_forward_packed_attention_setup": (
        "use_cuda_graph_padding", "hidden_states", "original_seq_len", "seq_len", "grid_thw", "build_packed_seq_params",
    ),
    "provider.Qwen3VLModelProvider.provide": ("pre_process=None", "post_process=None", "vp_stage=None"),
    "provider.Qwen3VLModelProvider.provide_language_model": ("pre_process=None", "post_process=None", "vp_stage=None"),
    "provider.Qwen3VLMoEModelProvider.finalize": (),
    "provider.Qwen3VLMoEModelProvider.provide": ("pre_process=None", "post_process=None", "vp_stage=None"),
    "provider.Qwen3VLMoEModelProvider.provide_language_model": (
        "pre_process=None", "post_process=None", "vp_stage=None",
    ),
    "bridge.Qwen3VLBridge.provider_bridge": ("hf_pretrained",),
    "bridge.Qwen3VLBridge.mapping_registry": (),
    "bridge.Qwen3VLMoEBridge.provider_bridge": ("hf_pretrained",),
    "bridge.Qwen3VLMoEBridge.mapping_registry": (),
    "bridge.AutoBridge.load_hf_weights": ("model",),
    "bridge.AutoBridge.export_hf_weights": ("model",),
}  # fmt: skip


def named(path: str) -> Any:
    """`file.Class.method` of the models room."""
    from importlib import import_module

    file, *names = path.split(".")
    found = import_module(f"qwen3vl_convert.models.{file}")
    for name in names:
        found = getattr(found, name)
    return found


def written(parameter: inspect.Parameter) -> str:
    """As the tables have it."""
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"


@pytest.mark.parametrize("path", SIGNATURES)
def test_takes_the_arguments_of_the_document_in_its_order(path: str) -> None:
    parameters = [p for p in inspect.signature(named(path)).parameters.values() if p.name != "self"]
    for parameter, documented in zip(parameters, SIGNATURES[path], strict=False):
        assert documented in (written(parameter), parameter.name), "an argument without a default may have one"
    assert len(parameters) >= len(SIGNATURES[path])
    more = parameters[len(SIGNATURES[path]) :]
    assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in more), "more arguments must be optional"


@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_have_the_documented_defaults(name: str) -> None:
    provider = named(f"provider.{name}")()
    found = {setting: getattr(provider, setting) for setting in PROVIDERS[name]}
    assert found == PROVIDERS[name]
    assert PROVIDERS[name].keys() <= {field.name for field in fields(provider)}


@pytest.mark.transformers
@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_default_vision_config_is_that_of_transformers(name: str) -> None:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

    assert isinstance(named(f"provider.{name}")().vision_config, Qwen3VLVisionConfig)


@pytest.mark.transformers
def test_without_transformers_the_default_vision_config_has_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    provider = named("provider.default_vision_config")
    theirs = provider()
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3_vl.configuration_qwen3_vl", None)
    ours = provider()
    assert type(ours) is not type(theirs)
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(theirs).items()}
    assert {name: listed[name] for name in vars(ours)} == vars(ours)


def test_classes_are_what_the_document_says_they_are() -> None:
    from megatron.core.models.common.vision_module.vision_module import VisionModule
    from megatron.core.transformer import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert issubclass(named("model.Qwen3VLModel"), MegatronModule)
    assert issubclass(named("vision_model.Qwen3VLVisionModel"), VisionModule)
    assert all(issubclass(named(f"provider.{name}"), TransformerConfig) for name in PROVIDERS)


@pytest.mark.slow
def test_the_room_exports_its_names_and_imports_nothing_before_they_are_used() -> None:
    import subprocess
    import sys

    code = (
        "import sys, qwen3vl_convert.models as room; assert 'megatron' not in sys.modules; "
        "[getattr(room, name) for name in room.__all__]"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
