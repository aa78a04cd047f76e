"""What a bridge is made of: a Hugging Face model, by its folder, its Hub id or its config alone."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen3vl_convert.dims import CONFIG_FILE, Dims, read_config
from qwen3vl_convert.errors import ConfigError, UsageError
from qwen3vl_convert.huggingface.hub import Resolved, resolve
from qwen3vl_convert.model import EMBEDDING, HuggingFaceModel, open_huggingface
from qwen3vl_convert.storage import WEIGHT_DTYPES


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
        name = None if _is_module(hf) else getattr(hf, "model_name_or_path", None)
        return replace(read_source(hf.config), name=name)
    raise UsageError(
        f"{type(hf).__name__}: expected a model folder, a Hub id, a config of transformers or a parsed config.json."
    )


def _is_module(hf: Any) -> bool:
    """Who has not imported torch has no module of it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(hf, torch.nn.Module)
