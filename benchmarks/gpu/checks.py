"""What the parts have in common: where they compute, and what a figure may be.

How much may differ. In float32, 2e-5, or on a GPU three times what transformers itself differs there from a CPU, if
that is more, but no more than 1e-3: both are right, and sums are done in another order. In bfloat16, transformers in
float32 is the reference (the weights are numbers that bfloat16 has): our error may be twice the largest that
transformers in bfloat16 has for a prompt, each the root of the mean square over all its logits. The largest, because a
token near the border between two experts is sent to the wrong one in one program and not in the other.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.page import Row
from gpu.parts import Shape

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
TOLERANCE = 2e-5
SPREAD = 3.0
FAR = 1e-3
"""Where transformers on the device is that far from itself on a CPU, one of the two is wrong, and no yardstick."""
ROUNDING = 2.0


@dataclass(frozen=True, slots=True)
class Run:
    """Where a part computes. `work`: a folder for what it makes itself; `checkpoint`: has hf/ and run/, of `shape`."""

    device: str
    work: Path
    shape: Shape | None = None
    checkpoint: Path | None = None

    @property
    def small(self) -> bool:
        """A rehearsal: tiny models take the place of real shapes."""
        return self.device == "cpu"

    @property
    def hf(self) -> Path:
        """The Hugging Face folder of the part's checkpoint."""
        assert self.checkpoint is not None
        return self.checkpoint / "hf"

    @property
    def run(self) -> Path:
        """The Megatron checkpoint."""
        assert self.checkpoint is not None
        return self.checkpoint / "run"


Checks = Callable[[Run], Iterator[Row]]
"""What a part is made of: one that raises is a failure, and the next goes on."""


def check(part: str, what: str, model: str, dtype: torch.dtype, measured: float, bound: float) -> Row:
    """A measured difference and how much it may be; NaN is too much."""
    figures = [f"{value:.2e}" for value in (measured, bound)]
    return Row("logits", (part, what, model, dtype_name(dtype), *figures), measured <= bound)


def bound_in_float32(spread: float) -> float:
    """`spread`: what transformers on the device differs from itself on a CPU."""
    return min(FAR, max(TOLERANCE, SPREAD * spread))


def fact(what: str, found: str, passed: bool = True) -> Row:
    """Something that is there, or works."""
    return Row("sanity", (what, found), passed)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def world(device: str) -> AbstractContextManager[Any]:
    """Process groups for this process alone. A backend has to be named where a GPU is not to be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core at import, of what is not installed
        from qwen3vl_convert.models import parallel_world
    alone: AbstractContextManager[Any] = parallel_world(
        rank=0, world_size=1, backend="gloo" if device == "cpu" else None
    )
    return alone


def give_back(device: str) -> None:
    """The memory of models that are gone, which would else make the verifier stream. They hold on to themselves by the
    hooks that they had.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize(device: str) -> None:
    """Until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()
