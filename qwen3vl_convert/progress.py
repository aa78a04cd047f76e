"""How a function tells what it is doing, to whoever wants to show it."""

from collections.abc import Callable

Report = Callable[[str, int, int], None]
"""Called as report(stage, bytes done, bytes in all); with 0 and 0 when something begins that no number measures."""

STEP = ": "
"""Between a step among several and a stage of it."""


def begin(report: Report | None, stage: str) -> None:
    """Say what comes next and may take a while, before it does."""
    if report is not None:
        report(stage, 0, 0)


def within(report: Report | None, step: str) -> Report | None:
    """A report of the stages of one step among several: `convert back: fill`."""
    return report and (lambda stage, done, total: report(f"{step}{STEP}{stage}", done, total))
