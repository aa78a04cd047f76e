"""Checkpoint conversion for Qwen3-VL: Hugging Face safetensors <-> Megatron distributed checkpoints.

The commands of the command line are functions here: `hf_to_megatron`, `megatron_to_hf`, `inspect`, `explain`,
`make_checkpoint`, and `verify` in `qwen3vl_convert.verify`; `register_mapping` adds mappings of your own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from qwen3vl_convert.convert import Result, RunOptions, hf_to_megatron, megatron_to_hf
    from qwen3vl_convert.dims import Dims
    from qwen3vl_convert.errors import ConvertError, InputError, OutputError, UsageError
    from qwen3vl_convert.explanation import Explanation, explain
    from qwen3vl_convert.fill import FillOptions
    from qwen3vl_convert.inspection import Inspection, inspect
    from qwen3vl_convert.make import make_checkpoint
    from qwen3vl_convert.mappings import (
        AutoMapping,
        ConcatenatedQKVMapping,
        ExpertMLPDownProjMapping,
        ExpertMLPGateUpProjMapping,
        GatedMLPMapping,
        MegatronMappingRegistry,
        QKVMapping,
        ReplicatedMapping,
        mapping_registry,
        register_mapping,
    )
    from qwen3vl_convert.models.auto_bridge import AutoBridge
    from qwen3vl_convert.parallel import ParallelLayout

_HOME = {
    "convert": ("Result", "RunOptions", "hf_to_megatron", "megatron_to_hf"),
    "dims": ("Dims",),
    "errors": ("ConvertError", "InputError", "OutputError", "UsageError"),
    "explanation": ("Explanation", "explain"),
    "fill": ("FillOptions",),
    "inspection": ("Inspection", "inspect"),
    "make": ("make_checkpoint",),
    "mappings": (
        "AutoMapping",
        "ConcatenatedQKVMapping",
        "ExpertMLPDownProjMapping",
        "ExpertMLPGateUpProjMapping",
        "GatedMLPMapping",
        "MegatronMappingRegistry",
        "QKVMapping",
        "ReplicatedMapping",
        "mapping_registry",
        "register_mapping",
    ),
    "models.auto_bridge": ("AutoBridge",),
    "parallel": ("ParallelLayout",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AutoBridge",
    "AutoMapping",
    "ConcatenatedQKVMapping",
    "ConvertError",
    "Dims",
    "ExpertMLPDownProjMapping",
    "ExpertMLPGateUpProjMapping",
    "Explanation",
    "FillOptions",
    "GatedMLPMapping",
    "InputError",
    "Inspection",
    "MegatronMappingRegistry",
    "OutputError",
    "ParallelLayout",
    "QKVMapping",
    "ReplicatedMapping",
    "Result",
    "RunOptions",
    "UsageError",
    "explain",
    "hf_to_megatron",
    "inspect",
    "make_checkpoint",
    "mapping_registry",
    "megatron_to_hf",
    "register_mapping",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `--help` must not wait for numpy."""
    from importlib import import_module

    if name == "__version__":
        from qwen3vl_convert.installed import program_version

        return program_version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
