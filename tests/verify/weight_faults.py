"""Checkpoints of the program's own making, and the tools that change weights on one side of a pair."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from broken import DENSE, MOE, QUICK, TIED, copied, make, put, stored
from qwen3vl_convert import ParallelLayout, hf_to_megatron
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.fill import FillOptions
from qwen3vl_convert.model import open_huggingface
from qwen3vl_convert.verify.result import Difference, WeightsReport
from qwen3vl_convert.verify.weights import compare_weights, open_beside
from reference import load_huggingface

HF = dict[str, Tensor]
TEXT = "model.language_model.layers."
OUR_TEXT = "language_model.decoder.layers."
OUR_VISION = "vision_model.decoder.layers."
PADDED = 128
"""Rows of padded tables; the vocabularies of the tests have 96."""

SIZES: dict[str, Dims] = {
    "dense": replace(DENSE, layers=3, heads=6, kv_heads=3),
    "wide": replace(DENSE, heads=8, kv_heads=4),
    "tied": TIED,
    "moe": replace(MOE, experts=6),
    "square": replace(DENSE, ffn=32, hidden=32, heads=4, head_dim=8),
    "square moe": replace(MOE, expert_ffn=32),
}


def faint(weights: HF) -> None:
    """Weights that float16 has as subnormal numbers or not at all."""
    for name, tensor in weights.items():
        weights[name] = tensor * 2.0**-12


def bright(weights: HF) -> None:
    """Weights of which two are too large for float16."""
    weights[f"{TEXT}1.mlp.down_proj.weight"][0, 7] = 1e5
    weights[f"{TEXT}1.mlp.down_proj.weight"][5, 2] = -7e4


def in_float32(weights: HF) -> None:
    """Weights that only float32 has."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in weights.items():
        weights[name] = tensor.float() * (1 + torch.rand(tensor.shape, generator=generator))


WEIGHTS = {"faint": faint, "bright": bright, "float32": in_float32}
"""Other weights of the dense model."""


@dataclass(frozen=True)
class Bases:
    """Folders and what was made of them, by name; made when first asked for."""

    root: Path

    def huggingface(self, name: str) -> Path:
        folder = self.root / name
        if name in WEIGHTS and not folder.exists():
            return changed_folder(self.huggingface("dense"), folder, WEIGHTS[name])
        return folder if folder.exists() else make(folder, SIZES[name])

    def megatron(self, name: str, layout: ParallelLayout | None = None, **options: Any) -> Path:
        words = [name, str(layout), *(f"{key} {value}" for key, value in options.items())]
        run = self.root / " ".join(words)
        if not run.exists():
            hf_to_megatron(self.huggingface(name), run, layout=layout, run=QUICK, **options)
        return run


def changed_folder(source: Path, target: Path, change: Callable[[HF], object]) -> Path:
    """A copy of a folder with other weights."""
    weights = {name: tensor.clone() for name, tensor in load_huggingface(source).items()}
    change(weights)
    copied(source, target)
    contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    save_file(contiguous, target / "model.safetensors", {"format": "pt"})
    return target


def run_of_changed(source: Path, root: Path, change: Callable[[HF], object], **options: Any) -> Path:
    """What a converter that makes this mistake makes of a folder: the changed weights, rightly converted."""
    folder = changed_folder(source, root / "changed", change)
    hf_to_megatron(folder, root / "run", run=QUICK, **options)
    return root / "run"


def stored_tensor(run: Path, key: str) -> Tensor:
    dtype, shape, data = stored(run, key)
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).reshape(shape)


def changed_run(run: Path, target: Path, key: str, change: Callable[[Tensor], object]) -> Path:
    """A copy of a Megatron checkpoint with other numbers under a key; `change` works in place."""
    copied(run, target)
    tensor = stored_tensor(run, key)
    change(tensor)
    data = tensor.view(torch.uint8).numpy().tobytes()
    put(target, key, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)
    return target


def compared(folder: Path, run: Path, **options: Any) -> WeightsReport:
    theirs = open_huggingface(folder)
    return compare_weights(theirs, open_beside(theirs, run), **{"options": FillOptions(workers=2), **options})


def found(report: WeightsReport) -> dict[str, Difference]:
    return {difference.name: difference for difference in report.differences}


def guesses(report: WeightsReport) -> dict[str, str]:
    return {difference.name: difference.guess for difference in report.differences}
