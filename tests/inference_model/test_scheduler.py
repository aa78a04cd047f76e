"""Who gets a turn, with which pages: simulations without a model, checked after each step."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.inference.engine.kv_pool import TokenToKVPoolAllocator, pages_for
from qwen3vl_convert.inference.engine.radix_cache import Node, RadixCache
from qwen3vl_convert.inference.engine.scheduler import Limits, Plan, Scheduler, SequenceState


class Rows:
    def __init__(self, count: int) -> None:
        self.count, self.free_rows = count, list(range(1, count + 1))

    def alloc(self) -> int:
        return self.free_rows.pop()

    def free(self, row: int) -> None:
        assert row not in self.free_rows
        self.free_rows.append(row)


class Bench:
    """A scheduler, and the table of pages as a device would have it."""

    def __init__(self, pages: int = 100, size: int = 4, running: int = 8, step: int = 16, **limits: object) -> None:
        self.size, self.limits = size, Limits(running, step, context_length=1000, **limits)  # type: ignore[arg-type]
        self.allocator, self.rows = TokenToKVPoolAllocator(pages + 1), Rows(running)
        self.cache = RadixCache(self.allocator, size)
        self.scheduler = Scheduler(self.allocator, self.cache, self.rows, self.limits)
        self.table: dict[tuple[int, int], int] = {}
        self.preempted: list[int] = []
        self.added: list[SequenceState] = []

    def add(self, prompt: list[int], new: int) -> SequenceState:
        sequence = SequenceState(len(self.added), list(prompt), list(prompt), len(prompt) + new)
        self.scheduler.add(sequence)
        self.added.append(sequence)
        return sequence

    def step(self) -> Plan:
        before = {one.id for one in self.scheduler.running}
        plan = self.scheduler.schedule()
        self.preempted += [one.id for one in self.scheduler.waiting if one.id in before]
        self.table |= self.scheduler.written_pages()
        self.check(plan)
        wanted = [chunk.sequence for chunk in plan.chunks if chunk.last]
        self.scheduler.computed(plan)
        for sequence in wanted:
            self.scheduler.append(sequence, sequence.id % 3)
            if len(sequence.tokens) == sequence.limit:
                self.scheduler.leave(sequence)
        return plan

    def finish(self, most: int = 2000) -> list[Plan]:
        plans = []
        while self.scheduler.busy:
            plans.append(self.step())
            assert plans[-1].chunks, "nothing is computed, and something waits"
            assert len(plans) < most
        return plans

    def check(self, plan: Plan) -> None:
        scheduler = self.scheduler
        assert sum(chunk.stop - chunk.start for chunk in plan.chunks) <= self.limits.max_step_tokens
        assert len(scheduler.running) <= self.limits.max_running
        assert self.rows.count - len(self.rows.free_rows) == len(scheduler.running)
        order = [one.id for one in scheduler.running] + [one.id for one in scheduler.waiting]
        assert order == sorted(order), "who came first is served first"
        for at, chunk in enumerate(plan.chunks):
            assert chunk.start == chunk.sequence.computed < chunk.stop <= len(chunk.sequence.tokens)
            assert chunk.sequence in scheduler.running
            if at < plan.num_decodes:
                assert chunk.stop - chunk.start == 1
                assert chunk.start >= chunk.sequence.prompt
            for page in range(pages_for(chunk.stop, self.size)):
                assert self.table[chunk.sequence.row, page] == chunk.sequence.pages[page]
        self.check_pages()

    def check_pages(self) -> None:
        """What nobody has is free, and a page is in two sequences only where the cache holds it for both."""
        in_tree, private = list[int](), list[int]()
        nodes = list(self.cache._root.children.values())
        while nodes:
            node = nodes.pop()
            in_tree += node.pages
            nodes += node.children.values()
        for sequence in self.scheduler.running:
            held = held_pages(sequence.node)
            assert sequence.pages[: len(held)] == held
            private += sequence.pages[len(held) :]
        assert len(set(in_tree + private)) == len(in_tree + private) == self.allocator.used


def held_pages(node: Node | None) -> list[int]:
    pages: list[int] = []
    while node is not None and node.parent is not None:
        assert node.locks
        pages, node = node.pages + pages, node.parent
    return pages


requests = st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.integers(1, 25)), max_size=12)


@settings(deadline=None, max_examples=200)
@given(
    requests,
    st.integers(1, 5),
    st.integers(0, 30),
    st.integers(1, 6),
    st.integers(1, 40),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_all_come_to_an_end_and_all_pages_come_back(
    requests: list[tuple[list[int], int]],
    size: int,
    spare: int,
    running: int,
    step: int,
    prefix_cache: bool,
    chance: random.Random,
) -> None:
    longest = max((len(prompt) + new for prompt, new in requests), default=1)
    bench = Bench(pages_for(longest, size) + spare, size, running, step, prefix_cache=prefix_cache)
    for prompt, new in requests:
        bench.add(prompt, new)
        if chance.random() < 0.5:
            bench.step()
    bench.finish()
    assert all(len(one.tokens) == one.limit for one in bench.added)
    assert bench.allocator.used == bench.cache.size == bench.cache.evictable
    assert prefix_cache or bench.cache.size == 0
    bench.cache.clear()
    assert bench.allocator.used == 0
    assert len(bench.rows.free_rows) == running


@settings(deadline=None, max_examples=100)
@given(requests, st.randoms(use_true_random=False))
def test_whoever_leaves_in_the_middle_leaves_no_page(
    requests: list[tuple[list[int], int]], chance: random.Random
) -> None:
    bench = Bench(pages=30, size=2, running=3, step=7)
    alive = [bench.add(prompt, new) for prompt, new in requests]
    while bench.scheduler.busy:
        bench.step()
        alive = [one for one in alive if len(one.tokens) < one.limit]
        if alive and chance.random() < 0.3:
            bench.scheduler.leave(alive.pop(chance.randrange(len(alive))))
            bench.check_pages()
    bench.cache.clear()
    assert bench.allocator.used == 0
    assert len(bench.rows.free_rows) == 3


@pytest.mark.parametrize(("prompt", "new", "word"), [(401, 1, "KV pool"), (300, 101, "KV pool"), (1, 400, "kv_tokens")])
def test_what_can_never_fit_is_refused_at_once(prompt: int, new: int, word: str) -> None:
    bench = Bench(pages=100, size=4)
    with pytest.raises(UsageError, match=f"at most 400 tokens.*found {prompt} .* {new} new.*"):
        bench.add([1] * prompt, new)
    with pytest.raises(UsageError, match=word):
        bench.add([1] * prompt, new)
    assert not bench.scheduler.busy
    bench.add([1] * 300, 100)


def test_what_is_longer_than_the_context_is_refused_too() -> None:
    bench = Bench(pages=1000, size=4)
    with pytest.raises(UsageError, match=r"at most 1000 tokens.*the context.*context_length"):
        bench.add([1] * 990, 11)


def test_a_long_prompt_is_computed_in_chunks() -> None:
    bench = Bench(step=16)
    bench.add(list(range(50)), 2)
    plans = bench.finish()
    assert [(chunk.start, chunk.stop) for plan in plans for chunk in plan.chunks] == [
        (0, 16),
        (16, 32),
        (32, 48),
        (48, 50),
        (50, 51),
    ]
    assert [plan.num_decodes for plan in plans] == [0, 0, 0, 0, 1]


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    bench = Bench(step=16)
    first = bench.add([1, 2, 3], 20)
    bench.step()
    bench.add(list(range(100, 160)), 1)
    for number in range(1, 4):
        plan = bench.step()
        assert plan.num_decodes == 1
        assert sum(chunk.stop - chunk.start for chunk in plan.chunks) == 16
        assert len(first.generated) == 1 + number


def test_prompts_share_a_step() -> None:
    bench = Bench(step=16)
    for start in (0, 10, 20):
        bench.add(list(range(start, start + 7)), 1)
    assert [(chunk.start, chunk.stop) for chunk in bench.step().chunks] == [(0, 7), (0, 7), (0, 2)]


def test_a_prefix_that_was_computed_is_not_computed_again() -> None:
    bench = Bench(step=100)
    bench.add(list(range(40)), 1)
    bench.finish()
    again, other, same = bench.add(list(range(42)), 1), bench.add([*range(38), 7, 7], 1), bench.add(list(range(40)), 1)
    assert [chunk.start for chunk in bench.step().chunks] == [40, 36, 36]
    assert (again.cached, other.cached, same.cached) == (40, 36, 36)


def test_a_running_prompt_is_shared_as_soon_as_it_is_computed() -> None:
    bench = Bench(step=100)
    first = bench.add(list(range(40)), 50)
    bench.step()
    second = bench.add(list(range(50)), 50)
    bench.step()
    assert second.cached == 40
    assert second.pages[:10] == first.pages[:10]


def test_equal_prompts_side_by_side_end_up_with_the_same_pages() -> None:
    bench = Bench(step=100)
    first, second = bench.add(list(range(40)), 50), bench.add(list(range(40)), 50)
    bench.step()
    bench.step()
    assert second.pages[:10] == first.pages[:10]
    assert second.pages[10] != first.pages[10]
    assert bench.allocator.used == 12


def test_the_youngest_goes_back_to_waiting_with_its_tokens_and_the_oldest_goes_on() -> None:
    bench = Bench(pages=10, size=4, step=100, prefix_cache=False)
    first, second, third = (bench.add([id_] * 8, 20) for id_ in range(3))
    bench.step()
    assert len(bench.scheduler.running) == 3
    while not bench.preempted:
        bench.step()
    assert bench.preempted == [third.id]
    assert len(third.generated) > 0
    assert (third.pages, third.row, third.computed) == ([], 0, 0)
    done = len(third.generated)
    while third.row == 0:
        bench.step()
    assert len(third.generated) >= done
    bench.finish()
    assert [len(one.generated) for one in (first, second, third)] == [20, 20, 20]


def test_who_was_preempted_finds_what_is_left_of_its_pages() -> None:
    bench = Bench(pages=10, size=4, step=100)
    sequences = [bench.add([id_] * 8, 20) for id_ in range(3)]
    tokens = sum(chunk.stop - chunk.start for plan in bench.finish() for chunk in plan.chunks)
    assert bench.preempted
    assert tokens < sum(3 * len(one.tokens) for one in sequences)
    assert all(one.cached == 0 for one in sequences), "found in what another computed, not in its own"


def test_new_prompts_leave_a_page_for_each_that_runs() -> None:
    bench = Bench(pages=10, size=4, step=100)
    bench.add([1] * 15, 9)
    bench.step()
    bench.add([2] * 24, 4)
    assert len(bench.step().chunks) == 1, "all pages but those that the first needs next"
    bench.finish()


def test_memory_comes_from_the_prefix_cache_before_anybody_is_preempted() -> None:
    bench = Bench(pages=10, size=4, step=100)
    bench.add(list(range(35)), 1)
    bench.finish()
    assert bench.allocator.available == 2
    bench.add([7] * 20, 10)
    bench.finish()
    assert bench.preempted == []


def test_no_more_sequences_than_tokens_in_a_step() -> None:
    bench = Bench(running=8, step=3)
    for number in range(6):
        bench.add([number] * 5, 5)
    bench.finish()
