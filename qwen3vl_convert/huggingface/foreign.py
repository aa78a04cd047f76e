"""What is recognised by name and not read: quantised weights, other frameworks' names, other file formats.

transformers loads most of these with a warning, and random weights or raw codes. Here each is refused by its own name.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qwen3vl_convert.errors import InputError, UnknownTensors, UnsupportedFormat, listing

HUB, BASE_MODEL = "hub", "base-model"
_HUB_PREFIXES = ("model.language_model.", "model.visual.")
_BASE_PREFIXES = ("language_model.", "visual.")

OTHER_WEIGHTS = {
    ".bin": "a PyTorch pickle",
    ".pt": "a PyTorch pickle",
    ".pth": "a PyTorch pickle",
    ".ckpt": "a PyTorch pickle",
    ".pkl": "a pickle",
    ".gguf": "GGUF",
    ".onnx": "ONNX",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".npz": "NumPy",
    ".distcp": "a Megatron distributed checkpoint",
}
"""Endings of weight files that are not safetensors, and what they are."""

# The first that matches names the quantisation, so the telling ones stand first.
_QUANTISED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(\.|_)scale_inv$", "block FP8 (scale_inv)"),
        (r"\.weight_(packed|zero_point|shape|g_idx)$", "compressed-tensors"),
        (r"\.(qweight|qzeros|g_idx)$", "AWQ or GPTQ"),
        (
            r"\.(SCB|weight_format)$|\.(absmax|nested_absmax|quant_map|nested_quant_map)$|\.quant_state\.",
            "bitsandbytes",
        ),
        (r"\.weight_scale_2$|\.weight_global_scale$", "NVFP4"),
        (r"\.weight_quantizer\.|\.input_quantizer\.", "Quark or ModelOpt fake quantisation"),
        (r"\.scale_weight$|(^|\.)scaled_fp8$", "ComfyUI scaled FP8"),
        (r"\.(weight|input)_scale$", "compressed-tensors or FP8 with weight_scale"),
        (r"\.(biases|scales)$", "MLX"),
    )
)
_FOREIGN = (
    ("base_model.model.", "a PEFT adapter or an unmerged PEFT model", "Merge it (merge_and_unload) and save it again."),
    ("_orig_mod.", "a model saved under torch.compile", "Save the module inside it (model._orig_mod)."),
    ("_fsdp_wrapped_module.", "a model saved inside FSDP", "Save a full state dict of the model itself."),
    (
        "module.",
        "a model saved inside DistributedDataParallel or DeepSpeed",
        "Save the module inside it (model.module).",
    ),
    ("thinker.", "a Qwen-Omni model", "Only Qwen3-VL is converted."),
    ("language_model.model.", "the names of vLLM or MLX", "Use the model's transformers folder."),
    ("language_model.lm_head.", "the names of vLLM or MLX", "Use the model's transformers folder."),
    ("vision_tower.", "the names of MLX", "Use the model's transformers folder."),
    ("model.layers.", "the names of ComfyUI or of a text-only Qwen3", "Use the model's transformers folder."),
    ("model.embed_tokens.", "the names of ComfyUI or of a text-only Qwen3", "Use the model's transformers folder."),
    ("model.norm.", "the names of ComfyUI or of a text-only Qwen3", "Use the model's transformers folder."),
)


def refuse_quantised_config(config: Mapping[str, Any], where: str) -> None:
    """Raises UnsupportedFormat, naming the quantisation, if config.json claims one."""
    for section in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if claim := section.get(key):
                raise _quantised(f"{where}: {key}", _claimed_name(key, claim))


def refuse_quantised_tensors(dtypes: Mapping[str, str], where: str) -> None:
    """Raises UnsupportedFormat, naming the quantisation, if a tensor's name or dtype is that of one."""
    for pattern, name in _QUANTISED:
        if found := [tensor for tensor in dtypes if pattern.search(tensor)]:
            raise _quantised(f"{where}: {listing(found, 3)}", name)
    small = [tensor for tensor, dtype in dtypes.items() if dtype.startswith(("float8_", "float6_", "float4_"))]
    if small:
        raise _quantised(f"{where}: {listing(small, 3)}", f"{dtypes[small[0]]} without scales")


def naming_of(names: Iterable[str], where: str) -> str:
    """`hub` (`model.language_model.*`) or `base-model` (`language_model.*`). Raises for any other naming."""
    names = list(names)
    for prefix, what, remedy in _FOREIGN:
        if found := [name for name in names if name.startswith(prefix)]:
            raise UnsupportedFormat(f"{where}: {found[0]}: names in {prefix}* are those of {what}. {remedy}")
    hub = [name for name in names if name.startswith(_HUB_PREFIXES)]
    base = [name for name in names if name.startswith(_BASE_PREFIXES)]
    if hub and base:
        raise InputError(
            f"{where}: expected one way of naming, found two: {hub[0]} and {base[0]}. "
            "The folder holds two checkpoints; keep the files of one."
        )
    if not hub and not base:
        raise UnknownTensors(
            f"{where}: expected names in model.language_model.* and model.visual.*, "
            f"found {listing(names, 3) or 'none'}. "
            "These are not the weights of a Qwen3-VL model."
        )
    return HUB if hub else BASE_MODEL


def canonical(name: str) -> str:
    """The hub's name of a tensor. What is outside the model (`lm_head.weight`, a user's own) is named alike."""
    return f"model.{name}" if name.startswith(_BASE_PREFIXES) else name


def _claimed_name(key: str, claim: Any) -> str:
    if not isinstance(claim, Mapping):
        return str(claim)
    if key == "quantization":
        return "MLX"
    method = str(claim.get("quant_method", "unnamed"))
    return " ".join([method, *(str(claim[part]) for part in ("format", "fmt", "quant_algo") if claim.get(part))])


def _quantised(where: str, name: str) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"{where}: the checkpoint is quantised: {name}. Expected plain bfloat16, float16 or float32 weights; "
        "use the unquantised model, or dequantise it first with the tool that made it."
    )
