"""Which modules the layers are made of: Transformer Engine's where it works, Megatron-Core's own and torch's otherwise.

Checkpoint keys are the same either way: a norm that Transformer Engine fuses into the linear layer after it is stored
under that layer's name, and one that it keeps apart under its own.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from qwen3vl_convert.models.attention import Qwen3VLSelfAttention, TorchAttention
from qwen3vl_convert.models.layers import Qwen3VLTransformerLayer, Qwen3VLVisionTransformerLayer
from qwen3vl_convert.models.norms import LayerNorm, RMSNorm, StoredLayerNorm, StoredRMSNorm


@cache
def transformer_engine_works() -> bool:
    """Importable, and a GPU to run on: it has no kernels for anything else."""
    try:
        from megatron.core.extensions.transformer_engine import HAVE_TE
    except ImportError:
        return False
    return bool(HAVE_TE) and torch.cuda.is_available()


def uses_transformer_engine(config: TransformerConfig) -> bool:
    """Whether layers of this configuration are Transformer Engine's; `transformer_impl="local"` turns it off."""
    return config.transformer_impl != "local" and transformer_engine_works()


def language_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One layer of the text model, dense or MoE as `config.num_moe_experts` says."""
    experts = config.num_moe_experts
    if uses_transformer_engine(config):
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
        )
        return _with(spec, Qwen3VLTransformerLayer)
    spec = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    return _with(
        spec,
        Qwen3VLTransformerLayer,
        attention={"core_attention": TorchAttention, "q_layernorm": StoredRMSNorm, "k_layernorm": StoredRMSNorm},
        # Transformer Engine fuses the norm before a dense MLP into its first layer; before experts it stands alone.
        **_local_norms(RMSNorm, RMSNorm if experts is None else StoredRMSNorm, fused_mlp=experts is None),
    )


def vision_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One layer of the vision tower: every patch of a frame sees every other."""
    if uses_transformer_engine(config):
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=False)
        return _with(spec, Qwen3VLVisionTransformerLayer, mask=AttnMaskType.no_mask)
    return _with(
        get_gpt_layer_local_spec(qk_layernorm=False),
        Qwen3VLVisionTransformerLayer,
        mask=AttnMaskType.no_mask,
        attention={"core_attention": TorchAttention, "q_layernorm": IdentityOp, "k_layernorm": IdentityOp},
        **_local_norms(LayerNorm, LayerNorm, fused_mlp=True),
    )


def _with(
    spec: ModuleSpec,
    layer: type[TransformerLayer],
    mask: AttnMaskType = AttnMaskType.causal,
    attention: dict[str, Any] | None = None,
    **changes: Any,
) -> ModuleSpec:
    """Megatron-Core's own spec with our layer, our self-attention, and the changes named."""
    submodules: TransformerLayerSubmodules = spec.submodules
    self_attention = ModuleSpec(
        module=Qwen3VLSelfAttention,
        params={**submodules.self_attention.params, "attn_mask_type": mask},
        submodules=replace(submodules.self_attention.submodules, **attention or {}),
    )
    return ModuleSpec(module=layer, submodules=replace(submodules, self_attention=self_attention, **changes))


def _local_norms(before_attention: type, before_mlp: type, fused_mlp: bool) -> dict[str, Any]:
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if fused_mlp:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return {
        "input_layernorm": before_attention,
        "pre_mlp_layernorm": before_mlp,
        "sharded_state_dict_keys_map": keys,
    }


def language_block_spec(
    config: TransformerConfig, layer_spec: ModuleSpec, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, and the norm after the last."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer_spec] * layers, layer_norm=_final_norm(config))


def vision_block_spec(config: TransformerConfig, layer_spec: ModuleSpec) -> TransformerBlockSubmodules:
    """All layers of the vision tower. The mergers have norms of their own; after the last layer there is none."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec] * config.num_layers, layer_norm=None)


def _final_norm(config: TransformerConfig) -> type:
    return _transformer_engine("TENorm") if uses_transformer_engine(config) else StoredRMSNorm


def _transformer_engine(name: str) -> type:
    from megatron.core.extensions import transformer_engine

    return getattr(transformer_engine, name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PatchMergerSubmodules:
    """What a patch merger is made of: a norm, a column-parallel and a row-parallel linear layer."""

    patch_norm: Any
    linear_fc1: Any
    linear_fc2: Any


def patch_merger_spec(config: TransformerConfig) -> ModuleSpec:
    """The modules of a merger; `module` is the merger itself."""
    from qwen3vl_convert.models.vision_layers import Qwen3VLVisionPatchMerger

    names = ("TENorm", "TEColumnParallelLinear", "TERowParallelLinear")
    if uses_transformer_engine(config):
        parts = [_transformer_engine(name) for name in names]
    else:
        parts = [StoredLayerNorm, ColumnParallelLinear, RowParallelLinear]
    return ModuleSpec(module=Qwen3VLVisionPatchMerger, submodules=PatchMergerSubmodules(*parts))
