"""Two checkpoints of any formats, tensor by tensor: what training changed, sorted by how much."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import InputError
from qwen3vl_convert.fill import FillOptions, Progress
from qwen3vl_convert.plan import Box, pieces
from qwen3vl_convert.progress import Report
from qwen3vl_convert.storage import DTYPES, Chunk
from qwen3vl_convert.strided import Array
from qwen3vl_convert.verify.canonical import Canonical, open_canonical, states_sizes
from qwen3vl_convert.verify.settings import NOT_FUNCTION
from qwen3vl_convert.verify.weights.bits import values
from qwen3vl_convert.verify.weights.passes import each
from qwen3vl_convert.verify.weights.tally import BLOCK, dot

_WIDEST = "float32"
"""The dtype in which a tensor is read that is made of tensors of several."""


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor that is another in B, by its name on the hub.

    `changed` of `elements` are other bits, or other values where the `dtypes` (A, B) differ. `relative` is the norm of
    B - A by that of A: infinite where A is zero, or either is not finite. `max_abs` is the largest change.
    """

    name: str
    elements: int
    changed: int
    relative: float
    max_abs: float
    dtypes: tuple[str, str]


@dataclass(frozen=True, slots=True)
class DiffReport:
    """The answer of `diff`. `changes`: the largest relative change first. `settings`: (A, B) by name."""

    a: str
    b: str
    formats: tuple[str, str]
    tensors: int
    elements: int
    changes: tuple[Change, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    settings: dict[str, tuple[Any, Any]]
    notes: tuple[str, ...]
    seconds: float

    @property
    def equal(self) -> bool:
        """No other weight, dtype, tensor or setting."""
        return not (self.changes or self.only_a or self.only_b or self.settings)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"equal": self.equal, **asdict(self)}


def diff(
    a: str | Path,
    b: str | Path,
    *,
    iteration_a: int | str | None = None,
    iteration_b: int | str | None = None,
    options: FillOptions | None = None,
    report: Report | None = None,
) -> DiffReport:
    """Compare two checkpoints of any formats, dtypes and layouts. Memory is `options.max_memory`.

    A checkpoint that does not state its sizes is read with the other's. Raises `InputError`'s kinds, also for two
    models of different sizes.
    """
    began = time.monotonic()
    if states_sizes(a, iteration_a):
        one = open_canonical(a, iteration_a)
        other = open_canonical(b, iteration_b, one.dims)
    else:
        other = open_canonical(b, iteration_b)
        one = open_canonical(a, iteration_a, other.dims)
    _check_sizes(one, other)
    common = [name for name in one.shapes if name in other.shapes]
    comparison = _Comparison(one, other, options or FillOptions())
    elements = {name: math.prod(one.shapes[name]) for name in common}
    tell = report or (lambda stage, done, total: None)
    nbytes = {name: 2 * comparison.itemsize(name) * count for name, count in elements.items()}
    found = each(nbytes, comparison.of, comparison.options.workers, lambda done, total: tell("compare", done, total))
    return DiffReport(
        a=str(a),
        b=str(b),
        formats=(one.format, other.format),
        tensors=len(common),
        elements=sum(elements.values()),
        changes=tuple(sorted((c for _, c in found if c is not None), key=lambda c: (-c.relative, c.name))),
        only_a=tuple(name for name in one.shapes if name not in other.shapes),
        only_b=tuple(name for name in other.shapes if name not in one.shapes),
        settings=_settings(one, other),
        notes=tuple(f"{which}: {note}" for which, side in (("A", one), ("B", other)) for note in side.notes),
        seconds=time.monotonic() - began,
    )


def _check_sizes(one: Canonical, other: Canonical) -> None:
    sizes = [_sizes(side.dims) for side in (one, other)]
    apart = [
        f"{name} = {sizes[0].get(name, 'none')} and {sizes[1].get(name, 'none')}"
        for name in dict.fromkeys((*sizes[0], *sizes[1]))
        if sizes[0].get(name) != sizes[1].get(name)
    ]
    if apart:
        raise InputError(
            f"{one.path} and {other.path} are models of different sizes ({', '.join(apart)}), whose tensors have no "
            f"counterparts. Compare checkpoints of one model."
        )


