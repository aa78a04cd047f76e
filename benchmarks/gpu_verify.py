"""The part of gpu_check that runs the verifier: checkpoints of real shapes pass, in float32 and bfloat16, with how long
it took and how much memory of the device; and planted faults do not pass.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen3vl_convert import ParallelLayout, hf_to_megatron, make_checkpoint
from qwen3vl_convert.convert import RunOptions
from qwen3vl_convert.verify import LogitsOptions, Verification, verify
from verify.faults import FAULTS
from verify.planting import Bases

SHAPES: dict[str, tuple[tuple[str, int | None], ...]] = {
    "full": (("2b", None), ("8b", None), ("30b-a3b", 12)),
    "quick": (("tiny", None), ("tiny-moe", None)),
}
"""(size, layers it is cut to)."""
PLANTED = ("expert pair exchanged", "rope theta 500000", "gate and up swapped")
HEAD = ["verify --logits", "dtype", "mode", "expected", "found", "largest difference", "allowed", "time", "peak memory"]


@dataclass(frozen=True)
class Verified:
    """One run of the verifier, and whether it had to find the models equal."""

    what: str
    dtype: str
    expected: bool
    found: Verification

    @property
    def passed(self) -> bool:
        logits = self.found.logits
        return logits is not None and logits.equal == self.expected

    def cells(self) -> list[str]:
        logits = self.found.logits
        assert logits is not None
        worst = max(logits.prompts, key=lambda one: one.max_abs / one.allowed)
        said = {True: "equal", False: "different"}
        return [
            self.what,
            self.dtype,
            logits.mode,
            said[self.expected],
            said[logits.equal] if self.passed else f"**{said[logits.equal]}**",
            f"{worst.max_abs:.1e}",
            f"{worst.allowed:.1e}",
            f"{logits.seconds:.1f} s",
            f"{logits.peak_bytes / 1e9:.1f} GB",
        ]


def verifications(work: Path, device: str, quick: bool) -> Iterator[Verified]:
    """All of them, checkpoints made in `work` one after the other."""
    for size, layers in SHAPES["quick" if quick else "full"]:
        yield from real_shapes(work / size, size, layers, device)
        shutil.rmtree(work / size)
    yield from faults(work, device)


def real_shapes(work: Path, size: str, layers: int | None, device: str) -> Iterator[Verified]:
    what = f"{size} shapes" + (f", {layers} layers" if layers else "")
    dims = make_checkpoint(work / "hf", size, layers=layers)
    layout = ParallelLayout(tp=2, ep=2) if dims.moe else ParallelLayout(tp=2)
    hf_to_megatron(work / "hf", work / "run", layout=layout, run=RunOptions(fsync=False))
    for dtype in ("fp32", "bf16"):
        yield verified(what, dtype, True, (work / "hf", work / "run"), device)


def faults(work: Path, device: str) -> Iterator[Verified]:
    bases = Bases(work / "right")
    for number, name in enumerate(PLANTED):
        target = work / f"wrong {number}"
        target.mkdir()
        pair = FAULTS[name].planted(bases, target)
        for dtype in ("fp32", "bf16"):
            yield verified(f"tiny: {name}", dtype, False, pair, device)


def verified(what: str, dtype: str, expected: bool, pair: tuple[Path, Path], device: str) -> Verified:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return Verified(what, dtype, expected, verify(*pair, logits=LogitsOptions(device=device, dtype=dtype)))
