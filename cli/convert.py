"""hf-to-megatron, megatron-to-hf and plan: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_convert.cli.console import Console, table
from qwen3vl_convert.cli.options import (
    DryRun,
    Dtype,
    Ep,
    Etp,
    FirstStage,
    ForCore,
    Format,
    Fsync,
    Headless,
    Iteration,
    Json,
    LastStage,
    MaxMemory,
    MaxShard,
    Overwrite,
    PaddedVocab,
    Pp,
    Quiet,
    Resume,
    Tp,
    VocabDivisor,
    Vpp,
    Workers,
    parse_bytes,
    parse_iteration,
)
from qwen3vl_convert.errors import UnsupportedFormat, UsageError
from qwen3vl_convert.quantities import amount, duration, size, speed

if TYPE_CHECKING:
    from qwen3vl_convert.convert import Result, RunOptions

Source = Annotated[str, typer.Argument(help="Hugging Face folder or Hub id (org/name or org/name@revision).")]
MegatronSource = Annotated[
    Path, typer.Argument(help="Megatron checkpoint: the run folder, or one iter_* or release folder.")
]
Target = Annotated[Path, typer.Argument(help="Folder to make; it appears when it is complete.")]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="Folder or Hub id for config.json, tokenizer and processors; what the checkpoint has by default.",
    ),
]


def hf_to_megatron(
    source: Source,
    target: Target,
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = None,
    ep: Ep = 1,
    etp: Etp = 1,
    first_stage_layers: FirstStage = None,
    last_stage_layers: LastStage = None,
    format: Format = "torch_dist",
    dtype: Dtype = "keep",
    padded_vocab_size: PaddedVocab = None,
    make_vocab_size_divisible_by: VocabDivisor = None,
    experts_layout: Annotated[
        str, typer.Option(help="Expert layout of SOURCE: auto, hub, v5, per-expert or scrambled.")
    ] = "auto",
    iteration: Annotated[str, typer.Option(help="Iteration to write: a number, or `release` for Megatron-LM.")] = "0",
    for_megatron_core: ForCore = "any",
    headless: Headless = False,
    max_memory: MaxMemory = "2GiB",
    workers: Workers = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    fsync: Fsync = True,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hugging Face safetensors to a Megatron distributed checkpoint, for any layout, in one process without a GPU."""
    from qwen3vl_convert.convert import hf_to_megatron as convert
    from qwen3vl_convert.parallel import ParallelLayout

    _check_format(format)
    layout = ParallelLayout(tp, pp, vpp, ep, etp, first_stage_layers, last_stage_layers)
    console = Console(json, quiet)
    with console.progress() as report:
        result = convert(
            source,
            target,
            layout=layout,
            dtype=dtype,
            padded_vocab_size=padded_vocab_size,
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            experts_layout=experts_layout,
            iteration=parse_iteration(iteration) or 0,
            megatron_core=for_megatron_core,
            headless=headless,
            run=_run_options(max_memory, workers, resume, overwrite, fsync, dry_run),
            report=report,
        )
    _print(console, result, str(layout))


