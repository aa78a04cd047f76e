"""The engine as a whole, with a model whose every token depends on all that an engine can get wrong.

What a request must get is computed by itself, without pool, pages, chunks, prefixes or batches (`fake_model.expected`).
"""

import gc
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from inference_model.fake_model import (
    DIMS,
    EOS,
    HIDDEN,
    IMAGE,
    VIDEO,
    VOCAB,
    WIDTH,
    Bytes,
    FakeModel,
    expected,
    pixels_for,
    visual_of,
)
from qwen3vl_convert.errors import InputError, UsageError
from qwen3vl_convert.inference.engine.engine import Engine, EngineOptions
from qwen3vl_convert.inference.engine.requests import Request, SamplingParams, VisualInputs
from qwen3vl_convert.inference.forward_batch import ForwardBatch, ForwardMode

START = 292


def engine_of(model: FakeModel | None = None, **options: Any) -> Engine:
    return Engine(model or FakeModel(), EngineOptions(**{"page_size": 4, "kv_tokens": 2000, **options}), Bytes())


def image_prompt(
    grid: Sequence[int] = (1, 4, 6), seed: int = 0, before: int = 3, after: int = 4, **sampling: Any
) -> Request:
    _, height, width = grid
    ids = [*range(before), START, *[IMAGE] * (height * width // 4), *range(50, 50 + after)]
    return Request(token_ids=ids, visual=visual_of([grid], seed=seed), sampling=SamplingParams(**sampling))


def text_prompt(*ids: int, **sampling: Any) -> Request:
    return Request(token_ids=ids, sampling=SamplingParams(**sampling))


def assert_empty(engine: Engine) -> None:
    """All memory is back but for what the prefix cache keeps, and it lets go of that."""
    assert not engine.busy
    assert engine.req_to_token_pool.available == engine.options.max_running
    assert engine.allocator.used == engine.radix_cache.size
    engine.radix_cache.clear()
    assert engine.allocator.used == 0


# ---- under load ------------------------------------------------------------------------------------------------------

SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 6},
    {"temperature": 1.2, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "seed": 7},
    {"repetition_penalty": 1.5},
]


