"""The parallel layout that a checkpoint says it was written in, and whether the processes of this run can hold it."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.megatron.checkpoint import MegatronCheckpoint
from qwen3vl_convert.megatron.run_config import read_run_config
from qwen3vl_convert.model import Model
from qwen3vl_convert.parallel import ParallelLayout
from qwen3vl_convert.torchrun import processes

_ALONE = "Run it without torchrun, in one process."

_SIZES = {
    "tp": ("tensor_model_parallel_size",),
    "pp": ("pipeline_model_parallel_size",),
    "vpp": ("virtual_pipeline_model_parallel_size",),
    "ep": ("expert_model_parallel_size",),
    "etp": ("expert_tensor_parallel_size",),
    "first_stage_layers": ("num_layers_in_first_pipeline_stage", "decoder_first_pipeline_num_layers"),
    "last_stage_layers": ("num_layers_in_last_pipeline_stage", "decoder_last_pipeline_num_layers"),
}
"""Fields of `ParallelLayout` as Megatron-Bridge's providers call them, and Megatron-LM's arguments."""


def layout_of(checkpoint: MegatronCheckpoint, model: Model) -> ParallelLayout:
    """The layout that a checkpoint says it was written in. Raises `UsageError` if it says none, or none that can be.

    What it leaves out is as Megatron-Core has it: one, and experts cut as all else is.
    """
    said = _said(checkpoint)
    found = {field: next((said[name] for name in names if said.get(name)), None) for field, names in _SIZES.items()}
    if found["tp"] is None:
        raise UsageError(
            f"{checkpoint.folder}: expected the layout that it was written in, which is how the model is run under "
            f"torchrun, in run_config.yaml or in the arguments of Megatron-LM; found it in neither. {_ALONE}"
        )
    experts = {"etp": found["etp"] or found["tp"]} if model.dims.moe else {"ep": 1, "etp": 1}
    sizes = {field: value for field, value in (found | experts).items() if value is not None}
    try:
        return _checked(sizes, model)
    except UsageError as error:
        listed = ", ".join(f"{field}={value!r}" for field, value in sizes.items())
        raise UsageError(
            f"{checkpoint.folder}: says that it was written with {listed}, which this model cannot be: {error} {_ALONE}"
        ) from None


def _checked(sizes: Mapping[str, Any], model: Model) -> ParallelLayout:
    if any(type(value) is not int for value in sizes.values()):
        raise UsageError("expected whole numbers.")
    layout = ParallelLayout(**sizes)
    layout.validate(model.dims, model.padded_vocab)
    return layout


def _said(checkpoint: MegatronCheckpoint) -> Mapping[str, Any]:
    """What the checkpoint says of its run: as Megatron-Bridge does, or else as Megatron-LM does."""
    run_config = read_run_config(checkpoint.folder / "run_config.yaml") or {}
    arguments = getattr(checkpoint.common.get("args"), "state", None)
    return next((one for one in (run_config.get("model"), arguments) if isinstance(one, Mapping)), {})


def check_processes(layout: ParallelLayout, checkpoint: MegatronCheckpoint) -> None:
    """Raise `UsageError` unless torchrun started as many processes as the layout needs, or a multiple."""
    size = processes()
    if size % layout.world:
        raise UsageError(
            f"{checkpoint.folder}: was written as {layout}, expected {layout.world} processes or a multiple, found "
            f"{size}. Start that many (torchrun --nproc-per-node {layout.world}), or run it without torchrun, in one."
        )


def check_gpus() -> None:
    """Raise `UsageError` unless each process that torchrun started on this machine can have a GPU of its own."""
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local > gpus:
        raise UsageError(
            f"torchrun: expected one process per GPU at most, found {local} processes and {gpus} GPUs on this machine. "
            f"Start fewer here and more on other machines, pass --device cpu, or run it without torchrun, in one."
        )
