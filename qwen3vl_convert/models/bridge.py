"""Bridges: from a Hugging Face model to the provider that builds it on Megatron-Core, and its weights in and out.

    bridge = AutoBridge.from_hf_pretrained("Qwen/Qwen3-VL-8B-Instruct")
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    model = provider.provide()
    bridge.load_hf_weights(model)
    bridge.save_hf_pretrained(model, "trained")

Names are Megatron-Bridge's. Weight methods are called by all ranks at once; see `live`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qwen3vl_convert.checksum import crc32
from qwen3vl_convert.config_fields import MODEL_TYPES
from qwen3vl_convert.conversion import Conversion, said
from qwen3vl_convert.dims import CONFIG_FILE, Dims, read_config
from qwen3vl_convert.errors import ConfigError, ConvertError, UsageError
from qwen3vl_convert.fill import Key, key_of
from qwen3vl_convert.huggingface.config import config_json, portable_config
from qwen3vl_convert.huggingface.files import auxiliary_files
from qwen3vl_convert.huggingface.hub import Resolved, resolve
from qwen3vl_convert.huggingface.target import huggingface_target
from qwen3vl_convert.manifest import MANIFEST, manifest_text, refuse_own_source
from qwen3vl_convert.mappings import MappingRegistry, mapping_registry
from qwen3vl_convert.megatron.run_config import provider_fields
from qwen3vl_convert.model import EMBEDDING, HuggingFaceModel, open_huggingface
from qwen3vl_convert.models.live import (
    WHERE,
    Export,
    HFWeightTuple,
    Loaded,
    export_weights,
    load_weights,
    open_export,
    rank,
    together,
)
from qwen3vl_convert.models.provider import Qwen3VLModelProvider, Qwen3VLMoEModelProvider
from qwen3vl_convert.plan import Job, Plan, Target
from qwen3vl_convert.seal import Staging, check_space, check_written, publishing, refuse_existing
from qwen3vl_convert.storage import WEIGHT_DTYPES
from qwen3vl_convert.strided import write_from
from qwen3vl_convert.to_huggingface import DEFAULT_SHARD_BYTES

Provider = Qwen3VLModelProvider | Qwen3VLMoEModelProvider


# ---- what a bridge is given ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A Hugging Face model: its config in whatever spelling, and `name`, the folder or Hub id of its weights, if any.

    `parsed` is transformers' own config object where one was given.
    """

    config: dict[str, Any]
    name: str | Path | None
    where: str
    revision: str | None = None
    parsed: Any = None

    @cached_property
    def dims(self) -> Dims:
        return Dims.from_config(self.config, self.where)

    def resolved(self, weights: bool) -> Resolved | None:
        """The folder, downloaded where it is the Hub's; None without a name."""
        return None if self.name is None else resolve(self.name, weights=weights, revision=self.revision)

    @cached_property
    def opened(self) -> HuggingFaceModel | None:
        """The checkpoint, whose headers are read; None where there is only a config."""
        resolved = self.resolved(weights=True)
        if resolved is None or not any(resolved.folder.glob("*.safetensors")):
            return None
        return open_huggingface(resolved.folder)

    @property
    def dtype(self) -> str:
        """What the weights are in, else what the config claims, else bfloat16, as all published models."""
        if self.name is not None and Path(self.name).is_dir() and self.opened is not None:
            return self.opened.tensors[EMBEDDING[1]].dtype
        claimed = self.dims.dtype or "bfloat16"
        if claimed not in WEIGHT_DTYPES:
            raise ConfigError(f"{self.where}: dtype: expected one of {', '.join(WEIGHT_DTYPES)}, found {claimed}.")
        return claimed


def read_source(hf: Any, revision: str | None = None) -> Source:
    """A Hugging Face model from a folder, a Hub id, a parsed config.json, an opened checkpoint, or transformers'
    config object or model.

    A model of transformers gives its config only: its weights in memory may be others than those in its folder.
    """
    if isinstance(hf, Source):
        return hf
    if isinstance(hf, str | Path):
        folder = resolve(hf, weights=False, revision=revision).folder
        return Source(read_config(folder), hf, str(folder / CONFIG_FILE), revision)
    if isinstance(hf, HuggingFaceModel):
        checkpoint = hf.checkpoint
        return Source(checkpoint.config, checkpoint.folder, str(checkpoint.folder / CONFIG_FILE))
    if isinstance(hf, Mapping):
        return Source(dict(hf), None, "the given config")
    if hasattr(hf, "to_json_string"):
        # All of it: what equals a class default is a fact too, and transformers' generations differ in defaults.
        return Source(json.loads(hf.to_json_string(use_diff=False)), None, f"the given {type(hf).__name__}", parsed=hf)
    if hasattr(hf, "config"):
        name = None if isinstance(hf, torch.nn.Module) else getattr(hf, "model_name_or_path", None)
        return replace(read_source(hf.config), name=name)
    raise UsageError(
        f"{type(hf).__name__}: expected a model folder, a Hub id, a config of transformers or a parsed config.json."
    )


