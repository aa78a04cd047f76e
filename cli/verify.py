"""verify and roundtrip: parse, call, print."""

import os
import shlex
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3vl_convert.cli import console
from qwen3vl_convert.cli.console import Console, table
from qwen3vl_convert.cli.diff import MOST_CHANGES
from qwen3vl_convert.cli.diff import show as show_changes
from qwen3vl_convert.cli.options import (
    Ep,
    Etp,
    Headless,
    Iteration,
    Json,
    Pp,
    Quiet,
    Tp,
    Vpp,
    Workers,
    parse_bytes,
    parse_iteration,
)
from qwen3vl_convert.errors import OutputError, UsageError

if TYPE_CHECKING:
    from qwen3vl_convert.fill import FillOptions
    from qwen3vl_convert.verify import LogitsOptions, RoundTrip, Verification
    from qwen3vl_convert.verify.report import Occasion

_LOGITS = "What both models compute"
AnyMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="Most memory: for buffers (2GiB), and for the weights of a layer with --stream (6GiB).",
        rich_help_panel="How it is carried out",
    ),
]
Logits = Annotated[
    bool, typer.Option("--logits", help="Also build both models and compare their logits.", rich_help_panel=_LOGITS)
]
Device = Annotated[
    str | None, typer.Option("--device", help="auto (a GPU if there is one), cuda or cpu.", rich_help_panel=_LOGITS)
]
LogitsDtype = Annotated[
    str | None, typer.Option("--dtype", help="What the models compute in: fp32 or bf16.", rich_help_panel=_LOGITS)
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="What computes with the Megatron checkpoint: megatron (Megatron-Core's layers) or inference.",
        rich_help_panel=_LOGITS,
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="With --logits: layer by layer, in memory that hardly grows with their number.",
        rich_help_panel=_LOGITS,
    ),
]