def megatron_to_hf(
    source: MegatronSource,
    target: Target,
    config: Config = None,
    experts_layout: Annotated[
        str, typer.Option(help="Expert layout to write: hub, v5, per-expert, or match (the source's).")
    ] = "hub",
    max_shard_size: MaxShard = None,
    dtype: Dtype = "keep",
    iteration: Iteration = None,
    headless: Headless = False,
    max_memory: MaxMemory = "2GiB",
    workers: Workers = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    fsync: Fsync = True,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A Megatron distributed checkpoint of any layout to safetensors that transformers 4.57 and 5.x load."""
    from qwen3vl_convert.convert import megatron_to_hf as convert

    console = Console(json, quiet)
    with console.progress() as report:
        result = convert(
            source,
            target,
            config=config,
            experts_layout=experts_layout,
            max_shard_bytes=None if max_shard_size is None else parse_bytes(max_shard_size, "--max-shard-size"),
            dtype=dtype,
            iteration=parse_iteration(iteration),
            headless=headless,
            run=_run_options(max_memory, workers, resume, overwrite, fsync, dry_run),
            report=report,
        )
    _print(console, result)


def plan(
    source: Annotated[str, typer.Argument(help="Checkpoint of either format; the plan is to convert it to the other.")],
    target: Annotated[Path, typer.Argument(help="Where it would go (for the free space).")] = Path("converted"),
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = None,
    ep: Ep = 1,
    etp: Etp = 1,
    first_stage_layers: FirstStage = None,
    last_stage_layers: LastStage = None,
    config: Config = None,
    dtype: Dtype = "keep",
    padded_vocab_size: PaddedVocab = None,
    make_vocab_size_divisible_by: VocabDivisor = None,
    experts_layout: Annotated[str | None, typer.Option(help="As for hf-to-megatron or megatron-to-hf.")] = None,
    max_shard_size: MaxShard = None,
    iteration: Iteration = None,
    headless: Headless = False,
    max_memory: MaxMemory = "2GiB",
    workers: Workers = None,
    json: Json = False,
) -> None:
    """What a conversion would do: files, bytes per rank, memory, disk, problems. Reads headers only, writes nothing."""
    import qwen3vl_convert.convert as api
    from qwen3vl_convert.inspection import is_megatron
    from qwen3vl_convert.parallel import ParallelLayout

    run = _run_options(max_memory, workers, resume=False, overwrite=False, fsync=True, dry_run=True)
    shared: dict[str, Any] = {"dtype": dtype, "headless": headless, "run": run}
    layout = ParallelLayout(tp, pp, vpp, ep, etp, first_stage_layers, last_stage_layers)
    if is_megatron(Path(source)):
        shard = None if max_shard_size is None else parse_bytes(max_shard_size, "--max-shard-size")
        options = {"config": config, "max_shard_bytes": shard, "iteration": parse_iteration(iteration)}
        result = api.megatron_to_hf(source, target, experts_layout=experts_layout or "hub", **options, **shared)  # type: ignore[arg-type]
    else:
        result = api.hf_to_megatron(
            source,
            target,
            layout=layout,
            experts_layout=experts_layout or "auto",
            padded_vocab_size=padded_vocab_size,
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            iteration=parse_iteration(iteration) or 0,
            **shared,
        )
    _print(Console(json), result, str(layout))


def _check_format(name: str) -> None:
    if name == "torch":
        raise UnsupportedFormat("--format torch: the legacy format is not written yet. Use torch_dist.")
    if name != "torch_dist":
        raise UsageError(f"--format {name}: expected torch_dist.")


def _run_options(
    max_memory: str, workers: int | None, resume: bool, overwrite: bool, fsync: bool, dry_run: bool
) -> "RunOptions":
    from qwen3vl_convert.convert import RunOptions
    from qwen3vl_convert.fill import FillOptions

    given = {} if workers is None else {"workers": workers}
    return RunOptions(
        FillOptions(**given, max_memory=parse_bytes(max_memory, "--max-memory")), overwrite, resume, fsync, dry_run
    )


def _print(console: Console, result: "Result", layout: str = "") -> None:
    console.notes(result.notes)
    console.result(
        result.to_json(), lambda: _plan_tables(result, layout) if result.dry_run else _summary(result, layout)
    )


def _model(result: "Result", layout: str) -> str:
    """What is written, as far as it has it: a layout on Megatron's side, experts in a mixture of them."""
    parallel = [layout] if result.direction == "hf-to-megatron" else []
    experts = [] if result.experts_layout == "none" else [f"experts: {result.experts_layout}"]
    return ", ".join((result.model, *parallel, result.dtype, *experts))


def _summary(result: "Result", layout: str) -> None:
    seconds = sum(result.seconds.values())
    stages = ", ".join(f"{stage} {duration(time)}" for stage, time in result.seconds.items() if time >= 0.005)
    rows = [
        ("model", _model(result, layout)),
        ("tensors", f"{result.tensors:,} in {amount(len(result.files), 'file')}, {size(result.total_bytes)}"),
        ("time", f"{duration(seconds)} ({stages}){_filling(result)}"),
        ("proof", "every element read once and written once; every chunk read back and its checksum compared"),
        ("target", result.target),
    ]
    table(f"{result.direction}: {result.source}", rows)


def _filling(result: "Result") -> str:
    """How fast, where anything was filled."""
    moving = result.seconds.get("fill", 0.0)
    return f"; {speed(result.data_bytes, moving)} while filling" if moving else ""


def _ranks(result: "Result") -> list[tuple[str, str]]:
    """How much each rank will hold; which, when they differ."""
    held = result.rank_bytes
    if not held:
        return []
    most = f"{size(max(held))} of weights on each of {amount(len(held), 'rank')}"
    if min(held) == max(held):
        return [("ranks", most)]
    shown = ", ".join(f"{rank}: {size(nbytes)}" for rank, nbytes in enumerate(held[:16]))
    shown += " ..." if held[16:] else ""
    return [("ranks", f"{size(min(held))} to {size(max(held))} of weights on each of {len(held)}; {shown}")]


def _plan_tables(result: "Result", layout: str) -> None:
    table(
        f"{result.direction}: {result.source} (a plan; nothing was written)",
        [
            ("model", _model(result, layout)),
            ("tensors", f"{result.tensors:,}, {size(result.data_bytes)} of data; every element accounted for once"),
            ("memory", f"at most {size(result.buffer_bytes)} of buffers"),
            *_ranks(result),
            ("disk", f"{size(result.total_bytes)} needed, {size(result.free_bytes)} free"),
        ],
    )
    table("files", [(name, size(nbytes)) for name, nbytes in result.files.items()], ("file", "size"))
