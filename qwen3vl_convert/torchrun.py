"""What torchrun, or a launcher that does as it does, tells the processes that it starts. Nothing is imported for it."""

import os

_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Schedulers of clusters set some of them for a process that is alone, too; a launcher sets all."""


def launched() -> bool:
    """Whether this process was started so."""
    return all(name in os.environ for name in _TOLD)


def processes() -> int:
    """How many were started together: 1 for a process that is alone."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def process() -> int:
    """This one's number among them, from 0."""
    return int(os.environ["RANK"]) if launched() else 0
