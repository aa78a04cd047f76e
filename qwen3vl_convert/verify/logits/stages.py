"""Our model in the layout of a checkpoint: built, filled and run by all processes at once, as a trainer does it.

Each reads its own slices of the checkpoint. The prompts are the microbatches of one forward pass under Megatron-Core's
schedule for the layout, interleaved or not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import InputError, UsageError
from qwen3vl_convert.model import MegatronModel
from qwen3vl_convert.models.ranks import together
from qwen3vl_convert.models.restore import Restoring, plan_restoring
from qwen3vl_convert.models.world import World
from qwen3vl_convert.verify.logits.hollow import hollow_out, weightless
from qwen3vl_convert.verify.logits.pieces import TokenIds
from qwen3vl_convert.verify.logits.programs import fill, our_provider
from qwen3vl_convert.verify.logits.prompts import Prompt, our_arguments
from qwen3vl_convert.verify.logits.traffic import Mode


def logits_in_stages(
    ours: MegatronModel, world: World, mode: Mode, exact: bool, prompts: Sequence[Prompt]
) -> list[Tensor]:
    """The logits [S, vocab] of every prompt, in the first process; what others get is of no use."""
    chunks = _filled(ours, world, mode, exact)
    found = _run(chunks, _batch(prompts, world, ours.model.dims))
    shapes = [(one.input_ids.shape[1], ours.model.dims.vocab) for one in prompts]
    cut = [logits[0, :length, :vocab] for logits, (length, vocab) in zip(found, shapes, strict=False)]
    dtype = mode.dtypes(exact)[-1]
    return _to_first(world, cut, [torch.empty(shape, dtype=dtype, device=mode.device) for shape in shapes])


# ---- built and filled ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ChunkWeights:
    """The weights of one chunk of this process's model."""

    restoring: Restoring
    chunk: int

    def parameter(self, name: str) -> Tensor:
        return self.restoring.parameter(name, self.chunk)

    def expert(self, name: str, number: int) -> Tensor:
        return self.parameter(name)[number]


def _filled(ours: MegatronModel, world: World, mode: Mode, exact: bool) -> list[nn.Module]:
    """This process's chunks of the model, with their weights on the device."""
    dtype = mode.dtypes(exact)[-1]
    with together():
        chunks = _built(ours, world, dtype)
    restoring = plan_restoring(chunks, ours)
    with together():
        for number, chunk in enumerate(chunks):
            hollow_out(chunk, mode.device)
            fill(chunk, _ChunkWeights(restoring, number), mode.dtypes(exact), mode.device)
    return chunks


def _built(ours: MegatronModel, world: World, dtype: torch.dtype) -> list[nn.Module]:
    """On the meta device. Raises `UsageError` for a layout in which the model cannot run."""
    provider = our_provider(ours.model.dims, ours.model.padded_vocab, dtype, **world.settings())
    try:
        provider.finalize()  # for experts on tensor parallel ranks it turns on sequence parallelism
        with weightless(), _nothing_shared():
            return [provider.provide(vp_stage=stage).eval() for stage in world.stages]
    except ValueError as error:
        raise UsageError(
            f"{ours.checkpoint.folder}: was written as {world.layout}, in which the model cannot be run: {error} "
            f"Run it without torchrun, in one process."
        ) from error


@contextmanager
def _nothing_shared() -> Iterator[None]:
    """When it builds a tied model Megatron-Core sends the embedding from the first stage to the last; there is none."""
    original = LanguageModule._is_in_embd_group
    LanguageModule._is_in_embd_group = lambda self: False
    try:
        yield
    finally:
        LanguageModule._is_in_embd_group = original


# ---- run -------------------------------------------------------------------------------------------------------------


def _batch(prompts: Sequence[Prompt], world: World, dims: Dims) -> list[Prompt]:
    """Microbatches as pipelines want them: all of one length, which sequence parallel ranks can share, and as many as
    fill interleaved stages. Prompts are made longer at their end, where no token of theirs looks.
    """
    layout, filler = world.layout, TokenIds.from_dims(dims).words[0]
    length = -(-max(one.input_ids.shape[1] for one in prompts) // layout.tp) * layout.tp
    found = []
    for one in prompts:
        ids = one.input_ids.new_full((1, length), filler)
        ids[:, : one.input_ids.shape[1]] = one.input_ids
        found.append(replace(one, input_ids=ids, attention_mask=torch.ones_like(ids)))
    return found + found[-1:] * (-len(found) % layout.pp)


def _run(chunks: Sequence[nn.Module], batch: Sequence[Prompt]) -> list[Tensor]:
    """The logits [1, S, padded vocab] of every microbatch on the last stage; on others nothing."""
    alone = len(chunks) == 1
    feeds = [iter(batch) for _ in chunks]
    schedule: Callable[..., list[Tensor]] = get_forward_backward_func()
    return schedule(
        forward_step_func=_step,
        data_iterator=feeds[0] if alone else feeds,
        model=chunks[0] if alone else list(chunks),
        num_microbatches=len(batch),
        seq_length=batch[0].input_ids.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _step(feed: Iterator[Prompt], chunk: nn.Module) -> tuple[Tensor, Callable[..., Tensor]]:
    try:
        output = chunk(**our_arguments(next(feed)), runtime_gather_output=True)
    except ValueError as error:
        raise InputError(f"The Megatron model, with the settings that the checkpoint states: {error}") from error
    return output, lambda output, non_loss_data: output.clone()  # its memory goes when it is sent on


def _to_first(world: World, found: Sequence[Tensor], places: Sequence[Tensor]) -> list[Tensor]:
    """Send what the last stage found to the first process, which puts it into `places`, unless it found it itself."""
    last = world.size - world.size // world.layout.pp
    if world.rank == 0 and last > 0:
        for place in places:
            dist.recv(place, last)
        return list(places)
    if world.rank == last > 0:
        for one in found:
            dist.send(one.contiguous(), 0)
    return list(found)
