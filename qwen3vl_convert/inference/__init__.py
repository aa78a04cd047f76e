"""Qwen3-VL for inference on one accelerator or a CPU (`model`), and an engine that serves it. Needs torch alone.

It shares no code with transformers or Megatron-Core, whose models it can therefore be held against.
"""

from qwen3vl_convert.installed import named

with named(__name__):
    from qwen3vl_convert.inference.attention.radix_attention import RadixAttention
    from qwen3vl_convert.inference.engine.engine import Engine, EngineOptions
    from qwen3vl_convert.inference.engine.requests import Completion, Request, SamplingParams, TokenEvent, VisualInputs
    from qwen3vl_convert.inference.forward_batch import ForwardBatch, ForwardMode
    from qwen3vl_convert.inference.loading import load_model
    from qwen3vl_convert.inference.model import Qwen3VLForConditionalGeneration, logger
    from qwen3vl_convert.inference.positions import get_rope_index
    from qwen3vl_convert.inference.text import Qwen3VLAttention, Qwen3VLDecoderLayer, Qwen3VLTextModel
    from qwen3vl_convert.inference.vision import (
        Qwen3VisionAttention,
        Qwen3VisionBlock,
        Qwen3VisionMLP,
        Qwen3VLVisionModel,
        Qwen3VLVisionPatchEmbed,
        Qwen3VLVisionPatchMerger,
    )

__all__ = [
    "Completion",
    "Engine",
    "EngineOptions",
    "ForwardBatch",
    "ForwardMode",
    "Qwen3VLAttention",
    "Qwen3VLDecoderLayer",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLTextModel",
    "Qwen3VLVisionModel",
    "Qwen3VLVisionPatchEmbed",
    "Qwen3VLVisionPatchMerger",
    "Qwen3VisionAttention",
    "Qwen3VisionBlock",
    "Qwen3VisionMLP",
    "RadixAttention",
    "Request",
    "SamplingParams",
    "TokenEvent",
    "VisualInputs",
    "get_rope_index",
    "load_model",
    "logger",
]
