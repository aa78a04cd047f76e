"""The world that models are built in: stand-ins for a GPU, process groups, seeds; and the harness of several processes.

That the stand-ins do what a GPU would is shown by training in `test_parallel`. Here: they go as they came.
"""

import gc
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models import parallel_rank
from models.parallel import RankError, run_ranks
from qwen3vl_convert import ParallelLayout, UsageError

pytestmark = pytest.mark.megatron

ABSENT = object()


# ---- stand-ins -------------------------------------------------------------------------------------------------------


def current() -> list[Any]:
    """What is where `cpu_for_cuda` puts stand-ins."""
    from qwen3vl_convert.models.cpu import _stand_ins

    return [vars(place).get(name, ABSENT) for place, name, _ in _stand_ins()]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(a is b for a, b in zip(one, other, strict=True))


def test_nothing_is_replaced_before_and_after() -> None:
    from qwen3vl_convert.models import cpu_for_cuda

    before = current()
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    with cpu_for_cuda():
        assert not any(a is b and a is not None for a, b in zip(current(), before, strict=True))
        assert torch.device(torch.cuda.current_device()) == torch.device("cpu")
    assert same(current(), before)


def test_stand_ins_stay_until_the_last_leaves() -> None:
    from qwen3vl_convert.models import cpu_for_cuda

    before = current()
    first, second = cpu_for_cuda(), cpu_for_cuda()
    first.__enter__()
    inside = current()
    second.__enter__()
    first.__exit__(None, None, None)
    assert same(current(), inside)
    assert not second.__exit__(ArithmeticError, ArithmeticError("a planted fault"), None)
    assert same(current(), before)


def test_torch_itself_stays_whole() -> None:
    """Libraries keep its functions in tables: with another `zeros` in torch, torch.device("meta") has no effect."""
    from megatron.core.pipeline_parallel import schedules

    from qwen3vl_convert.models import cpu_for_cuda

    makers = torch.zeros, torch.ones, torch.tensor
    with cpu_for_cuda():
        assert (torch.zeros, torch.ones, torch.tensor) == makers
        assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"
        assert schedules.torch.zeros(2, device="meta").device.type == "meta"
        assert schedules.torch.autograd is torch.autograd
        with torch.device("meta"):
            assert torch.zeros(2).device.type == "meta"
    assert schedules.torch is torch


def test_causal_masks_of_megatron_core() -> None:
    """Our attention has no need of them, and that of other models on Megatron-Core does."""
    from megatron.core.transformer.utils import get_default_causal_mask

    from qwen3vl_convert.models import cpu_for_cuda

    with cpu_for_cuda():
        assert get_default_causal_mask(2).tolist() == [[False, True], [False, False]]


# ---- one process -----------------------------------------------------------------------------------------------------


def test_one_process_leaves_nothing() -> None:
    from megatron.core import parallel_state

    from qwen3vl_convert.models import single_process

    with single_process():
        pass  # gloo keeps what it opened first, for whoever comes next
    gc.collect()  # what other tests left open
    before, random_state, opened = current(), torch.get_rng_state(), psutil.Process().num_fds()
    with single_process() as world:
        assert (world.rank, world.size) == (0, 1)
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        dist.barrier()
        torch.rand(3)
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert psutil.Process().num_fds() == opened
    assert same(current(), before)


def test_an_exception_leaves_nothing_either() -> None:
    from megatron.core import parallel_state

    from qwen3vl_convert.models import single_process

    before = current()
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="a planted fault"), single_process():
            raise ArithmeticError("a planted fault")
        assert not dist.is_initialized()
        assert not parallel_state.model_parallel_is_initialized()
        assert same(current(), before)


def test_a_world_within_a_world() -> None:
    from qwen3vl_convert.models import parallel_world, single_process

    with single_process():
        with pytest.raises(UsageError, match="in use already"), parallel_world():
            pass
        assert dist.get_world_size() == 1  # the outer one stands