def random_request(chance: random.Random) -> Request:
    """Text, images and a video; a few openings and pictures that come again and again."""
    ids = [9] * chance.choice([0, 0, 6, 17]) + [chance.randrange(20) for _ in range(chance.randrange(1, 5))]
    images, videos = list[tuple[int, int, int]](), list[tuple[int, int, int]]()
    for _ in range(chance.choice([0, 0, 1, 2])):
        grid = (1, 2 * chance.randrange(1, 5), 2 * chance.randrange(1, 5))
        ids += [START, *[IMAGE] * (grid[1] * grid[2] // 4), 8][: None if chance.random() < 0.5 else -1]
        images.append(grid)
    if chance.random() < 0.2:
        videos.append((3, 4, 4))
        for frame in range(3):
            ids += [30 + frame, START, *[VIDEO] * 4]
    ids += [chance.randrange(20) for _ in range(chance.randrange(0, 9))]
    if chance.random() < 0.2:
        images, videos, ids = [], [], [11] * 40 + ids[-1:] * (ids[-1] < 20)
    sampling = SamplingParams(max_new_tokens=chance.randrange(1, 25), **chance.choice(SAMPLED))
    visual = visual_of(images, videos, chance.randrange(3)) if images or videos else None
    return Request(token_ids=ids, visual=visual, sampling=sampling)


def requests_of(count: int, seed: int) -> list[Request]:
    chance = random.Random(seed)
    fresh = [random_request(chance) for _ in range(count * 3 // 4)]
    return fresh + [chance.choice(fresh) for _ in range(count - len(fresh))]


class Watched(Engine):
    """Counts who was sent back to waiting."""

    def __init__(self, **options: Any) -> None:
        super().__init__(FakeModel(), EngineOptions(**options))
        self.preemptions, preempt = 0, self._scheduler._preempt

        def counted(sequence: Any) -> None:
            self.preemptions += 1
            preempt(sequence)

        self._scheduler._preempt = counted  # type: ignore[method-assign]


def test_64_requests_under_load_get_the_tokens_that_each_gets_alone() -> None:
    requests = requests_of(64, seed=1)
    engine = Watched(page_size=4, kv_tokens=200, max_running=64, max_step_tokens=24)
    found = engine.generate(requests)
    assert [list(one.token_ids) for one in found] == [expected(one) for one in requests]
    assert engine.preemptions > 0
    assert sum(one.cached_tokens for one in found) > 100
    assert ForwardMode.MIXED in engine.model.modes
    assert ForwardMode.DECODE in engine.model.modes
    assert max(engine.model.tokens) == 24
    assert_empty(engine)


@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 1, "kv_tokens": 110, "max_running": 8, "max_step_tokens": 7},
        {"page_size": 16, "kv_tokens": 4000},
        {"page_size": 3, "kv_tokens": 150, "max_running": 5, "max_step_tokens": 9, "prefix_cache": False},
        {"page_size": 2, "kv_tokens": 200, "max_running": 9, "max_step_tokens": 64, "cuda_graphs": True},
    ],
    ids=["pages of one token", "roomy", "without a prefix cache", "decoding as graphs do"],
)
def test_tokens_do_not_depend_on_the_options(options: dict[str, Any]) -> None:
    requests = requests_of(16, seed=2)
    engine = Watched(**options)
    for _ in range(2):
        found = engine.generate(requests)
        assert [list(one.token_ids) for one in found] == [expected(one) for one in requests]
    assert engine.options.prefix_cache == (sum(one.cached_tokens for one in found) > 0)
    assert_empty(engine)


def test_who_was_preempted_ends_with_the_same_tokens() -> None:
    requests = [text_prompt(*[number] * 8, max_new_tokens=20, **SAMPLED[number]) for number in range(4)]
    engine = Watched(page_size=4, kv_tokens=40, max_running=4)
    found = engine.generate(requests)
    assert engine.preemptions > 0
    assert [list(one.token_ids) for one in found] == [expected(one) for one in requests]


# ---- prefixes --------------------------------------------------------------------------------------------------------


def test_two_images_of_one_size_share_nothing() -> None:
    engine = engine_of()
    cat, dog = image_prompt(seed=1, max_new_tokens=6), image_prompt(seed=2, max_new_tokens=6)
    first, second = engine.generate([cat])[0], engine.generate([dog])[0]
    assert first.token_ids != second.token_ids
    assert (list(first.token_ids), list(second.token_ids)) == (expected(cat), expected(dog))
    assert second.cached_tokens == 4, "the text before the image, and none of it"


@pytest.mark.parametrize("change", ["dtype", "grid", "kind"])
def test_the_same_bytes_that_mean_something_else_are_something_else(change: str) -> None:
    ids = list(image_prompt((1, 4, 6)).token_ids)
    pixels, sampling = pixels_for([(1, 4, 6)], seed=1).half(), SamplingParams(max_new_tokens=4)
    usual = VisualInputs(pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 6]]))
    first = Request(token_ids=ids, visual=usual, sampling=sampling)
    visual = {
        "dtype": VisualInputs(pixel_values=pixels.view(torch.bfloat16), image_grid_thw=torch.tensor([[1, 4, 6]])),
        "grid": VisualInputs(pixel_values=pixels, image_grid_thw=torch.tensor([[1, 6, 4]])),
        "kind": VisualInputs(pixel_values_videos=pixels, video_grid_thw=torch.tensor([[1, 4, 6]])),
    }[change]
    if change == "kind":
        ids = [VIDEO if token == IMAGE else token for token in ids]
    second = Request(token_ids=ids, visual=visual, sampling=sampling)
    engine = engine_of()
    engine.generate([first])
    again = engine.generate([second])[0]
    assert again.cached_tokens == 4
    assert list(again.token_ids) == expected(second)


