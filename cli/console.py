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
from qwen3vl_convert.progress import Report
from qwen3vl_convert.quantities import duration, share, size

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
    def progress(self) -> Iterator[Report]:
        """A report function: bars on a terminal, a line now and then elsewhere, nothing with `--quiet`."""
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
def _bar() -> Iterator[Report]:
    """A line for each stage: a bar of what is done, or, where no number measures it, one that moves, and the time."""
    from rich.console import Console as Rich
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Of(ProgressColumn):
        """Another column, for tasks that are measured, or for those that are not."""

        def __init__(self, column: ProgressColumn, measured: bool) -> None:
            super().__init__()
            self.column, self.measured = column, measured

        def render(self, task: Task) -> Any:
            return self.column.render(task) if task.fields["measured"] == self.measured else Text("")

    measured = (Of(column, True) for column in (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()))
    columns = (TextColumn("{task.description:8}"), BarColumn(), *measured, Of(TimeElapsedColumn(), False))
    tasks: dict[str, TaskID] = {}
    waiting: list[TaskID] = []
    with Progress(*columns, console=Rich(stderr=True)) as progress:

        def ended() -> None:
            for task in waiting:
                progress.update(task, total=1, completed=1)
            waiting.clear()

        def report(stage: str, done: int, total: int) -> None:
            ended()
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total or None, measured=total > 0)
            if total:
                progress.update(tasks[stage], completed=done)
            else:
                waiting.append(tasks[stage])

        yield report
        ended()


def _lines() -> Report:
    """A line when something begins that no number measures, and now and then about what is measured."""
    last = began = time.monotonic()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if not total:
            print(f"{stage} ...", file=sys.stderr, flush=True)
        elif now - last >= _LINE_EVERY:
            last = now
            said = f"{stage}: {share(done / total, 0)} of {size(total)} after {duration(now - began)}"
            print(said, file=sys.stderr, flush=True)

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
