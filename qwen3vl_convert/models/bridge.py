"""Bridges: from a Hugging Face model to the provider that builds it on Megatron-Core, and its weights in and out.

    bridge = AutoBridge.from_hf_pretrained("Qwen/Qwen3-VL-8B-Instruct")
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    model = provider.provide()
    bridge.load_hf_weights(model)
    bridge.save_hf_pretrained(model, "trained")

Names are Megatron-Bridge's. Weight methods are called by all ranks at once; see `live`.
"""

from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.huggingface.config import portable_config
from qwen3vl_convert.mappings import MegatronMappingRegistry, mapping_registry
from qwen3vl_convert.megatron.run_config import provider_fields
from qwen3vl_convert.model import HuggingFaceModel
from qwen3vl_convert.models.live import Export, HFWeightTuple, Loaded, export_weights, load_weights, open_export
from qwen3vl_convert.models.provider import Qwen3VLModelProvider, Qwen3VLMoEModelProvider
from qwen3vl_convert.models.ranks import rank, together
from qwen3vl_convert.models.saving import save_export
from qwen3vl_convert.models.source import Source, read_source
from qwen3vl_convert.seal import refuse_existing

Provider = Qwen3VLModelProvider | Qwen3VLMoEModelProvider


# ---- the bridges -----------------------------------------------------------------------------------------------------


class MegatronModelBridge:
    """The base of bridges: settings, mappings and weights of the family that `model_type` names and `provider` builds.

    `hf`: a folder, a Hub id, or a config; see `read_source`. UsageError for one of another family.
    """

    model_type: ClassVar[str]
    provider: ClassVar[type[Provider]]

    def __init__(self, hf: Any = None, *, revision: str | None = None) -> None:
        if type(self) is MegatronModelBridge:
            names = ", ".join(bridge.__name__ for bridge in BRIDGES.values())
            raise UsageError(f"MegatronModelBridge is the base of {names}: make one of those, or AutoBridge.")
        self.source = None if hf is None else self._own(read_source(hf, revision))

    def _own(self, source: Source) -> Source:
        found = source.dims.model_type
        if found != self.model_type:
            other = BRIDGES[found].__name__
            raise UsageError(
                f"{type(self).__name__}: expected a config of {self.model_type}, found {found} in {source.where}. "
                f"Use {other}, or AutoBridge, which chooses."
            )
        return source

    def _source(self) -> Source:
        if self.source is None:
            raise UsageError(f"{type(self).__name__}() knows no model: make it of one, {type(self).__name__}(folder).")
        return self.source

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        """The provider that builds this model: every setting that its config decides, in whatever spelling.

        Nothing is frozen, also where the provider's class freezes by default: what is converted is to be trained.
        Raises `ConfigError` for a config that contradicts itself, `UsageError` for one of the other family.
        """
        source = self._own(read_source(hf_pretrained))
        dims = source.dims
        fields = {name: _object(value) for name, value in provider_fields(dims, {}, source.dtype).items()}
        vision, text = _hf_configs(source, fields)
        fields |= {
            "vision_config": vision,
            "hf_text_config": text,
            "init_method_std": getattr(text, "initializer_range", 0.02),
            "autocast_dtype": fields["params_dtype"],
            "head_dim": dims.head_dim,
            "language_max_sequence_length": dims.max_positions,
            "patch_size": dims.patch,
            "temporal_patch_size": dims.temporal_patch,
            "in_channels": dims.channels,
            "spatial_merge_size": dims.spatial_merge,
            "num_position_embeddings": dims.position_embeddings,
            "out_hidden_size": dims.vision_out,
            "deepstack_visual_indexes": list(dims.deepstack),
        }
        return self.provider(**{name: value for name, value in fields.items() if name != "_target_"})

    def mapping_registry(self) -> MegatronMappingRegistry:
        """The mappings of this family, the same as those of `hf-to-megatron`; for one model, those that it needs."""
        if self.source is None:
            return mapping_registry(self.model_type)
        dims = self.source.dims
        return mapping_registry(self.model_type, attention_bias=dims.attention_bias, head=not dims.tied)

    def load_hf_weights(
        self, model: Any, hf_path: str | Path | None = None, *, allow_dtype_cast: bool = False
    ) -> Loaded:
        """Fill a model, or a list of its virtual-pipeline chunks, from the folder, or from `hf_path` of the same sizes.

        All ranks call it. Parameters are touched only when model and folder are known to be the same tensors; see
        `load_weights` for dtypes, memory and errors.
        """
        source = self._source() if hf_path is None else self._own(read_source(hf_path))
        with together():
            opened = source.opened
            if opened is None:
                raise UsageError(
                    f"{source.where}: expected weights beside it, found none. Pass load_hf_weights "
                    f"hf_path=, a folder or a Hub id that has them."
                )
        return load_weights(model, opened, allow_dtype_cast=allow_dtype_cast)

    def export_hf_weights(
        self,
        model: Any,
        cpu: bool = False,
        *,
        only_rank0: bool = False,
        experts_layout: str = "match",
        dtype: str = "source",
        check_replicas: bool = False,
    ) -> Iterator[HFWeightTuple]:
        """Stream (name, whole tensor) in hub order; all ranks call it and go through it to the end.

        - `cpu`: give tensors on the CPU. `only_rank0`: give them on rank 0 only.
        - `experts_layout`: hub, v5, per-expert, or "match": that of the source (hub where it has no weights).
        - `dtype`: "source", what the source's tensor has; "keep", what the parameter has; bf16, fp16 or fp32.
        - `check_replicas`: first compare the copies of each parameter that several ranks hold.
        """
        export = self._export(model, experts_layout, dtype)
        if check_replicas:
            export.check_replicas()
        return export_weights(export, cpu=cpu, only_rank0=only_rank0)

    def save_hf_pretrained(
        self,
        model: Any,
        folder: str | Path,
        *,
        source_path: str | Path | None = None,
        experts_layout: str = "match",
        dtype: str = "source",
        max_shard_bytes: int | None = None,
        overwrite: bool = False,
        check_replicas: bool = True,
    ) -> None:
        """Write a whole model folder: rank 0 writes, all ranks call it. Config, auxiliary files and the split into
        files are the source's, or those of `source_path`; of a model that was not trained, so is every byte of weights.

        The folder appears when it is complete and read back. What fails on one rank is raised on all, and then there is
        none. Options as those of `export_hf_weights`; `max_shard_bytes`: split into files anew.
        """
        with together():
            if rank() == 0:
                refuse_existing(Path(folder), overwrite)
        export = self._export(model, experts_layout, dtype)
        if check_replicas:
            export.check_replicas()
        source = self._source() if source_path is None else self._own(read_source(source_path))
        save_export(export, source, Path(folder), max_shard_bytes, overwrite)

    def _export(self, model: Any, experts_layout: str, dtype: str) -> Export:
        with together():
            source = self._source()
            opened = source.opened
            layout = _written_layout(experts_layout, opened)
        dtypes = {} if opened is None else {name: tensor.dtype for name, tensor in opened.tensors.items()}
        return open_export(model, source.dims, experts_layout=layout, dtype=dtype, source_dtypes=dtypes)