# ---- the bridges -----------------------------------------------------------------------------------------------------


class _Bridge:
    """What both families share. `hf`: a folder, a Hub id, or a config; see `read_source`."""

    model_type: ClassVar[str]
    provider: ClassVar[type[Provider]]

    def __init__(self, hf: Any = None, *, revision: str | None = None) -> None:
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

    def mapping_registry(self) -> MappingRegistry:
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
                raise UsageError(f"{source.where} has no weights: pass hf_path, a folder or a Hub id that has.")
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
        _save(export, source, Path(folder), max_shard_bytes, overwrite)

    def _export(self, model: Any, experts_layout: str, dtype: str) -> Export:
        with together():
            source = self._source()
            opened = source.opened
            layout = _written_layout(experts_layout, opened)
        dtypes = {} if opened is None else {name: tensor.dtype for name, tensor in opened.tensors.items()}
        return open_export(model, source.dims, experts_layout=layout, dtype=dtype, source_dtypes=dtypes)


class Qwen3VLBridge(_Bridge):
    """Bridge of the dense models, `Qwen3VLForConditionalGeneration`."""

    model_type = "qwen3_vl"
    provider = Qwen3VLModelProvider


class Qwen3VLMoEBridge(_Bridge):
    """Bridge of the Mixture-of-Experts models, `Qwen3VLMoeForConditionalGeneration`."""

    model_type = "qwen3_vl_moe"
    provider = Qwen3VLMoEModelProvider


BRIDGES: dict[str, type[_Bridge]] = {bridge.model_type: bridge for bridge in (Qwen3VLBridge, Qwen3VLMoEBridge)}


class AutoBridge:
    """The bridge that a config asks for, under Megatron-Bridge's name for it."""

    def __init__(self, hf: Any, *, revision: str | None = None) -> None:
        self.source = read_source(hf, revision)
        self.bridge = BRIDGES[self.source.dims.model_type](self.source)

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, *, revision: str | None = None) -> "AutoBridge":
        """Of a model folder or a Hub id; its weights are downloaded when they are read."""
        return cls(path, revision=revision)

    @classmethod
    def from_hf_config(cls, config: Any) -> "AutoBridge":
        """Of transformers' config object or a parsed config.json. It has no weights to load, and can write them."""
        return cls(config)

    @staticmethod
    def supports(config: Any) -> bool:
        """Whether a config is one of a model that there is a bridge for."""
        found = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
        return found in MODEL_TYPES

    @classmethod
    def can_handle(cls, path: str | Path) -> bool:
        """Whether a folder or Hub id has a config that there is a bridge for."""
        try:
            return cls.supports(read_source(path).config)
        except ConvertError:
            return False

    @property
    def hf_config(self) -> dict[str, Any]:
        """The model's config.json, parsed."""
        return self.source.config

    def to_megatron_provider(self, load_weights: bool = False, hf_path: str | Path | None = None) -> Any:
        """The provider, its settings open until `finalize`. With `load_weights` the model that it provides is filled.

        Under a virtual pipeline a chunk alone cannot be: provide all chunks, then `load_hf_weights` them together.
        """
        provider = self.bridge.provider_bridge(self.source)
        if load_weights:
            provider.provide = _filling(provider, self.bridge, hf_path)
        return provider

    def mapping_registry(self) -> MappingRegistry:
        """As the bridge's."""
        return self.bridge.mapping_registry()

    def load_hf_weights(
        self, model: Any, hf_path: str | Path | None = None, *, allow_dtype_cast: bool = False
    ) -> Loaded:
        """As the bridge's."""
        return self.bridge.load_hf_weights(model, hf_path, allow_dtype_cast=allow_dtype_cast)

    def export_hf_weights(self, model: Any, cpu: bool = False, **options: Any) -> Iterator[HFWeightTuple]:
        """As the bridge's, with its options."""
        return self.bridge.export_hf_weights(model, cpu, **options)

    def save_hf_pretrained(self, model: Any, folder: str | Path, **options: Any) -> None:
        """As the bridge's, with its options."""
        self.bridge.save_hf_pretrained(model, folder, **options)


