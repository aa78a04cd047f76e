"""What a person, a script or nobody sees: results on stdout, talk and progress on stderr, one table of exit codes."""

import functools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec

import typer

from qwen3vl_convert.errors import ConvertError
from qwen3vl_convert.installed import named

P = ParamSpec("P")

INTERRUPTED = 130
BUG = 70
"""What the program did not foresee; sysexits.h calls it EX_SOFTWARE. Not Python's own 1, which means different."""
_LINE_EVERY = 10.0
"""Seconds between lines of progress where there is no terminal."""

show_traceback = False


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose errors are a message on stderr and an exit code, never a traceback (unless asked for)."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with named(command.__name__.replace("_", "-")):
                command(*args, **kwargs)
        except (ConvertError, OSError, KeyboardInterrupt) as error:
            if show_traceback:
                traceback.print_exception(error)
            else:
                _say_error(error)
            raise typer.Exit(exit_code(error)) from None
        except typer.Exit:
            raise
        except Exception as error:  # noqa: BLE001  no exit code of a bug may be taken for an answer
            traceback.print_exception(error)
            print("error: this is a bug in qwen3vl-convert. Please report it with the lines above.", file=sys.stderr)
            raise typer.Exit(BUG) from None

    return run


def exit_code(error: BaseException) -> int:
    """2 wrong usage, 3 unusable input, 4 output cannot be written, 130 interrupted."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, ConvertError) else 4


def _say_error(error: BaseException) -> None:
    text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    for line in (f"error: {text}", *getattr(error, "__notes__", ())):
        print(line, file=sys.stderr)


class Console:
    """One sink for human, `--json` and `--quiet` output."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet

    def result(self, value: dict[str, Any], human: Callable[[], None]) -> None:
        """The result: as one JSON object, as a person reads it, or not at all."""
        if self.as_json:
            print(json.dumps(_plain(value), indent=2, default=str, allow_nan=False))
        elif not self.quiet:
            human()

    def notes(self, notes: Iterable[str]) -> None:
        if not self.quiet and not self.as_json:
            for note in notes:
                print(f"note: {note}", file=sys.stderr)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """A report function: a bar on a terminal, a line now and then elsewhere, nothing with `--quiet`."""
        if self.quiet:
            yield lambda stage, done, total: None
        elif sys.stderr.isatty():
            with _bar() as report:
                yield report
        else:
            yield _lines()


def _plain(value: Any) -> Any:
    """null for what is no number or infinite, which JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console as Rich
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Rich(stderr=True)) as progress:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield report


def _lines() -> Callable[[str, int, int], None]:
    last = began = time.monotonic()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY:
            last = now
            print(f"{stage}: {done / max(total, 1):.0%} of {size(total)} after {now - began:.0f} s", file=sys.stderr)

    return report


def table(title: str, rows: Iterable[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
    """Print a table on stdout, as wide as it needs (a pipe has no width)."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console as Rich
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=bool(header), pad_edge=False)
    known = list(rows)
    for name in header or ("",) * max((len(row) for row in known), default=1):
        made.add_column(name, overflow="fold", justify="right" if name in ("bytes", "size", "time") else "left")
    for row in known:
        made.add_row(*row)
    Rich(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False).print(made)


def size(nbytes: float) -> str:
    """`4.26 GB`; decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
