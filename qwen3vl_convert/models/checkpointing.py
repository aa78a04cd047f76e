"""Megatron checkpoints of a live model: saved by Megatron-Core from all ranks, loaded at any layout without its loader.

PATH/latest_checkpointed_iteration.txt, latest_train_state.pt
PATH/iter_0000000/   what Megatron-Core writes, and what `hf_to_megatron` puts beside it: run_config.yaml, hf/, ...
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state

from qwen3vl_convert.dims import CONFIG_FILE
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.huggingface.config import config_json
from qwen3vl_convert.huggingface.files import auxiliary_files
from qwen3vl_convert.huggingface.hub import resolve
from qwen3vl_convert.megatron.checkpoint import HF_FOLDER
from qwen3vl_convert.megatron.target import MegatronOptions, run_files
from qwen3vl_convert.model import EMBEDDING, MegatronModel, open_megatron
from qwen3vl_convert.models.cut import layout_of, stages_of
from qwen3vl_convert.models.live import METADATA, OpenedModel, open_live, read_live, unwrapped
from qwen3vl_convert.models.ranks import everyones, rank, together
from qwen3vl_convert.models.restore import plan_restoring
from qwen3vl_convert.models.source import Source
from qwen3vl_convert.models.world import single_process
from qwen3vl_convert.seal import publishing, refuse_existing

State = dict[str, Any]


# ---- out -------------------------------------------------------------------------------------------------------------


def save_model(
    model: Any, source: Source, path: Path, files: str | Path | None, iteration: int, overwrite: bool
) -> None:
    """Save the chunks of a model of `source`'s sizes; all ranks call it. `files`: folder or Hub id of tokenizer and
    processor. The checkpoint is opened as a complete model before it gets its name.
    """
    with together():
        if rank() == 0:
            refuse_existing(path, overwrite)
    live = read_live(model)
    opened = open_live(live, source.dims, "hub")
    options = MegatronOptions(layout_of(unwrapped(model)[0].config), iteration=iteration)
    with ExitStack() as stack:
        with together():
            staging = stack.enter_context(publishing(path, "", overwrite=overwrite)) if rank() == 0 else None
            if staging is not None:
                (staging.content / options.folder).mkdir(parents=True)
        place = Path(everyones(None if staging is None else str(staging.content))[0])
        with together():
            _save_shards(model, iteration, place / options.folder)
        with together():
            if staging is not None:
                _write_beside(opened, live.tensors[EMBEDDING[0]].dtype, source, files, options, place)
                open_megatron(place)
                staging.publish(fsync=True)


def _save_shards(model: Any, iteration: int, folder: Path) -> None:
    chunks = unwrapped(model)
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    states = {
        name: chunk.sharded_state_dict(prefix="", metadata=dict(METADATA))
        for name, chunk in zip(names, chunks, strict=True)
    }
    state = {"checkpoint_version": 3.0, "iteration": iteration, **states}
    dist_checkpointing.save(state, str(folder), content_metadata=dict(METADATA), **_own_writer())


def _own_writer() -> State:
    """Later releases write through an optional package unless told not to."""
    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def _write_beside(
    opened: OpenedModel,
    dtype: str,
    source: Source,
    files: str | Path | None,
    options: MegatronOptions,
    place: Path,
) -> None:
    """What a checkpoint has beside Megatron-Core's files: settings, trackers, and the model's own files."""
    model = opened.model
    for name, content in run_files(model.dims, model.sizes, dtype, options).items():
        (place / name).write_bytes(content)
    folder = place / options.folder / HF_FOLDER
    folder.mkdir()
    (folder / CONFIG_FILE).write_bytes(_config_of(source))
    for file in () if files is None else auxiliary_files(resolve(files, weights=False).folder):
        copyfile(file, folder / file.name)


def _config_of(source: Source) -> bytes:
    """Its config.json, byte for byte where there is one."""
    resolved = source.resolved(weights=False)
    return config_json(source.config).encode() if resolved is None else (resolved.folder / CONFIG_FILE).read_bytes()


# ---- in --------------------------------------------------------------------------------------------------------------


def load_model(bridge: Any, source: Source, path: Path, iteration: int | str | None, overrides: State) -> list[Any]:
    """This rank's chunks of the model, filled; all ranks call it."""
    with together():
        opened = open_megatron(path, iteration, source.dims)
    with _process_groups():
        provider = _provider(bridge, source, opened, overrides)
        chunks = [provider.provide(vp_stage=stage) for stage in stages_of(provider)]
        _fill(chunks, opened)
    return chunks


def _process_groups() -> AbstractContextManager[Any]:
    return nullcontext() if parallel_state.model_parallel_is_initialized() else single_process()


def _provider(bridge: Any, source: Source, opened: MegatronModel, overrides: State) -> Any:
    """The bridge's provider, cut as the process groups are, with the checkpoint's dtype and padded vocabulary."""
    provider = bridge.provider_bridge(source)
    dtype = getattr(torch, opened.tensors[EMBEDDING[0]].dtype)
    settings = {
        **_groups(),
        **dict.fromkeys(("params_dtype", "pipeline_dtype", "autocast_dtype"), dtype),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "vocab_size": opened.model.padded_vocab,
        "should_pad_vocab": False,
        "perform_initialization": False,
        **overrides,
    }
    for name, value in settings.items():
        if not hasattr(provider, name):
            raise UsageError(f"AutoBridge.load_megatron_model: mp_overrides: {name}: the provider has no such setting.")
        setattr(provider, name, value)
    return provider


def _groups() -> State:
    """The parallel sizes that the process groups were set up with, as settings."""
    vpp = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": vpp,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        "overlap_p2p_comm": vpp is not None,
        "batch_p2p_comm": vpp is None,
    }


def _fill(chunks: list[Any], opened: MegatronModel) -> None:
    restoring = plan_restoring(chunks, opened)
    with together(), torch.no_grad():
        for number, name, parameter in _parameters(chunks):
            parameter.copy_(restoring.parameter(name, number))


def _parameters(chunks: list[Any]) -> Iterator[tuple[int, str, torch.Tensor]]:
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            yield number, name, parameter