def _filling(provider: Provider, bridge: _Bridge, hf_path: str | Path | None) -> Any:
    build = provider.provide

    def provide(*args: Any, **kwargs: Any) -> Any:
        if (provider.virtual_pipeline_model_parallel_size or 1) > 1:
            raise UsageError(
                "load_weights=True fills one model, and a virtual pipeline has several chunks. Provide them all, and "
                "pass the list to load_hf_weights."
            )
        model = build(*args, **kwargs)
        bridge.load_hf_weights(model, hf_path)
        return model

    return provide


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


# ---- writing ---------------------------------------------------------------------------------------------------------


def _written_layout(option: str, opened: HuggingFaceModel | None) -> str:
    if option not in ("hub", "v5", "per-expert", "match"):
        raise UsageError(f"experts_layout={option!r}: expected hub, v5, per-expert or match.")
    if option != "match":
        return option
    layout = "hub" if opened is None else opened.model.experts_layout
    return layout if layout in ("v5", "per-expert") else "hub"


def _save(export: Export, source: Source, path: Path, max_shard_bytes: int | None, overwrite: bool) -> None:
    """Rank 0 lays the files out, fills them tensor by tensor and publishes them; every step succeeds on all ranks or
    none.
    """
    first = rank() == 0
    crcs: dict[Key, int] = {}
    with ExitStack() as stack:
        with together():
            plan = export.plan(_target(export, source, max_shard_bytes) if first else None)
            staging = stack.enter_context(_laid_out(plan, path, overwrite)) if first else None
        jobs = {job.name: job for job in plan.jobs}
        for name, _, _ in export.entries:
            tensor = export.tensor(jobs[name], only_rank0=True)
            with together():
                if staging is not None:
                    crcs[key_of(jobs[name].chunk)] = _write(tensor, jobs[name], plan, staging)
        with together():
            if staging is not None:
                _publish(plan, staging, crcs, _record(export, source, plan))


def _target(export: Export, source: Source, max_shard_bytes: int | None) -> Target:
    """The files to write: the split, the config and the auxiliary files of the source, where it has them."""
    model, opened = export.opened.model, source.opened
    if (source.dims.sizes(), source.dims.tied) != (model.dims.sizes(), model.dims.tied):
        raise UsageError(
            f"{source.where}: is the config of a model of other sizes. Pass one of the model that is saved."
        )
    dtypes = {name: dtype for name, dtype, _ in export.entries}
    config = portable_config(source.config, model.dims, dtypes[EMBEDDING[1]], model.experts_layout)
    text: bytes | Path = config_json(config).encode()
    if opened is not None and config == source.config:
        text = (opened.checkpoint.folder / CONFIG_FILE).resolve()
    split = None
    if opened is not None and max_shard_bytes is None and len(opened.checkpoint.files) > 1:
        split = opened.checkpoint.shard_of
    resolved = source.resolved(weights=False)
    auxiliary = () if resolved is None else auxiliary_files(resolved.folder)
    return huggingface_target(list(export.entries), text, auxiliary, max_shard_bytes or DEFAULT_SHARD_BYTES, split)


@contextmanager
def _laid_out(plan: Plan, path: Path, overwrite: bool) -> Iterator[Staging]:
    """The files at their final size beside `path`, to be filled; removed on an error."""
    refuse_own_source(replace(plan, source={}), path)  # its source is no file
    check_space(path, plan.target.nbytes)
    with publishing(path, "", overwrite=overwrite) as staging:
        staging.lay_out(plan.target)
        yield staging


def _write(tensor: Tensor, job: Job, plan: Plan, staging: Staging) -> int:
    """Write one tensor and read it back; returns the CRC-32 of its bytes."""
    content = tensor.cpu().reshape(-1).view(torch.uint8).numpy().data
    file = staging.content / job.chunk.file
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        write_from(descriptor, memoryview(content), job.chunk.start, file)
    finally:
        os.close(descriptor)
    crc = int(crc32(content))
    alone = replace(plan, target=Target({}, {}), jobs=(job,))
    check_written(alone, staging.content, {key_of(job.chunk): crc}, 1, _unheard)
    return crc


def _publish(plan: Plan, staging: Staging, crcs: dict[Key, int], record: Conversion) -> None:
    check_written(replace(plan, jobs=()), staging.content, crcs, 1, _unheard)
    (staging.content / MANIFEST).write_text(manifest_text(record, crcs))
    staging.publish(fsync=True)


def _unheard(nbytes: int) -> None:
    """Nobody is told how far it is."""


def _record(export: Export, source: Source, plan: Plan) -> Conversion:
    """What the manifest says of a folder that came from a live model."""
    resolved = source.resolved(weights=False)
    options = {
        "config": None if resolved is None else said(resolved),
        "experts_layout": export.opened.model.experts_layout,
    }
    return Conversion("megatron-to-hf", str(WHERE), export.opened.model, plan, options, list, (), MANIFEST, ())
