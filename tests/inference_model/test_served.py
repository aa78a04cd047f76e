"""What the engine computes is what transformers computes: every step's logits, and tokens under load."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from inference_model.worlds import KINDS, NEAR, ROWS, World, make_world, visual
from qwen3vl_convert import ParallelLayout, hf_to_megatron
from qwen3vl_convert.errors import InputError
from qwen3vl_convert.inference import Engine, EngineOptions, Request, SamplingParams, VisualInputs, load_model
from qwen3vl_convert.inference.attention import sdpa
from qwen3vl_convert.verify.logits.pieces import Image, Piece, Text, Video
from qwen3vl_convert.verify.logits.prompts import Prompt

pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings("ignore")]

STEPS = 6


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("dense", tmp_path_factory.mktemp("dense"))


def engine_of(world: World, **options: Any) -> Engine:
    chosen = {"page_size": 4, "kv_tokens": 1024, **options}
    return Engine(world.ours, EngineOptions(**chosen))


def request_of(prompt: Prompt, steps: int = STEPS) -> Request:
    pixels = visual(prompt)
    inputs = VisualInputs(**pixels) if any(one is not None for one in pixels.values()) else None
    sampling = SamplingParams(max_new_tokens=steps, ignore_eos=True)
    return Request(token_ids=prompt.input_ids[0].tolist(), visual=inputs, sampling=sampling)


@contextmanager
def forwards(world: World) -> Iterator[list[tuple[int, Tensor]]]:
    """(tokens of a forward, the logits that it gave) of all that are run meanwhile."""
    seen: list[tuple[int, Tensor]] = []
    hook = world.ours.register_forward_hook(lambda model, args, out: seen.append((len(args[0]), out.clone())))
    try:
        yield seen
    finally:
        hook.remove()


def check_logits(world: World, engine: Engine, prompt: Prompt) -> tuple[list[int], Any]:
    """Serve one request, hold every step's logits against transformers; (tokens of each forward, the completion)."""
    with forwards(world) as seen:
        (done,) = engine.generate([request_of(prompt)])
    sizes, logits = [size for size, _ in seen], torch.cat([out for _, out in seen if len(out)])
    expected = world.expected(prompt, list(done.token_ids))[prompt.input_ids.shape[1] - 1 : -1]
    assert logits.shape == expected.shape
    assert float((logits - expected).abs().max()) <= NEAR
    assert list(done.token_ids) == expected.argmax(-1).tolist()
    return sizes, done


@pytest.mark.parametrize("name", ROWS)
def test_prefill_and_every_step(world: World, name: str) -> None:
    sizes, _ = check_logits(world, engine_of(world), world.prompt(ROWS[name]))
    assert sizes[1:] == [1] * (STEPS - 1)


@pytest.mark.parametrize("name", ROWS)
def test_in_chunks(world: World, name: str) -> None:
    sizes, _ = check_logits(world, engine_of(world, max_step_tokens=5), world.prompt(ROWS[name]))
    assert len(sizes) > STEPS
    assert max(sizes) == 5


AGAIN: dict[str, tuple[list[Piece], int]] = {
    "text": ([Text(13)], 12),
    "after an image": ([Text(3), Image(1, 2, 3), Text(3)], 12),
    "inside an image": ([Text(3), Image(1, 2, 3)], 8),
    "inside a video": ([Text(1), Video(2, 2, 3, 2)], 16),
    "inside the second image": ([Text(3), Image(1, 2, 3), Text(2), Image(1, 4, 3)], 24),
}
"""What a second prompt begins with, too, and how many of its tokens are in the pages of the first."""


@pytest.mark.parametrize("name", AGAIN)
def test_after_a_prefix_that_was_seen(world: World, name: str) -> None:
    """The original let positions start again at 0 there, and refused a prefix that ends inside an image."""
    pieces, cached = AGAIN[name]
    first, second = world.prompt([*pieces, Text(4)]), world.prompt([*pieces, Text(9)])
    ends = first.input_ids.shape[1] - 4
    second.input_ids[0, ends:] = second.input_ids[0, ends:].flip(0)
    engine = engine_of(world)
    check_logits(world, engine, first)
    sizes, done = check_logits(world, engine, second)
    assert done.cached_tokens == cached
    assert sizes[0] == second.input_ids.shape[1] - cached


