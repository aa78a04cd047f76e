"""Qwen3-VL for inference on one accelerator or a CPU, and an engine that serves it. Needs torch alone.

It shares no code with transformers or Megatron-Core, whose models it can therefore be held against.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "Qwen3VisionMLP": "vision",
    "Qwen3VLVisionPatchEmbed": "vision",
    "Qwen3VisionAttention": "vision",
    "Qwen3VisionBlock": "vision",
    "Qwen3VLVisionPatchMerger": "vision",
    "Qwen3VLVisionModel": "vision",
    "Qwen3VLAttention": "text",
    "Qwen3VLDecoderLayer": "text",
    "Qwen3VLTextModel": "text",
    "Qwen3VLForConditionalGeneration": "model",
    "get_rope_index": "positions",
    "logger": "model",
    "RadixAttention": "attention.radix_attention",
    "ForwardBatch": "forward_batch",
    "ForwardMode": "forward_batch",
    "load_model": "loading",
    "Engine": "engine.engine",
    "EngineOptions": "engine.engine",
    "Request": "engine.requests",
    "SamplingParams": "engine.requests",
    "VisualInputs": "engine.requests",
    "Completion": "engine.requests",
    "TokenEvent": "engine.requests",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
