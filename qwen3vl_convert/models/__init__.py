"""Qwen3-VL as Megatron-Core modules, providers that build it and bridges that fill it. Needs megatron-core.

Nothing of Megatron-Core is imported before one of these names is used.
"""

from importlib import import_module
from typing import Any

from qwen3vl_convert.installed import named

_PLACES = {
    "Qwen3VLModel": "model",
    "Qwen3VLVisionModel": "vision_model",
    "Qwen3VLGPTModel": "text_model",
    "Qwen3VLTransformerConfig": "transformer_config",
    "get_vision_model_config": "transformer_config",
    "Qwen3ModelProvider": "provider",
    "Qwen3MoEModelProvider": "provider",
    "Qwen3VLModelProvider": "provider",
    "Qwen3VLMoEModelProvider": "provider",
    "MegatronModelBridge": "bridge",
    "Qwen3VLBridge": "bridge",
    "Qwen3VLMoEBridge": "bridge",
    "AutoBridge": "auto_bridge",
    "cpu_for_cuda": "cpu",
    "parallel_world": "world",
    "single_process": "world",
    "get_rope_index": "positions",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with named(__name__, "torch", "megatron.core"):
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
