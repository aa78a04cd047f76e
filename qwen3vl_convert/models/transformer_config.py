"""The transformer configurations of both towers: Megatron-Core's, with what Qwen3-VL adds."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from qwen3vl_convert.errors import ConfigError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
    "silu": functional.silu,
}
"""`hidden_act` of a Hugging Face configuration, as a function."""

_AS_IN_TEXT = (
    "tensor_model_parallel_size", "params_dtype", "bf16", "fp16", "autocast_dtype", "enable_autocast",
    "use_cpu_initialization", "perform_initialization", "init_method_std", "gradient_accumulation_fusion",
    "transformer_impl", "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
    "deterministic_mode", "attention_backend", "timers", "finalize_model_grads_func", "grad_scale_func",
)  # fmt: skip
"""What the vision tower takes over from the text model's configuration."""


@dataclass
class Qwen3VLTransformerConfig(TransformerConfig):  # type: ignore[misc]
    """A TransformerConfig with the sizes, tokens and positions of Qwen3-VL; field names are Megatron-Bridge's."""

    vocab_size: int = 151936
    make_vocab_size_divisible_by: int = 128
    should_pad_vocab: bool = False
    language_max_sequence_length: int = 4096
    """Only a bound for what Megatron-Core allocates for learned positions, of which there are none."""

    patch_size: int = 16
    temporal_patch_size: int = 2
    in_channels: int = 3
    spatial_merge_size: int = 2
    num_position_embeddings: int = 2304
    out_hidden_size: int = 2304
    """Width of the vision features: the text model's hidden size."""
    deepstack_visual_indexes: list[int] = field(default_factory=lambda: [8, 16, 24])
    """Vision layers (from 0) whose output goes to the first text layers, one each."""

    apply_rotary_pos_emb_in_fp32: bool = False
    position_embedding_type: str = "mrope"
    rotary_percent: float = 1.0
    rotary_base: float = 5000000.0
    mrope_section: list[int] = field(default_factory=lambda: [24, 20, 20])
    """Frequencies of time, height and width; their sum is half of a head."""
    fp16_lm_cross_entropy: bool = False
    share_embeddings_and_output_weights: bool = False
    scatter_embedding_sequence_parallel: bool = False

    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    hf_text_config: Any = None

    vision_cuda_graph_impl: str = "none"
    """"transformer_engine" pads the vision sequence to a fixed length, as captured graphs need it."""
    max_vision_cuda_graph_seq_length: int | None = None
    """That length in patches. None: a quarter of `num_position_embeddings` (for a merge size of 2)."""


def vision_config_of(config: Any) -> Any:
    """The part of a Hugging Face configuration that is the tower's: of `Qwen3VLConfig` its `vision_config`."""
    return getattr(config, "vision_config", config)


def get_vision_model_config(vision_config: Any, megatron_config: Qwen3VLTransformerConfig) -> Qwen3VLTransformerConfig:
    """The vision tower's configuration: sizes from the Hugging Face `vision_config`, run-time settings from the text's.

    `vision_config` may be the whole model's configuration, `Qwen3VLConfig`.

    The tower lives whole on the first pipeline stage and is cut by tensor parallelism only. Its norms have eps 1e-6 and
    its rotation runs in float32, as in transformers; neither is in the published configurations.
    """
    vision_config = vision_config_of(vision_config)
    hidden_act = getattr(vision_config, "hidden_act", "gelu_pytorch_tanh")
    if hidden_act not in ACTIVATIONS:
        raise ConfigError(f"vision_config.hidden_act: expected one of {', '.join(ACTIVATIONS)}; found {hidden_act!r}.")
    known = {setting.name for setting in fields(megatron_config)}  # releases of Megatron-Core differ
    config = Qwen3VLTransformerConfig(
        num_layers=vision_config.depth,
        hidden_size=vision_config.hidden_size,
        num_attention_heads=vision_config.num_heads,
        num_query_groups=vision_config.num_heads,
        kv_channels=vision_config.hidden_size // vision_config.num_heads,
        ffn_hidden_size=vision_config.intermediate_size,
        activation_func=ACTIVATIONS[hidden_act],
        gated_linear_unit=False,
        normalization="LayerNorm",
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
        add_qkv_bias=True,
        qk_layernorm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        apply_rotary_pos_emb_in_fp32=True,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        pipeline_model_parallel_size=1,
        patch_size=vision_config.patch_size,
        temporal_patch_size=vision_config.temporal_patch_size,
        in_channels=vision_config.in_channels,
        spatial_merge_size=vision_config.spatial_merge_size,
        num_position_embeddings=vision_config.num_position_embeddings,
        out_hidden_size=vision_config.out_hidden_size,
        deepstack_visual_indexes=list(vision_config.deepstack_visual_indexes),
        max_vision_cuda_graph_seq_length=megatron_config.max_vision_cuda_graph_seq_length,
        **{name: getattr(megatron_config, name) for name in _AS_IN_TEXT if name in known},
    )
    config.cuda_graph_impl = megatron_config.vision_cuda_graph_impl
    return config


def plain_config(settings: Any) -> TransformerConfig:
    """Megatron-Core's own configuration of the settings of a provider, which are checked first."""
    settings.finalize()
    return TransformerConfig(**{one.name: getattr(settings, one.name) for one in fields(TransformerConfig) if one.init})


def parameter_device(config: TransformerConfig) -> Any:
    """Where modules of torch's own make their parameters: where Megatron-Core makes its own."""
    return None if config.use_cpu_initialization else torch.cuda.current_device()
