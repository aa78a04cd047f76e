"""The equation behind a name, and the exact slice of it that a rank holds."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.mappings import Mapping, View, mapping_registry
from qwen3vl_convert.megatron.placement import shards
from qwen3vl_convert.megatron.stored import Stored, stored
from qwen3vl_convert.parallel import ParallelLayout


@dataclass(frozen=True, slots=True)
class Slice:
    """Part of a Megatron chunk, and the part of a HF tensor that it is. Ranges are half open, per memory dimension."""

    megatron: str
    megatron_box: tuple[tuple[int, int], ...] | None
    hf: str
    hf_axes: dict[str, tuple[int, int]]
    hf_box: tuple[tuple[int, int], ...] | None
    """None, as `megatron_box` may be, when the part is no box of the tensor: then the axes say which elements."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` says of a name."""

    name: str
    mapping: str
    equation: str
    axes: dict[str, int]
    stored_as: tuple[str, ...]
    rank: int | None
    slices: tuple[Slice, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def explain(
    name: str,
    dims: Dims,
    *,
    layout: ParallelLayout | None = None,
    rank: int | None = None,
    experts_layout: str = "hub",
) -> Explanation:
    """Explain a Megatron or HF name of a model of these sizes; with `rank`, the slices that this rank holds.

    Raises `UnknownTensors` with the nearest names, `UsageError` for a rank beyond the layout's world.
    """
    registry = mapping_registry(dims.model_type, attention_bias=dims.attention_bias).with_experts(experts_layout)
    claim = registry.lookup(name)
    layout, sizes = layout or ParallelLayout(), dims.sizes()
    layout.validate(dims, dims.vocab)
    if rank is not None and not 0 <= rank < layout.world:
        raise UsageError(f"--rank {rank}: expected 0 to {layout.world - 1}, the ranks of {layout}.")
    unknown = {a for t in (claim.mapping.equation.megatron, *claim.mapping.equation.hf) for a in t.axes} - {"*", *sizes}
    if rank is not None and unknown:
        raise UsageError(f"{name}: the model's sizes do not say {', '.join(sorted(unknown))}. Leave --rank out.")
    disk = stored(claim.mapping.equation)
    axes = {
        a: sizes[a] for t in (claim.mapping.equation.megatron, *claim.mapping.equation.hf) for a in t.axes if a in sizes
    }
    return Explanation(
        name=name,
        mapping=type(claim.mapping).__name__,
        equation=str(claim.mapping.equation),
        axes=dict(sorted(axes.items())),
        stored_as=tuple(str(one.equation.megatron) for one in disk),
        rank=rank,
        slices=() if rank is None else tuple(_slices(claim.mapping, disk, claim.place, sizes, layout, rank)),
    )


def _slices(
    mapping: Mapping,
    disk: tuple[Stored, ...],
    place: dict[str, int],
    sizes: dict[str, int],
    layout: ParallelLayout,
    rank: int,
) -> Iterator[Slice]:
    stage, local = divmod(rank, layout.stage_ranks)
    for one in disk:
        chosen = {axis: index for axis, index in place.items() if axis in one.equation.place_axes}
        for pair in (
            p
            for at in one.equation.places(sizes)
            if chosen.items() <= at.items()
            for p in one.equation.pairs(sizes, at)
        ):
            for shard in shards(one, sizes, 1, layout):
                held = shard.stage == stage and local in shard.ranks
                named = all(place.get(axis, shard.offsets[i]) == shard.offsets[i] for i, axis in enumerate(one.stack))
                if not (held and named and shard.key == pair.megatron_name):
                    continue
                for ranges in pair.megatron.clip(shard.offsets, shard.sizes):
                    ours, theirs = pair.megatron.narrowed(ranges), pair.hf.narrowed(ranges)
                    axes = {axis: (first, first + length) for axis, (first, length) in ranges.items()}
                    yield Slice(pair.megatron_name, _box(ours), pair.hf_name, axes, _box(theirs))


def _box(view: View) -> tuple[tuple[int, int], ...] | None:
    if view.numel != math.prod(view.bounds()[1]):
        return None
    return tuple((o, o + s) for o, s in zip(*view.bounds(), strict=True))
