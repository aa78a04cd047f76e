"""Entries of an axis that hold what other entries of it should hold: exchanged, permuted, one shard twice.

An axis is one that the mapping names (key-value groups, heads, gate and up) or a whole memory dimension: rows, columns.
"""

import numpy as np

from qwen3vl_convert.strided import Array
from qwen3vl_convert.verify.weights.part import Group, Hypothesis, Part, drawn

_NAMED = {"s": ("gate", "up"), "t": ("q", "k", "v")}
"""Axes whose entries have names."""
_WORDS = {
    "kv": "kv groups",
    "g": "query heads of each group",
    "n": "vision heads",
    "pos": "positions",
    "rgb": "channels",
}
_SHARDS = "shards of {}"
_TP, _LEAST = (2, 4, 8), 8
"""Of vectors: into how many shards, and of how many elements at least."""
_MOST_RUNS = 4
_BYTES = 16 << 20

Moves = dict[int, int]
"""Which entry of theirs an entry of ours holds, where it is not its own."""


def rearranged(part: Part) -> str:
    """Every entry of ours along some axis is an entry of theirs."""
    if len(part.dims) == 1 and np.array_equal(np.sort(part.theirs, None), np.sort(part.ours, None)):
        return _of_named(part) or "a permutation of the elements"
    return _of_named(part)


def _of_named(part: Part) -> str:
    for name, before, count, after in _ways(part):
        theirs, ours = (side.reshape(before, count, after) for side in (part.theirs, part.ours))
        moves = _moves(theirs, ours)
        if moves:
            return said(name, moves, count)
    return ""


def _ways(part: Part) -> list[tuple[str, int, int, int]]:
    """(what its entries are called, entries before it, of it, after it in memory), the coarsest axis first."""
    named = _opened(part.axes, {**_NAMED, **_WORDS})
    if len(part.dims) > 1:
        return [*named, *_opened(part.dims, None)]
    # One number is no evidence: a vector of few different ones is made of another's by accident.
    size = part.theirs.size
    return [
        *named,
        *(
            (_SHARDS.format(parts), 1, parts, size // parts)
            for parts in _TP
            if size % parts == 0 and size >= parts * _LEAST
        ),
    ]


def _opened(axes: Group, known: dict[str, object] | None) -> list[tuple[str, int, int, int]]:
    sizes = [size for _, size in axes]
    ways = []
    for at, (name, size) in enumerate(axes):
        if known is None or name in known:
            ways.append((name, int(np.prod(sizes[:at])), size, int(np.prod(sizes[at + 1 :]))))
    return ways


def _moves(theirs: Array, ours: Array) -> Moves:
    """Empty unless all entries are accounted for. Arrays [before, entry, after]."""
    some = drawn((theirs.shape[0], theirs.shape[2]))
    wanted, found = (np.ascontiguousarray(side[some[0], :, some[1]].T) for side in (theirs, ours))
    places: dict[bytes, int] = {}
    for entry in range(len(wanted)):
        places.setdefault(wanted[entry].tobytes(), entry)
    moves = {}
    for entry in range(len(found)):
        if not np.array_equal(found[entry], wanted[entry]):
            place = places.get(found[entry].tobytes())
            if place is None:
                return {}
            moves[entry] = place
    return moves if moves and _is_exact(theirs, ours, moves) else {}


def _is_exact(theirs: Array, ours: Array, moves: Moves) -> bool:
    order = np.arange(ours.shape[1])
    order[list(moves)] = list(moves.values())
    step = max(1, _BYTES // (ours.itemsize * ours.shape[0] * ours.shape[2]))
    return all(
        np.array_equal(theirs[:, order[first : first + step]], ours[:, first : first + step])
        for first in range(0, ours.shape[1], step)
    )


def said(name: str, moves: Moves, count: int) -> str:
    """The moves in words."""
    exchanged = len(moves) == 2 and all(moves.get(other) == one for one, other in moves.items())
    if name in _NAMED:
        return _said_by_name(_NAMED[name], moves, exchanged)
    words = _WORDS.get(name, name)
    if exchanged:
        return f"{words} {' and '.join(map(str, sorted(moves)))} are exchanged"
    runs = _runs(moves)
    if len(set(moves.values()) | (set(range(count)) - set(moves))) == count:
        return f"a permutation of the {words}" + (f": {_listed(runs, words)}" if len(runs) <= _MOST_RUNS else "")
    shard = all(count % (stop - first) == 0 and (stop - first) * 64 >= count for first, stop, _ in runs)
    return ("one TP shard twice: " if shard and len(runs) <= _MOST_RUNS else "") + _listed(runs, words)


def _said_by_name(labels: tuple[str, ...], moves: Moves, exchanged: bool) -> str:
    if exchanged:
        return f"{' and '.join(labels[entry] for entry in sorted(moves))} are swapped"
    return ", ".join(f"{labels[entry]} holds {labels[other]}" for entry, other in moves.items())


def _runs(moves: Moves) -> list[tuple[int, int, int]]:
    """(first, stop, first that it holds) of neighbours that hold neighbours."""
    runs: list[tuple[int, int, int]] = []
    for entry, other in sorted(moves.items()):
        if runs and runs[-1][1] == entry and other - entry == runs[-1][2] - runs[-1][0]:
            runs[-1] = (runs[-1][0], entry + 1, runs[-1][2])
        else:
            runs.append((entry, entry + 1, other))
    return runs


def _listed(runs: list[tuple[int, int, int]], words: str) -> str:
    shown = [f"{words} {_range(a, b)} hold {_range(c, c + b - a)}" for a, b, c in runs[:_MOST_RUNS]]
    return ", ".join(shown) + (f" and {len(runs) - _MOST_RUNS} more" if len(runs) > _MOST_RUNS else "")


def _range(first: int, stop: int) -> str:
    return str(first) if stop == first + 1 else f"{first}:{stop}"


ENTRIES = (Hypothesis("entries of an axis", rearranged),)
