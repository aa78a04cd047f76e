"""What scripts for Megatron-Bridge ask a provider for: the process groups, and the model of this rank in a list."""

import atexit
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.models.cpu import cpu_for_cuda
from qwen3vl_convert.models.cut import layout_of, stages_of
from qwen3vl_convert.models.world import World, initialize_megatron, lasting_world, seed_everything

Hook = Callable[[list[Any]], list[Any] | None]

_UNTIL_THE_END = ExitStack()
"""Process groups that nobody else takes down."""


@atexit.register
def _take_down() -> None:
    """Not where the program failed: other ranks may wait for this one, and are told by its end. NCCL would not let it
    go without them.
    """
    if getattr(sys, "last_value", None) is None:
        _UNTIL_THE_END.close()


class Distributed:
    """For a provider: methods of Megatron-Bridge's that set processes up, and build what this rank holds."""

    def initialize_model_parallel(self, seed: int | None = None, seed_kwargs: dict[str, Any] | None = None) -> None:
        """Set up process groups of the provider's parallel sizes, until the process ends. On a machine without GPU all
        is done on the CPU; `parallel_world` does the same for a part of a program.

        Where `torch.distributed` is in use already, its processes are taken.
        """
        settings: Any = self
        if not torch.distributed.is_initialized():
            world, undo = lasting_world(layout_of(settings), settings.context_parallel_size)
            _UNTIL_THE_END.enter_context(undo)
            for name, value in world.settings(sequence_parallel=settings.sequence_parallel).items():
                setattr(settings, name, value)
            seed_everything(1234 if seed is None else seed, **(seed_kwargs or {}))
            return
        if not torch.cuda.is_available():
            _UNTIL_THE_END.enter_context(cpu_for_cuda())
        ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        initialize_megatron(World(layout_of(settings), settings.context_parallel_size, *ranks))
        if seed is not None:
            seed_everything(seed, **(seed_kwargs or {}))

    def register_pre_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        """Have a function called with the chunks that `provide_distributed_model` builds, before they are wrapped."""
        hooks = self._hooks()
        hooks.insert(0 if prepend else len(hooks), hook)

    def provide_distributed_model(
        self, ddp_config: Any = None, *, wrap_with_ddp: bool = True, use_cpu_initialization: Any = None, **settings: Any
    ) -> list[Any]:
        """This rank's chunks of the model: one, or one for each stage of its virtual pipeline; filled, if the bridge
        has weights (see `to_megatron_provider`), and wrapped for data parallel training with `ddp_config`.

        Process groups are set up if there are none. Raises UsageError for settings of other wrappers.
        """
        if settings:
            raise UsageError(
                f"provide_distributed_model: {', '.join(settings)}: expected wrap_with_ddp and ddp_config, and nothing "
                f"else: there are no other wrappers here. Set what the model is like on the provider."
            )
        if wrap_with_ddp and ddp_config is None:
            raise UsageError("provide_distributed_model: pass ddp_config, or wrap_with_ddp=False.")
        if not parallel_state.model_parallel_is_initialized():
            self.initialize_model_parallel(seed=0)
        chunks = [type(self).provide(self, vp_stage=stage) for stage in stages_of(self)]  # type: ignore[attr-defined]
        for hook in self._hooks():
            chunks = hook(chunks) or chunks
        return [DistributedDataParallel(self, ddp_config, chunk) for chunk in chunks] if wrap_with_ddp else chunks

    def _hooks(self) -> list[Hook]:
        found: list[Hook] = self.__dict__.setdefault("_pre_wrap_hooks", [])
        return found
