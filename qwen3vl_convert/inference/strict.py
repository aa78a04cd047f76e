"""Weights into the model, each exactly once in its shape: anything else is an error that names tensors."""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import (
    DuplicateTensors,
    InputError,
    MisshapenTensor,
    MissingTensors,
    UnknownTensors,
    UnsupportedFormat,
    listing,
)
from qwen3vl_convert.huggingface.foreign import canonical
from qwen3vl_convert.model import EMBEDDING, OUTPUT

if TYPE_CHECKING:
    from qwen3vl_convert.inference.layers import Slot
    from qwen3vl_convert.inference.model import Qwen3VLForConditionalGeneration

_COMPUTED = re.compile(r".*rotary(_pos)?_emb\.inv_freq")
"""Names of what old releases of transformers saved and every model computes."""
_STACK = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")


def load_into(model: "Qwen3VLForConditionalGeneration", weights: Iterable[tuple[str, Tensor]]) -> None:
    """Put every tensor where the model's `slots()` say. Names are the Hub's, with `model.` before them or without.

    Stacks of experts are taken too, as published or as transformers 5 has them in memory. A tied model takes an output
    layer that equals its embedding. Raises MissingTensors, UnknownTensors, DuplicateTensors or MisshapenTensor, naming
    tensors, or UnsupportedFormat for quantised ones; a model that was not loaded whole is not to be used.
    """
    slots: dict[str, Slot] = dict(model.slots())
    given: set[str] = set()
    spare: Tensor | None = None
    for name, tensor in _apart(weights, model.config):
        if name in given:
            raise DuplicateTensors(f"{name} is given twice. Leave out the file or the tensor that is not this model's.")
        given.add(name)
        if name in slots:
            _put(name, slots[name], tensor, model.device)
        elif name == OUTPUT[1]:  # only a tied model has no slot for it
            spare = tensor
        del tensor  # before the next one is read
    _check_given(slots.keys(), given if spare is None else given - {OUTPUT[1]})
    if spare is not None:
        _check_spare(spare, model.get_input_embeddings().weight)


def _apart(weights: Iterable[tuple[str, Tensor]], dims: Dims) -> Iterator[tuple[str, Tensor]]:
    """Under the names that the model has, and experts one by one."""
    for given, tensor in weights:
        name = canonical(given)
        stack = _STACK.fullmatch(name) if dims.moe else None
        if stack is not None:
            yield from _experts(name, stack, tensor, dims)
        elif not _COMPUTED.fullmatch(name):
            yield name, tensor
        del tensor


def _experts(name: str, stack: re.Match[str], tensor: Tensor, dims: Dims) -> Iterator[tuple[str, Tensor]]:
    """The experts of a stack [E, rows, columns], or [E, columns, rows] as published."""
    rows, columns = (2 * dims.expert_ffn, dims.hidden) if stack[2] == "gate_up_proj" else (dims.hidden, dims.expert_ffn)
    ours, published = (dims.experts, rows, columns), (dims.experts, columns, rows)
    if tuple(tensor.shape) not in (ours, published):
        raise MisshapenTensor(
            f"{name}: expected {published}, or {ours} as transformers 5 has it in memory; found {tuple(tensor.shape)}."
        )
    if rows == columns:
        raise MisshapenTensor(
            f"{name}: {published} is the shape of two layouts, and a tensor alone does not say which. Give the experts "
            f"one by one ({stack[1]}.0.down_proj.weight), or load the checkpoint by its path."
        )
    for number, expert in enumerate(tensor if tuple(tensor.shape) == ours else tensor.mT):
        if stack[2] == "down_proj":
            yield f"{stack[1]}.{number}.down_proj.weight", expert
        else:
            yield f"{stack[1]}.{number}.gate_proj.weight", expert[: dims.expert_ffn]
            yield f"{stack[1]}.{number}.up_proj.weight", expert[dims.expert_ffn :]


def _put(name: str, slot: "Slot", tensor: Tensor, device: torch.device) -> None:
    if tuple(tensor.shape) != slot.shape:
        raise MisshapenTensor(
            f"{name}: expected {slot.shape}, found {tuple(tensor.shape)}. Is the config that of these weights?"
        )
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise UnsupportedFormat(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')}: expected bfloat16, float16 or float32. "
            "Quantised weights are not read; give the plain ones, which a quantization of the model rounds itself."
        )
    slot.put(tensor.to(device))  # first: a copy to another device and dtype is rounded by the host


def _check_given(wanted: Iterable[str], given: set[str]) -> None:
    missing, unknown = set(wanted) - given, given - set(wanted)
    also = f" (and {len(unknown)} that it has no place for: {listing(unknown, 3)})" if unknown else ""
    if missing:
        raise MissingTensors(
            f"{len(missing)} weights of the model were not given: {listing(missing)}{also}. "
            "Is the config that of these weights, and are all files there?"
        )
    if unknown:
        raise UnknownTensors(
            f"{len(unknown)} tensors were given that the model has no place for: {listing(unknown)}. "
            "Leave them out, or use the config of these weights."
        )


def _check_spare(spare: Tensor, embedding: Tensor) -> None:
    if not torch.equal(spare.to(embedding), embedding):
        raise InputError(
            f"The config says that {OUTPUT[1]} is tied to {EMBEDDING[1]}, and they differ. "
            f"Set tie_word_embeddings to false to keep it, or leave the tensor out."
        )
