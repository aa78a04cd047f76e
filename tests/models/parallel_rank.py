"""What runs in the processes of `parallel`: the jobs, as functions of the world that they find themselves in.

Nothing of megatron is imported before a job runs: the tests import this module to name its functions.
"""

import io
import logging
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from models.parallel import PATIENCE, Failure, Job
from oracles.megatron_world import Keys, Load, Shard
from qwen3vl_convert import Dims

TIMEOUT = timedelta(seconds=PATIENCE)
PLAIN = Keys(prefix="", te_norm=False)
"""The real model names its keys itself."""


def rank_main(connection: Connection) -> None:
    """Entry point of a process: jobs come and results go, until the other end is closed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        answer = io.BytesIO()
        torch.save(carry_out(job), answer)
        connection.send_bytes(answer.getvalue())


def carry_out(job: Job) -> Any:
    """What the function returns in the job's world (or where it has none, of itself), or the Failure."""
    from qwen3vl_convert.models.world import parallel_world

    failed: list[float] = []
    try:
        if job.layout is None:
            return job.function(job.rank, job.size, *job.arguments)
        with parallel_world(
            job.layout, cp=job.cp, rank=job.rank, world_size=job.size, store=job.store, timeout=TIMEOUT
        ) as world:
            try:
                return job.function(world, *job.arguments)
            except BaseException:
                failed.append(time.monotonic())
                raise
    except BaseException:  # noqa: BLE001  CheckpointException is no Exception
        return Failure(traceback.format_exc(), (failed or [time.monotonic()])[0])


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, where its weights are, and the microbatches that it is trained with.

    checkpoint: an `iter_*` folder. settings: fields of the provider. batch: keyword arguments of the model, with
    `labels` [B, S], of which negative ones do not count.
    """

    dims: Dims
    checkpoint: Path
    batch: tuple[dict[str, Tensor], ...] = ()
    sequence_parallel: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def build(world: Any, case: Case) -> list[Any]:
    """This rank's part of the model, one per virtual stage, in float32, with NaN in every weight."""
    from models.build import provider

    settings = world.settings(sequence_parallel=case.sequence_parallel) | case.settings
    made = provider(case.dims, **settings)
    chunks = [made.provide(vp_stage=stage) for stage in world.stages]
    with torch.no_grad():
        for parameter in parameters(chunks):
            parameter.fill_(float("nan"))
    return chunks


def built(world: Any, case: Case) -> list[Any]:
    """With the weights of the checkpoint, which Megatron-Core loads strictly."""
    from oracles.megatron_rank import load

    chunks = build(world, case)
    load(Load(case.checkpoint, keys=PLAIN), chunks)
    return chunks


def parameters(chunks: Sequence[Any]) -> Iterator[torch.nn.Parameter]:
    for chunk in chunks:
        yield from chunk.parameters()


def shards(chunks: list[Any]) -> list[Shard]:
    """What this rank's parameters hold, under the keys of a checkpoint."""
    from oracles.megatron_rank import shard_of, stored_tensors

    return [shard_of(tensor) for tensor in stored_tensors(chunks, PLAIN)]


# ---- jobs: the model -------------------------------------------------------------------------------------------------


def saved_again(world: Any, case: Case, folder: Path) -> None:
    """Load, and have Megatron-Core save what the model holds, as `Save` does."""
    from megatron.core import dist_checkpointing

    from oracles.megatron_rank import own_writer, results_in_this_process, sharded_state

    chunks = built(world, case)
    if world.rank == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    state = {"checkpoint_version": 3.0, "iteration": 0, **sharded_state(chunks, PLAIN)}
    with results_in_this_process():
        dist_checkpointing.save(state, str(folder), content_metadata=dict(PLAIN.metadata), **own_writer())


def refused(world: Any, case: Case) -> str:
    """What building the model raises on this rank; empty where it builds."""
    try:
        build(world, case)
    except ValueError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Step:
    """One rank's view of a training step. Losses [B, S] and logits [B, S, vocab] per microbatch, by its number: on the
    last pipeline stage, those of its data parallel share. Gradients of all that it holds.
    """

    losses: dict[int, Tensor]
    logits: dict[int, Tensor]
    grads: list[Shard]
    norm: float
    """Of all gradients of the model, as Megatron-Core's optimizer finds it."""


def training_step(world: Any, case: Case) -> Step:
    """Load, look at the logits, and do one step as Megatron-LM does."""
    return step_of(built(world, case), case.batch)


def unfinished_step(world: Any, case: Case) -> Step:
    """The same, and the ranks do not tell each other of their gradients."""
    return step_of(built(world, case), case.batch, finalize=False)