def test_positions_go_on_after_a_prefix_of_text() -> None:
    """The original restarts them at 0."""
    engine, request = engine_of(), text_prompt(*range(30), max_new_tokens=8)
    engine.generate([text_prompt(*range(22), 99, max_new_tokens=1)])
    found = engine.generate([request])[0]
    assert found.cached_tokens == 20
    assert list(found.token_ids) == expected(request)


@pytest.mark.parametrize("page_size", [1, 3, 4, 5])
def test_positions_and_features_go_on_after_a_prefix_that_ends_in_an_image(page_size: int) -> None:
    engine = engine_of(page_size=page_size, max_step_tokens=11)
    whole = image_prompt((1, 8, 10), seed=3, max_new_tokens=5)
    key = 4 + 11  # of 20 tokens of the image
    engine.generate([whole])
    engine.radix_cache.evict(engine.radix_cache.size - key // page_size)
    engine._runner.features.clear()
    found = engine.generate([whole])[0]
    assert found.cached_tokens == key // page_size * page_size
    assert list(found.token_ids) == expected(whole)


@pytest.mark.parametrize("step", [1, 3, 7])
def test_an_image_may_be_split_among_chunks_and_is_encoded_once(step: int) -> None:
    engine = engine_of(max_step_tokens=step)
    request = image_prompt((1, 6, 10), seed=4, max_new_tokens=4)
    assert list(engine.generate([request])[0].token_ids) == expected(request)
    assert engine.model.encoded == [60]
    assert max(engine.model.tokens) <= step


@pytest.mark.parametrize("step", [1, 5])
def test_images_side_by_side_may_be_split_too(step: int) -> None:
    request = Request(
        token_ids=[1, *[IMAGE] * 6, *[IMAGE] * 4, 2],
        visual=visual_of([(1, 4, 6), (1, 4, 4)]),
        sampling=SamplingParams(max_new_tokens=3),
    )
    assert list(engine_of(max_step_tokens=step).generate([request])[0].token_ids) == expected(request)


def test_images_are_encoded_once_for_all_requests_and_not_at_all_if_their_prefix_is_there() -> None:
    engine = engine_of()
    requests = [image_prompt(seed=1, before=1, after=after, max_new_tokens=2) for after in (2, 3, 4)]
    engine.generate(requests)
    assert engine.model.encoded == [24]
    engine._runner.features.clear()
    engine.generate(requests)
    assert engine.model.encoded == [24]


def test_features_are_kept_for_a_while_and_up_to_a_size() -> None:
    engine = engine_of(prefix_cache=False)
    features = engine._runner.features
    features._most_bytes = 3 * 6 * HIDDEN * 3 * 4  # three images
    for seed in (1, 2, 3, 1, 4, 1, 2):
        request = image_prompt(seed=seed, max_new_tokens=2)
        assert list(engine.generate([request])[0].token_ids) == expected(request)
        assert features._bytes == sum(one.nbytes for one in features._features.values()) <= features._most_bytes
    assert len(engine.model.encoded) == 5, "1, 2, 3, 4, and 2 again"


def test_features_are_let_go_when_their_tokens_are_computed() -> None:
    engine = engine_of(max_step_tokens=6)
    engine._runner.features._most_bytes = 0
    request = Request(
        token_ids=[1, START, *[IMAGE] * 6, 2, START, *[IMAGE] * 6, 3],
        visual=visual_of([(1, 4, 6), (1, 4, 6)]),
        sampling=SamplingParams(max_new_tokens=3),
    )
    engine.submit(request)
    held = []
    while engine._live:
        live = next(iter(engine._live.values()))
        engine.step()
        held.append(sorted(live.visual.held))
    assert held == [[0], [1], [], [], []]


# ---- what can never be served ----------------------------------------------------------------------------------------


def test_a_prompt_that_never_fits_is_refused_at_once() -> None:
    """The original leaves it pending for ever."""
    engine = engine_of(kv_tokens=100)
    with pytest.raises(UsageError, match="at most 100 tokens, which is what the KV pool holds, found 90 of the prompt"):
        engine.submit(text_prompt(*[1] * 90, max_new_tokens=11))
    with pytest.raises(UsageError, match="the context"):
        engine_of(context_length=50).stream(text_prompt(*[1] * 40, max_new_tokens=11))
    assert not engine.busy


def test_a_prompt_longer_than_a_step_is_not_pending_for_ever() -> None:
    engine, request = engine_of(max_step_tokens=10), text_prompt(*range(64), max_new_tokens=3)
    assert list(engine.generate([request])[0].token_ids) == expected(request)
    assert engine.model.tokens == [10, 10, 10, 10, 10, 10, 4, 1, 1]


IDS = (1, START, *[IMAGE] * 6, 2)


@pytest.mark.parametrize(
    ("ids", "visual", "message"),
    [
        (IDS, None, "expected no image tokens .* without image_grid_thw"),
        (IDS[:-2], visual_of([(1, 4, 6)]), "expected 6 image tokens .* found 5"),
        ((*IDS, IMAGE), visual_of([(1, 4, 6)]), "after the 6 of image_grid_thw, found 1 more"),
        (IDS, visual_of([(1, 4, 6), (1, 2, 2)]), "expected 7, found 6"),
        (IDS, visual_of((), [(1, 4, 6)]), "image_grid_thw"),
        ((1, 2), visual_of([(1, 4, 6)]), "expected 6, found 0"),
        (IDS, visual_of([(1, 3, 8)]), "multiples of 2"),
        (
            IDS,
            VisualInputs(pixel_values=torch.zeros(24, WIDTH + 1), image_grid_thw=torch.tensor([[1, 4, 6]])),
            f"expected {WIDTH} values in a patch, found {WIDTH + 1}",
        ),
        ((1, VOCAB), None, f"ids below {VOCAB}"),
    ],
)
def test_what_does_not_fit_together_is_refused_at_once(ids: Sequence[int], visual: Any, message: str) -> None:
    engine = engine_of()
    with pytest.raises(UsageError, match=message):
        engine.submit(Request(token_ids=ids, visual=visual))
    assert not engine.busy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pixel_values": torch.zeros(24, WIDTH)}, "both or neither"),
        ({"image_grid_thw": torch.tensor([[1, 4, 6]])}, "both or neither"),
        ({"pixel_values": torch.zeros(23, WIDTH), "image_grid_thw": torch.tensor([[1, 4, 6]])}, "expected 24 patches"),
        ({"pixel_values": torch.zeros(24, WIDTH), "image_grid_thw": torch.tensor([1, 4, 6])}, r"\[rows, 3\]"),
        ({"pixel_values": torch.zeros(24, WIDTH), "image_grid_thw": torch.ones(1, 3)}, "whole numbers"),
        ({"pixel_values": torch.zeros(0, WIDTH), "image_grid_thw": torch.tensor([[0, 4, 6]])}, "at least 1"),
        ({"pixel_values": torch.zeros(24), "image_grid_thw": torch.tensor([[1, 4, 6]])}, "floating point"),
        ({"pixel_values_videos": torch.zeros(24, 1), "video_grid_thw": torch.tensor([[1, 2, 2]])}, "video_grid_thw"),
    ],
)
def test_pixels_without_their_grid_are_refused(fields: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VisualInputs(**fields)


@pytest.mark.parametrize("ids", [(), (1, -1), (1.0,), ("1",), (True,)])
def test_tokens_that_are_none_are_refused(ids: Any) -> None:
    with pytest.raises(UsageError, match="token_ids"):
        Request(token_ids=ids)


def test_tokens_may_come_as_a_tensor() -> None:
    assert Request(token_ids=torch.tensor([3, 4])).token_ids == (3, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"page_size": 0}, {"kv_tokens": -1}, {"max_running": 1.5}, {"max_step_tokens": 0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))}: expected a whole number, at least 1, found"):
        EngineOptions(**options)


