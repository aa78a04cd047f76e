"""One request on its way through the engine: what it is made of, what has come of it, who listens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen3vl_convert.inference.engine.batching import Positions
from qwen3vl_convert.inference.engine.detokenizer import Detokenizer
from qwen3vl_convert.inference.engine.requests import Completion, FinishReason, SamplingParams, TokenEvent
from qwen3vl_convert.inference.engine.scheduler import SequenceState
from qwen3vl_convert.inference.engine.stream import Mailbox
from qwen3vl_convert.inference.engine.visual import VisualPrompt


@dataclass(slots=True, eq=False)
class Live:
    """A request that has not ended."""

    sequence: SequenceState
    sampling: SamplingParams
    seed: int
    visual: VisualPrompt
    positions: Positions
    ends: frozenset[int]
    """Tokens after which it stops."""
    detokenizer: Detokenizer | None
    mailbox: Mailbox | None = None
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    text: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def take(self, token: int, logprob: float) -> TokenEvent:
        """One more token, which the sequence has already. The event says if it was the last."""
        if self.first_token is None:
            self.first_token = time.perf_counter() - self.submitted
        text, reason = self._read(token)
        self.text.append(text)
        if self.sampling.logprobs:
            self.logprobs.append(logprob)
        return TokenEvent(self.sequence.id, token, text, logprob if self.sampling.logprobs else None, reason)

    def abort(self) -> TokenEvent:
        return TokenEvent(self.sequence.id, None, "", None, "abort")

    def completion(self, reason: FinishReason) -> Completion:
        return Completion(
            token_ids=tuple(self.sequence.generated),
            text="".join(self.text),
            finish_reason=reason,
            prompt_tokens=self.sequence.prompt,
            cached_tokens=self.sequence.cached or 0,
            logprobs=tuple(self.logprobs) if self.sampling.logprobs else None,
            seconds=time.perf_counter() - self.submitted,
            first_token_seconds=self.first_token,
        )

    def _read(self, token: int) -> tuple[str, FinishReason | None]:
        """(text that has become certain, why it is the last token, if it is)."""
        if token in self.ends:
            return self._rest(), "stop"
        text = self.detokenizer.add(token) if self.detokenizer else ""
        if self.detokenizer and self.detokenizer.stopped:
            return text, "stop"
        if len(self.sequence.tokens) < self.sequence.limit:
            return text, None
        text += self._rest()
        # What was held back may have been a stop string all along.
        return text, "stop" if self.detokenizer and self.detokenizer.stopped else "length"

    def _rest(self) -> str:
        return self.detokenizer.finish() if self.detokenizer else ""


def ends_of(sampling: SamplingParams, eos: Sequence[int]) -> frozenset[int]:
    """Tokens after which a request stops."""
    return frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else eos)