def step_of(chunks: list[Any], batch: Sequence[dict[str, Tensor]], finalize: bool = True) -> Step:
    """Forward and backward of all microbatches under Megatron-Core's schedule for this layout, and the optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.parallel_state import get_data_parallel_rank, get_data_parallel_world_size

    config = chunks[0].config
    share = range(len(batch))[get_data_parallel_rank() :: get_data_parallel_world_size()]
    logits = pipeline(chunks, batch, share, logits_of, forward_only=True, collect_non_loss_data=True)
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="sgd", lr=1e-3, clip_grad=0.0), wrapped)
    config.finalize_model_grads_func = finalize_model_grads if finalize else None
    losses = pipeline(wrapped, batch, share, loss_of, forward_only=False)
    grads = gradients(chunks)
    optimizer.step()
    return Step(
        dict(zip(share, losses, strict=False)), dict(zip(share, logits, strict=False)), grads, optimizer.get_grad_norm()
    )


Forward = Callable[[Any, dict[str, Tensor]], tuple[Tensor, Callable[..., Any]]]


def pipeline(chunks: list[Any], batch: Any, share: Sequence[int], forward: Forward, **how: bool) -> list[Any]:
    """What the last stage collects of each microbatch of this data parallel rank's share; nothing on other stages."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config = chunks[0].config
    # Where stages do not agree on lengths beforehand, these are not read.
    length = max(microbatch["input_ids"].shape[1] for microbatch in batch)
    feeds = [iter([batch[number] for number in share]) for _ in chunks]
    alone = config.virtual_pipeline_model_parallel_size is None
    collected = get_forward_backward_func()(
        forward_step_func=lambda feed, chunk: forward(chunk, next(feed)),
        data_iterator=feeds[0] if alone else feeds,
        model=chunks[0] if alone else chunks,
        num_microbatches=len(share),
        seq_length=length,
        micro_batch_size=len(batch[0]["input_ids"]),
        **how,
    )
    return list(collected)


def logits_of(chunk: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, Callable[..., Any]]:
    inputs = {name: value for name, value in microbatch.items() if name != "labels"}
    return chunk(**inputs, runtime_gather_output=True), lambda output, non_loss_data: output.clone()


def loss_of(chunk: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, Callable[..., Any]]:
    labels = microbatch["labels"]
    counts = labels >= 0
    output = chunk(**{**microbatch, "labels": labels.clamp(min=0)})
    return output, partial(mean_loss, counts)


def mean_loss(counts: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """(the loss of a microbatch, what is collected of it)."""
    return (losses * counts).sum() / counts.sum(), (losses * counts).detach().clone()


def gradients(chunks: list[Any]) -> list[Shard]:
    """`main_grad` of every parameter, under the keys of a checkpoint."""
    weights = [parameter.data for parameter in parameters(chunks)]
    for parameter in parameters(chunks):
        parameter.data = parameter.main_grad  # type: ignore[attr-defined]
    found = shards(chunks)
    for parameter, weight in zip(parameters(chunks), weights, strict=True):
        parameter.data = weight
    return found


# ---- jobs: the world -------------------------------------------------------------------------------------------------


def place(world: Any) -> dict[str, int]:
    """Where this rank stands among those of each kind, as Megatron-Core has it."""
    from megatron.core import parallel_state

    assert torch.distributed.get_rank() == world.rank
    assert torch.distributed.get_world_size() == world.size
    return {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
        "etp": parallel_state.get_expert_tensor_parallel_rank(),
        "cp": parallel_state.get_context_parallel_rank(),
        "dp": parallel_state.get_data_parallel_rank(),
    }


def draws(world: Any) -> dict[str, Tensor]:
    """Random numbers of each of Megatron-Core's streams, two times each."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    found = {"default": torch.rand(4), "default again": torch.rand(4)}
    for again in ("", " again"):
        for name in get_cuda_rng_tracker().get_states():
            with get_cuda_rng_tracker().fork(name):
                found[name + again] = torch.rand(4)
    return found


def gathered(world: Any, lengths: list[int]) -> list[Tensor]:
    """What every rank gave: as many rows as are its own, of its number."""
    mine = torch.full((lengths[world.rank], 3), float(world.rank))
    pieces = [mine.new_empty(length, 3) for length in lengths]
    torch.distributed.all_gather(pieces, mine)
    return pieces


def fails_on(world: Any, rank: int) -> int:
    """One rank raises while the others wait for it."""
    if world.rank == rank:
        raise ArithmeticError("a planted fault")
    torch.distributed.barrier()
    return int(world.rank)


def dies_on(world: Any, rank: int) -> None:
    """One rank ends without a word."""
    if world.rank == rank:
        os._exit(3)
    torch.distributed.barrier()


def launched(rank: int, size: int, port: int) -> tuple[str, int, float]:
    """As under torchrun: (layout, rank, sum over ranks of 1 + rank) in the world that the environment tells of."""
    from qwen3vl_convert import ParallelLayout
    from qwen3vl_convert.models.world import parallel_world

    told = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = mock.patch.dict(os.environ, {name: str(value) for name, value in told.items()})
    with environment, parallel_world(ParallelLayout(tp=size)) as world:
        total = torch.tensor(1.0 + world.rank)
        torch.distributed.all_reduce(total)
        return str(world.layout), world.rank, total.item()