def test_no_more_context_than_the_model_has() -> None:
    with pytest.raises(UsageError, match="context_length: expected at most 4096, .* found 4097"):
        engine_of(context_length=4097)


# ---- ends ------------------------------------------------------------------------------------------------------------


def tokens_after(*ids: int, **sampling: Any) -> list[int]:
    return expected(text_prompt(*ids, **sampling), ends=())


def test_lengths_and_ends() -> None:
    tokens = tokens_after(1, 2, 3, max_new_tokens=9)
    stop = tokens[4]
    engine = engine_of(eos_token_ids=(stop,))
    cut = tokens[: tokens.index(stop) + 1]
    whole, ended, by_request, ignoring = engine.generate(
        [
            text_prompt(1, 2, 3, max_new_tokens=2),
            text_prompt(1, 2, 3, max_new_tokens=9),
            text_prompt(1, 2, 3, max_new_tokens=9, stop_token_ids=(tokens[2],), ignore_eos=True),
            text_prompt(1, 2, 3, max_new_tokens=9, ignore_eos=True),
        ]
    )
    assert (list(whole.token_ids), whole.finish_reason) == (tokens[:2], "length")
    assert (list(ended.token_ids), ended.finish_reason) == (cut, "stop")
    assert (list(by_request.token_ids), by_request.finish_reason) == (tokens[: tokens.index(tokens[2]) + 1], "stop")
    assert (list(ignoring.token_ids), ignoring.finish_reason) == (tokens, "length")
    assert ended.text == Bytes().decode(cut[:-1])
    assert_empty(engine)


