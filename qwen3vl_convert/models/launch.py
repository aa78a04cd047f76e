"""Processes that torchrun started: where they meet, and what is done once for all of them.

Neither torch nor Megatron-Core is imported by a process that is alone.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

from qwen3vl_convert.installed import need
from qwen3vl_convert.torchrun import process, processes

Found = TypeVar("Found")

_PATIENCE = timedelta(days=1)
"""Of the ranks that wait: the largest models take an hour on a slow disk."""


def once(job: Callable[[], Found]) -> Found:
    """What `job` gives, done by rank 0 while the others wait; all return it, or raise what it raised.

    For work on files that one process does for a whole job. A process that is alone just does it.
    """
    if not _together() and processes() == 1:
        return job()
    need("A conversion under torchrun", "torch")
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
        rank, size = process(), processes()
        store = meeting_place(rank, size, _PATIENCE)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
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


# ---- where they meet -------------------------------------------------------------------------------------------------


def meeting_place(rank: int, size: int, timeout: timedelta) -> Any:
    """A new store for `init_process_group`; the same for all ranks, which must come equally often.

    torchrun keeps one store for the whole job. What one group of processes left there another would take for its own,
    and look for processes where they no longer listen: every meeting has names of its own.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    store, meetings = _launcher_store(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], rank, size)
    store.set_timeout(timeout)
    return PrefixStore(f"qwen3vl-convert-{next(meetings)}", store)


@cache
def _launcher_store(address: str, port: str, rank: int, size: int) -> tuple[Any, Iterator[int]]:
    """The store of the whole job, and the numbers of meetings there.

    Kept to the end: where rank 0 serves it, not torchrun, the others are at the next meeting while it leaves the last.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", rank, size))
    return store, count()
