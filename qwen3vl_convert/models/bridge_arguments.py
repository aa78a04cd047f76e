"""Arguments of Megatron-Bridge's AutoBridge that mean nothing here: what each is for there, and why not here.

Said once per call, in one warning. What is in no table is refused.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3vl_convert.errors import UsageError


@dataclass(frozen=True, slots=True)
class WithoutEffect:
    """Why an argument has no effect. `quiet`: the values that ask for what is done anyway."""

    why: str
    quiet: tuple[Any, ...] = (None,)


WITHOUT_EFFECT = {
    "attn_implementation": WithoutEffect("no model of transformers is built"),
    "device_map": WithoutEffect("bytes go from file to file, through no device"),
    "distributed_save": WithoutEffect("rank 0 writes the files", (False,)),
    "hf_tokenizer_kwargs": WithoutEffect("the tokenizer's files are copied byte for byte, not loaded", (None, {})),
    "low_cpu_mem_usage": WithoutEffect("memory does not grow with the model"),
    "low_memory_save": WithoutEffect("parameters are written from where they lie, and the model is kept", (False,)),
    "max_memory": WithoutEffect("memory does not grow with the model"),
    "merge_adapter_weights": WithoutEffect("a model with adapters is refused", (True,)),
    "offload_folder": WithoutEffect("memory does not grow with the model"),
    "save_every_n_ranks": WithoutEffect("rank 0 writes the files", (1,)),
    "show_progress": WithoutEffect("nothing is printed", (True, False)),
    "strict": WithoutEffect("a tensor too few or too many is always an error", (True,)),
    "trust_remote_code": WithoutEffect("no code of a model folder is ever run", (None, False)),
    "use_cpu_initialization": WithoutEffect("it follows from whether there is a GPU", (None, True, False)),
    "use_safetensors": WithoutEffect("only safetensors are read", (None, True)),
}
"""Accepted, and said to have no effect unless the value is a quiet one."""

INSTEAD = {
    "allowed_mismatched_params": "every parameter has to match. Take them out of the model, or load another folder",
    "cache_dir": "set HF_HOME, or HF_HUB_CACHE",
    "conversion_tasks": "mappings are derived from the model. Add your own with register_mapping",
    "force_download": "remove the model from the cache with `hf cache delete`",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "proxies": "set HTTPS_PROXY",
    "quantization_config": "convert unquantised weights; quantise the exported folder with the tools of what serves it",
    "subfolder": "name the folder itself",
    "token": "set HF_TOKEN, or log in with `hf auth login`",
}
"""Refused where it asks for something: what to do instead."""


def check_arguments(method: str, given: Mapping[str, Any], known: tuple[str, ...] = ()) -> None:
    """Refuse what is unknown or cannot be done, and say in one warning what has no effect; `known` ones have one.

    To be called by the method that the user calls, so that the warning points to the user's line.
    """
    for name, value in given.items():
        if name in INSTEAD and value not in (None, False):
            raise UsageError(f"AutoBridge.{method}: {name}={value!r} is not taken: {INSTEAD[name]}.")
        if name not in (*known, *WITHOUT_EFFECT, *INSTEAD):
            takes = ", ".join((*known, *WITHOUT_EFFECT))
            raise UsageError(f"AutoBridge.{method}: {name}={value!r} is unknown. Taken are {takes}.")
    idle = [name for name, value in given.items() if name in WITHOUT_EFFECT and not _quiet(name, value)]
    if idle:
        reasons = "; ".join(f"{name}: {WITHOUT_EFFECT[name].why}" for name in idle)
        warnings.warn(f"AutoBridge.{method}: without effect here: {reasons}.", UserWarning, stacklevel=3)


def _quiet(name: str, value: Any) -> bool:
    return any(value is quiet or value == quiet for quiet in WITHOUT_EFFECT[name].quiet)


_DTYPES = {"auto": "keep", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def dtype_option(method: str, given: Mapping[str, Any]) -> str:
    """The --dtype that `torch_dtype` or `dtype` asks for: a torch.dtype or its name, "auto", or nothing."""
    name = next((name for name in ("dtype", "torch_dtype") if given.get(name) is not None), None)
    if name is None:
        return "keep"
    asked = str(given[name]).removeprefix("torch.")
    if asked not in _DTYPES:
        raise UsageError(f"AutoBridge.{method}: {name}={given[name]!r}: expected one of {', '.join(_DTYPES)}.")
    return _DTYPES[asked]