def _sizes(dims: Dims) -> dict[str, Any]:
    """What decides the tensors and their shapes. The ffn of a model of experts is no tensor's."""
    named = ("model_type", "layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "experts", "expert_ffn")
    vision = [f.name for f in fields(Dims) if f.name.startswith("vision_") and not f.name.endswith("_id")]
    patches = ("patch", "temporal_patch", "channels", "spatial_merge", "position_embeddings")
    ffn = () if dims.moe else ("ffn",)
    return {name: getattr(dims, name) for name in (*named, *ffn, *vision, *patches)} | {
        "deepstack mergers": len(dims.deepstack)
    }


def _settings(one: Canonical, other: Canonical) -> dict[str, tuple[Any, Any]]:
    """What both state and state differently, of all that changes what a model computes."""
    if one.stated is None or other.stated is None:
        return {}
    config, trained = (_different(a, b) for a, b in zip(one.stated, other.stated, strict=True))
    return config | {f"{name} (as trained)": pair for name, pair in trained.items() if name not in config}


def _different(one: Dims, other: Dims) -> dict[str, tuple[Any, Any]]:
    pairs = {f.name: (getattr(one, f.name), getattr(other, f.name)) for f in fields(Dims)}
    return {name: pair for name, pair in pairs.items() if name not in NOT_FUNCTION and pair[0] != pair[1]}


@dataclass(frozen=True)
class _Comparison:
    """Both checkpoints, tensor by tensor and piece by piece."""

    a: Canonical
    b: Canonical
    options: FillOptions

    def dtypes(self, name: str) -> tuple[str, str]:
        """(A, B) as they are told."""
        return " and ".join(self.a.assembled.dtypes(name)), " and ".join(self.b.assembled.dtypes(name))

    def itemsize(self, name: str) -> int:
        return max(DTYPES[_read_as(side, name)].itemsize for side in (self.a, self.b))

    def of(self, name: str, progress: Progress) -> Change | None:
        """The change of a tensor, if there is one. Those that are equal are read once, others to their first change
        and then whole.
        """
        dtypes, same = self.dtypes(name), True
        for box in self._pieces(name):
            same = same and not self._changed(*self._read(name, box), name).any()
            if not same:
                break
            progress(math.prod(box[1]) * self.itemsize(name))
        if same and dtypes[0] == dtypes[1]:
            return None
        return self._measured(name, dtypes, progress)

    def _measured(self, name: str, dtypes: tuple[str, str], progress: Progress) -> Change:
        moves = _Moves()
        for box in self._pieces(name):
            a, b = (bits.reshape(-1) for bits in self._read(name, box))
            for first in range(0, a.size, BLOCK):
                here = slice(first, first + BLOCK)
                changed = int(np.count_nonzero(self._changed(a[here], b[here], name)))
                moves.add(changed, self._values(a[here], self.a, name), self._values(b[here], self.b, name))
            progress(math.prod(box[1]) * self.itemsize(name))
        elements = math.prod(self.a.shapes[name])
        return Change(name, elements, moves.changed, moves.relative, moves.largest, dtypes)

    def _pieces(self, name: str) -> Iterator[Box]:
        shape = self.a.shapes[name]
        return pieces(Chunk((0,) * len(shape), shape, Path(), 0), self.itemsize(name), self.options.piece_bytes)

    def _read(self, name: str, box: Box) -> tuple[Array, Array]:
        one, other = (side.assembled.read(name, box, _read_as(side, name)) for side in (self.a, self.b))
        return one, other

    def _changed(self, a: Array, b: Array, name: str) -> Array:
        """By bits; of different dtypes by value, where zeros of either sign are two and all NaNs are one."""
        if _read_as(self.a, name) == _read_as(self.b, name):
            return np.asarray(a != b)
        start, end = (values(x, _read_as(side, name)) for x, side in ((a, self.a), (b, self.b)))
        return np.asarray(~_same(start, end) | ((start == 0) & (np.signbit(start) != np.signbit(end))))

    def _values(self, bits: Array, side: Canonical, name: str) -> Array:
        return values(bits, _read_as(side, name)).astype(np.float64)


def _read_as(side: Canonical, name: str) -> str:
    dtypes = side.assembled.dtypes(name)
    return dtypes[0] if len(dtypes) == 1 else _WIDEST


def _same(start: Array, end: Array) -> Array:
    return np.asarray((start == end) | (np.isnan(start) & np.isnan(end)))


@dataclass(slots=True)
class _Moves:
    """How far the elements of a tensor have moved, so far."""

    changed: int = 0
    largest: float = 0.0
    before: float = 0.0
    moved: float = 0.0

    def add(self, changed: int, start: Array, end: Array) -> None:
        """Some more elements, flat, in float64."""
        self.changed += changed
        with np.errstate(invalid="ignore", over="ignore"):
            step = end - start
            if not np.isfinite(step).all():  # maybe where both are the same that is not finite
                step = np.where(_same(start, end), 0.0, step)
            self.before += dot(start, start)
            self.moved += dot(step, step)
            furthest = max(float(step.max()), -float(step.min()))
        self.largest = max(self.largest, math.inf if math.isnan(furthest) else furthest)

    @property
    def relative(self) -> float:
        """The norm of the change by the norm of what was changed."""
        if self.moved == 0:
            return 0.0
        if not (math.isfinite(self.moved) and math.isfinite(self.before)) or self.before == 0:
            return math.inf
        return math.sqrt(self.moved / self.before)
