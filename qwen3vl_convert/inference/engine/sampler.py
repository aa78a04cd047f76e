"""The next token of each sequence of a batch, from logits: greedy, or drawn.

What a request draws depends on its own seed and on how many tokens it has, and on nothing else in the batch: each draw
has a number of its own, and picks a token by it from the distribution in the order of the vocabulary. Filters compare
values alone, so that equal logits, which bfloat16 makes common, are kept or dropped together.

Axes: B sequences, V vocabulary, C candidates, the largest logits in descending order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from qwen3vl_convert.inference.engine.requests import SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """How one sequence wants its next token."""

    params: SamplingParams
    seed: int
    number: int
    """How many tokens were generated before."""
    row: int = 0
    """Of the sequence in `PenaltyCounts`; only read if its parameters penalise."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """On the host, one each per sequence."""

    tokens: list[int]
    logprobs: list[float]
    """Of the token, before temperature, penalties and filters; NaN where it was not asked for."""
    finite: bool
    """Whether the logits were numbers: False means broken weights or an overflow."""


class PenaltyCounts:
    """Which tokens each sequence has seen, for those that penalise. Memory is taken when the first one comes."""

    def __init__(self, rows: int, vocab: int, device: torch.device | str) -> None:
        self._shape, self._device = (rows, vocab), device
        self._prompt_BV = self._output_BV = torch.empty(0)

    def start(self, row: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Set a row anew: for a sequence that begins, or comes back."""
        if not len(self._output_BV):
            self._prompt_BV = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._output_BV = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        vocab = self._shape[1]
        self._prompt_BV[row] = torch.bincount(torch.tensor(prompt), minlength=vocab).bool().to(self._device)
        counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=vocab)
        self._output_BV[row] = counts.int().to(self._device)

    def add(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """One more token for each of the rows, which are different ones."""
        if rows:
            at = torch.tensor([rows, tokens], device=self._device)
            self._output_BV[at[0], at[1]] += 1

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(whether a token was in the prompt, how often it was generated), [B, V] each."""
        return self._prompt_BV[rows], self._output_BV[rows]


def sample(logits_BV: Tensor, draws: Sequence[Draw], counts: PenaltyCounts) -> Sampled:
    """One token for each row of the logits, which are of any floating type."""
    if all(map(_plain, draws)):
        return _on_host(*logits_BV.max(-1))
    logits_BV = logits_BV.float()
    best_B, tokens_B = logits_BV.max(-1)
    score_BV = penalised(logits_BV, draws, counts)
    if score_BV is not logits_BV:
        tokens_B = score_BV.argmax(-1)
    if any(draw.params.temperature > 0 for draw in draws):
        tokens_B = _drawn(score_BV, tokens_B, draws)
    wanted = any(draw.params.logprobs for draw in draws)
    return _on_host(best_B, tokens_B, _logprobs(logits_BV, tokens_B) if wanted else None)


def _on_host(best_B: Tensor, tokens_B: Tensor, logprob_B: Tensor | None = None) -> Sampled:
    """In one copy. Doubles hold every token id. `best_B`: the largest logits."""
    logprob_B = torch.full_like(best_B, torch.nan) if logprob_B is None else logprob_B
    tokens, logprobs, best = torch.stack([tokens_B.double(), logprob_B.double(), best_B.double()]).tolist()
    return Sampled(list(map(int, tokens)), logprobs, all(map(math.isfinite, best)))


def _plain(draw: Draw) -> bool:
    """Whether nothing is computed with its logits."""
    return not (draw.params.temperature or draw.params.logprobs or penalises(draw.params))


def _logprobs(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return logits_BV.gather(-1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(-1)


def penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def penalised(logits_BV: Tensor, draws: Sequence[Draw], counts: PenaltyCounts) -> Tensor:
    """Logits less the penalties; the very same tensor where nobody penalises.

    Repetition divides what is positive and multiplies what is negative, for all tokens of prompt and output. Presence
    and frequency are subtracted, once and as often as a token was generated.
    """
    which = [at for at, draw in enumerate(draws) if penalises(draw.params)]
    if not which:
        return logits_BV
    params, device = [draws[at].params for at in which], logits_BV.device
    index = torch.tensor([which, [draws[at].row for at in which]], device=device)
    repetition, presence, frequency = torch.tensor(
        [[one.repetition_penalty, one.presence_penalty, one.frequency_penalty] for one in params],
        dtype=torch.float32,
        device=device,
    ).T[:, :, None]
    in_prompt_BV, output_BV = counts.of(index[1])
    some_BV = logits_BV[index[0]]
    hit_BV = torch.where(some_BV > 0, some_BV / repetition, some_BV * repetition)
    some_BV = torch.where(in_prompt_BV | (output_BV > 0), hit_BV, some_BV)
    some_BV = some_BV - presence * (output_BV > 0) - frequency * output_BV
    return logits_BV.index_copy(0, index[0], some_BV)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _drawn(score_BV: Tensor, greedy_B: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draw for the rows with a temperature; the others keep their greedy token."""
    which = [at for at, draw in enumerate(draws) if draw.params.temperature > 0]
    chosen = [draws[at] for at in which]
    rows_B = torch.tensor(which, device=score_BV.device)
    probs_BV = distribution(score_BV[rows_B], [draw.params for draw in chosen])
    number_B = torch.tensor(
        [uniform(draw.seed, draw.number) for draw in chosen], dtype=torch.float64, device=score_BV.device
    )
    cdf_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    # `right`: the first token whose sum is beyond the number, never one of no probability.
    found_B = torch.searchsorted(cdf_BV, number_B[:, None] * cdf_BV[:, -1:], right=True)[:, 0].clamp(
        max=probs_BV.shape[-1] - 1
    )
    return greedy_B.index_copy(0, rows_B, found_B)


def uniform(seed: int, number: int) -> float:
    """A number in [0, 1) for draw `number` of a seed, a multiple of 2^-32, always the same one."""
    digest = blake2b(f"{seed} {number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") / 2**32


def distribution(score_BV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities [B, V] after temperature, top-k, top-p and min-p, in this order. All temperatures are above 0.

    top-k: as many of the largest values. top-p: of those, the fewest whose probabilities reach p. min-p: those at
    least as probable as p times the most probable. Tokens that equal the last one kept are kept as well.
    """
    table = torch.tensor(
        [[one.temperature, one.top_p, one.min_p] for one in params], dtype=torch.float64, device=score_BV.device
    )
    temperature_B1, top_p_B1, min_p_B1 = table.T[:, :, None]
    # The largest becomes 0, and no temperature is too small for a float: no overflow.
    scaled_BV = (score_BV - score_BV.amax(-1, keepdim=True)) / temperature_B1.clamp(min=1e-30).float()
    least_B1 = min_p_B1.log().float()
    if any(map(_cuts, params)):
        least_B1 = torch.maximum(least_B1, _least(scaled_BV, params, top_p_B1))
    kept_BV: Tensor = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
    return kept_BV.softmax(-1)


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _least(scaled_BV: Tensor, params: Sequence[SamplingParams], top_p_B1: Tensor) -> Tensor:
    """The smallest value that top-k and top-p keep [B, 1]."""
    vocab, device = scaled_BV.shape[-1], scaled_BV.device
    limits = [(min(one.top_k, vocab) or vocab) if _cuts(one) else 1 for one in params]
    # A few candidates where every row has a top-k; to sort a vocabulary takes long on a CPU.
    value_BC = scaled_BV.topk(max(limits)).values
    limit_B1 = torch.tensor(limits, device=device)[:, None]
    place_C = torch.arange(value_BC.shape[-1], device=device)
    prob_BC = value_BC.masked_fill(place_C >= limit_B1, -torch.inf).softmax(-1, dtype=torch.float64)
    before_BC = prob_BC.cumsum(-1) - prob_BC
    kept_BC = ((before_BC < top_p_B1) | (top_p_B1 >= 1)) & (place_C < limit_B1)
    least_B1 = value_BC.gather(-1, kept_BC.sum(-1, keepdim=True) - 1)
    free_B = torch.tensor([not _cuts(one) for one in params], device=device)
    return least_B1.masked_fill(free_B[:, None], -torch.inf)
