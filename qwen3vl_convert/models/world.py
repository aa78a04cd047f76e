"""Process groups, Megatron-Core's parallel state and seeds: what must stand before a model is built, and go after it.

with single_process(): ...                       # one process: no launcher, no ports
with parallel_world(ParallelLayout(tp=2)): ...   # under torchrun, on GPUs or, without one, on CPUs
"""

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.models.cpu import cpu_for_cuda
from qwen3vl_convert.models.launch import meeting_place
from qwen3vl_convert.parallel import ParallelLayout
from qwen3vl_convert.torchrun import launched, process, processes

_SEED_STEP = 100
"""Between pipeline stages, as Megatron-LM has it: their layers start from different random weights."""


@dataclass(frozen=True, slots=True)
class World:
    """Where this process stands: its rank among `size`, and how a model is cut over them.

    `cp`: context parallel size, which no checkpoint depends on and `ParallelLayout` hence does not know.
    """

    layout: ParallelLayout
    cp: int
    rank: int
    size: int

    def settings(self, *, sequence_parallel: bool = False) -> dict[str, Any]:
        """The fields of a TransformerConfig, or a provider, that must agree with the process groups.

        Interleaved pipelines send and receive one by one: in a batch of messages Megatron-Core takes those of two
        chunks for each other where a stage before is also the one after, in a pipeline of two, and gradients are
        wrong without a word.
        """
        layout = self.layout
        return {
            "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": layout.pp,
            "virtual_pipeline_model_parallel_size": self.vpp,
            "expert_model_parallel_size": layout.ep,
            "expert_tensor_parallel_size": layout.etp,
            "context_parallel_size": self.cp,
            "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
            "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
            "sequence_parallel": sequence_parallel,
            "overlap_p2p_comm": self.vpp is not None,
            "batch_p2p_comm": self.vpp is None,
        }

    @property
    def vpp(self) -> int | None:
        """Model chunks per rank; None without interleaving, which Megatron-Core tells from one chunk."""
        return self.layout.vpp if (self.layout.vpp or 1) > 1 else None

    @property
    def stages(self) -> list[int | None]:
        """The `vp_stage` of each model chunk of this rank: `[provider.provide(vp_stage=s) for s in world.stages]`."""
        return [None] if self.vpp is None else list(range(self.vpp))


def single_process(*, seed: int = 1234) -> AbstractContextManager[World]:
    """`parallel_world` for this process alone, whatever launched it. It needs no launcher and leaves nothing behind."""
    return parallel_world(rank=0, world_size=1, seed=seed)


@contextmanager
def parallel_world(
    layout: ParallelLayout | None = None,
    *,
    cp: int = 1,
    rank: int | None = None,
    world_size: int | None = None,
    store: Path | None = None,
    backend: str | None = None,
    seed: int = 1234,
    timeout: timedelta = timedelta(minutes=10),
) -> Iterator[World]:
    """Join the other processes, and have Megatron-Core cut models over them as `layout` says (default: not at all).

    Processes beyond those that the layout needs are data parallel. All of it is undone at the end, also after an
    exception; torch's random state is put back too.

    - `rank`, `world_size`: those that torchrun says, else one process.
    - `store`: a file that does not exist yet, where the processes meet; all must see it. Without one they meet where
      torchrun says.
    - `backend`: by default "nccl" on GPUs and "gloo" on CPUs. With "gloo", and where there is no GPU, all is done on
      the CPU (`cpu_for_cuda`).
    - `seed`: of random weights and dropout. The same on every rank; what each draws follows from its place.
    - `timeout`: how long a process waits for the others.

    Raises UsageError for sizes that do not fit together, and where torch.distributed is in use already.
    """
    world = _world(layout or ParallelLayout(), cp, rank, world_size)
    _check_unused()
    with ExitStack() as undo:
        _set_up(world, undo, _meeting(world, store, timeout), backend, timeout)
        seed_everything(seed)
        yield world
        if torch.distributed.is_initialized():  # unless taken down by hand
            torch.distributed.barrier()  # who leaves first would take the connections of the others with it


