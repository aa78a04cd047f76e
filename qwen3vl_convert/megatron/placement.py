"""Which chunks a Megatron job writes, and which rank writes each: the grids and the placement of Megatron-Core's own
saves.

A tensor is stored as one chunk per layer, per expert, per half of a SwiGLU and per tensor parallel rank. Each chunk is
written by one rank: the first that holds it, or, when several data-parallel ranks do, the one that Megatron-Core's
fully-parallel save picks (greedily, fewest holders first, then the largest, to the least loaded rank).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from qwen3vl_convert.mappings import Layout
from qwen3vl_convert.mappings.layout import Sizes
from qwen3vl_convert.mappings.qwen3_vl import CUTS
from qwen3vl_convert.mappings.registry import names
from qwen3vl_convert.megatron.stored import STACKS, Stored
from qwen3vl_convert.parallel import ParallelLayout

_EMBEDDING = "language_model.embedding."
_FIRST_STAGE = ("vision_model.", _EMBEDDING)


@dataclass(frozen=True, slots=True)
class Shard:
    """A chunk to be written: its box, its size in bytes, and its pipeline stage.

    `ranks` of that stage hold it, replicas included; of these `writers` may write it.
    """

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    nbytes: int
    stage: int
    ranks: tuple[int, ...]
    writers: tuple[int, ...]


def shards(one: Stored, sizes: Sizes, itemsize: int, layout: ParallelLayout) -> Iterator[Shard]:
    """The chunks of a stored parameter, by offset; of every tensor of that kind, where axes stay in its name."""
    term, full = one.equation.megatron, one.equation.full(sizes)
    shape = term.layout.shape(full)
    cut, keys = cut_dimension(one), list(names(term, sizes))
    spans = [_spans(one, term.layout, dim, shape[dim], full, layout) for dim in range(len(shape))]
    for index in itertools.product(*(range(len(span)) for span in spans)):
        offsets, extents = zip(*(span[i] for span, i in zip(spans, index, strict=True)), strict=True)
        part = index[cut[0]] % _ways(cut, layout) if cut else 0
        at = dict(zip(one.stack, offsets, strict=False))
        stage = stage_of(term.name, at.get("l"), sizes["l"], layout)
        held = _ranks(at, part if cut else None, sizes, layout)
        for key in keys:
            yield Shard(key, offsets, extents, math.prod(extents) * itemsize, stage, *held)


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


def _ranks(
    at: dict[str, int], part: int | None, sizes: Sizes, layout: ParallelLayout
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ranks of a stage that hold a chunk, those of them that a save chooses from). `part`: of the cut axis, if any."""
    if "e" in at:
        holders = layout.holders(None, at["e"] // (sizes["e"] // layout.ep), part)
    else:
        holders = layout.holders(part, None, None)
    # A save divides the work among data-parallel ranks: those with the tensor parallel index of the first replica.
    return holders, tuple(rank for rank in holders if rank % layout.tp == holders[0] % layout.tp)


def held_bytes(
    parameters: Iterable[Stored], sizes: Sizes, itemsize_of: Callable[[str], int], layout: ParallelLayout, tied: bool
) -> list[int]:
    """Bytes of weights that each global rank holds; a tied head is a second copy of the embedding on the last stage."""
    held = [0] * layout.world
    for one in parameters:
        name = one.equation.megatron.name
        for shard in shards(one, sizes, 1, layout):
            copies = {shard.stage, layout.pp - 1} if tied and name.startswith(_EMBEDDING) else {shard.stage}
            for rank in (stage * layout.stage_ranks + local for stage in copies for local in shard.ranks):
                held[rank] += shard.nbytes * itemsize_of(shard.key)
    return held


def stage_of(name: str, layer: int | None, layers: int, layout: ParallelLayout) -> int:
    """The pipeline stage that holds a parameter: vision and embedding first, norm and head last, layers by their
    number.
    """
    if layer is not None and name.startswith(STACKS["l"]):
        return layout.stages(layers)[layer]
    return 0 if name.startswith(_FIRST_STAGE) else layout.pp - 1


def writers(everything: Iterable[Shard], layout: ParallelLayout) -> dict[tuple[str, tuple[int, ...]], int]:
    """The global rank that writes each chunk, by (key, offsets)."""
    groups: dict[tuple[int, int], list[Shard]] = defaultdict(list)
    for shard in everything:
        groups[shard.stage, shard.writers[0] % layout.tp].append(shard)
    chosen = {}
    for (stage, _), members in groups.items():
        load = dict.fromkeys((rank for shard in members for rank in shard.writers), 0)
        for shard in sorted(members, key=lambda s: (len(s.writers), -s.nbytes, s.key, s.offsets)):
            rank = min(shard.writers, key=lambda r: (load[r], r))
            load[rank] += shard.nbytes
            chosen[shard.key, shard.offsets] = stage * layout.stage_ranks + rank
    return chosen