def test_the_models_own_end_is_known_from_its_config() -> None:
    engine = engine_of()
    assert engine._eos == (EOS,)
    DIMS.eos_token_id = (7, 8)
    try:
        assert engine_of(eos_token_ids=(9,))._eos == (7, 8, 9)
        DIMS.eos_token_id = None
        assert engine_of()._eos == ()
    finally:
        DIMS.eos_token_id = EOS


def test_text_ends_before_a_stop_string() -> None:
    prompt, params = (4, 5, 6), {"max_new_tokens": 30, "ignore_eos": True}
    tokens = tokens_after(*prompt, **params)
    text = Bytes().decode(tokens)
    stop = next(text[at : at + 2] for at in range(8, len(text)) if text[at : at + 2].isascii())
    engine = engine_of()
    found = engine.generate([text_prompt(*prompt, stop=(stop,), **params)])[0]
    assert found.text == text[: text.index(stop)]
    assert found.finish_reason == "stop"
    assert len(found.token_ids) < 30
    with pytest.raises(UsageError, match="stop: expected a tokenizer"):
        Engine(FakeModel(), EngineOptions(kv_tokens=100)).submit(text_prompt(1, stop=("x",)))


def test_without_a_tokenizer_there_is_no_text() -> None:
    engine = Engine(FakeModel(), EngineOptions(kv_tokens=100))
    found = engine.generate([text_prompt(1, 2, max_new_tokens=3)])[0]
    assert (found.text, len(found.token_ids)) == ("", 3)


def test_what_is_told_of_a_completion() -> None:
    engine = engine_of()
    requests = [text_prompt(*range(10), max_new_tokens=5, logprobs=True), text_prompt(*range(10), max_new_tokens=5)]
    engine.generate(requests[:1])
    first, second = engine.generate(requests)
    assert (first.prompt_tokens, first.cached_tokens) == (10, 8)
    assert first.token_ids == second.token_ids
    assert second.logprobs is None
    assert first.logprobs is not None
    assert len(first.logprobs) == 5
    assert all(-5 < one < 0 for one in first.logprobs)
    assert first.first_token_seconds is not None
    assert 0 < first.first_token_seconds < first.seconds


# ---- streams and aborts ----------------------------------------------------------------------------------------------


def test_a_stream_gives_what_generate_gives() -> None:
    request = image_prompt(max_new_tokens=8, logprobs=True, ignore_eos=True)
    engine = engine_of()
    events = list(engine.stream(request))
    whole = engine.generate([request])[0]
    assert tuple(event.token_id for event in events) == whole.token_ids
    assert "".join(event.text for event in events) == whole.text
    assert tuple(event.logprob for event in events) == whole.logprobs
    assert [event.finish_reason for event in events] == [None] * 7 + ["length"]
    assert_empty_after_report(engine)