def lasting_world(
    layout: ParallelLayout, cp: int, timeout: timedelta = timedelta(minutes=10)
) -> tuple[World, ExitStack]:
    """`parallel_world` without seeds, and what undoes it: that waits for no other rank, since one may have died."""
    world = _world(layout, cp, None, None)
    _check_unused()
    with ExitStack() as undo:
        _set_up(world, undo, _meeting(world, None, timeout), None, timeout)
        return world, undo.pop_all()


def seed_everything(seed: int, **settings: Any) -> None:
    """Set the seeds of this rank, which follow from its place. `settings`: of `model_parallel_cuda_manual_seed`."""
    seed += _SEED_STEP * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, **settings)


# ---- what is asked for -----------------------------------------------------------------------------------------------


def _world(layout: ParallelLayout, cp: int, rank: int | None, size: int | None) -> World:
    if (rank is None) != (size is None):
        raise UsageError(f"rank={rank}, world_size={size}: expected both, or neither to take what torchrun says.")
    if rank is None or size is None:
        rank, size = process(), processes()
    if cp < 1:
        raise UsageError(f"cp={cp}: expected 1 or more.")
    unit = layout.pp * math.lcm(layout.tp * cp, layout.ep * layout.etp)
    if size < 1 or size % unit:
        raise UsageError(
            f"world_size={size}: expected a multiple of {unit} = pp * lcm(tp * cp, ep * etp) = {layout.pp} * "
            f"lcm({layout.tp} * {cp}, {layout.ep} * {layout.etp}). Start that many processes, or choose other sizes."
        )
    if not 0 <= rank < size:
        raise UsageError(f"rank={rank}: expected 0 to {size - 1}, as there are {size} processes.")
    return World(layout, cp, rank, size)


def _check_unused() -> None:
    if torch.distributed.is_initialized() or parallel_state.model_parallel_is_initialized():
        raise UsageError(
            "torch.distributed is in use already in this process. Models can be built without parallel_world then, if "
            "megatron.core.parallel_state is set up too; or leave, with destroy_process_group(), before entering."
        )


def _meeting(world: World, store: Path | None, timeout: timedelta) -> Any:
    """The store by which the processes find each other."""
    if world.size == 1:
        return torch.distributed.HashStore()  # type: ignore[attr-defined]
    if store is not None:
        return torch.distributed.FileStore(str(store), world.size)  # type: ignore[attr-defined]
    if launched():
        return meeting_place(world.rank, world.size, timeout)
    raise UsageError(
        f"world_size={world.size}: expected a place where the processes meet, found none. Start them with "
        f"`torchrun --nproc-per-node {world.size}`, or pass store=, a file that all see and that does not exist yet."
    )


# ---- set up ----------------------------------------------------------------------------------------------------------


def _set_up(world: World, undo: ExitStack, store: Any, backend: str | None, timeout: timedelta) -> None:
    """All but the seeds; what undoes it is left in `undo`."""
    on_gpu = torch.cuda.is_available() and backend != "gloo"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", world.rank % torch.cuda.device_count())))
    undo.enter_context(torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu else []))
    undo.enter_context(nullcontext() if on_gpu else cpu_for_cuda())
    undo.callback(_destroy)
    torch.distributed.init_process_group(
        backend or ("nccl" if on_gpu else "gloo"), store=store, rank=world.rank, world_size=world.size, timeout=timeout
    )
    initialize_megatron(world)


def initialize_megatron(world: World) -> None:
    """Megatron-Core's process groups, over processes that torch.distributed has already."""
    layout = world.layout
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=world.vpp,
        context_parallel_size=world.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )


def _destroy() -> None:
    get_cuda_rng_tracker().reset()
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