def test_groups_of_the_user_are_left_alone() -> None:
    from qwen3vl_convert.models import single_process

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        with pytest.raises(UsageError, match="in use already"), single_process():
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_recompute_drops_the_same() -> None:
    """Activation recompute puts random states back, those of Megatron-Core's streams too."""
    from megatron.core import tensor_parallel

    from qwen3vl_convert.models import single_process

    def dropped(x: Tensor) -> Tensor:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            first = torch.nn.functional.dropout(x, 0.5)
        return torch.nn.functional.dropout(first, 0.5)

    with single_process():
        x = torch.ones(1000, requires_grad=True)
        out = tensor_parallel.checkpoint(dropped, False, x)
        torch.rand(7)
        out.sum().backward()
        after = torch.rand(3)
        assert 150 < out.count_nonzero() < 350
        assert torch.equal(x.grad, out)  # type: ignore[arg-type]
        assert not torch.equal(torch.rand(3), after)


def draws(seed: int) -> dict[str, Tensor]:
    from qwen3vl_convert.models import single_process

    with single_process(seed=seed) as world:
        return parallel_rank.draws(world)


def test_seeds() -> None:
    found, again, other = draws(1), draws(1), draws(2)
    assert found.keys() >= {"default", "data-parallel-rng", "model-parallel-rng", "expert-parallel-rng"}
    # The default stream and that of data parallelism begin alike.
    assert len({tuple(values.tolist()) for values in found.values()}) == len(found) - 2
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not any(torch.equal(found[name], other[name]) for name in found)


