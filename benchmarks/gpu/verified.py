"""The verifier: checkpoints of real shapes pass, in float32 and bfloat16 and by the inference model, with how long it
took and how much memory of the device; and planted faults do not pass.
"""

from collections.abc import Iterator
from pathlib import Path

from gpu.checks import Run, give_back
from gpu.page import Row
from qwen3vl_convert import ParallelLayout, hf_to_megatron, make_checkpoint
from qwen3vl_convert.convert import RunOptions
from qwen3vl_convert.verify import LogitsOptions, LogitsReport, verify
from qwen3vl_convert.verify.result import WeightsReport
from verify.faults import FAULTS
from verify.planting import Bases

ASKED = (("bf16", "megatron"), ("fp32", "megatron"), ("bf16", "inference"))
"""(dtype, model), cheapest first."""
PLANTED = ("expert pair exchanged", "rope theta 500000", "gate and up swapped")


def real_shapes(run: Run) -> Iterator[Row]:
    """Of the part's checkpoint."""
    yield from equal_by_all(f"{run.shape} shapes", run.hf, run.run, run.device)


def tiny_moe(run: Run) -> Iterator[Row]:
    """Something right that has experts, before the faults."""
    folder = run.work / "right moe"
    make_checkpoint(folder / "hf", "tiny-moe")
    hf_to_megatron(folder / "hf", folder / "run", layout=ParallelLayout(tp=2, ep=2), run=RunOptions(fsync=False))
    yield from equal_by_all("tiny-moe", folder / "hf", folder / "run", run.device)


def equal_by_all(what: str, hf: Path, megatron: Path, device: str) -> Iterator[Row]:
    """Weights once, then the logits in each way that is asked for."""
    weights = verify(hf, megatron).weights
    said = f"{weights.tensors} tensors, {weights.elements:,} elements, {weights.seconds:.1f} s"
    yield Row("sanity", (f"weights of {what}, bit for bit", said), weights.equal)
    for dtype, model in ASKED:
        yield verified(what, LogitsOptions(device=device, dtype=dtype, model=model), (hf, megatron), weights=weights)


def faults(run: Run) -> Iterator[Row]:
    """Each must be found, in both dtypes."""
    bases = Bases(run.work / "right")
    for number, name in enumerate(PLANTED):
        target = run.work / f"wrong {number}"
        target.mkdir()
        pair = FAULTS[name].planted(bases, target)
        weights = verify(*pair).weights
        for dtype in ("fp32", "bf16"):
            options = LogitsOptions(device=run.device, dtype=dtype)
            yield verified(f"tiny: {name}", options, pair, weights=weights, expected=False)


def verified(
    what: str, options: LogitsOptions, pair: tuple[Path, Path], *, weights: WeightsReport, expected: bool = True
) -> Row:
    """`expected`: whether the logits are to be equal."""
    give_back(options.device)
    logits = verify(*pair, logits=options, weights=weights).logits
    assert logits is not None
    return row(what, options, logits, expected)


def row(what: str, options: LogitsOptions, logits: LogitsReport, expected: bool) -> Row:
    """Of the prompt that came nearest to what is allowed."""
    said = {True: "equal", False: "different"}
    worst = max(logits.prompts, key=lambda one: one.max_abs / one.allowed, default=None)
    figures = ("-", "-") if worst is None else (f"{worst.max_abs:.1e}", f"{worst.allowed:.1e}")
    how = (options.dtype, options.model, logits.mode, said[expected], said[logits.equal])
    took = (f"{logits.seconds:.1f} s", f"{logits.peak_bytes / 1e9:.1f} GB")
    return Row("verified", (what, *how, *figures, *took), logits.equal == expected)


CHECKS = (real_shapes,)
