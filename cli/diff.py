"""diff: parse, call, print."""

from typing import TYPE_CHECKING, Annotated

import typer

from qwen3vl_convert.cli.console import Console, table
from qwen3vl_convert.cli.options import Json, MaxMemory, Quiet, Workers, parse_bytes, parse_iteration
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.quantities import amount, figure, share

if TYPE_CHECKING:
    from qwen3vl_convert.verify.diff import Change, DiffReport

MOST_CHANGES = 20
"""Tensors that are shown if nothing else is asked for."""
_ITERATION = "Which iteration of {} to read; the newest by default."


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint of either format, or a Hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one of the same model.")],
    iteration_a: Annotated[str | None, typer.Option("--iteration-a", help=_ITERATION.format("A"))] = None,
    iteration_b: Annotated[str | None, typer.Option("--iteration-b", help=_ITERATION.format("B"))] = None,
    top: Annotated[int, typer.Option("--top", help="How many of the tensors that changed to show.")] = MOST_CHANGES,
    max_memory: MaxMemory = "2GiB",
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What has changed from A to B, tensor by tensor, the most first? Exit code 0: nothing, 1: something."""
    from qwen3vl_convert.fill import FillOptions
    from qwen3vl_convert.verify.diff import diff as run

    if top < 0:
        raise UsageError(f"--top {top}: expected 0 or more.")
    given = {} if workers is None else {"workers": workers}
    options = FillOptions(**given, max_memory=parse_bytes(max_memory, "--max-memory"))
    iterations = {"iteration_a": parse_iteration(iteration_a), "iteration_b": parse_iteration(iteration_b)}
    console = Console(json, quiet)
    with console.progress() as report:
        found = run(a, b, **iterations, options=options, report=report)
    console.notes(found.notes)
    console.result(found.to_json(), lambda: show(found, top))
    if not found.equal:
        raise typer.Exit(1)


def show(found: "DiffReport", top: int) -> None:
    """As a person reads it, `top` of the tensors that changed."""
    if found.equal:
        print(f"EQUAL: {amount(found.tensors, 'tensor')}, {amount(found.elements, 'element')}.")
        return
    changed, settings = f"{len(found.changes):,} of {amount(found.tensors, 'tensor')}", len(found.settings)
    print(f"DIFFERENT: {changed}, {amount(settings, 'setting')}.")
    for which, names in (("A", found.only_a), ("B", found.only_b)):
        for name in names:
            print(f"  only in {which}: {name}")
    for setting, (before, after) in found.settings.items():
        print(f"  {setting}: {before} in A, {after} in B")
    if found.changes and top:
        header = ("tensor", "relative change", "largest change", "elements changed", "dtype")
        shown = min(top, len(found.changes))
        title = f"{shown:,} of {amount(len(found.changes), 'tensor')} that changed (all of them with --json)"
        table(title, [_row(change) for change in found.changes[:top]], header)


def _row(change: "Change") -> tuple[str, ...]:
    before, after = change.dtypes
    dtype = before if before == after else f"{before} -> {after}"
    part = share(change.changed / max(change.elements, 1))
    return change.name, figure(change.relative), figure(change.max_abs), part, dtype