def assert_empty_after_report(engine: Engine) -> None:
    engine.step()
    assert_empty(engine)


def test_streams_take_turns() -> None:
    engine = engine_of()
    requests = [text_prompt(number, 2, 3, max_new_tokens=4 + number) for number in range(3)]
    streams = [engine.stream(request) for request in requests]
    found: list[list[int | None]] = [[], [], []]
    for _ in range(10):
        for tokens, stream in zip(found, streams, strict=True):
            tokens += [event.token_id for event in [next(stream, None)] if event is not None]
    assert found == [expected(request) for request in requests]
    completion = streams[2].completion
    assert completion is not None
    assert list(completion.token_ids) == found[2]


def test_a_stream_takes_no_events_from_those_that_step() -> None:
    engine, request = engine_of(), text_prompt(1, 2, 3, max_new_tokens=4)
    submitted = engine.submit(request)
    list(engine.stream(text_prompt(5, 6, max_new_tokens=9, ignore_eos=True)))
    engine.generate([text_prompt(7, max_new_tokens=3)])
    events = engine.step()
    assert [event.token_id for event in events if event.request_id == submitted] == expected(request)
    assert {event.request_id for event in events} == {submitted}


@pytest.mark.parametrize("how", ["close", "with", "drop", "break"])
def test_a_stream_that_nobody_reads_on_is_aborted(how: str) -> None:
    engine, request = engine_of(), image_prompt(max_new_tokens=50, ignore_eos=True)
    stream = engine.stream(request)
    next(stream)
    if how == "close":
        stream.close()
        assert [event.finish_reason for event in stream] == ["abort"]
    elif how == "with":
        with stream:
            next(stream)
    elif how == "drop":
        del stream
    else:
        for _ in stream:
            break
        del stream
    gc.collect()
    assert [event.finish_reason for event in engine.step()][-1] == "abort"
    assert_empty(engine)


def test_a_stream_that_was_never_read_is_aborted_too() -> None:
    engine = engine_of()
    engine.stream(text_prompt(1, 2, 3))
    gc.collect()
    assert [event.finish_reason for event in engine.step()] == ["abort"]
    assert_empty(engine)


def test_aborts_of_waiting_running_and_ended_requests() -> None:
    engine = engine_of(max_running=1)
    running, waiting = (engine.submit(text_prompt(number, max_new_tokens=9)) for number in range(2))
    engine.step()
    for request_id in (waiting, running, running, 77):
        engine.abort(request_id)
    assert [(event.request_id, event.finish_reason) for event in engine.step()] == [
        (waiting, "abort"),
        (running, "abort"),
    ]
    assert_empty(engine)


def test_an_abort_in_the_middle_of_a_step_waits_for_its_end() -> None:
    model, engine = FakeModel(), None
    ids: list[int] = []

    class Aborting(Bytes):
        def decode(self, tokens: Sequence[int]) -> str:
            assert engine is not None
            engine.abort(ids[1])
            return super().decode(tokens)

    engine = Engine(model, EngineOptions(page_size=4, kv_tokens=400), Aborting())
    ids += [engine.submit(text_prompt(number, 5, 6, max_new_tokens=4)) for number in range(3)]
    reasons: dict[int, str | None] = {}
    while engine.busy:
        reasons |= {event.request_id: event.finish_reason for event in engine.step()}
    assert reasons == {ids[0]: "length", ids[1]: "abort", ids[2]: "length"}
    assert_empty(engine)


# ---- what goes wrong on the way --------------------------------------------------------------------------------------