def verify(
    huggingface: Annotated[str, typer.Argument(metavar="HF", help="Hugging Face folder or Hub id.")],
    megatron: Annotated[Path, typer.Argument(metavar="MEGATRON", help="Megatron checkpoint of any layout.")],
    iteration: Iteration = None,
    headless: Headless = False,
    dtype_tolerant: Annotated[
        bool,
        typer.Option("--dtype-tolerant", help="Dtypes may differ; values must be exactly what rounding gives."),
    ] = False,
    logits: Logits = False,
    device: Device = None,
    dtype: LogitsDtype = None,
    stream: Stream = False,
    model: ModelOption = None,
    report_file: Annotated[Path | None, typer.Option("--report", help="Write what was found as one HTML file.")] = None,
    max_memory: AnyMemory = None,
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Is this the same model? Every weight on disk, bit for bit; with --logits what both models compute, too.

    Exit code 0: yes, 1: no. Under torchrun, --logits runs the Megatron model in the checkpoint's own layout.
    """
    from qwen3vl_convert.verify import verify as run

    if report_file is not None:
        _check_free(report_file)
    chosen, options = _logits(logits, device, dtype, stream, max_memory, model), _fill(max_memory, workers)
    speaks = os.environ.get("RANK", "0") == "0" or not logits
    sink = Console(json and speaks, quiet or not speaks)
    with sink.progress() as report:
        found = run(
            huggingface,
            megatron,
            iteration=parse_iteration(iteration),
            headless=headless,
            dtype_tolerant=dtype_tolerant,
            logits=chosen,
            options=options,
            report=report,
        )
    if report_file is not None and speaks:
        _write(report_file, found)
    sink.notes((*found.weights.notes, *(found.logits.notes if found.logits else ())))
    sink.result(found.to_json(), lambda: _show(found))
    if not found.equal and speaks:  # torchrun ends all processes when one fails, and the first has yet to speak
        raise typer.Exit(1)


def _logits(
    logits: bool,
    device: str | None,
    dtype: str | None,
    stream: bool,
    max_memory: str | None,
    model: str | None,
) -> "LogitsOptions | None":
    from qwen3vl_convert.verify import LogitsOptions

    given = {"--device": device, "--dtype": dtype, "--stream": stream or None, "--model": model}
    if not logits and (named := [name for name, value in given.items() if value is not None]):
        raise UsageError(f"{', '.join(named)}: of use with --logits only. Add it, or leave them out.")
    if logits and not console.show_traceback:
        warnings.simplefilter("ignore")  # of the libraries, which warn of what is not installed when they are imported
    shelf = {} if max_memory is None else {"shelf_bytes": parse_bytes(max_memory, "--max-memory")}
    if not logits:
        return None
    return LogitsOptions(device or "auto", dtype or "fp32", stream, model=model or "megatron", **shelf)


def _fill(max_memory: str | None, workers: int | None) -> "FillOptions":
    from qwen3vl_convert.fill import FillOptions

    given = {} if workers is None else {"workers": workers}
    if max_memory is not None:
        given["max_memory"] = parse_bytes(max_memory, "--max-memory")
    return FillOptions(**given)


def _check_free(path: Path) -> None:
    if path.exists():
        raise OutputError(f"--report {path}: exists. Name another file, or remove it.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"--report {path}: {path.absolute().parent} is no folder. Make it first.")


def _write(path: Path, found: "Verification") -> None:
    """Whole or not at all."""
    from qwen3vl_convert.verify.report import html_report

    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(html_report(found, _occasion()), encoding="utf-8")
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _occasion() -> "Occasion":
    """Now, and what was typed."""
    from qwen3vl_convert.verify.report import Occasion

    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Occasion(now, shlex.join(["qwen3vl-convert", *sys.argv[1:]]))


def _show(found: "Verification") -> None:
    from qwen3vl_convert.verify.terminal import terminal_lines

    print("\n".join(terminal_lines(found)))


def roundtrip(
    source: Annotated[str, typer.Argument(help="A checkpoint of either format, or a Hub id.")],
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = None,
    ep: Ep = 1,
    etp: Etp = 1,
    config: Annotated[
        str | None, typer.Option("--config", help="For a Megatron source: folder or Hub id of config and tokenizer.")
    ] = None,
    iteration: Iteration = None,
    headless: Headless = False,
    logits: Logits = False,
    device: Device = None,
    dtype: LogitsDtype = None,
    stream: Stream = False,
    model: ModelOption = None,
    scratch: Annotated[
        Path | None,
        typer.Option("--scratch", help="Where to put the checkpoints meanwhile; needs three times the size."),
    ] = None,
    max_memory: AnyMemory = None,
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert there and back under two layouts, and compare every bit. Exit code 0: the same, 1: not.

    With --logits both models are built too, on a GPU where there is one, and their logits compared.

    Without --tp, --pp, --vpp, --ep and --etp the first layout cuts in two whatever can be cut.
    """
    from qwen3vl_convert.parallel import ParallelLayout
    from qwen3vl_convert.verify import roundtrip as run

    layout = ParallelLayout(tp, pp, vpp, ep, etp)
    if scratch is not None and not scratch.is_dir():
        raise OutputError(f"--scratch {scratch}: is no folder. Make it first.")
    chosen = _logits(logits, device, dtype, stream, max_memory, model)
    sink = Console(json, quiet)
    with sink.progress() as report:
        found = run(
            source,
            layout=None if layout == ParallelLayout() else layout,
            config=config,
            iteration=parse_iteration(iteration),
            headless=headless,
            logits=chosen,
            scratch=scratch,
            options=_fill(max_memory, workers),
            report=report,
        )
    if found.logits is not None:
        sink.notes(found.logits.notes)
    sink.result(found.to_json(), lambda: _show_trip(found))
    if not found.equal:
        raise typer.Exit(1)


def _show_trip(trip: "RoundTrip") -> None:
    from qwen3vl_convert.verify.terminal import trip_lines, trip_rows, trip_verdict

    print(trip_verdict(trip))
    table("", trip_rows(trip))
    if lines := trip_lines(trip):
        print("\n".join(lines))
    for step in trip.steps:
        if step.changes is not None and not step.equal:
            show_changes(step.changes, MOST_CHANGES)