class Qwen3VLBridge(MegatronModelBridge):
    """Bridge of the dense models, `Qwen3VLForConditionalGeneration`."""

    model_type = "qwen3_vl"
    provider = Qwen3VLModelProvider


class Qwen3VLMoEBridge(MegatronModelBridge):
    """Bridge of the Mixture-of-Experts models, `Qwen3VLMoeForConditionalGeneration`."""

    model_type = "qwen3_vl_moe"
    provider = Qwen3VLMoEModelProvider


BRIDGES: dict[str, type[MegatronModelBridge]] = {
    bridge.model_type: bridge for bridge in (Qwen3VLBridge, Qwen3VLMoEBridge)
}


# ---- settings --------------------------------------------------------------------------------------------------------


def _object(value: Any) -> Any:
    """What a `_target_` of torch stands for; anything else is returned as it is."""
    name = value.get("_target_", "") if isinstance(value, dict) else ""
    return attrgetter(name.removeprefix("torch."))(torch) if name.startswith("torch.") else value


def _hf_configs(source: Source, fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """(vision config, text config) as transformers has them; without transformers, objects with the same attributes."""
    if source.parsed is not None:
        return source.parsed.vision_config, source.parsed.text_config
    try:
        import transformers
    except ImportError:
        plain = ({k: _object(v) for k, v in fields[name].items()} for name in ("vision_config", "hf_text_config"))
        vision, text = (SimpleNamespace(**values) for values in plain)
        return vision, text
    kind = transformers.Qwen3VLMoeConfig if source.dims.moe else transformers.Qwen3VLConfig
    # The hub's spelling is the one that every generation of transformers reads.
    config = kind.from_dict(portable_config(source.config, source.dims, source.dtype, "hub"))
    return config.vision_config, config.text_config


def _written_layout(option: str, opened: HuggingFaceModel | None) -> str:
    if option not in ("hub", "v5", "per-expert", "match"):
        raise UsageError(f"experts_layout={option!r}: expected hub, v5, per-expert or match.")
    if option != "match":
        return option
    layout = "hub" if opened is None else opened.model.experts_layout
    return layout if layout in ("v5", "per-expert") else "hub"
