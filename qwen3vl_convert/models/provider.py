"""Providers: dataclasses that hold every setting of a model and its training, and build it.

The fields are Megatron-Bridge's, with its defaults; a setting may be changed until `finalize`, which checks them all.

    Qwen3ModelProvider         the text model: its settings, and the model by itself
        Qwen3MoEModelProvider  the same with experts
    Qwen3VLModelProvider       the first with a vision tower
    Qwen3VLMoEModelProvider    the second with a vision tower
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.nn import functional

from qwen3vl_convert.errors import ConfigError
from qwen3vl_convert.models.distributed import Distributed
from qwen3vl_convert.models.model import Qwen3VLModel, padded_vocab_size
from qwen3vl_convert.models.specs import language_layer_spec, uses_transformer_engine
from qwen3vl_convert.models.text_model import Qwen3VLGPTModel
from qwen3vl_convert.models.transformer_config import Qwen3VLTransformerConfig


def default_vision_config() -> Any:
    """transformers' default Qwen3VLVisionConfig; without transformers, an object with the same attributes."""
    try:
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    except ImportError:
        return SimpleNamespace(
            depth=27, hidden_size=1152, hidden_act="gelu_pytorch_tanh", intermediate_size=4304, num_heads=16,
            in_channels=3, patch_size=16, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=3584,
            num_position_embeddings=2304, deepstack_visual_indexes=[8, 16, 24], initializer_range=0.02,
        )  # fmt: skip
    return Qwen3VLVisionConfig()


