"""The text model: Megatron-Core's GPTModel with interleaved M-RoPE and layers that take deepstack features."""

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import get_pg_rank

from qwen3vl_convert.models.rope import InterleavedMRoPE
from qwen3vl_convert.models.specs import language_block_spec
from qwen3vl_convert.models.transformer_config import Qwen3VLTransformerConfig


class Qwen3VLGPTModel(GPTModel):
    """A GPTModel whose `position_ids` are [3, B, S] (time, height, width).

    Deepstack features [features, S, B, h] are given to `forward` as `extra_block_kwargs={"context": ...}`.
    """

    def __init__(
        self,
        config: Qwen3VLTransformerConfig,
        transformer_layer_spec: ModuleSpec,
        *,
        vp_stage: int | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        """As GPTModel's; `transformer_layer_spec` is that of one layer."""
        rank = 0 if pg_collection is None else get_pg_rank(pg_collection.pp)
        block = language_block_spec(config, transformer_layer_spec, vp_stage, rank)
        super().__init__(
            config=config,
            transformer_layer_spec=block,
            position_embedding_type="mrope",
            rotary_base=config.rotary_base,
            rotary_percent=config.rotary_percent,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
            **kwargs,
        )
        self.rotary_pos_emb = InterleavedMRoPE(config.kv_channels, config.rotary_base)
