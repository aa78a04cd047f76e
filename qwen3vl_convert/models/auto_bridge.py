"""Megatron-Bridge's AutoBridge: a script of its changes one line of import.

    from qwen3vl_convert.models import AutoBridge

    AutoBridge.import_ckpt("Qwen/Qwen3-VL-8B-Instruct", "megatron")
    AutoBridge.from_hf_pretrained("Qwen/Qwen3-VL-8B-Instruct").export_ckpt("megatron", "back")

Methods and arguments are those of Megatron-Bridge 0.6.2; what comes after a `*` is more than it has. Files are
converted without torch and Megatron-Core, which are imported by the methods that take or give a live model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from qwen3vl_convert.config_fields import MODEL_TYPES
from qwen3vl_convert.convert import Result, RunOptions, hf_to_megatron, megatron_to_hf
from qwen3vl_convert.dims import CONFIG_FILE
from qwen3vl_convert.errors import ConvertError, UsageError
from qwen3vl_convert.huggingface.config import config_json
from qwen3vl_convert.huggingface.files import auxiliary_files, has_weights
from qwen3vl_convert.huggingface.hub import resolve
from qwen3vl_convert.installed import need
from qwen3vl_convert.manifest import read_manifest
from qwen3vl_convert.mappings import MegatronMappingRegistry
from qwen3vl_convert.megatron.checkpoint import iteration_folder, read_megatron
from qwen3vl_convert.megatron.run_config import read_run_config
from qwen3vl_convert.models.bridge_arguments import LOADING, check_arguments, dtype_option, live
from qwen3vl_convert.models.launch import once
from qwen3vl_convert.models.source import Source, read_source
from qwen3vl_convert.parallel import ParallelLayout

ARCHITECTURES = ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration")

_ADAPTERS = "adapters are not converted: merge them into the model (merge=True in training, or PEFT's merge_and_unload)"
_QUANTISED = "save_hf_pretrained, then quantise the folder with the tools of what is to serve it"
NOT_HERE = {
    "export_adapter_ckpt": _ADAPTERS,
    "export_adapter_weights": _ADAPTERS,
    "export_hf_weights_modelopt": _QUANTISED,
    "export_hf_weights_quant": _QUANTISED,
    "get_conversion_tasks": "mapping_registry() has the mappings, and `qwen3vl-convert explain` says what each copies",
    "push_to_hub": "save_hf_pretrained or export_ckpt, then `hf upload NAME FOLDER` (Megatron-Bridge's does nothing)",
    "save_hf_adapter": _ADAPTERS,
    "save_hf_weights": "save_hf_pretrained, which writes config and tokenizer beside the weights",
}
"""Methods of Megatron-Bridge's that are not here: what to do instead."""


