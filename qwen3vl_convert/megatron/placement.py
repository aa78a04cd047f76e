"""Which chunks a Megatron job writes, and which rank writes each: the grids and the placement of Megatron-Core's own saves.

A tensor is stored as one chunk per layer, per expert, per half of a SwiGLU and per tensor parallel rank. Each chunk is
written by one rank: the first that holds it, or, when several data-parallel ranks do, the one that Megatron-Core's
fully-parallel save picks (greedily, fewest holders first, then the largest, to the least loaded rank).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qwen3vl_convert.mappings import Layout
from qwen3vl_convert.mappings.layout import Sizes
from qwen3vl_convert.mappings.qwen3_vl import CUTS
from qwen3vl_convert.mappings.registry import names
from qwen3vl_convert.megatron.stored import STACKS, Stored
from qwen3vl_convert.parallel import ParallelLayout

_FIRST_STAGE = ("vision_model.", "language_model.embedding.")


@dataclass(frozen=True, slots=True)
class Shard:
    """A chunk to be written: its box, its size in bytes, its pipeline stage and the ranks of that stage that may write it."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    nbytes: int
    stage: int
    holders: tuple[int, ...]


def shards(one: Stored, sizes: Sizes, itemsize: int, layout: ParallelLayout) -> Iterator[Shard]:
    """The chunks of a stored parameter, by offset; of every tensor of that kind, where axes stay in its name."""
    term, full = one.equation.megatron, one.equation.full(sizes)
    shape = term.layout.shape(full)
    cut, keys = cut_dimension(one), list(names(term, sizes))
    spans = [_spans(one, term.layout, dim, shape[dim], full, layout) for dim in range(len(shape))]
    for index in itertools.product(*(range(len(span)) for span in spans)):
        offsets, extents = zip(*(span[i] for span, i in zip(spans, index, strict=True)), strict=True)
        part = index[cut[0]] % _ways(cut, layout) if cut else 0
        stage, holders = _owners(one, offsets, part, sizes, layout)
        for key in keys:
            yield Shard(key, offsets, extents, math.prod(extents) * itemsize, stage, holders)


def cut_dimension(one: Stored) -> tuple[int, str] | None:
    """(memory dimension, "tp" or "etp") that tensor parallelism cuts, or None when every rank holds the whole."""
    if one.equation.uncut:
        return None
    for dim, group in enumerate(one.equation.megatron.layout.groups):
        outer = next((axis for axis in group if axis != one.equation.apart), None)
        if dim >= len(one.stack) and outer in CUTS:
            return dim, CUTS[outer]
    return None


def _ways(cut: tuple[int, str], layout: ParallelLayout) -> int:
    return layout.tp if cut[1] == "tp" else layout.etp


def _spans(
    one: Stored, whole: Layout, dim: int, size: int, full: Sizes, layout: ParallelLayout
) -> list[tuple[int, int]]:
    """(offset, size) of the chunks along one memory dimension."""
    cut, apart = cut_dimension(one), one.equation.apart
    count = 1
    if dim < len(one.stack):
        count = size
    elif apart in whole.groups[dim]:
        count = full[apart]
    if cut is not None and cut[0] == dim:
        count *= _ways(cut, layout)
    return [(index * (size // count), size // count) for index in range(count)]


def _owners(
    one: Stored, offsets: tuple[int, ...], part: int, sizes: Sizes, layout: ParallelLayout
) -> tuple[int, tuple[int, ...]]:
    """The pipeline stage of a chunk, and the ranks of it that a save chooses from."""
    at = dict(zip(one.stack, offsets, strict=False))
    name, cut = one.equation.megatron.name, cut_dimension(one)
    stage = stage_of(name, at.get("l"), sizes["l"], layout)
    if "e" not in at:
        # replicas of a tensor that is not cut count from tensor parallel rank 0
        return stage, tuple(layout.holders(part if cut else 0, None, None))
    expert_rank = at["e"] // (sizes["e"] // layout.ep)
    holders = layout.holders(None, expert_rank, part if cut else None)
    return stage, tuple(rank for rank in holders if rank % layout.tp == holders[0] % layout.tp)


def stage_of(name: str, layer: int | None, layers: int, layout: ParallelLayout) -> int:
    """The pipeline stage that holds a parameter: vision and embedding first, norm and head last, layers by their number."""
    if layer is not None and name.startswith(STACKS["l"]):
        return layout.stages(layers)[layer]
    return 0 if name.startswith(_FIRST_STAGE) else layout.pp - 1


def writers(everything: Iterable[Shard], layout: ParallelLayout) -> dict[tuple[str, tuple[int, ...]], int]:
    """The global rank that writes each chunk, by (key, offsets)."""
    groups: dict[tuple[int, int], list[Shard]] = defaultdict(list)
    for shard in everything:
        groups[shard.stage, shard.holders[0] % layout.tp].append(shard)
    chosen = {}
    for (stage, _), members in groups.items():
        load = dict.fromkeys((rank for shard in members for rank in shard.holders), 0)
        for shard in sorted(members, key=lambda s: (len(s.holders), -s.nbytes, s.key, s.offsets)):
            rank = min(shard.holders, key=lambda r: (load[r], r))
            load[rank] += shard.nbytes
            chosen[shard.key, shard.offsets] = stage * layout.stage_ranks + rank
    return chosen
