"""How a model is cut over ranks, as its own settings say it."""

from typing import Any

from qwen3vl_convert.parallel import ParallelLayout


def layout_of(config: Any) -> ParallelLayout:
    """The layout that the settings of a TransformerConfig, or of a provider, amount to."""
    experts = getattr(config, "num_moe_experts", None)
    return ParallelLayout(
        tp=config.tensor_model_parallel_size,
        pp=config.pipeline_model_parallel_size,
        vpp=_chunks(config),
        ep=config.expert_model_parallel_size if experts else 1,
        etp=_expert_tensor_parallel(config) if experts else 1,
        first_stage_layers=config.num_layers_in_first_pipeline_stage,
        last_stage_layers=config.num_layers_in_last_pipeline_stage,
    )


def stages_of(config: Any) -> list[int | None]:
    """The `vp_stage` of each chunk that a rank holds of the model."""
    chunks = _chunks(config)
    return [None] if chunks is None else list(range(chunks))


def _chunks(config: Any) -> int | None:
    """Chunks per pipeline rank; None without interleaving."""
    chunks: int | None = config.virtual_pipeline_model_parallel_size
    return chunks if (chunks or 1) > 1 else None


def _expert_tensor_parallel(config: Any) -> int:
    """Megatron-Core takes the tensor parallel size where none is set."""
    size: int | None = config.expert_tensor_parallel_size
    return int(config.tensor_model_parallel_size) if size is None else size
