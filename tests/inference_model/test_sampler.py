"""Sampling against formulas and plain loops, and a token that no neighbour in the batch can change."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.inference.engine import sampler
from qwen3vl_convert.inference.engine.requests import SamplingParams
from qwen3vl_convert.inference.engine.sampler import (
    Draw,
    PenaltyCounts,
    distribution,
    penalised,
    sample,
    uniform,
)

# Few values, so that there are ties.
values = st.integers(-12, 12).map(lambda value: value / 4)
rows = st.lists(values, min_size=7, max_size=7)
filters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
)


def by_hand(row: Sequence[float], params: SamplingParams) -> list[float]:
    """top-k, then top-p of what is left, then min-p, with loops; equals of the last one kept are kept."""
    scaled = [value / params.temperature for value in row]
    ranked = sorted(scaled, reverse=True)[: params.top_k or len(row)]
    weights = [math.exp(value) for value in ranked]
    nucleus, mass = list[float](), 0.0
    for value, weight in zip(ranked, weights, strict=True):
        if mass < params.top_p or not nucleus:
            nucleus.append(value)
        mass += weight / sum(weights)
    least = max(nucleus[-1], max(scaled) + math.log(params.min_p) if params.min_p else -math.inf)
    kept = [math.exp(value) if value >= least - 1e-6 else 0.0 for value in scaled]
    return [weight / sum(kept) for weight in kept]


def on_an_edge(row: Sequence[float], params: SamplingParams) -> bool:
    """Whether rounding decides."""
    scaled = sorted((value / params.temperature for value in row), reverse=True)[: params.top_k or len(row)]
    weights = [math.exp(value) for value in scaled]
    mass, sums = 0.0, []
    for weight in weights:
        mass += weight / sum(weights)
        sums.append(mass)
    near_p = params.top_p < 1 and any(abs(one - params.top_p) < 1e-6 for one in sums)
    limit = max(scaled) + math.log(params.min_p) if params.min_p else -math.inf
    return near_p or any(abs(value - limit) < 1e-5 for value in scaled[1:] if value != max(scaled))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(rows, filters), min_size=1, max_size=5))
def test_the_distribution_is_that_of_the_formula(cases: list[tuple[list[float], SamplingParams]]) -> None:
    cases = [case for case in cases if not on_an_edge(*case)]
    if not cases:
        return
    found = distribution(torch.tensor([row for row, _ in cases]), [params for _, params in cases])
    torch.testing.assert_close(found, torch.tensor([by_hand(*case) for case in cases]), rtol=1e-4, atol=1e-6)


penalties = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.2]),
)
histories = st.lists(st.integers(0, 6), max_size=6)


def penalised_by_hand(row: list[float], prompt: list[int], output: list[int], params: SamplingParams) -> list[float]:
    found = []
    for token, value in enumerate(row):
        if token in prompt + output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        if token in output:
            value -= params.presence_penalty
        for _ in range(output.count(token)):
            value -= params.frequency_penalty
        found.append(value)
    return found


@settings(deadline=None)
@given(st.lists(st.tuples(rows, histories.filter(bool), histories, penalties), min_size=1, max_size=4))
def test_penalties_are_those_of_a_loop(cases: list[tuple[list[float], list[int], list[int], SamplingParams]]) -> None:
    counts = PenaltyCounts(6, 7, "cpu")
    order = list(range(5, 5 - len(cases), -1))
    for row, (_, prompt, output, _) in zip(order, cases, strict=True):
        counts.start(row, [6, 6], [3])
        counts.start(row, prompt, output[: len(output) // 2])
    for at in range(6):
        late = [(row, case[2][len(case[2]) // 2 :]) for row, case in zip(order, cases, strict=True)]
        pairs = [(row, rest[at]) for row, rest in late if at < len(rest)]
        counts.add([row for row, _ in pairs], [token for _, token in pairs])
    draws = [Draw(case[3], 0, 0, row) for row, case in zip(order, cases, strict=True)]
    found = penalised(torch.tensor([case[0] for case in cases]), draws, counts)
    torch.testing.assert_close(found, torch.tensor([penalised_by_hand(*case) for case in cases]))


def draw_one(logits: Tensor, params: SamplingParams, seed: int, number: int) -> int:
    return sample(logits[None], [Draw(params, seed, number)], PenaltyCounts(1, logits.shape[-1], "cpu")).tokens[0]


def test_frequencies_are_the_probabilities() -> None:
    logits, params = torch.tensor([0.0, 1.0, -1.0, 2.0]), SamplingParams(temperature=1.5, top_k=3)
    draws = [Draw(params, 11, number) for number in range(20_000)]
    tokens = sample(logits.expand(20_000, -1), draws, PenaltyCounts(1, 4, "cpu")).tokens
    share = torch.bincount(torch.tensor(tokens), minlength=4) / len(tokens)
    torch.testing.assert_close(share, distribution(logits[None], [params])[0], rtol=0, atol=0.012)
    assert share[2] == 0


def params_for(number: int, **fields: Any) -> SamplingParams:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.7},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    ]
    return SamplingParams(**kinds[number % len(kinds)], **fields)


def test_a_token_does_not_depend_on_the_rest_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(30, 50, generator=generator).mul(3).bfloat16()
    draws = [Draw(params_for(at), 100 + at, at % 4, row=at) for at in range(30)]
    counts = PenaltyCounts(30, 50, "cpu")
    for at in range(30):
        counts.start(at, [at, 3], [at + 1, at + 1])
    together = sample(logits, draws, counts).tokens
    alone = [sample(logits[at, None], [draw], counts).tokens[0] for at, draw in enumerate(draws)]
    backwards = sample(logits.flip(0), draws[::-1], counts).tokens[::-1]
    assert together == alone == backwards


def test_seed_and_number_of_the_token_decide_the_draw() -> None:
    logits, params = torch.zeros(1000), SamplingParams(temperature=1.0)
    tokens = [draw_one(logits, params, seed, number) for seed in range(8) for number in range(8)]
    assert len(set(tokens)) > 55
    assert tokens == [draw_one(logits, params, seed, number) for seed in range(8) for number in range(8)]
    assert uniform(1, 23) != uniform(12, 3)
    assert all(0 <= uniform(seed, 0) < 1 for seed in range(1000))


def test_greedy_is_the_largest_and_a_low_temperature_nearly_so() -> None:
    logits = torch.tensor([[0.5, 3.0, -2.0], [4.0, 3.9, 3.8]])
    draws = [Draw(SamplingParams(), 0, 0), Draw(SamplingParams(temperature=1e-60), 0, 0)]
    assert sample(logits, draws, PenaltyCounts(2, 3, "cpu")).tokens == [1, 0]


def test_greedy_is_the_largest_after_the_penalties() -> None:
    counts = PenaltyCounts(1, 3, "cpu")
    counts.start(0, [0, 1], [])
    draw = Draw(SamplingParams(repetition_penalty=2.0), 0, 0)
    assert sample(torch.tensor([[3.0, -1.0, 2.0]]), [draw], counts).tokens == [2]


def test_logprobs_are_those_of_the_model_whatever_the_filters() -> None:
    logits = torch.randn(3, 9)
    draws = [Draw(params_for(at, logprobs=True), 5, 0) for at in (0, 2, 4)]
    found = sample(logits, draws, PenaltyCounts(1, 9, "cpu"))
    expected = logits.log_softmax(-1)[torch.arange(3), torch.tensor(found.tokens)]
    assert found.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    quiet = sample(logits, [Draw(params_for(at), 5, 0) for at in (0, 2, 4)], PenaltyCounts(1, 9, "cpu"))
    assert all(math.isnan(one) for one in quiet.logprobs)


@pytest.mark.parametrize(("value", "finite"), [(math.nan, False), (math.inf, False), (-math.inf, True)])
def test_logits_that_are_no_numbers_are_noticed(value: float, finite: bool) -> None:
    logits = torch.tensor([[0.0, value, 1.0], [0.0, 1.0, 2.0]])
    draws = [Draw(SamplingParams(), 0, 0)] * 2
    assert sample(logits, draws, PenaltyCounts(1, 3, "cpu")).finite is finite


def test_equal_logits_at_the_edge_are_kept_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert (distribution(logits, [SamplingParams(temperature=1.0, top_k=2)]) > 0).tolist() == [[True] * 4 + [False]]


def test_top_p_is_of_what_top_k_has_left() -> None:
    logits = torch.tensor([[40.0, 31.0, 29.0], [1.0, 1.0, 1.0]]).log()
    both = [SamplingParams(temperature=1.0, top_k=2, top_p=0.56), SamplingParams(temperature=1.0, top_p=0.99)]
    found = distribution(logits, both)[0].tolist()
    assert found == [1.0, 0.0, 0.0], "40 of 71 are enough, 40 of 100 would not be"


def test_the_smallest_number_draws_no_token_without_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, number: 0.0)
    assert draw_one(torch.tensor([0.0, 5.0, 4.0]), SamplingParams(temperature=1.0, top_k=2), 0, 0) == 1


def test_the_largest_number_draws_no_token_without_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, number: 1 - 2**-32)
    assert draw_one(torch.tensor([4.0, 5.0, 0.0, -9.0]), SamplingParams(temperature=1.0, top_k=2), 0, 0) == 1


def test_memory_for_penalties_is_taken_when_somebody_penalises() -> None:
    counts = PenaltyCounts(4, 100, "cpu")
    logits = torch.randn(1, 100)
    assert penalised(logits, [Draw(SamplingParams(), 0, 0)], counts) is logits
    assert counts._output_BV.numel() == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected 0, for greedy, or more, found -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1, found 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k: expected 0, for no limit, or more, found -1"),
        ({"top_k": 1.5}, "top_k: expected whole numbers, found 1.5"),
        ({"min_p": 2}, "min_p: expected from 0 to 1, found 2"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, found 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected from 0.01 to 100, found 0.0"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"seed": "x"}, "seed"),
        ({"stop": ("",)}, "stop: expected strings that are not empty, found ''"),
        ({"stop_token_ids": (True,)}, "stop_token_ids"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplingParams(**fields)


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
