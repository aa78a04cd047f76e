"""Which tokens of which sequences the next forward computes, and with which pages. Knows no model and no tensors.

Every sequence under way has a row and pages for all tokens that it has; those behind `computed` are still to be
computed. One forward takes the sequences that decode, a token each, then pieces of prompts as far as tokens are left
for it. Where pages run out, what was forgotten longest leaves the prefix cache, and then the youngest sequence goes
back to waiting with the tokens that it has. So the oldest always comes to its end.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from qwen3vl_convert.inference.engine.kv_pool import TokenToKVPoolAllocator, pages_for
from qwen3vl_convert.inference.engine.radix_cache import Node, RadixCache, RadixKey
from qwen3vl_convert.inference.engine.requests import CONTEXT, check_room


class Rows(Protocol):
    """A row, 1 or more, per sequence under way, for as many as may run: `ReqToTokenPool`."""

    def alloc(self) -> int: ...
    def free(self, row: int, /) -> None: ...


@dataclass(slots=True, eq=False)
class SequenceState:
    """A request on its way through. `tokens` and `key` grow together."""

    id: int
    tokens: list[int]
    """The prompt, and what was generated."""
    key: list[int]
    """The same by content, see `RadixKey`."""
    limit: int
    """The most tokens that it may come to have."""
    prompt: int = 0
    """Tokens of the prompt."""
    computed: int = 0
    """Tokens whose keys and values are in the pool."""
    cached: int | None = None
    """Tokens of the prompt that were found in the pool when it first got its turn."""
    row: int = 0
    pages: list[int] = field(default_factory=list)
    node: Node | None = None
    """The last of its pages that are the prefix cache's, locked."""

    def __post_init__(self) -> None:
        self.prompt = self.prompt or len(self.tokens)

    @property
    def decodes(self) -> bool:
        """Only the last token is to be computed, and it is a generated one."""
        return self.computed == len(self.tokens) - 1 and self.computed >= self.prompt

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt :]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens start <= i < stop of a sequence."""

    sequence: SequenceState
    start: int
    stop: int

    @property
    def generated(self) -> list[int]:
        """Those of its tokens that are not of the prompt."""
        return self.sequence.tokens[max(self.start, self.sequence.prompt) : self.stop]

    @property
    def last(self) -> bool:
        """Whether the sequence's next token can be known after it."""
        return self.stop == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward: decodes come first, a token each."""

    chunks: list[Chunk]
    num_decodes: int
    started: list[SequenceState]
    """Those that have a row since this plan."""

    @property
    def sequences(self) -> list[SequenceState]:
        return [chunk.sequence for chunk in self.chunks]


@dataclass(frozen=True, slots=True)
class Limits:
    max_running: int
    max_step_tokens: int
    context_length: int
    """The most tokens of one sequence."""
    prefix_cache: bool = True


class Scheduler:
    """Takes sequences in by `add`, and until each has left by `leave`: `schedule`, a forward, `computed`, `append`."""

    def __init__(self, allocator: TokenToKVPoolAllocator, cache: RadixCache, rows: Rows, limits: Limits) -> None:
        self._allocator, self._cache, self._rows, self._limits = allocator, cache, rows, limits
        self._page_size = cache.page_size
        self.waiting: deque[SequenceState] = deque()
        """The oldest first, all younger than those that run."""
        self.running: list[SequenceState] = []
        """The oldest first."""
        self._written: dict[tuple[int, int], int] = {}
        self._fresh: list[int] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, prompt: int, new: int) -> None:
        """Raise UsageError if so many tokens can never fit, however long they wait."""
        room = {CONTEXT: self._limits.context_length, "the KV pool": self._allocator.total * self._page_size}
        check_room(prompt, new, room)

    def add(self, sequence: SequenceState) -> None:
        """Ids must grow from call to call. Raises UsageError as `check` does."""
        self.check(sequence.prompt, sequence.limit - sequence.prompt)
        self.waiting.append(sequence)

    def schedule(self) -> Plan:
        """What to compute next; without chunks if there is nothing."""
        decodes = [Chunk(one, one.computed, one.computed + 1) for one in self._with_room_for_a_token()]
        budget = self._limits.max_step_tokens - len(decodes)
        chunks, started = list[Chunk](), list[SequenceState]()
        candidates = self._prefilling(started)
        while budget > 0 and (sequence := next(candidates, None)):
            stop = min(len(sequence.tokens), sequence.computed + budget)
            budget -= stop - sequence.computed
            chunks.append(Chunk(sequence, sequence.computed, stop))
        return Plan(decodes + chunks, len(decodes), started)

    def computed(self, plan: Plan) -> None:
        """The forward of the plan is done. Prompts that are complete are in the prefix cache from now on."""
        for chunk in plan.chunks:
            chunk.sequence.computed = chunk.stop
        for chunk in plan.chunks[plan.num_decodes :]:
            if chunk.last:
                self._share(chunk.sequence)

    def append(self, sequence: SequenceState, token: int) -> None:
        """What was sampled for it."""
        sequence.tokens.append(token)
        sequence.key.append(token)

    def leave(self, sequence: SequenceState) -> None:
        """It is finished, aborted, or its forward failed. What is computed of it stays in the prefix cache."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def written_pages(self) -> dict[tuple[int, int], int]:
        """What has changed in the table of pages since the last call: page by (row, number in the sequence)."""
        written, self._written = self._written, {}
        return written

    def fresh_pages(self) -> list[int]:
        """The pages that were given out since the last call, with what others left in them."""
        fresh, self._fresh = self._fresh, []
        return fresh

    # ---- who gets a turn ---------------------------------------------------------------------------------------------

    def _with_room_for_a_token(self) -> list[SequenceState]:
        """Those that decode, the oldest first, each with a page for its token; the youngest go if there is none."""
        ready = []
        for sequence in [one for one in self.running if one.decodes]:
            while sequence.row and not self._grow(sequence, len(sequence.tokens)):
                self._preempt(self.running[-1])
            if sequence.row:
                ready.append(sequence)
        return ready

    def _prefilling(self, started: list[SequenceState]) -> Iterator[SequenceState]:
        """Those with a prompt to compute: who has begun, then who can begin, which is noted in `started`."""
        yield from [one for one in self.running if not one.decodes]
        most = self._limits.max_running
        while self.waiting and len(self.running) < most and self._start(self.waiting[0]):
            started.append(self.waiting[0])
            self.running.append(self.waiting.popleft())
            yield self.running[-1]

    def _start(self, sequence: SequenceState) -> bool:
        """Give it a row and pages for all its tokens, if there are enough for those that run as well."""
        if self._allocator.available + self._cache.evictable <= len(self.running):
            return False  # not even one page; to look for a prefix takes longer than to see this
        # The last token is computed in any case: its logits are wanted.
        found = self._cache.match_prefix(self._key(sequence, len(sequence.tokens) - 1))
        self._cache.inc_lock_ref(found.node)
        lacking = pages_for(len(sequence.tokens), self._page_size) - len(found.pages)
        pages = self._pages(lacking, spare=len(self.running))
        if pages is None:
            self._cache.dec_lock_ref(found.node)
            return False
        sequence.row, sequence.node = self._rows.alloc(), found.node
        sequence.computed = len(found.pages) * self._page_size
        if sequence.cached is None:
            sequence.cached = sequence.computed
        self._put(sequence, found.pages + pages)
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    # ---- pages -------------------------------------------------------------------------------------------------------

    def _pages(self, count: int, spare: int = 0) -> list[int] | None:
        """So many pages, for which the cache gives up some, if as many as `spare` can be had after that."""
        lacking = count - self._allocator.available
        if lacking + spare > self._cache.evictable:
            return None
        if lacking > 0:
            self._cache.evict(lacking)
        pages = self._allocator.alloc(count)
        self._fresh += pages or ()
        return pages

    def _grow(self, sequence: SequenceState, tokens: int) -> bool:
        """Pages for so many tokens."""
        lacking = pages_for(tokens, self._page_size) - len(sequence.pages)
        if lacking <= 0:
            return True
        pages = self._pages(lacking)
        if pages is not None:
            self._put(sequence, sequence.pages + pages)
        return pages is not None

    def _put(self, sequence: SequenceState, pages: list[int]) -> None:
        """Its pages from now on; what is new among them is noted for the table."""
        old = sequence.pages
        for at, page in enumerate(pages):
            if at >= len(old) or old[at] != page:
                self._written[sequence.row, at] = page
        sequence.pages = pages

    def _key(self, sequence: SequenceState, tokens: int) -> RadixKey:
        return RadixKey(tuple(sequence.key[: tokens if self._limits.prefix_cache else 0]))

    def _share(self, sequence: SequenceState) -> None:
        """Hand the full pages of what is computed to the cache, and go on with those that it has for it."""
        full = sequence.computed // self._page_size if self._limits.prefix_cache else 0
        found = self._cache.insert(self._key(sequence, full * self._page_size), sequence.pages[:full])
        self._cache.inc_lock_ref(found.node)
        if sequence.node is not None:
            self._cache.dec_lock_ref(sequence.node)
        sequence.node = found.node
        self._put(sequence, found.pages + sequence.pages[full:])

    def _release(self, sequence: SequenceState) -> None:
        """Take back row and pages."""
        self._share(sequence)
        assert sequence.node is not None
        full = sequence.computed // self._page_size if self._limits.prefix_cache else 0
        self._allocator.free(sequence.pages[full:])
        self._cache.dec_lock_ref(sequence.node)
        self._rows.free(sequence.row)
        sequence.row, sequence.pages, sequence.node, sequence.computed = 0, [], None, 0