# ---- what cannot be --------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too few": ({"layout": ParallelLayout(tp=2, pp=2), "rank": 0, "world_size": 2}, "expected a multiple of 4 = pp"),
    "no multiple": ({"layout": ParallelLayout(tp=2), "rank": 0, "world_size": 3}, "expected a multiple of 2 = pp"),
    "experts": ({"layout": ParallelLayout(tp=2, ep=3), "rank": 0, "world_size": 2}, "expected a multiple of 6 = pp"),
    "context": ({"layout": ParallelLayout(tp=2), "cp": 2, "rank": 0, "world_size": 2}, r"lcm\(2 \* 2, 1 \* 1\)"),
    "cp": ({"cp": 0}, "cp=0: expected 1 or more"),
    "rank": ({"rank": 2, "world_size": 2}, "rank=2: expected 0 to 1"),
    "half": ({"rank": 0}, "expected both, or neither"),
    "nowhere to meet": ({"rank": 0, "world_size": 2}, "torchrun --nproc-per-node 2"),
    "no launcher": ({"layout": ParallelLayout(pp=2)}, "world_size=1: expected a multiple of 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3vl_convert.models import parallel_world

    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    arguments, message = WRONG[name]
    before = current()
    with pytest.raises(UsageError, match=message), parallel_world(**arguments):
        pass
    assert not dist.is_initialized()
    assert same(current(), before)


def test_nobody_else_comes(tmp_path: Path) -> None:
    from qwen3vl_convert.models import parallel_world

    before = current()
    waiting = parallel_world(rank=0, world_size=2, store=tmp_path / "store", timeout=timedelta(seconds=1))
    with pytest.raises(RuntimeError, match="(?i)time"), waiting:
        pass
    assert not dist.is_initialized()
    assert same(current(), before)


# ---- several processes -----------------------------------------------------------------------------------------------


def places(**ranks: list[int]) -> list[dict[str, int]]:
    """Per rank, its index of each kind; 0 of kinds that are not named."""
    count = len(next(iter(ranks.values())))
    whole = {kind: ranks.get(kind, [0] * count) for kind in ("tp", "pp", "ep", "etp", "cp", "dp")}
    return [{kind: indices[rank] for kind, indices in whole.items()} for rank in range(count)]


PLACES = {
    "tp2 pp2": (ParallelLayout(tp=2, pp=2), 1, places(tp=[0, 1, 0, 1], pp=[0, 0, 1, 1])),
    "tp2 of 4": (ParallelLayout(tp=2), 1, places(tp=[0, 1, 0, 1], dp=[0, 0, 1, 1])),
    "ep2 etp2": (
        ParallelLayout(ep=2, etp=2), 1, places(ep=[0, 0, 1, 1], etp=[0, 1, 0, 1], dp=[0, 1, 2, 3]),
    ),
    "tp2 cp2": (ParallelLayout(tp=2), 2, places(tp=[0, 1, 0, 1], cp=[0, 0, 1, 1])),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_who_is_where(name: str) -> None:
    layout, cp, expected = PLACES[name]
    assert run_ranks(layout, parallel_rank.place, size=4, cp=cp) == expected


def test_settings_of_an_interleaved_pipeline() -> None:
    """One chunk is no interleaving to Megatron-Core, and messages in batches go wrong under it."""
    from qwen3vl_convert.models.world import World

    plain = World(ParallelLayout(pp=2, vpp=1, first_stage_layers=3), 1, 0, 2)
    interleaved = World(ParallelLayout(pp=2, vpp=2), 1, 0, 2)
    assert plain.stages == [None]
    assert interleaved.stages == [0, 1]
    names = ("virtual_pipeline_model_parallel_size", "overlap_p2p_comm", "batch_p2p_comm")
    assert [plain.settings()[name] for name in names] == [None, False, True]
    assert [interleaved.settings()[name] for name in names] == [2, True, False]
    assert plain.settings()["num_layers_in_first_pipeline_stage"] == 3
    assert plain.settings(sequence_parallel=True)["sequence_parallel"]


def alike(layout: ParallelLayout) -> set[str]:
    """The streams of which two ranks draw the same, of each both times."""
    first, second = run_ranks(layout, parallel_rank.draws)
    return {name for name in first if torch.equal(first[name], second[name])}


def test_random_numbers_of_ranks() -> None:
    """Parts of one layer draw differently where they should, and alike where they must."""
    whole = {"default", "default again", "data-parallel-rng", "data-parallel-rng again"}
    dense, experts = ({f"{kind}-parallel-rng", f"{kind}-parallel-rng again"} for kind in ("model", "expert"))
    assert alike(ParallelLayout(tp=2)) == whole | experts
    assert alike(ParallelLayout(etp=2)) == alike(ParallelLayout(ep=2)) == whole | dense
    assert alike(ParallelLayout(pp=2)) == set()


@pytest.mark.parametrize("lengths", [[2, 5], [3, 3], [0, 4]], ids=str)
def test_pieces_of_unequal_length(lengths: list[int]) -> None:
    expected = [torch.full((length, 3), float(rank)) for rank, length in enumerate(lengths)]
    for pieces in run_ranks(ParallelLayout(), parallel_rank.gathered, lengths, size=2):
        assert all(torch.equal(piece, wanted) for piece, wanted in zip(pieces, expected, strict=True))


def test_under_a_launcher() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run_ranks(None, parallel_rank.launched, port, size=2) == [("TP2", 0, 3.0), ("TP2", 1, 3.0)]


# ---- the harness -----------------------------------------------------------------------------------------------------


def test_a_rank_that_fails_is_heard() -> None:
    """Its traceback comes before those of ranks that it let down, and the processes do the next job."""
    for failing in (0, 1):
        with pytest.raises(RankError) as raised:
            run_ranks(ParallelLayout(tp=2), parallel_rank.fails_on, failing)
        first, *_ = str(raised.value).split("\nrank ")[1:]
        assert first.startswith(f"{failing}: Traceback")
        assert "ArithmeticError: a planted fault" in first
        assert run_ranks(ParallelLayout(tp=2), parallel_rank.fails_on, 5) == [0, 1]


def test_a_rank_that_dies_is_noticed() -> None:
    with pytest.raises(RankError, match="rank 1: the process ended with exit code 3"):
        run_ranks(ParallelLayout(tp=2), parallel_rank.dies_on, 1)
    assert run_ranks(ParallelLayout(tp=2), parallel_rank.fails_on, 5) == [0, 1]
