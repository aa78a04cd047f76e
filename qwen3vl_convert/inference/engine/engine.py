"""The engine: requests go in, tokens come out, and memory is as it was before. Start here.

A step plans (`scheduler`), runs one forward and samples (`runner`), and hands out tokens (`live`). Not safe to be used
by several threads at once.
"""

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.inference.engine.batching import Positions
from qwen3vl_convert.inference.engine.detokenizer import Detokenizer, Tokenizer
from qwen3vl_convert.inference.engine.kv_pool import TokenToKVPoolAllocator
from qwen3vl_convert.inference.engine.live import Live, ends_of
from qwen3vl_convert.inference.engine.options import EngineOptions
from qwen3vl_convert.inference.engine.radix_cache import RadixCache
from qwen3vl_convert.inference.engine.requests import Completion, Request, TokenEvent, check_vocabulary
from qwen3vl_convert.inference.engine.runner import Runner
from qwen3vl_convert.inference.engine.scheduler import Limits, Plan, Scheduler, SequenceState
from qwen3vl_convert.inference.engine.stream import Mailbox, TokenStream
from qwen3vl_convert.inference.engine.visual import VisualPrompt, content_of, visual_prompt

if TYPE_CHECKING:
    from qwen3vl_convert.inference.attention.backend import AttentionBackend

__all__ = ["Engine", "EngineOptions", "TokenStream"]


