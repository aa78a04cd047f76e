"""Megatron-Core on a machine without a GPU: stand-ins for the calls that it makes of a GPU whatever it was told."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

_SAYS_CUDA = (
    "megatron.core.pipeline_parallel.schedules",  # the count of tokens
    "megatron.core.transformer.utils",  # causal masks of its own attention
    "megatron.core.optimizer.optimizer",  # the scale of the loss
    "megatron.core.optimizer.clip_grads",  # norms of gradients
    "megatron.core.utils",  # the same, computed without Apex
)
"""Modules of Megatron-Core that write `device="cuda"` on the way of every training step."""


class _StandIn(NamedTuple):
    """What stands for `name` of `place` meanwhile."""

    place: Any
    name: str
    value: Any


_ABSENT = object()
_originals: list[_StandIn] = []
_entered = 0


@contextmanager
def cpu_for_cuda() -> Iterator[None]:
    """Within it Megatron-Core builds, trains, saves and loads models on the CPU, in processes that gloo connects.

    It may be entered again inside of itself; when the last leaves, everything is as it was. What it stands in for:

    - `torch.cuda.current_device` is the CPU: Megatron-Core allocates there what it receives, gathers and caches;
    - `torch.zeros`, `ones` and `tensor` take `device="cuda"` for the CPU, as the modules of Megatron-Core see them
      that write it. torch itself keeps its own, since libraries compare them (transformers' loading does);
    - `Tensor.cuda` is the tensor: embeddings tied across pipeline stages, optimizer states, checkpoints;
    - `torch.cuda.synchronize` does nothing: after messages between stages, before a checkpoint is written;
    - `torch.cuda.current_stream` and the stream of the all-to-all dispatcher of a MoE are one on which all is done
      already; gradient buffers ask for it too (0.19). That dispatcher's counts are numpy arrays, as it has them of a
      GPU (`maybe_move_tensor_to_cpu`), since `all_to_all_single` takes no tensors for sizes;
    - `torch.cuda.manual_seed`, `torch.cuda.get_rng_state` (under both of its names) and Megatron-Core's
      `_set_cuda_rng_state` act on the CPU's generator, from which dropout draws here: seeds of tensor parallel ranks,
      activation recompute;
    - `torch.distributed.all_gather` of pieces of unequal length, which gloo refuses, gathers them padded: tokens of
      experts that are cut by expert tensor parallelism. All else that Megatron-Core asks of NCCL, gloo has too;
    - `moe_utils.te_general_gemm` is None, as where Transformer Engine is missing; 0.16 forgets to say so.

    Out of reach without a GPU all the same: clipping gradients in `megatron.core.optimizer` and its distributed
    optimizer, which ask for the type of a CUDA tensor (set `clip_grad=0.0`), fused kernels, CUDA graphs.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _entered
    if not _entered:
        for place, name, value in _stand_ins():
            _originals.append(_StandIn(place, name, vars(place).get(name, _ABSENT)))
            setattr(place, name, value)
    _entered += 1


def _leave() -> None:
    global _entered
    _entered -= 1
    while not _entered and _originals:
        place, name, original = _originals.pop()
        if original is _ABSENT:
            delattr(place, name)
        else:
            setattr(place, name, original)


def _stand_ins() -> list[_StandIn]:
    torch_on_cpu = _torch_on_cpu()
    return [
        *(_StandIn(import_module(name), "torch", torch_on_cpu) for name in _SAYS_CUDA),
        _StandIn(torch.cuda, "current_device", lambda: "cpu"),
        _StandIn(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
        _StandIn(torch.cuda, "synchronize", lambda device=None: None),
        _StandIn(torch.cuda, "current_stream", lambda device=None: _STREAM),
        _StandIn(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", _STREAM),
        _StandIn(token_dispatcher, "maybe_move_tensor_to_cpu", _as_from_gpu),
        _StandIn(torch.cuda, "manual_seed", torch.manual_seed),
        _StandIn(torch.cuda, "get_rng_state", _rng_state),
        _StandIn(torch.cuda.random, "get_rng_state", _rng_state),
        _StandIn(megatron_random, "_set_cuda_rng_state", _set_rng_state),
        _StandIn(torch.distributed, "all_gather", _padding(torch.distributed.all_gather)),
        _StandIn(moe_utils, "te_general_gemm", None),
    ]


# ---- devices ---------------------------------------------------------------------------------------------------------


class _View(ModuleType):
    """A module that is another one but for what is set on it."""

    def __init__(self, whole: ModuleType, **own: Any) -> None:
        super().__init__(whole.__name__)
        vars(self).update(own, _whole=whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def _torch_on_cpu() -> ModuleType:
    return _View(torch, zeros=_on_cpu(torch.zeros), ones=_on_cpu(torch.ones), tensor=_on_cpu(torch.tensor))


def _on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def on_cpu(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return make(*args, device="cpu" if device == "cuda" else device, **kwargs)

    return on_cpu


# ---- streams ---------------------------------------------------------------------------------------------------------


class _Stream:
    """A stream, and its events, where all that was asked for is done before the call returns."""

    def wait_stream(self, stream: Any) -> None:
        """There is nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """There is nothing to wait for."""

    def record_event(self, event: Any = None) -> "_Stream":
        """An event that has happened."""
        return self

    def synchronize(self) -> None:
        """There is nothing to wait for."""


_STREAM = _Stream()


def _as_from_gpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


# ---- random states ---------------------------------------------------------------------------------------------------


def _rng_state(device: Any = None) -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


# ---- collectives -----------------------------------------------------------------------------------------------------


def _padding(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """`all_gather` for pieces that differ in length too. Each rank knows all lengths, so all ranks choose alike."""

    def gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        lengths = [len(piece) if piece.dim() else 1 for piece in tensor_list]
        if async_op or len(set(lengths)) == 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        padded = [piece.new_empty(max(lengths), *piece.shape[1:]) for piece in tensor_list]
        filler = tensor.new_zeros(max(lengths) - len(tensor), *tensor.shape[1:])
        all_gather(padded, torch.cat((tensor, filler)), group=group)
        for piece, longer in zip(tensor_list, padded, strict=True):
            piece.copy_(longer[: len(piece)])
        return None

    return gather
