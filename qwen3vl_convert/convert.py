"""The main path: open, plan, prove; then lay out, fill, check, publish.

hf_to_megatron(source, target, layout=ParallelLayout(tp=2, pp=2))
megatron_to_hf(source, target, config="Qwen/Qwen3-VL-8B-Instruct")
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen3vl_convert.conversion import Conversion
from qwen3vl_convert.errors import InputError, OutputError, UsageError
from qwen3vl_convert.fill import FillOptions, fill
from qwen3vl_convert.huggingface.hub import resolve
from qwen3vl_convert.manifest import fingerprint_of, manifest_text, refuse_own_source
from qwen3vl_convert.megatron.target import MegatronOptions
from qwen3vl_convert.parallel import ParallelLayout
from qwen3vl_convert.progress import Report
from qwen3vl_convert.seal import check_space, check_written, publishing, refuse_existing
from qwen3vl_convert.to_huggingface import plan_megatron_to_hf
from qwen3vl_convert.to_megatron import plan_hf_to_megatron


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a conversion is carried out; none of this changes a byte of the result."""

    fill: FillOptions = field(default_factory=FillOptions)
    overwrite: bool = False
    resume: bool = False
    fsync: bool = True
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.overwrite and self.resume:
            raise UsageError("--resume and --overwrite exclude each other: one goes on, the other begins anew.")


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did, or with `dry_run` would do; `to_json()` is what `--json` prints. Sizes in bytes.

    `rank_bytes`: weights that each rank of the layout will hold once it is loaded (empty for a HF folder).
    """

    direction: str
    source: str
    target: str
    model: str
    dtype: str
    experts_layout: str
    options: dict[str, Any]
    tensors: int
    files: dict[str, int]
    data_bytes: int
    total_bytes: int
    free_bytes: int
    buffer_bytes: int
    rank_bytes: tuple[int, ...]
    dry_run: bool
    seconds: dict[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def hf_to_megatron(
    source: str | Path,
    target: str | Path,
    *,
    layout: ParallelLayout | None = None,
    dtype: str = "keep",
    padded_vocab_size: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    experts_layout: str = "auto",
    iteration: int | str = 0,
    megatron_core: str = "any",
    headless: bool = False,
    run: RunOptions | None = None,
    report: Report | None = None,
) -> Result:
    """Convert a Hugging Face folder (or Hub id) to a Megatron `torch_dist` checkpoint. Options as on the command line.

    Raises `UsageError`, `InputError` or `OutputError`; then there is no target.
    """
    began = time.monotonic()
    run = run or RunOptions()
    if not run.dry_run:
        refuse_existing(Path(target), run.overwrite)
    resolved = resolve(source, weights=True)
    options = MegatronOptions(layout or ParallelLayout(), megatron_core, iteration)
    padding = (padded_vocab_size, make_vocab_size_divisible_by)
    conversion = plan_hf_to_megatron(resolved, options, dtype, padding, experts_layout, headless)
    return carry_out(conversion, Path(target), run, report, began)


def megatron_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    config: str | Path | None = None,
    experts_layout: str = "hub",
    max_shard_bytes: int | None = None,
    dtype: str = "keep",
    iteration: int | str | None = None,
    headless: bool = False,
    run: RunOptions | None = None,
    report: Report | None = None,
) -> Result:
    """Convert a Megatron `torch_dist` checkpoint to a Hugging Face folder. Options as on the command line.

    `config`: folder or Hub id for config.json and the auxiliary files. Raises as `hf_to_megatron`.
    """
    began = time.monotonic()
    run = run or RunOptions()
    if not run.dry_run:
        refuse_existing(Path(target), run.overwrite)
    reference = None if config is None else resolve(config, weights=False)
    conversion = plan_megatron_to_hf(
        Path(source), reference, dtype, experts_layout, max_shard_bytes, iteration, headless
    )
    return carry_out(conversion, Path(target), run, report, began)


def carry_out(
    conversion: Conversion, target: Path, run: RunOptions, report: Report | None = None, began: float | None = None
) -> Result:
    """Lay out, fill, check and publish a planned conversion; with `run.dry_run`, only say what that would be."""
    tell: Report = report or (lambda stage, done, total: None)
    clock = _Clock(began)
    clock.lap("plan")
    plan = conversion.plan
    if run.dry_run:
        return _result(conversion, target, run, clock, conversion.notes, check_space(target, 0))
    refuse_own_source(plan, target)
    free = check_space(target, plan.target.nbytes)
    notes = (*conversion.notes, *conversion.check_data())
    clock.lap("check source")
    fingerprint = fingerprint_of(conversion)
    with publishing(target, fingerprint, overwrite=run.overwrite, resume=run.resume) as staging:
        if not staging.resumed:
            staging.lay_out(plan.target)
        clock.lap("lay out")
        crcs = fill(
            plan, staging.content, run.fill, _meter(tell, "fill", plan.data_bytes), staging.done, staging.finished
        )
        clock.lap("fill")
        if fingerprint_of(conversion) != fingerprint:
            raise InputError(f"{conversion.source}: was changed while it was read. Convert again when it is complete.")
        try:
            check_written(plan, staging.content, crcs, run.fill.workers, _meter(tell, "check", plan.data_bytes))
        except OutputError:
            staging.discard()  # what is not what was written is nothing to go on from
            raise
        clock.lap("check")
        (staging.content / conversion.manifest_path).write_text(manifest_text(conversion, crcs))
        staging.publish(run.fsync)
        clock.lap("publish")
    return _result(conversion, target, run, clock, notes, free)


class _Clock:
    """Seconds per stage."""

    def __init__(self, began: float | None) -> None:
        self.last = began if began is not None else time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self.last, 3)
        self.last = now


def _meter(tell: Report, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def progress(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell(stage, done, total)

    return progress


def _result(
    conversion: Conversion, target: Path, run: RunOptions, clock: _Clock, notes: tuple[str, ...], free: int
) -> Result:
    plan, model = conversion.plan, conversion.model
    return Result(
        direction=conversion.direction,
        source=conversion.source,
        target=str(target),
        model=model.dims.model_type,
        dtype=", ".join(sorted({tensor.dtype for tensor in plan.target.tensors.values()})),
        experts_layout=model.experts_layout,
        options={key: value for key, value in conversion.options.items() if key != "shard_of"},
        tensors=len(plan.target.tensors),
        files=dict(sorted(plan.target.sizes.items())),
        data_bytes=plan.data_bytes,
        total_bytes=plan.target.nbytes,
        free_bytes=free,
        buffer_bytes=run.fill.buffer_bytes,
        rank_bytes=conversion.rank_bytes,
        dry_run=run.dry_run,
        seconds=clock.seconds,
        notes=notes,
    )
