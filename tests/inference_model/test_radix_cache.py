"""The tree against a table of all prefixes, page by page: what is found, what is freed, and in which order."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_convert.inference.engine.kv_pool import TokenToKVPoolAllocator
from qwen3vl_convert.inference.engine.radix_cache import Node, RadixCache, RadixKey

Prefix = tuple[int, ...]


@dataclass
class Entry:
    page: int
    used: int
    locks: int = 0


@dataclass
class Table:
    """Every prefix of full pages that is there, by itself."""

    size: int
    entries: dict[Prefix, Entry] = field(default_factory=dict)
    clock: int = 0

    def prefixes(self, key: Prefix) -> list[Prefix]:
        return [key[:end] for end in range(self.size, len(key) + 1, self.size)]

    def match(self, key: Prefix) -> list[Prefix]:
        self.clock += 1
        found = []
        for prefix in self.prefixes(key):
            if prefix not in self.entries:
                break
            self.entries[prefix].used = self.clock
            found.append(prefix)
        return found

    def insert(self, key: Prefix, pages: list[int]) -> None:
        self.match(key)
        for prefix, page in zip(self.prefixes(key), pages, strict=True):
            self.entries.setdefault(prefix, Entry(page, self.clock))

    def lock(self, prefix: Prefix, by: int) -> None:
        for one in self.prefixes(prefix):
            self.entries[one].locks += by

    def evict(self, count: int) -> int:
        for done in range(count):
            inner = {prefix[: -self.size] for prefix in self.entries}
            free = [one for one, entry in self.entries.items() if not entry.locks and one not in inner]
            if not free:
                return done
            del self.entries[min(free, key=lambda one: self.entries[one].used)]
        return count


keys = st.lists(st.integers(-1, 1), max_size=9).map(tuple)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), keys),
        st.tuples(st.just("match"), keys),
        st.tuples(st.just("lock"), keys),
        st.tuples(st.just("unlock"), st.integers(0, 5)),
        st.tuples(st.just("evict"), st.integers(0, 6)),
    ),
    max_size=25,
)


class Pair:
    """The tree and the table, which are asked the same."""

    def __init__(self, size: int) -> None:
        self.allocator = TokenToKVPoolAllocator(400)
        self.tree, self.table = RadixCache(self.allocator, size), Table(size)
        self.seen: set[Prefix] = set()
        self.locks: list[tuple[Node, Prefix]] = []

    def match(self, key: Prefix) -> tuple[Node, Prefix]:
        found, expected = self.tree.match_prefix(RadixKey(key)), self.table.match(key)
        assert found.pages == [self.table.entries[prefix].page for prefix in expected]
        return found.node, expected[-1] if expected else ()

    def insert(self, key: Prefix) -> None:
        self.seen.add(key)
        pages = self.allocator.alloc(len(key) // self.tree.page_size)
        assert pages is not None
        found = self.tree.insert(RadixKey(key), pages)
        self.table.insert(key, pages)
        assert found.pages == [self.table.entries[prefix].page for prefix in self.table.prefixes(key)]

    def lock(self, key: Prefix) -> None:
        self.locks.append(self.match(key))
        self.tree.inc_lock_ref(self.locks[-1][0])
        self.table.lock(self.locks[-1][1], 1)

    def unlock(self, which: int) -> None:
        if self.locks:
            node, prefix = self.locks.pop(which % len(self.locks))
            self.tree.dec_lock_ref(node)
            self.table.lock(prefix, -1)

    def evict(self, count: int) -> None:
        assert self.tree.evict(count) == self.table.evict(count)

    def check(self) -> None:
        assert self.tree.size == self.allocator.used == len(self.table.entries)
        assert self.tree.evictable == sum(not entry.locks for entry in self.table.entries.values())
        for key in sorted(self.seen):
            self.match(key)


@settings(deadline=None, max_examples=400)
@given(st.integers(1, 3), steps)
def test_as_a_table_of_all_prefixes(size: int, steps: list[tuple[str, Prefix | int]]) -> None:
    pair = Pair(size)
    for name, argument in steps:
        getattr(pair, name)(argument)
        pair.check()
    while pair.locks:
        pair.unlock(0)
    pair.tree.clear()
    assert (pair.tree.size, pair.tree.evictable, pair.allocator.used) == (0, 0, 0)


def build(size: int = 2) -> tuple[RadixCache, TokenToKVPoolAllocator]:
    allocator = TokenToKVPoolAllocator(100)
    return RadixCache(allocator, size), allocator


def put(cache: RadixCache, allocator: TokenToKVPoolAllocator, *tokens: int) -> list[int]:
    pages = allocator.alloc(len(tokens) // cache.page_size)
    assert pages is not None
    return cache.insert(RadixKey(tokens), pages).pages


def test_only_full_pages_match() -> None:
    cache, allocator = build()
    pages = put(cache, allocator, 1, 2, 3, 4)
    assert cache.match_prefix(RadixKey((1, 2, 3, 4, 5))).pages == pages
    assert cache.match_prefix(RadixKey((1, 2, 3))).pages == pages[:1]
    assert cache.match_prefix(RadixKey((1, 9, 3, 4))).pages == []
    assert cache.match_prefix(RadixKey(())).pages == []


def test_the_same_prefix_is_stored_once() -> None:
    cache, allocator = build()
    first = put(cache, allocator, 1, 2, 3, 4)
    second = put(cache, allocator, 1, 2, 3, 4, 5, 6)
    assert second[:2] == first
    assert allocator.used == 3


def test_what_was_used_least_recently_goes_first_from_its_end() -> None:
    cache, allocator = build()
    put(cache, allocator, 1, 2, 3, 4)
    put(cache, allocator, 5, 6, 7, 8)
    cache.match_prefix(RadixKey((1, 2, 3, 4)))
    assert cache.evict(1) == 1
    assert len(cache.match_prefix(RadixKey((5, 6, 7, 8))).pages) == 1
    assert len(cache.match_prefix(RadixKey((1, 2, 3, 4))).pages) == 2


def test_nothing_locked_is_evicted_also_after_a_split() -> None:
    cache, allocator = build()
    pages = put(cache, allocator, 1, 2, 3, 4)
    node = cache.match_prefix(RadixKey((1, 2, 3, 4))).node
    cache.inc_lock_ref(node)
    put(cache, allocator, 1, 2, 9, 9)
    assert cache.clear() == 1
    assert cache.match_prefix(RadixKey((1, 2, 3, 4))).pages == pages
    cache.dec_lock_ref(node)
    with pytest.raises(ValueError, match="without a lock"):
        cache.dec_lock_ref(node)
    assert cache.clear() == 2
    assert allocator.used == 0


def test_a_number_of_pages_that_does_not_fit_the_key_is_refused() -> None:
    cache, allocator = build()
    pages = allocator.alloc(2)
    assert pages is not None
    with pytest.raises(ValueError, match="expected 1 pages for the key, found 2"):
        cache.insert(RadixKey((1, 2, 3)), pages)


def test_a_busy_cache_does_not_grow_its_list_of_leaves() -> None:
    cache, allocator = build()
    put(cache, allocator, 1, 2)
    for _ in range(1000):
        cache.match_prefix(RadixKey((1, 2)))
    assert len(cache._leaves) < 100
    assert cache.evict(1) == 1
