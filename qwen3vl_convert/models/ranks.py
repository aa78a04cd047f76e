"""Steps that all ranks take at once: what fails on one is raised on all, so that none waits for another for ever."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from qwen3vl_convert.errors import ConvertError


def rank() -> int:
    """This process among those that hold the model; 0 where there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes hold the model."""
    return dist.get_world_size() if dist.is_initialized() else 1


def everyones(value: Any) -> list[Any]:
    """What each rank gave, by rank."""
    found: list[Any] = [value] * ranks()
    if ranks() > 1:
        dist.all_gather_object(found, value)
    return found


@contextmanager
def together() -> Iterator[None]:
    """A step that succeeds on all ranks or on none: an exception on one is raised on all.

    Without it the others would wait for ever in the next collective call.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:  # noqa: BLE001  also Ctrl-C: the others must hear of it
        failure = error
    if not _on_any_rank(failure is not None):
        return
    said = failure if isinstance(failure, ConvertError) or failure is None else ConvertError(repr(failure))
    theirs = everyones(said)
    if failure is not None:
        raise failure
    number, first = next((number, said) for number, said in enumerate(theirs) if said is not None)
    raise type(first)(f"rank {number}: {first}")


def _on_any_rank(here: bool) -> bool:
    if ranks() == 1:
        return here
    flag = torch.tensor([int(here)], device=meeting_device())
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def meeting_device(near: torch.device | None = None) -> torch.device:
    """Where tensors must lie to be summed over the ranks: `near`, if the ranks can speak from there.

    NCCL speaks for GPUs only; gloo is used from the CPU, whatever it says of GPUs.
    """
    near = near or torch.device("cpu")
    if ranks() == 1:
        return near
    backends = dict(one.split(":") for one in dist.get_backend_config().split(","))
    if near.type in backends and (near.type == "cpu" or backends[near.type] != "gloo"):
        return near
    return torch.device("cpu") if "cpu" in backends else torch.device("cuda", torch.cuda.current_device())
