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


LOADING = {
    "attn_implementation": WithoutEffect("no model of transformers is built"),
    "device_map": WithoutEffect("bytes go from file to file, through no device"),
    "low_cpu_mem_usage": WithoutEffect("memory does not grow with the model"),
    "max_memory": WithoutEffect("memory does not grow with the model"),
    "offload_folder": WithoutEffect("memory does not grow with the model"),
    "trust_remote_code": WithoutEffect("no code of a model folder is ever run", (None, False)),
    "use_safetensors": WithoutEffect("only safetensors are read", (None, True)),
}
"""What `from_hf_pretrained` and `import_ckpt` take and pass on to transformers there."""

LIVE = {
    "distributed_save": WithoutEffect("rank 0 writes the files", (False,)),
    "hf_tokenizer_kwargs": WithoutEffect("the tokenizer's files are copied byte for byte, not loaded", (None, {})),
    "low_memory_save": WithoutEffect("parameters are written from where they lie, and the model is kept", (False,)),
    "merge_adapter_weights": WithoutEffect("a model with adapters is refused", (True,)),
    "save_every_n_ranks": WithoutEffect("rank 0 writes the files", (1,)),
    "strict": WithoutEffect("a tensor too few or too many is always an error", (True,)),
    "use_cpu_initialization": WithoutEffect("it follows from whether there is a GPU", (None, True, False)),
}
"""What methods take that save or load a live model. `show_progress`, of all of them, is about printing: nothing is."""

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


def live(*names: str) -> dict[str, WithoutEffect]:
    """Those of `LIVE` that a method takes."""
    return {name: LIVE[name] for name in names}


def check_arguments(
    method: str, given: Mapping[str, Any], idle: Mapping[str, WithoutEffect], known: tuple[str, ...] = ()
) -> None:
    """Refuse what is unknown or cannot be done, and say in one warning what has no effect (`idle`); `known` ones have.

    To be called by the method that the user calls, so that the warning points to the user's line.
    """
    for name, value in given.items():
        if name in INSTEAD and value not in (None, False):
            raise UsageError(f"AutoBridge.{method}: {name}={value!r} is not taken: {INSTEAD[name]}.")
        if name not in (*known, *idle, *INSTEAD):
            takes = ", ".join((*known, *idle))
            raise UsageError(f"AutoBridge.{method}: {name}={value!r} is unknown. Expected one of {takes}.")
    reasons = [
        f"{name}: {idle[name].why}" for name, value in given.items() if name in idle and value not in idle[name].quiet
    ]
    if reasons:
        text = f"AutoBridge.{method}: without effect here: {'; '.join(reasons)}."
        warnings.warn(text, UserWarning, stacklevel=3)


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
