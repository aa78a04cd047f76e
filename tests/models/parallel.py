"""Real Megatron-Core on CPUs at any parallel layout, to train in: processes that do one job after another.

    logits = run_ranks(ParallelLayout(tp=2), parallel_rank.logits, case)    # what the function returned on each rank
    tensors = assemble([step.grads for step in steps])                      # {key: whole tensor}

A job is a function of `parallel_rank`, called on each rank inside of a `parallel_world`. Processes start when they are
first needed and stay for later jobs, each of which has process groups of its own. This half runs in the test and never
imports megatron; `parallel_rank` is the half that runs in the processes.
"""

import atexit
import io
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oracles.megatron_world import Shard
from qwen3vl_convert import ParallelLayout

# What takes seconds to import is imported once, in a server process that ranks are forked from.
PRELOAD = [
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.pipeline_parallel",
    "qwen3vl_convert.models.provider",
    "qwen3vl_convert.models.world",
    "frozen",
]
PATIENCE = 120.0
"""Seconds that a job may take; after the first failure the other ranks have GRACE."""
GRACE = 5.0


@dataclass(frozen=True)
class Job:
    """One rank's part of a job."""

    layout: ParallelLayout | None
    cp: int
    rank: int
    size: int
    store: Path
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Failure:
    """What a rank raised, as it would be printed, and when: the first causes the others."""

    text: str
    when: float


class RankError(Exception):
    """A rank raised, died or did not answer. The message has its traceback."""


class Worker:
    """A process that does jobs; any rank of any world."""

    def __init__(self) -> None:
        from models.parallel_rank import rank_main  # its module level imports nothing of megatron

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=rank_main, args=(other_end,))  # no daemon: those may not start others
        self.process.start()
        other_end.close()

    def send(self, job: Job) -> None:
        self.connection.send(job)

    def receive(self) -> Any:
        """The result, or a Failure."""
        try:
            return torch.load(io.BytesIO(self.connection.recv_bytes()), weights_only=False)
        except EOFError:
            self.process.join()
            return Failure(f"the process ended with exit code {self.process.exitcode}", time.monotonic())

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


_workers: list[Worker] = []
atexit.register(lambda: stop_ranks())  # before multiprocessing waits for them


def run_ranks(
    layout: ParallelLayout | None,
    function: Callable[..., Any],
    *arguments: Any,
    size: int | None = None,
    cp: int = 1,
) -> list[Any]:
    """`function(world, *arguments)` on every rank of a new world; what each returned. Raises RankError.

    `size`: of the world, if more than the layout needs. No layout: `function(rank, size, *arguments)` and no world.
    """
    size = size or (layout.world if layout else 1)
    while len(_workers) < size:
        _workers.append(Worker())
    workers = _workers[:size]
    with tempfile.TemporaryDirectory() as folder:
        for rank, worker in enumerate(workers):
            worker.send(Job(layout, cp, rank, size, Path(folder) / "store", function, arguments))
        results = _collect(workers)
    failures = {rank: result for rank, result in results.items() if isinstance(result, Failure)}
    if failures or len(results) < size:
        if len(results) < size or not all(worker.process.is_alive() for worker in workers):
            stop_ranks()
        raise RankError(_told(function, failures, set(range(size)) - results.keys()))
    return [results[rank] for rank in range(size)]


def stop_ranks() -> None:
    """End the processes; the next job starts new ones."""
    while _workers:
        _workers.pop().stop()


def _collect(workers: Sequence[Worker]) -> dict[int, Any]:
    """What ranks answered, until all have, or time is up."""
    waiting: dict[Any, int] = {worker.connection: rank for rank, worker in enumerate(workers)}
    results: dict[int, Any] = {}
    deadline = time.monotonic() + PATIENCE
    while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            results[rank] = workers[rank].receive()
            if isinstance(results[rank], Failure):
                deadline = min(deadline, time.monotonic() + GRACE)
    return results


def _told(function: Callable[..., Any], failures: dict[int, Failure], silent: set[int]) -> str:
    told = [f"rank {rank}: {failure.text}" for rank, failure in sorted(failures.items(), key=lambda f: f[1].when)]
    if silent and not told:
        told = [f"ranks {sorted(silent)} did not answer within {PATIENCE:.0f} s"]
    return "\n".join([f"{function.__name__} failed.", *told])


# ---- tensors ---------------------------------------------------------------------------------------------------------


def assemble(ranks: Sequence[Sequence[Shard]], tolerance: float = 0.0) -> dict[str, Tensor]:
    """The global tensors of what each rank holds.

    Every element must be held by some rank, and by all that hold it within `tolerance` of the largest in its tensor.
    """
    tensors: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    for shard in itertools.chain(*ranks):
        tensor = tensors.setdefault(shard.key, torch.zeros(shard.global_shape, dtype=shard.data.dtype))
        seen = held.setdefault(shard.key, torch.zeros(shard.global_shape, dtype=torch.bool))
        assert tensor.shape == shard.global_shape, f"{shard.key}: ranks disagree on its shape"
        again = seen[shard.where]
        apart = (tensor[shard.where] - shard.data)[again]
        assert not apart.numel() or apart.abs().max() <= tolerance * shard.data.abs().max(), f"{shard.key}: replicas"
        tensor[shard.where] = shard.data
        seen[shard.where] = True
    incomplete = [key for key, seen in held.items() if not seen.all()]
    assert not incomplete, f"no rank holds all of {incomplete}"
    return tensors


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Per name, the largest difference beside the largest magnitude expected; inf where only one has the name."""
    return {
        name: distance(found[name], expected[name]) if name in found and name in expected else float("inf")
        for name in sorted(found.keys() | expected.keys())
    }


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference beside the largest magnitude expected: 0 where both are all zeros, nan for nan."""
    if found.shape != expected.shape:
        return float("inf")
    apart = (found - expected).abs().max().item()
    return apart / expected.abs().max().item() if apart else apart