class AutoBridge:
    """Of a Hugging Face model, by its folder, its Hub id or its config: files both ways, and live models both ways."""

    def __init__(self, hf_pretrained: Any, *, revision: str | None = None) -> None:
        self.source = read_source(hf_pretrained, revision)
        self.model_type = self.source.dims.model_type  # refuses what is no Qwen3-VL, or contradicts itself
        self.hf_model_id: str | None = None

    # -- what it is made of --------------------------------------------------------------------------------------------

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, **kwargs: Any) -> "AutoBridge":
        """Of a model folder or a Hub id, at a `revision`; its weights are downloaded when they are read."""
        check_arguments("from_hf_pretrained", kwargs, LOADING, ("dtype", "revision", "torch_dtype"))
        bridge = cls(path, revision=kwargs.get("revision"))
        bridge._check_dtype(dtype_option("from_hf_pretrained", kwargs))
        return bridge

    @classmethod
    def from_hf_config(cls, config: Any) -> "AutoBridge":
        """Of transformers' config object or a parsed config.json. It has no weights to load, and can write them."""
        return cls(config)

    @classmethod
    def from_auto_config(
        cls, megatron_path: str | Path, hf_model_id: str | Path, trust_remote_code: bool = False
    ) -> "AutoBridge":
        """Of the sizes that a Megatron checkpoint says of itself, with the tokenizer and processor files of a folder or
        Hub id: for models whose sizes nobody published.
        """
        check_arguments("from_auto_config", {"trust_remote_code": trust_remote_code}, LOADING)
        checkpoint = read_megatron(Path(megatron_path))
        checkpoint.dims()  # raises where it says nothing of its sizes
        bridge = cls(Source(checkpoint.config or {}, None, str(checkpoint.config_from)))
        bridge.hf_model_id = str(hf_model_id)
        return bridge

    @staticmethod
    def list_supported_models() -> list[str]:
        """The architectures, as a config.json names them, that there is a bridge for."""
        return list(ARCHITECTURES)

    @staticmethod
    def supports(config: Any) -> bool:
        """Whether a config is one of a model that there is a bridge for."""
        found = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
        return found in MODEL_TYPES

    @classmethod
    def can_handle(cls, path: str | Path, trust_remote_code: bool = False) -> bool:
        """Whether a folder or Hub id has a config that there is a bridge for."""
        check_arguments("can_handle", {"trust_remote_code": trust_remote_code}, LOADING)
        try:
            return cls.supports(read_source(path).config)
        except ConvertError:
            return False

    @staticmethod
    def get_hf_model_id_from_checkpoint(path: str | Path) -> str | None:
        """The Hub id that a Megatron checkpoint, or one iteration of it, says it was made from; None if it does not."""
        run = read_run_config(iteration_folder(Path(path)) / "run_config.yaml") or {}
        model = run.get("model")
        found = model.get("hf_model_id") if isinstance(model, dict) else None
        return None if found is None else str(found)

    @property
    def hf_config(self) -> dict[str, Any]:
        """The model's config.json, parsed."""
        return self.source.config

    # -- files ---------------------------------------------------------------------------------------------------------

    @classmethod
    def import_ckpt(
        cls,
        hf_model_id: str | Path,
        megatron_path: str | Path,
        *,
        layout: ParallelLayout | None = None,
        overwrite: bool = False,
        **kwargs: Any,
    ) -> Result:
        """Convert a Hugging Face folder or Hub id to a Megatron checkpoint, as `hf_to_megatron` does: without building
        the model, at any `layout` (default: not cut). Needs neither torch nor Megatron-Core.

        Of `kwargs`, `revision` and `torch_dtype` (or `dtype`; "auto" keeps each tensor's) have an effect. Under
        torchrun rank 0 does it, and the others wait. Raises as `hf_to_megatron`; then there is no checkpoint.
        """
        check_arguments("import_ckpt", kwargs, LOADING, ("dtype", "revision", "torch_dtype"))
        source, dtype = _named(hf_model_id, kwargs.get("revision")), dtype_option("import_ckpt", kwargs)
        run = RunOptions(overwrite=overwrite)
        return once(lambda: hf_to_megatron(source, megatron_path, layout=layout, dtype=dtype, run=run))

    def export_ckpt(
        self,
        megatron_path: str | Path,
        hf_path: str | Path,
        show_progress: bool = True,
        strict: bool = False,
        source_path: str | Path | None = None,
        *,
        experts_layout: str = "match",
        max_shard_bytes: int | None = None,
        iteration: int | str | None = None,
        overwrite: bool = False,
    ) -> Result:
        """Convert a Megatron checkpoint of any layout to a Hugging Face folder, as `megatron_to_hf` does. Needs neither
        torch nor Megatron-Core.

        Config, tokenizer and processor files are those of the model that the bridge was made of, or of `source_path`.
        `experts_layout`: hub, v5, per-expert, or "match": that of the source's weights (hub where they are not here).
        `strict` it always is. Under torchrun rank 0 does it, and the others wait. Raises as `megatron_to_hf`.
        """

        def convert() -> Result:
            with self._reference(source_path) as reference:
                return megatron_to_hf(
                    megatron_path,
                    hf_path,
                    config=reference,
                    experts_layout=_experts(experts_layout, reference, Path(megatron_path), iteration),
                    max_shard_bytes=max_shard_bytes,
                    iteration=iteration,
                    run=RunOptions(overwrite=overwrite),
                )

        return once(convert)

    @contextmanager
    def _reference(self, source_path: str | Path | None) -> Iterator[str | Path]:
        """Where config.json and the files beside it are to be had; for a config alone, a folder that is made of it."""
        if self.source.name is not None:
            yield source_path or _named(self.source.name, self.source.revision)
            return
        beside = source_path or self.hf_model_id
        with TemporaryDirectory() as place:
            folder = Path(place) / "config"  # the manifest names it
            folder.mkdir()
            (folder / CONFIG_FILE).write_text(config_json(self.source.config))
            for file in () if beside is None else auxiliary_files(resolve(beside, weights=False).folder):
                copyfile(file, folder / file.name)
            yield folder

    def _check_dtype(self, option: str) -> None:
        """A bridge reads weights as they are; only a dtype that changes nothing may be asked for here."""
        known = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        if option in known and known[option] != self.source.dtype:
            raise UsageError(
                f"AutoBridge.from_hf_pretrained: torch_dtype={known[option]}: expected the weights' own, "
                f"{self.source.dtype}. Pass it to import_ckpt, or set params_dtype of the provider."
            )

    # -- live models ---------------------------------------------------------------------------------------------------

    @cached_property
    def bridge(self) -> Any:
        """The bridge of the family: `Qwen3VLBridge` or `Qwen3VLMoEBridge`."""
        return _of_live_models("bridge").BRIDGES[self.model_type](self.source)

    @property
    def transformer_config(self) -> Any:
        """Megatron-Core's TransformerConfig of the text model, checked."""
        provider = self.to_megatron_provider(load_weights=False)
        return _of_live_models("transformer_config").plain_config(provider)

    def mapping_registry(self) -> MegatronMappingRegistry:
        """As the bridge's."""
        found: MegatronMappingRegistry = self.bridge.mapping_registry()
        return found

    def to_megatron_provider(self, load_weights: bool | None = None, hf_path: str | Path | None = None) -> Any:
        """The provider, its settings open until `finalize`. The models of its `provide_distributed_model` have the
        weights of the folder, or of `hf_path`, unless `load_weights` is False or there are none; with True, which is an
        error where there are none, those of `provide` have them too.

        Under a virtual pipeline a chunk alone cannot be filled: provide all, then `load_hf_weights` them together.
        """
        provider = self.bridge.provider_bridge(self.source)
        if load_weights or (load_weights is None and (hf_path or self.source.name) is not None):
            provider.register_pre_wrap_hook(partial(_filled, self.bridge, hf_path))
        if load_weights:
            provider.provide = _filling(provider, self.bridge, hf_path)
        return provider

    def to_megatron_model(
        self, load_weights: bool = True, hf_path: str | Path | None = None, **kwargs: Any
    ) -> list[Any]:
        """This rank's chunks of the model: `provide_distributed_model` of the provider, with its arguments."""
        chunks: list[Any] = self.to_megatron_provider(load_weights, hf_path).provide_distributed_model(**kwargs)
        return chunks

    def load_hf_weights(
        self,
        model: Any,
        hf_path: str | Path | None = None,
        allowed_mismatched_params: list[str] | None = None,
        *,
        allow_dtype_cast: bool = False,
    ) -> Any:
        """As the bridge's."""
        check_arguments("load_hf_weights", {"allowed_mismatched_params": allowed_mismatched_params or None}, {})
        return self.bridge.load_hf_weights(model, hf_path, allow_dtype_cast=allow_dtype_cast)

    def export_hf_weights(
        self,
        model: Any,
        cpu: bool = False,
        show_progress: bool = True,
        conversion_tasks: Any = None,
        merge_adapter_weights: bool = True,
        weight_dtype: Any = None,
        **options: Any,
    ) -> Iterator[Any]:
        """As the bridge's, with its options."""
        asked = {"conversion_tasks": conversion_tasks, "merge_adapter_weights": merge_adapter_weights}
        check_arguments("export_hf_weights", asked, live("merge_adapter_weights"))
        found: Iterator[Any] = self.bridge.export_hf_weights(
            model, cpu, **_with_dtype("export_hf_weights", options, weight_dtype)
        )
        return found

    def save_hf_pretrained(
        self,
        model: Any,
        path: str | Path,
        show_progress: bool = True,
        source_path: str | Path | None = None,
        strict: bool = True,
        merge_adapter_weights: bool = True,
        distributed_save: bool = False,
        save_every_n_ranks: int = 1,
        weight_dtype: Any = None,
        **options: Any,
    ) -> None:
        """As the bridge's, with its options."""
        asked = {
            "strict": strict,
            "merge_adapter_weights": merge_adapter_weights,
            "distributed_save": distributed_save,
            "save_every_n_ranks": save_every_n_ranks,
        }
        check_arguments("save_hf_pretrained", asked, live(*asked))
        options = _with_dtype("save_hf_pretrained", options, weight_dtype)
        self.bridge.save_hf_pretrained(model, path, source_path=source_path, **options)

    def save_megatron_model(
        self,
        model: Any,
        path: str | Path,
        hf_tokenizer_path: str | Path | None = None,
        low_memory_save: bool = False,
        hf_tokenizer_kwargs: dict[str, Any] | None = None,
        *,
        iteration: int = 0,
        overwrite: bool = False,
    ) -> None:
        """Write a live model, or its virtual-pipeline chunks, as a Megatron checkpoint that Megatron-Bridge,
        Megatron-LM and `megatron_to_hf` read. All ranks call it, and each writes what it holds, through Megatron-Core.

        The config of the bridge's model travels along, and its tokenizer and processor files or those of
        `hf_tokenizer_path`. The checkpoint appears when it is complete; what fails on one rank is raised on all.
        """
        asked = {"low_memory_save": low_memory_save, "hf_tokenizer_kwargs": hf_tokenizer_kwargs}
        check_arguments("save_megatron_model", asked, live(*asked))
        files = hf_tokenizer_path or self.source.name or self.hf_model_id
        _of_live_models("checkpointing").save_model(model, self.source, Path(path), files, iteration, overwrite)

    def load_megatron_model(
        self,
        path: str | Path,
        *,
        mp_overrides: Mapping[str, Any] | None = None,
        iteration: int | str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """This rank's chunks of the model with the weights of a Megatron checkpoint of any layout.

        The model is cut as the process groups are, and `mp_overrides` must not say otherwise; without process groups it
        is whole. Settings are those of the bridge's model, the padded vocabulary is the checkpoint's. Raises
        `TensorError`'s kinds unless checkpoint and model are the same tensors.
        """
        check_arguments("load_megatron_model", kwargs, live("use_cpu_initialization"), ("wrap_with_ddp",))
        if kwargs.get("wrap_with_ddp"):
            raise UsageError("AutoBridge.load_megatron_model: wrap_with_ddp=True: wrap the chunks that it returns.")
        chunks: list[Any] = _of_live_models("checkpointing").load_model(
            self.bridge, self.source, Path(path), iteration, dict(mp_overrides or {})
        )
        return chunks


def _of_live_models(module: str) -> Any:
    """A module of this room that needs Megatron-Core, imported when it is needed."""
    need("AutoBridge, for live models,", "torch", "megatron.core")
    return import_module(f"qwen3vl_convert.models.{module}")


def _not_here(method: str, instead: str) -> Callable[..., NoReturn]:
    def refuse(self: AutoBridge, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(f"AutoBridge.{method} is not here: {instead}.")

    return refuse


for _method, _instead in NOT_HERE.items():
    setattr(AutoBridge, _method, _not_here(_method, _instead))


def _named(hf: str | Path, revision: str | None) -> str | Path:
    """A model with the revision that is asked for; a folder has but one."""
    return f"{hf}@{revision}" if revision and not Path(hf).is_dir() else hf


def _experts(option: str, reference: str | Path, checkpoint: Path, iteration: int | str | None) -> str:
    """The expert layout to write: what `match` stands for, where that can be known."""
    if option != "match" or (Path(reference).is_dir() and has_weights(Path(reference))):
        return option
    return "match" if read_manifest(iteration_folder(checkpoint, iteration)).get("experts_layout") else "hub"


def _with_dtype(method: str, options: dict[str, Any], weight_dtype: Any) -> dict[str, Any]:
    return options if weight_dtype is None else {**options, "dtype": dtype_option(method, {"dtype": weight_dtype})}


def _filled(bridge: Any, hf_path: str | Path | None, chunks: list[Any]) -> list[Any]:
    bridge.load_hf_weights(chunks, hf_path)
    return chunks


def _filling(provider: Any, bridge: Any, hf_path: str | Path | None) -> Any:
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