class Failing(FakeModel):
    """Fails where it is told to."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.after = where, 3

    def visual(self, pixels: Tensor, grid: Tensor) -> Tensor:
        if self.where == "visual":
            raise RuntimeError("a broken image")
        return super().visual(pixels, grid)[: -1 if self.where == "features" else None]

    def forward(self, ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        logits = super().forward(ids, positions, batch)
        self.after -= 1
        if self.after < 0 and self.where == "forward":
            raise KeyboardInterrupt
        return logits * torch.nan if self.after < 0 and self.where == "logits" else logits


def steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()


@pytest.mark.parametrize(
    ("where", "error"),
    [("visual", RuntimeError), ("features", RuntimeError), ("forward", KeyboardInterrupt), ("logits", InputError)],
)
def test_a_step_that_fails_leaves_no_page_behind_and_the_others_go_on(where: str, error: type[BaseException]) -> None:
    model = Failing(where)
    engine = engine_of(model, max_running=2)
    broken = engine.submit(image_prompt(max_new_tokens=9, ignore_eos=True))
    beside = engine.submit(text_prompt(1, 2, max_new_tokens=9, ignore_eos=True))
    later = text_prompt(5, 6, max_new_tokens=4)
    waiting, found = engine.submit(later), []
    with pytest.raises(error):
        steps(engine, 9)
    model.where = ""
    reasons = {}
    while engine.busy:
        for event in engine.step():
            reasons[event.request_id] = event.finish_reason
            found += [event.token_id] * (event.request_id == waiting)
    assert reasons == {broken: "abort", beside: "abort", waiting: "length"}
    assert found == expected(later)
    assert_empty(engine)


def test_generate_leaves_nothing_behind_when_it_fails() -> None:
    engine = engine_of(Failing("visual"), max_running=1)
    with pytest.raises(RuntimeError, match="broken image"):
        engine.generate([image_prompt(), text_prompt(1), text_prompt(2)])
    assert [event.finish_reason for event in engine.step()] == ["abort"] * 3
    assert_empty(engine)
    with pytest.raises(UsageError, match="ids below"):
        engine.generate([text_prompt(1), text_prompt(VOCAB)])
    assert_empty_after_report(engine)


def test_what_a_failed_step_computed_is_not_taken_for_a_prefix() -> None:
    model = Failing("logits")
    model.after = 0
    engine, request = engine_of(model), text_prompt(*range(20), max_new_tokens=4)
    with pytest.raises(InputError, match="expected numbers, found infinities or NaN"):
        engine.generate([request])
    model.where = ""
    found = engine.generate([request])[0]
    assert (found.cached_tokens, list(found.token_ids)) == (0, expected(request))


class Chatty(FakeModel):
    """Wants to say the image's token."""

    def forward(self, ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        logits = super().forward(ids, positions, batch)
        logits[:, IMAGE] += 1000 * (logits[:, 0] > 0)
        return logits


def test_a_visual_token_that_is_generated_is_but_a_token() -> None:
    """Alone, beside prompts with images, computed again after a preemption: the same tokens."""
    talk, show = text_prompt(1, 2, 3, max_new_tokens=30, ignore_eos=True), image_prompt(max_new_tokens=3)
    alone = engine_of(Chatty()).generate([talk])[0].token_ids
    assert IMAGE in alone[:-1]
    beside = engine_of(Chatty(), max_step_tokens=2).generate([talk, show, show])
    assert beside[0].token_ids == alone
    crowd = engine_of(Chatty(), kv_tokens=40, max_running=3).generate([show, talk, talk])
    assert [one.token_ids for one in crowd] == [beside[1].token_ids, alone, alone]


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_pool_is_as_large_as_free_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3vl_convert.inference.engine import runner

    token = 2 * DIMS.layers * DIMS.kv_heads * DIMS.head_dim * 4
    monkeypatch.setattr(runner, "free_memory", lambda device: token * 16 * 10 + 5)
    assert Engine(FakeModel()).allocator.total == 10
    monkeypatch.setattr(runner, "free_memory", lambda device: 1 << 60)
    engine = Engine(FakeModel(), EngineOptions(max_running=2, context_length=100))
    assert engine.allocator.total == 2 * 7, "no more than can ever be used"
    monkeypatch.setattr(runner, "free_memory", lambda device: token)
    with pytest.raises(UsageError, match="expected memory for at least 16 tokens"):
        Engine(FakeModel())


def test_free_memory_is_asked_of_the_system() -> None:
    from qwen3vl_convert.inference.engine.options import free_memory

    assert 1 << 20 < free_memory(torch.device("cpu")) < 1 << 50