def test_another_image_of_the_same_size_shares_nothing(world: World) -> None:
    """The original took the keys and values of the first."""
    row: list[Piece] = [Text(3), Image(1, 2, 3), Text(5)]
    one, other = world.prompt(row), world.prompt(row)
    assert other.pixel_values is not None
    other.pixel_values.mul_(-1)
    engine = engine_of(world, page_size=1)
    check_logits(world, engine, one)
    _, second = check_logits(world, engine, other)
    assert second.cached_tokens == 4  # the text, and the start of vision


def test_what_overflowed_is_in_no_other_answer(dense: World) -> None:
    """Keys and values that are masked are still multiplied, by 0: of NaN that is NaN."""
    clean = request_of(dense.prompt(ROWS["text"]))
    alone = engine_of(dense).generate([clean])[0].token_ids
    engine, weight = engine_of(dense, kv_tokens=64, page_size=16), dense.ours.model.layers[0].mlp.down_proj.weight
    kept = weight.clone()
    weight.fill_(torch.inf)
    try:
        with pytest.raises(InputError, match="infinities or NaN"):
            engine.generate([request_of(dense.prompt([Text(40)]))])
    finally:
        weight.copy_(kept)
    assert [engine.generate([clean])[0].token_ids for _ in range(3)] == [alone] * 3


def test_decoding_a_few_sequences_at_a_time(dense: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may be put together at once: here one, or two of the short ones."""
    monkeypatch.setattr(sdpa, "_GATHERED", 3000)
    requests = [request_of(dense.prompt(ROWS[name])) for name in ROWS]
    alone = [engine_of(dense).generate([request])[0].token_ids for request in requests]
    assert [done.token_ids for done in engine_of(dense).generate(requests)] == alone


# ---- under load ------------------------------------------------------------------------------------------------------


def random_row(chance: random.Random) -> list[Piece]:
    pieces: list[Piece] = [Text(chance.randint(1, 30))]
    for _ in range(chance.choice([0, 0, 1, 2])):
        size = chance.randint(1, 3), chance.randint(2, 4)
        pieces += [Image(1, *size) if chance.random() < 0.7 else Video(2, *size, 2), Text(chance.randint(1, 12))]
    return pieces


@pytest.mark.parametrize("options", [{"kv_tokens": 4096}, {"kv_tokens": 192, "max_step_tokens": 24, "max_running": 9}])
def test_many_at_once_and_one_by_one(dense: World, options: dict[str, int]) -> None:
    chance = random.Random(5)
    prompts = [dense.prompt(random_row(chance), seed % 3) for seed in range(64)]
    requests = [request_of(prompt, chance.randint(1, 16)) for prompt in prompts]
    alone = [engine_of(dense, prefix_cache=False).generate([request])[0].token_ids for request in requests]
    engine = engine_of(dense, **options)
    together = [done.token_ids for done in engine.generate(requests)]
    assert together == alone
    engine.radix_cache.clear()
    assert engine.allocator.used == 0
    assert engine.req_to_token_pool.available == engine.req_to_token_pool.max_reqs


# ---- either format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_megatron_checkpoint_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    made = make_world(kind, tmp_path / "hf")
    layout = ParallelLayout(tp=2, pp=2, ep=2 if made.dims.moe else 1)
    hf_to_megatron(made.folder, tmp_path / "run", layout=layout, padded_vocab_size=640)
    restored = load_model(tmp_path / "run")
    requests = [request_of(made.prompt(ROWS[name]), 12) for name in ROWS]
    (theirs, ours) = (Engine(one, EngineOptions(kv_tokens=1024)).generate(requests) for one in (made.ours, restored))
    assert [done.token_ids for done in ours] == [done.token_ids for done in theirs]
