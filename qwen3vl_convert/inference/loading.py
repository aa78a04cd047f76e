"""A checkpoint of either format into the model: streamed tensor by tensor under the hub's names.

Nothing is converted on disk. Experts come one by one, so that no stack of them is ever held beside the model, and no
square stack is ambiguous.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qwen3vl_convert.assembled import Assembled, assemble_huggingface, assemble_megatron
from qwen3vl_convert.dims import CONFIG_FILE, Dims, read_config
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.huggingface.hub import resolve
from qwen3vl_convert.inference.quantization import get_quantization_config
from qwen3vl_convert.inference.strict import load_into
from qwen3vl_convert.inspection import is_megatron
from qwen3vl_convert.model import EMBEDDING, HuggingFaceModel, MegatronModel, open_huggingface, open_megatron

if TYPE_CHECKING:
    from qwen3vl_convert.inference.model import Qwen3VLForConditionalGeneration

_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

__all__ = ["CheckpointWeights", "checkpoint_weights", "load_into", "load_model", "uninitialised"]


# ---- out of a checkpoint ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointWeights:
    """The weights of a checkpoint, read anew whenever they are gone through: (name on the Hub, tensor on the CPU).

    Experts are `...mlp.experts.N.gate_proj.weight` [I, h], `up_proj` [I, h] and `down_proj` [h, I]. `dims`: the sizes
    of the model; `dtype`: that of its embedding; `notes` say what a user should know, one sentence each.
    """

    dims: Dims
    dtype: torch.dtype
    assembled: Assembled
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.assembled.links:
            yield name, self.assembled.tensor(name)


def checkpoint_weights(
    path: str | Path,
    *,
    config: str | Path | None = None,
    iteration: int | str | None = None,
    headless: bool = False,
) -> CheckpointWeights:
    """The weights of a Hugging Face folder, a Hub id or a Megatron checkpoint. Memory is one tensor, that of an expert.

    `config`: folder or Hub id whose config.json says the sizes of a Megatron checkpoint, where it does not say them
    itself or a better authority is at hand; a folder goes by its own. `iteration`: as for a conversion. `headless`: the
    model has no output layer. Raises `InputError`'s kinds before anything is read: tensors that are missing, unknown,
    misshapen or quantised, by name.
    """
    if iteration is not None or is_megatron(Path(path)):
        megatron = open_megatron(Path(path), iteration, _dims_of(config), "per-expert", headless)
        return _weights(megatron, assemble_megatron(megatron), EMBEDDING[0])
    folder = open_huggingface(resolve(path, weights=True).folder, headless=headless)
    return _weights(folder, assemble_huggingface(folder, "per-expert"), EMBEDDING[1])


def _weights(opened: HuggingFaceModel | MegatronModel, assembled: Assembled, embedding: str) -> CheckpointWeights:
    notes = (*opened.checkpoint.notes, *opened.check_data())
    return CheckpointWeights(opened.model.dims, getattr(torch, opened.tensors[embedding].dtype), assembled, notes)


def _dims_of(config: str | Path | None) -> Dims | None:
    if config is None:
        return None
    folder = resolve(config, weights=False).folder
    return Dims.from_config(read_config(folder), str(folder / CONFIG_FILE))


# ---- into a model ----------------------------------------------------------------------------------------------------


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    config: str | Path | None = None,
    iteration: int | str | None = None,
) -> "Qwen3VLForConditionalGeneration":
    """The model of a checkpoint of either format, ready to run. Memory is its weights and one tensor.

    `dtype`: bf16, fp16 or fp32, as the checkpoint's embedding is without it, on a CPU too. `quantization`: int8, or
    none. The rest is as for `checkpoint_weights`. Raises `UsageError` or `InputError`'s kinds.
    """
    from qwen3vl_convert.inference.model import Qwen3VLForConditionalGeneration

    where, method = _device(device), None if quantization is None else get_quantization_config(quantization)
    asked = None if dtype is None else _dtype(dtype)
    weights = checkpoint_weights(path, config=config, iteration=iteration)
    with uninitialised(where, asked or weights.dtype):
        model = Qwen3VLForConditionalGeneration(weights.dims, method)
    model.load_weights(weights)
    return model.eval().requires_grad_(False)


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r}: expected cpu, cuda or cuda:1, say.") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count() > 0:
        raise UsageError(f"device {device}: torch finds {torch.cuda.device_count()} GPUs here, counted from 0.")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device}: torch finds no GPU here. Use device cpu, or a torch that was built for it.")
    return found


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or not found.is_floating_point or found.itemsize < 2:
        raise UsageError(f"dtype {dtype}: expected bf16, fp16 or fp32.")
    return found


@contextmanager
def uninitialised(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it modules are made on the device and in the dtype, and weights are not drawn: they will be loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, _Undrawn():
            yield
    finally:
        torch.set_default_dtype(before)


class _Undrawn(TorchFunctionMode):
    """Leaves the tensors that torch.nn.init would fill as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
