"""One rank of the tests of Megatron checkpoints of live models. Jobs for `parallel.run_ranks`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from models.bridge_rank import Case, build, held, passed
from oracles.megatron_rank import results_in_this_process


def saved(world: Any, case: Case) -> None:
    """Fill a model of this layout from the folder, and save it in `case.work`."""
    from qwen3vl_convert.models import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    chunks = build(world, case, bridge)
    bridge.load_hf_weights(passed(chunks))
    with results_in_this_process():
        bridge.save_megatron_model(passed(chunks), case.work)


def loaded(world: Any, case: Case) -> list[str]:
    """Names of parameters that differ, in dtype or bits, between a model filled from the folder and one loaded."""
    from qwen3vl_convert.models import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    chunks = build(world, case, bridge)
    bridge.load_hf_weights(passed(chunks))
    overrides = {"sequence_parallel": True} if world.layout.tp > 1 and bridge.source.dims.moe else None
    found = held(bridge.load_megatron_model(case.work, mp_overrides=overrides))
    expected = held(chunks)
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not same(found[name], tensor)]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def refused(world: Any, case: Case) -> list[tuple[str, str]]:
    """What saving raises on this rank: when the first rank's disk is full, and when the target is there."""
    from qwen3vl_convert.errors import OutputError
    from qwen3vl_convert.models import AutoBridge, checkpointing

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    (model,) = build(world, case, bridge)
    bridge.load_hf_weights(model)
    fault = mock.patch.object(checkpointing, "_write_beside", side_effect=OutputError("disk full"))
    with results_in_this_process(), fault:
        full = raised(lambda: bridge.save_megatron_model(model, case.work))
    assert not case.work.exists()
    return [full, raised(lambda: bridge.save_megatron_model(model, case.folder))]


def raised(action: Callable[[], Any]) -> tuple[str, str]:
    from qwen3vl_convert.errors import ConvertError

    try:
        action()
    except ConvertError as error:
        return type(error).__name__, str(error)
    return "", ""


def converted_by_one(rank: int, size: int, case: Case) -> tuple[int, str, str]:
    """Files converted by a script that torchrun started: (tensors, what a second try raised, what is there)."""
    import os

    from qwen3vl_convert.models import AutoBridge

    assert case.megatron is not None
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": case.megatron.read_text()}
    try:
        result = AutoBridge.import_ckpt(case.folder, case.work)
        there = sorted(path.name for path in case.work.iterdir())
        again, _ = raised(lambda: AutoBridge.import_ckpt(case.folder, case.work))
        return result.tensors, again, " ".join(there)
    finally:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]


def in_processes_of_the_script(rank: int, size: int, folder: Path, store: Path) -> dict[str, torch.Tensor]:
    """What a model cut over the ranks holds that is built where torch.distributed is up already, as it is exported."""
    from megatron.core import parallel_state

    from qwen3vl_convert.models import AutoBridge
    from qwen3vl_convert.models.distributed import _UNTIL_THE_END

    place = dist.FileStore(str(store), size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=place, rank=rank, world_size=size)
    try:
        bridge = AutoBridge.from_hf_pretrained(folder)
        provider = bridge.to_megatron_provider()
        provider.tensor_model_parallel_size = size
        provider.finalize()
        chunks = provider.provide_distributed_model(wrap_with_ddp=False)
        return dict(bridge.export_hf_weights(chunks))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        _UNTIL_THE_END.close()
