"""Processes that torchrun started: whether this is one of several, and what is done once for all of them.

Neither torch nor Megatron-Core is imported by a process that is alone.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

Found = TypeVar("Found")

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher leaves in the environment."""
_PATIENCE = timedelta(days=1)
"""Of the ranks that wait: the largest models take an hour on a slow disk."""


def launched() -> bool:
    """Whether torchrun, or what does as it does, started this process."""
    return all(name in os.environ for name in LAUNCHED)


def once(job: Callable[[], Found]) -> Found:
    """What `job` gives, done by rank 0 while the others wait; all return it, or raise what it raised.

    For work on files that one process does for a whole job. A process that is alone just does it.
    """
    if not _together() and not (launched() and int(os.environ["WORLD_SIZE"]) > 1):
        return job()
    import torch.distributed as dist

    with _meeting() as group:
        outcome = [_tried(job) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(outcome, src=0, group=group)
    found, error = outcome[0]  # type: ignore[misc]  # every rank has rank 0's now
    if error is not None:
        raise error
    return found  # type: ignore[no-any-return]


def _together() -> bool:
    """Whether process groups are up; who has not imported torch has none."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def _meeting() -> Iterator[Any]:
    """A group of all ranks in which they can wait for long, whatever the timeout of the others is."""
    import torch.distributed as dist

    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group(None if own else group)


def _tried(job: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return job(), None
    except Exception as error:  # noqa: BLE001  all ranks raise it
        return None, error
