"""Decoding by graphs, with a call in the place of the capture: padding, sizes, addresses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference_model.fake_model import DIMS, VOCAB, FakeModel
from models.planted import lively_checkpoint
from qwen3vl_convert.inference.attention.sdpa import SDPABackend
from qwen3vl_convert.inference.engine.batching import LINES, Pools
from qwen3vl_convert.inference.engine.cuda_graphs import DecodeGraphs, batch_sizes, round_pages
from qwen3vl_convert.inference.engine.engine import Engine, EngineOptions
from qwen3vl_convert.inference.engine.kv_pool import KVPool, ReqToTokenPool
from qwen3vl_convert.inference.engine.requests import Request, SamplingParams
from qwen3vl_convert.inference.forward_batch import ForwardBatch
from qwen3vl_convert.inference.loading import load_model
from qwen3vl_convert.make import SIZES

REQUESTS = [
    Request(token_ids=[number, 5, number], sampling=SamplingParams(max_new_tokens=4 + 3 * number))
    for number in range(7)
]


def test_batches_are_rounded_up() -> None:
    assert batch_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(1) == [1]


def test_pages_are_rounded_up() -> None:
    assert [round_pages(pages, 100) for pages in (1, 8, 9, 13, 17, 25, 33, 49, 70, 97)] == [
        *(8, 8, 12, 16, 24, 32, 48, 64, 96, 100)
    ]
    assert round_pages(3, 5) == 5


def run(cuda_graphs: bool) -> tuple[list[tuple[int, ...]], Engine]:
    engine = Engine(FakeModel(), EngineOptions(page_size=2, kv_tokens=400, max_running=6, cuda_graphs=cuda_graphs))
    return [completion.token_ids for completion in engine.generate(REQUESTS)], engine


def test_graphs_change_no_token() -> None:
    plain, _ = run(cuda_graphs=False)
    replayed, engine = run(cuda_graphs=True)
    assert replayed == plain
    assert engine._runner.graphs is not None
    captured = engine._runner.graphs.captured
    assert len(captured) == len(set(captured)) > 2
    assert {batch for batch, _ in captured} <= {1, 2, 4, 6}
    assert {pages for _, pages in captured} <= {8, 12, 16}


def test_padding_touches_the_dummy_page_only() -> None:
    _, engine = run(cuda_graphs=True)
    engine.radix_cache.clear()
    keys, _ = engine.kv_pool.get_kv_buffer(0)
    assert keys[0].any(), "slot 0 takes what pads"
    assert not keys[1:2].any()
    assert not engine.req_to_token_pool.page_table[0].any()


class Recording(FakeModel):
    """Notes where the numbers of each batch lie."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[tuple[int, ...]] = []
        self.sizes: list[int] = []

    def forward(self, ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        tensors = (ids, positions, batch.mrope_positions, batch.out_cache_loc, batch.req_pool_indices, batch.kv_lens)
        self.addresses.append(tuple(one.data_ptr() for one in tensors if one is not None))
        self.sizes.append(len(ids))
        assert batch.attention_metadata is None, "of another run"
        return super().forward(ids, positions, batch)


def pools() -> Pools:
    rows = ReqToTokenPool(4, 40, 2, "cpu")
    rows.write({(row, column): 1 + 5 * (row - 1) + column for row in range(1, 5) for column in range(5)})
    return Pools(KVPool(30, 2, DIMS.layers, 1, 4, torch.float32, "cpu"), rows, SDPABackend())


def table(lengths: list[int]) -> Tensor:
    """Sequences in rows 1, 2, ... whose last token is to be computed."""
    columns = [
        (row, length - 1, length - 1, length - 1, length - 1, 2 * (1 + 5 * (row - 1)) + length - 1, row, length)
        for row, length in enumerate(lengths, 1)
    ]
    return torch.tensor(columns).T.reshape(LINES, -1)


def test_a_graph_is_captured_once_and_finds_its_numbers_in_the_same_place() -> None:
    model, captures = Recording(), 0

    def capture(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        nonlocal captures
        captures += 1
        return forward

    graphs = DecodeGraphs(model, pools(), 4, capture)
    for lengths in ([3, 4, 5], [6, 7, 8, 9], [1, 1, 1]):
        assert graphs.run(table(lengths)).shape == (len(lengths), VOCAB)
    assert (captures, model.sizes, graphs.captured) == (1, [4, 4, 4], [(4, 8)])
    assert len(set(model.addresses)) == 1
    graphs.run(table([2]))
    assert (captures, graphs.captured) == (2, [(4, 8), (1, 8)])


def test_what_pads_cannot_see_an_earlier_batch() -> None:
    model = FakeModel()
    fresh, used = DecodeGraphs(model, pools(), 4), DecodeGraphs(model, pools(), 4)
    used.run(table([9, 8, 7, 6]))
    for graphs in (fresh, used):
        graphs.run(table([2, 3, 4]))
    assert fresh._tables[4].equal(used._tables[4])
    assert fresh._tables[4][:, 3].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]


def test_without_graphs_on_a_cpu_unless_asked_for() -> None:
    assert Engine(FakeModel(), EngineOptions(kv_tokens=100))._runner.graphs is None


def test_graphs_change_no_token_of_the_real_model(tmp_path: Path) -> None:
    lively_checkpoint(tmp_path, replace(SIZES["tiny"], dtype="float32"))
    model = load_model(tmp_path)
    found = []
    for cuda_graphs in (False, True):
        engine = Engine(model, EngineOptions(page_size=2, kv_tokens=400, max_running=6, cuda_graphs=cuda_graphs))
        found.append([completion.token_ids for completion in engine.generate(REQUESTS)])
    assert found[0] == found[1]
    assert len(set(found[0][-1])) > 3, "more than one token over and over"


def broken(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_capture_that_fails_ends_graphs_and_not_the_request() -> None:
    engine = Engine(FakeModel(), EngineOptions(page_size=2, kv_tokens=400, cuda_graphs=None))
    engine._runner.graphs = DecodeGraphs(engine.model, engine._runner.pools, 64, broken)
    with pytest.warns(RuntimeWarning, match="CUDA graphs are off.*not permitted"):
        found = engine.generate(REQUESTS)
    assert [one.token_ids for one in found] == run(cuda_graphs=False)[0]


def test_a_capture_that_was_insisted_on_may_not_fail() -> None:
    engine = Engine(FakeModel(), EngineOptions(page_size=2, kv_tokens=400, cuda_graphs=True))
    engine._runner.graphs = DecodeGraphs(engine.model, engine._runner.pools, 64, broken)
    with pytest.raises(RuntimeError, match="not permitted"):
        engine.generate(REQUESTS)
    engine.radix_cache.clear()
    assert engine.allocator.used == 0
