"""The two models that are compared, built on the device, and how far their logits are apart."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, dtype

from gpu.checks import BFLOAT16, FLOAT32, Run
from models.planted import lively_checkpoint
from models.prompts import Prompt
from models.sides import load_theirs
from qwen3vl_convert.make import SIZES


def build_ours(folder: Path, dtype: dtype, device: str, **settings: Any) -> Any:
    """The Megatron model, with weights."""
    from qwen3vl_convert.models import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    precision = {"params_dtype": dtype, "pipeline_dtype": dtype, "autocast_dtype": dtype, "bf16": dtype == BFLOAT16}
    place = {"use_cpu_initialization": True, "transformer_impl": "local"} if device == "cpu" else {}
    for name, value in {**precision, **place, **settings}.items():
        setattr(provider, name, value)
    model = provider.provide()
    bridge.load_hf_weights(model, allow_dtype_cast=True)
    return model.eval()


def build_theirs(folder: Path, dtype: dtype, device: str, attention: str = "eager") -> Any:
    """transformers' model."""
    return load_theirs(folder, dtype, attention).to(device)


def tiny(run: Run, name: str) -> Path:
    """Weights with which faults show, all of them numbers that bfloat16 has."""
    folder = run.work / name
    if not folder.exists():
        lively_checkpoint(folder, SIZES[name])
        weights = load_file(folder / "model.safetensors")
        rounded = {key: weight.to(BFLOAT16).to(FLOAT32) for key, weight in weights.items()}
        save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    return folder


def on(prompt: Prompt, device: str) -> Prompt:
    """The prompt with its tensors there."""
    moved = {name: value.to(device) for name, value in vars(prompt).items() if isinstance(value, Tensor)}
    return replace(prompt, **moved, alone=tuple(on(one, device) for one in prompt.alone))


def config_of(folder: Path) -> dict[str, Any]:
    """What is in config.json."""
    from transformers import AutoConfig

    config: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    return config


@dataclass(frozen=True, slots=True)
class Difference:
    """Of logits at tokens that are no padding: the greatest, and the root of the mean square."""

    greatest: float
    mean: float


def difference(found: Tensor, expected: Tensor, prompt: Prompt) -> Difference:
    """Raises ValueError for logits of another shape."""
    if found.shape != expected.shape:
        raise ValueError(f"logits: expected the shape {tuple(expected.shape)}, found {tuple(found.shape)}")
    valid = prompt.valid.to(found.device)
    gap = (found.float() - expected.to(found.device).float())[valid]
    return Difference(float(gap.abs().max()), float(gap.square().mean().sqrt()))
