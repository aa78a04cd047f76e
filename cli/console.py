"""What a person, a script or nobody sees: results on stdout, talk and progress on stderr, one table of exit codes."""

import functools
import json
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from qwen3vl_convert.errors import ConvertError
from qwen3vl_convert.installed import named
from qwen3vl_convert.progress import STEP, Report
from qwen3vl_convert.quantities import duration, share, size

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

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


_HEADING, _MEASURED, _WAITING = "heading", "measured", "waiting"
"""Kinds of lines of progress: the step of several to which the lines below it belong, what is measured in bytes, and
what no number measures.
"""


@contextmanager
def _bar() -> Iterator[Report]:
    """A line for each stage: a bar of what is done, or, where no number measures it, one that moves, and the time."""
    from rich.console import Console as Rich
    from rich.progress import Progress

    with Progress(*_columns(), console=Rich(stderr=True)) as progress:
        bars = _Bars(progress)
        yield bars.report
        bars.end_waiting()


def _columns() -> "tuple[ProgressColumn, ...]":
    from rich import progress as of
    from rich.table import Column
    from rich.text import Text

    class ByKind(of.ProgressColumn):
        """What another column shows in a line, by its kind; nothing for other kinds, and never in two lines."""

        def __init__(self, shrinks: bool = False, **columns: of.ProgressColumn) -> None:
            super().__init__(Column(no_wrap=not shrinks))
            self.columns = columns

        def render(self, task: of.Task) -> Any:
            column = self.columns.get(task.fields["kind"])
            return Text("") if column is None else column.render(task)

    bar = of.BarColumn(20)
    return (
        of.TextColumn("{task.description:8}", table_column=Column(no_wrap=True)),
        ByKind(shrinks=True, measured=bar, waiting=bar),
        ByKind(measured=of.DownloadColumn()),
        ByKind(measured=of.TransferSpeedColumn()),
        ByKind(measured=of.TimeRemainingColumn(compact=True), waiting=of.TimeElapsedColumn()),
    )


class _Bars:
    """The lines of progress on a terminal. Stages of a step stand below its name."""

    def __init__(self, progress: "Progress") -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}
        self.waiting: list[TaskID] = []
        self.lock = threading.Lock()

    def report(self, stage: str, done: int, total: int) -> None:
        """What `Report` says; called by many threads."""
        with self.lock:
            if not (known := stage in self.tasks):
                self.tasks[stage] = self._line(stage, total)
            if total:
                self.progress.update(self.tasks[stage], completed=done)
            elif not known:
                self.waiting.append(self.tasks[stage])

    def _line(self, stage: str, total: int) -> "TaskID":
        self.end_waiting()
        step, colon, rest = stage.partition(STEP)
        if not colon:
            return self.progress.add_task(stage, total=total or None, kind=_MEASURED if total else _WAITING)
        if step not in self.tasks:
            self.tasks[step] = self.progress.add_task(step, total=1, completed=1, kind=_HEADING)
        kind = _MEASURED if total else _WAITING
        return self.progress.add_task(f"  {rest}", total=total or None, kind=kind)

    def end_waiting(self) -> None:
        """What no number measures is over when the next begins."""
        for task in self.waiting:
            self.progress.update(task, total=1, completed=1)
        self.waiting.clear()


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