@dataclass
class Qwen3ModelProvider(Distributed, Qwen3VLTransformerConfig):
    """Settings of the text model, which `provide` builds by itself. By default those of the 8B.

    Settings stay open until `finalize`; `provide` calls it if nobody did.
    """

    # Megatron-Core has no default for these; those of Megatron-Bridge's Qwen3 provider.
    num_layers: int = 36
    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_query_groups: int | None = 8
    kv_channels: int | None = 128
    ffn_hidden_size: int | None = 12288

    normalization: str = "RMSNorm"
    activation_func: Any = functional.silu
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    layernorm_epsilon: float = 1e-6
    hidden_dropout: float = 0.0
    init_method_std: float = 0.02
    seq_length: int = 4096
    bf16: bool = True
    params_dtype: torch.dtype = torch.bfloat16
    autocast_dtype: torch.dtype = torch.bfloat16
    pipeline_dtype: torch.dtype = torch.bfloat16
    batch_p2p_comm: bool = True

    head_dim: int = 128
    language_max_sequence_length: int = 2048
    attention_dropout: float = 0.0
    attention_softmax_in_fp32: bool = True
    qk_layernorm: bool = True
    sequence_parallel: bool = False
    parallel_output: bool = True

    def __post_init__(self) -> None:
        """Nothing yet: settings are still to come."""
        self._finalized = False

    def finalize(self) -> None:
        """Check all settings, derive those that follow from others. Raises ConfigError or ValueError."""
        self._check()
        if self.context_parallel_size > 1:
            self.calculate_per_token_loss = True  # ranks have different numbers of tokens that count
        if not torch.cuda.is_available():
            self.use_cpu_initialization = True
        if not uses_transformer_engine(self):
            self._without_transformer_engine()
        super().__post_init__()
        self._finalized = True

    def _without_transformer_engine(self) -> None:
        """Turn off fusions that only its kernels (or Apex's) have. They change speed, not results."""
        self.transformer_impl = "local"
        self.gradient_accumulation_fusion = False
        self.persist_layer_norm = False
        self.masked_softmax_fusion = False
        self.bias_dropout_fusion = False
        self.apply_rope_fusion = False

    def _check(self) -> None:
        self._divides("num_attention_heads", self.num_attention_heads, "tensor_model_parallel_size")
        self._divides("vocab_size", padded_vocab_size(self), "tensor_model_parallel_size")
        if 2 * sum(self.mrope_section) != self.kv_channels:
            raise ConfigError(
                f"mrope_section: expected three numbers with the sum kv_channels / 2 = "
                f"{(self.kv_channels or 0) / 2:g}, found {self.mrope_section}. Both are in the model's configuration."
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "sequence_parallel: expected tensor_model_parallel_size of 2 or more, found 1. It cuts the sequence "
                "over tensor parallel ranks; set it to False."
            )

    def _divides(self, name: str, value: int, over: str) -> None:
        ranks = getattr(self, over)
        if ranks < 1 or value % ranks:
            raise ConfigError(f"{over}: expected a divisor of {name} = {value}, found {ranks}.")

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> Any:
        """The text model with its embedding, or this rank's stage of it. Its `position_ids` are [3, B, S].

        `pre_process` and `post_process` come from the process groups if None. `vp_stage` is the chunk to build under a
        virtual pipeline.
        """
        pre_process, post_process = self._stage(pre_process, post_process, vp_stage)
        return Qwen3VLGPTModel(
            self,
            language_layer_spec(self),
            vocab_size=padded_vocab_size(self),
            max_sequence_length=self.language_max_sequence_length,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=self.parallel_output,
            fp16_lm_cross_entropy=self.fp16_lm_cross_entropy,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            scatter_embedding_sequence_parallel=self.scatter_embedding_sequence_parallel,
            vp_stage=vp_stage,
        )

    def _check_groups(self) -> None:
        """The settings must say what the process groups of this run are."""
        if not parallel_state.model_parallel_is_initialized():
            raise ConfigError(
                "megatron.core.parallel_state: expected process groups, found none. Build the model within "
                "single_process() or parallel_world(...), or after parallel_state.initialize_model_parallel(...)."
            )
        found = {
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            "context_parallel_size": parallel_state.get_context_parallel_world_size(),
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        }
        if self.num_moe_experts and self.expert_tensor_parallel_size is not None:  # None is whatever the groups have
            found["expert_tensor_parallel_size"] = parallel_state.get_expert_tensor_parallel_world_size()
        for setting, size in found.items():
            if getattr(self, setting) != size:
                raise ConfigError(
                    f"{setting}: expected {size}, which the process groups were set up with, found "
                    f"{getattr(self, setting)}. Set both to the same."
                )

    def _stage(self, pre_process: bool | None, post_process: bool | None, vp_stage: int | None) -> tuple[bool, bool]:
        if not self._finalized:
            self.finalize()
        self._check_groups()
        where = {"ignore_virtual": False, "vp_stage": vp_stage}
        first = parallel_state.is_pipeline_first_stage(**where) if pre_process is None else pre_process
        last = parallel_state.is_pipeline_last_stage(**where) if post_process is None else post_process
        return first, last


@dataclass
class Qwen3MoEModelProvider(Qwen3ModelProvider):
    """Settings of a Mixture-of-Experts text model. Every layer has experts."""

    num_moe_experts: int | None = 128
    moe_ffn_hidden_size: int | None = 768
    moe_router_topk: int = 8
    moe_router_load_balancing_type: str = "aux_loss"
    moe_aux_loss_coeff: float = 1e-3
    moe_grouped_gemm: bool = True
    moe_router_pre_softmax: bool = False
    moe_router_dtype: str | None = "fp32"
    moe_router_score_function: str = "softmax"
    moe_router_bias_update_rate: float = 0.001
    moe_permute_fusion: bool = True
    moe_token_dispatcher_type: str = "alltoall"
    mlp_only_layers: list[int] = field(default_factory=list)
    decoder_sparse_step: int = 1

    persist_layer_norm: bool = True
    bias_activation_fusion: bool = True
    bias_dropout_fusion: bool = True
    masked_softmax_fusion: bool = False
    deallocate_pipeline_outputs: bool = True
    async_tensor_model_parallel_allreduce: bool = True
    distribute_saved_activations: bool = False
    cp_comm_type: str = "p2p"

    def finalize(self) -> None:
        """As the dense one's. With tensor parallelism, experts need sequence parallelism in training: turned on."""
        if self.tensor_model_parallel_size > 1:
            self.sequence_parallel = True
        super().finalize()

    def _without_transformer_engine(self) -> None:
        super()._without_transformer_engine()
        self.moe_permute_fusion = False
        self.moe_grouped_gemm = False
        self.bias_activation_fusion = False

    def _check(self) -> None:
        super()._check()
        if self.mlp_only_layers or self.decoder_sparse_step != 1:
            raise ConfigError(
                f"mlp_only_layers={self.mlp_only_layers}, decoder_sparse_step={self.decoder_sparse_step}: expected [] "
                "and 1. Every layer of the published models has experts, and no mapping knows of others."
            )
        self._divides("num_moe_experts", self.num_moe_experts or 0, "expert_model_parallel_size")
        if self.expert_tensor_parallel_size is not None:  # else Megatron-Core takes the tensor parallel size
            self._divides("moe_ffn_hidden_size", self.moe_ffn_hidden_size or 0, "expert_tensor_parallel_size")


