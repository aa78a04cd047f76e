"""Which prefixes of sequences have their keys and values in the pool: a radix tree of pages.

A key is what a token *is*, not its id alone: all visual tokens share an id, so each has a number from a digest of its
pixels instead (see `visual`). Prompts that agree in the first tokens of their keys have the same keys and values there,
positions included: those follow from the tokens before and from grids, which the digest covers.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from qwen3vl_convert.inference.engine.kv_pool import TokenToKVPoolAllocator

Block = tuple[int, ...]
"""The tokens of one page."""


@dataclass(frozen=True, slots=True)
class RadixKey:
    """A sequence: ids of text tokens, and for each visual token a negative number that its image's pixels decide."""

    tokens: tuple[int, ...]

    def blocks(self, page_size: int) -> list[Block]:
        """Its full pages."""
        full = len(self.tokens) // page_size * page_size
        return [self.tokens[start : start + page_size] for start in range(0, full, page_size)]


class Node:
    """Some pages that follow on those of the parent. Children differ in their first page."""

    __slots__ = ("blocks", "children", "locks", "pages", "parent", "serial", "used")

    def __init__(self, blocks: list[Block], pages: list[int], parent: "Node | None", serial: int) -> None:
        self.blocks, self.pages, self.parent, self.serial = blocks, pages, parent, serial
        self.children: dict[Block, Node] = {}
        self.locks = self.used = 0


@dataclass(frozen=True, slots=True)
class Match:
    """The pages of the longest prefix that is there, and its last node: lock it before anything else is asked."""

    pages: list[int]
    node: Node


class RadixCache:
    """A radix tree whose edges are as long as can be. It owns the pages in it, and gives them back by `evict`.

    Not evicted is what is locked: a lock on a node is one on all before it. Of the rest, the end of what was used
    least recently goes first.
    """

    def __init__(self, allocator: TokenToKVPoolAllocator, page_size: int) -> None:
        self._allocator, self.page_size = allocator, page_size
        self._serials = count()
        self._root = self._new([], [], None)
        self._root.locks = 1
        self._clock = self._nodes = 0
        self._leaves: list[tuple[int, int, Node]] = []
        """A heap of (last used, serial, node); entries that no longer hold are skipped when they come up."""
        self.evictable = 0
        """Pages that `evict` could give back."""
        self.size = 0
        """Pages in the tree."""

    def match_prefix(self, key: RadixKey) -> Match:
        """The longest prefix of the key's full pages that is there. It counts as used."""
        self._clock += 1
        node, pages, blocks = self._root, list[int](), key.blocks(self.page_size)
        while len(pages) < len(blocks) and (child := node.children.get(blocks[len(pages)])):
            same = _common(child.blocks, blocks, len(pages))
            node = child if same == len(child.blocks) else self._split(child, same)
            node.used = self._clock
            pages += node.pages
        self._offer(node)
        return Match(pages, node)

    def insert(self, key: RadixKey, pages: Sequence[int]) -> Match:
        """Hand over the pages of the key's full pages; gives those that the tree has for them.

        Where it had others already, with the same in them, the caller's are freed.
        """
        blocks, found = key.blocks(self.page_size), self.match_prefix(key)
        if len(pages) != len(blocks):
            raise ValueError(f"insert: expected {len(blocks)} pages for the key, found {len(pages)}")
        had = len(found.pages)
        self._allocator.free([mine for mine, its in zip(pages, found.pages, strict=False) if mine != its])
        if had == len(blocks):
            return found
        leaf = self._new(blocks[had:], list(pages[had:]), found.node)
        leaf.used = self._clock
        found.node.children[blocks[had]] = leaf
        self._count(len(leaf.pages))
        self._offer(leaf)
        return Match(found.pages + leaf.pages, leaf)

    def inc_lock_ref(self, node: Node) -> None:
        """Keep the node and all before it."""
        for one in self._path(node):
            if not one.locks:
                self.evictable -= len(one.pages)
            one.locks += 1

    def dec_lock_ref(self, node: Node) -> None:
        """Take back one `inc_lock_ref`."""
        for one in self._path(node):
            if not one.locks:
                raise ValueError("dec_lock_ref: expected a locked node, found one without a lock")
            one.locks -= 1
            if not one.locks:
                self.evictable += len(one.pages)
        self._offer(node)

    def evict(self, pages: int) -> int:
        """Give at least so many pages back to the allocator, or all that are not locked. Gives how many it was."""
        freed: list[int] = []
        while len(freed) < pages and (leaf := self._oldest()):
            keep = max(0, len(leaf.pages) - (pages - len(freed)))
            freed += leaf.pages[keep:]
            del leaf.pages[keep:]
            first = leaf.blocks[0]
            del leaf.blocks[keep:]
            self._offer(leaf if keep else self._remove(leaf, first))
        self._count(-len(freed))
        self._allocator.free(freed)
        return len(freed)

    def clear(self) -> int:
        """Forget all that is not locked; gives how many pages it was."""
        return self.evict(self.evictable)

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def _new(self, blocks: list[Block], pages: list[int], parent: Node | None) -> Node:
        return Node(blocks, pages, parent, next(self._serials))

    def _count(self, pages: int) -> None:
        self.evictable += pages
        self.size += pages

    def _path(self, node: Node) -> list[Node]:
        """The node and all before it but the root."""
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path

    def _split(self, node: Node, at: int) -> Node:
        """A new node for the first `at` pages. Those who hold the old one still hold all of it."""
        assert node.parent is not None
        upper = self._new(node.blocks[:at], node.pages[:at], node.parent)
        upper.locks, upper.children = node.locks, {node.blocks[at]: node}
        node.parent.children[node.blocks[0]] = upper
        node.parent, node.blocks, node.pages = upper, node.blocks[at:], node.pages[at:]
        return upper

    def _remove(self, leaf: Node, first: Block) -> Node:
        """Gives the parent."""
        parent = leaf.parent
        assert parent is not None
        del parent.children[first]
        leaf.parent = None
        return parent

    # ---- which goes first --------------------------------------------------------------------------------------------

    def _offer(self, node: Node) -> None:
        """Note the node if it may be evicted next; if it may only later, this is called again then."""
        if not _evictable(node):
            return
        heapq.heappush(self._leaves, (node.used, node.serial, node))
        if len(self._leaves) > 2 * self.size + 64:
            self._leaves = [entry for entry in set(self._leaves) if _holds(entry)]
            heapq.heapify(self._leaves)

    def _oldest(self) -> Node | None:
        while self._leaves:
            entry = heapq.heappop(self._leaves)
            if _holds(entry):
                return entry[2]
        return None


def _evictable(node: Node) -> bool:
    return not node.locks and not node.children and node.parent is not None


def _holds(entry: tuple[int, int, Node]) -> bool:
    used, _, node = entry
    return used == node.used and _evictable(node)


def _common(blocks: list[Block], others: list[Block], start: int) -> int:
    """How many of `blocks` are those of `others` from `start` on."""
    most = min(len(blocks), len(others) - start)
    if blocks[:most] == others[start : start + most]:
        return most
    return next(at for at in range(most) if blocks[at] != others[start + at])