class Engine:
    """Serves one model: `Qwen3VLForConditionalGeneration`, or what has its interface.

    `tokenizer` needs no more than `decode(ids)`; without one there is no text, and no stop strings.
    """

    def __init__(
        self,
        model: Any,
        options: EngineOptions | None = None,
        tokenizer: Tokenizer | None = None,
        attn_backend: "AttentionBackend | None" = None,
    ) -> None:
        self.model, self.options, self.tokenizer = model, options or EngineOptions(), tokenizer
        self.context_length = _context_length(self.options, model.config.max_positions)
        self._runner = Runner(model, self.options, self.context_length, attn_backend)
        self.kv_pool, self.req_to_token_pool = self._runner.pools.kv, self._runner.pools.rows
        self.allocator = TokenToKVPoolAllocator(self.kv_pool.num_pages)
        self.radix_cache = RadixCache(self.allocator, self.options.page_size)
        limits = Limits(
            max_running=self.options.max_running,
            max_step_tokens=self.options.max_step_tokens,
            context_length=self.context_length,
            prefix_cache=self.options.prefix_cache,
        )
        self._scheduler = Scheduler(self.allocator, self.radix_cache, self.req_to_token_pool, limits)
        self._eos = (*_as_tuple(model.config.eos_token_id), *self.options.eos_token_ids)
        self._live: dict[int, Live] = {}
        self._events: list[tuple[TokenEvent, bool]] = []
        """What has happened, and whether a stream or `generate` has heard of it."""
        self._next_id = 0
        self._stepping = False
        self._doomed: set[int] = set()

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute or to report."""
        return bool(self._live or self._events)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Take a request in; `step` computes it. Gives its id.

        Raises UsageError if it can never be served: too long for the context or the pool, tokens that the model does
        not have, images that do not fit the tokens, stop strings without a tokenizer.
        """
        return self._submit(request, None)

    def stream(self, request: Request) -> TokenStream:
        """Submit a request at once; its tokens are computed as they are asked for."""
        mailbox = Mailbox()
        return TokenStream(self, self._submit(request, mailbox), mailbox)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all requests, side by side. Raises what a step raises, and then none of them is left behind."""
        mailboxes: dict[int, Mailbox] = {}
        try:
            for request in requests:
                mailbox = Mailbox()
                mailboxes[self._submit(request, mailbox)] = mailbox
            while any(one.completion is None for one in mailboxes.values()):
                self.advance()
        finally:
            for request_id in mailboxes:
                self.abort(request_id)
        return [one.completion for one in mailboxes.values() if one.completion is not None]

    def abort(self, request_id: int) -> None:
        """End a request and take its memory back. One that has ended already is left alone."""
        if self._stepping:
            self._doomed.add(request_id)  # a stream that is collected in the middle of a step
        elif (live := self._live.get(request_id)) is not None:
            self._end(live, live.abort())

    def _submit(self, request: Request, mailbox: Mailbox | None) -> int:
        self._check(request)
        ids, sampling = request.token_ids, request.sampling
        visual = visual_prompt(ids, request.visual, self.model.config)
        limit = len(ids) + sampling.max_new_tokens
        live = Live(
            sequence=SequenceState(self._next_id, list(ids), content_of(ids, visual), limit),
            sampling=sampling,
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            visual=visual,
            positions=self._positions(ids, visual),
            ends=ends_of(sampling, self._eos),
            detokenizer=Detokenizer(self.tokenizer, sampling.stop) if self.tokenizer is not None else None,
            mailbox=mailbox,
        )
        self._scheduler.add(live.sequence)
        self._live[self._next_id] = live
        self._next_id += 1
        return live.sequence.id

    def _check(self, request: Request) -> None:
        """What costs nothing to see."""
        check_vocabulary(request.token_ids, self.model.config.vocab)
        if request.sampling.stop and self.tokenizer is None:
            raise UsageError("stop: expected a tokenizer to read the text with, found none. Pass stop_token_ids.")
        self._scheduler.check(len(request.token_ids), request.sampling.max_new_tokens)

    def _positions(self, ids: Sequence[int], visual: VisualPrompt) -> Positions:
        """Of the whole prompt, once: chunks and what follows on a cached prefix take slices of them."""
        positions, delta = self.model.rope_index(torch.tensor(ids), visual.grid("image"), visual.grid("video"))
        return Positions(positions.cpu(), int(delta))

    # ---- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> list[TokenEvent]:
        """Run one forward; gives what has happened since the last step, of all requests. What `generate` and streams
        computed for themselves meanwhile is not told again.

        If it fails, the requests that were in it are aborted, which the next step reports, and the others go on.
        """
        self._forward()
        events, self._events = self._events, []
        return [event for event, _ in events]

    def advance(self) -> None:
        """A step of which only streams and `generate` hear; what nobody of them listens to is kept for `step`."""
        self._forward()
        self._events = [(event, heard) for event, heard in self._events if not heard]

    @torch.inference_mode()
    def _forward(self) -> None:
        self._bury()
        plan = self._scheduler.schedule()
        if plan.chunks:
            self._stepping = True
            try:
                self._run(plan)
            except BaseException:
                self._doomed |= {sequence.id for sequence in plan.sequences}
                raise
            finally:
                self._stepping = False
                self._bury()

    def _run(self, plan: Plan) -> None:
        lives = [self._live[sequence.id] for sequence in plan.sequences]
        sampled = self._runner.run(plan, self._scheduler.written_pages(), self._scheduler.fresh_pages(), lives)
        receivers = [live for live, chunk in zip(lives, plan.chunks, strict=True) if chunk.last]
        self._scheduler.computed(plan)
        for live in lives:
            live.visual.forget(live.sequence.computed)
        for live, token, logprob in zip(receivers, sampled.tokens, sampled.logprobs, strict=True):
            self._scheduler.append(live.sequence, token)
            event = live.take(token, logprob)
            if event.finish_reason is None:
                self._emit(live, event)
            else:
                self._end(live, event)

    def _bury(self) -> None:
        """Abort what could not be aborted before."""
        while self._doomed:
            self.abort(self._doomed.pop())

    def _emit(self, live: Live, event: TokenEvent) -> None:
        self._events.append((event, live.mailbox is not None))
        if live.mailbox is not None:
            live.mailbox.events.append(event)

    def _end(self, live: Live, event: TokenEvent) -> None:
        assert event.finish_reason is not None
        del self._live[live.sequence.id]
        self._scheduler.leave(live.sequence)
        if live.mailbox is not None:
            live.mailbox.completion = live.completion(event.finish_reason)
        self._emit(live, event)


def _context_length(options: EngineOptions, most: int) -> int:
    asked = options.context_length
    if asked is not None and asked > most:
        raise UsageError(f"context_length: expected at most {most}, as config.json says, found {asked}.")
    return asked or most


def _as_tuple(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