if TYPE_CHECKING:
    _EitherText = Qwen3ModelProvider
else:
    _EitherText = object  # one of the two above stands behind the next class wherever it is used


@dataclass
class _WithTower(_EitherText):
    """What a vision tower adds to the settings of either text model."""

    vision_config: Any = field(default_factory=default_vision_config)
    """The Hugging Face vision configuration, or an object with its attributes; it decides the tower's sizes."""
    vision_end_token_id: int = 151653
    bos_token_id: int = 151643
    eos_token_id: int | list[int] = 151645

    freeze_language_model: bool = False
    freeze_vision_model: bool = False
    freeze_vision_projection: bool = False
    add_encoder: bool = True
    add_decoder: bool = True

    def _check(self) -> None:
        super()._check()
        vision = self.vision_config
        self._divides("vision_config.num_heads", vision.num_heads, "tensor_model_parallel_size")
        if vision.out_hidden_size != self.hidden_size:
            raise ConfigError(
                f"vision_config.out_hidden_size: expected hidden_size {self.hidden_size}, found "
                f"{vision.out_hidden_size}. Features take the place of embeddings, so the widths must be the same."
            )

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> Qwen3VLModel:
        """The model, or this rank's stage of it: `pre_process` and `post_process` come from the process groups if None.

        `vp_stage` is the chunk to build under a virtual pipeline. Parts that the settings freeze are frozen.
        """
        pre_process, post_process = self._stage(pre_process, post_process, vp_stage)
        model = Qwen3VLModel(
            language_transformer_config=self,
            language_transformer_layer_spec=language_layer_spec(self),
            vision_transformer_config=self.vision_config,
            parallel_output=self.parallel_output,
            pre_process=pre_process,
            post_process=post_process,
            add_encoder=self.add_encoder,
            add_decoder=self.add_decoder,
            vp_stage=vp_stage,
        )
        model.freeze(self.freeze_language_model, self.freeze_vision_model, self.freeze_vision_projection)
        return model

    def provide_language_model(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """The text model alone, with its embedding; arguments as those of `provide`."""
        return super().provide(pre_process, post_process, vp_stage)


@dataclass
class Qwen3VLModelProvider(_WithTower, Qwen3ModelProvider):
    """Settings of a dense Qwen3-VL. The defaults are the documented ones; a bridge sets those of a checkpoint."""

    hidden_size: int = 2048
    patch_size: int = 14


@dataclass
class Qwen3VLMoEModelProvider(_WithTower, Qwen3MoEModelProvider):
    """Settings of a Mixture-of-Experts Qwen3-VL. By default only the mergers are trained, as documented."""

    pretrained_model_name: str = "Qwen/Qwen3-VL-30B-A3B-Instruct"
    freeze_language_model: bool = True
    freeze_vision_model: bool = True
    freeze_vision_projection: bool = False
