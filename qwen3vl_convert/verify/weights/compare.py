"""Every element of both checkpoints, read from disk and compared bit for bit; where they differ, how much and why.

The first pass asks of each tensor whether it is equal, and stops at the first piece that is not. Only tensors that
differ are read once more and measured, and the first of those are looked at for one of the usual things.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np

from qwen3vl_convert.fill import FillOptions, Progress
from qwen3vl_convert.model import HuggingFaceModel, MegatronModel
from qwen3vl_convert.progress import Report
from qwen3vl_convert.storage import DTYPES
from qwen3vl_convert.verify.result import Difference, WeightsReport
from qwen3vl_convert.verify.settings import differing
from qwen3vl_convert.verify.weights.guess import Guesser
from qwen3vl_convert.verify.weights.padding import check_padding
from qwen3vl_convert.verify.weights.passes import each
from qwen3vl_convert.verify.weights.sides import Sides, align
from qwen3vl_convert.verify.weights.tally import Tally

T = TypeVar("T")

MOST_GUESSES = 50
"""Tensors that are looked at for what happened to them; of further ones it is only said how much they differ."""


def compare_weights(
    theirs: HuggingFaceModel,
    ours: MegatronModel,
    *,
    dtype_tolerant: bool = False,
    options: FillOptions | None = None,
    report: Report | None = None,
) -> WeightsReport:
    """Compare every weight of a HF folder with a Megatron checkpoint of any layout; `open_beside` opens that.

    `dtype_tolerant`: a tensor whose dtype differs must be exactly what rounding the wider to the narrower gives (of
    bfloat16 and float16, either to the other), every NaN for any other. Memory is `options.max_memory`, and for the
    guesses a few times the largest expert or matrix. Raises `InputError`'s kinds for what cannot be aligned.
    """
    began = time.monotonic()
    run = _Run(align(theirs, ours, dtype_tolerant), options or FillOptions(), report or (lambda *_: None))
    measured = run.measure(run.unequal())
    padding, padding_notes = check_padding(ours)
    return WeightsReport(
        tensors=len(run.sides.theirs),
        elements=sum(tensor.numel for tensor in run.sides.theirs.values()),
        differences=tuple(_merged([*run.differences(measured, Guesser(run.sides, theirs, ours)), *padding])),
        settings=differing(ours.checkpoint, theirs.model.dims),
        ulps=tuple(sum(counts) for counts in zip(*(t.ulps for t in (Tally(), *measured.values())), strict=True)),
        tolerated=_tolerated(run.sides) if dtype_tolerant else "",
        notes=(*theirs.check_data(), *padding_notes, *theirs.checkpoint.notes, *ours.checkpoint.notes),
        seconds=time.monotonic() - began,
    )


def _tolerated(sides: Sides) -> str:
    pairs = sorted({pair for name in sides.theirs if (pair := sides.dtypes(name)) is not None})
    shown = "; ".join(f"{theirs} in the HF folder, {ours} in the Megatron checkpoint" for theirs, ours in pairs)
    return f"the wider dtype is rounded to the other, to nearest even: {shown or 'none differ'}"


def _merged(found: list[Difference]) -> Iterator[Difference]:
    """One difference per name: of a tensor that differs and whose padding is wrong too, the tensor's with both
    guesses.
    """
    by_name: dict[str, Difference] = {}
    for one in found:
        known = by_name.get(one.name)
        by_name[one.name] = replace(known, guess=f"{known.guess}; {one.guess}".strip("; ")) if known else one
    yield from by_name.values()


class _Run:
    """The passes over both checkpoints, each in threads that take a tensor at a time."""

    def __init__(self, sides: Sides, options: FillOptions, report: Report) -> None:
        self.sides, self.options, self.report = sides, options, report

    def unequal(self) -> list[str]:
        """The names of tensors that differ, in the order of the folder."""
        return [name for name, equal in self._each("compare", self.sides.theirs, self._is_equal) if not equal]

    def measure(self, names: list[str]) -> dict[str, Tally]:
        """By how much; an empty tally for those whose dtypes do not allow to tell."""
        return dict(self._each("measure", names, self._tally))

    def differences(self, measured: dict[str, Tally], guesser: Guesser) -> Iterator[Difference]:
        for number, (name, tally) in enumerate(measured.items()):
            shape = self.sides.theirs[name].shape
            if not self.sides.common(name):
                yield self._of_dtypes(name)
                continue
            guess = guesser.guess(name) if number < MOST_GUESSES else ""
            yield replace(tally.difference(name, self.sides.key(name), shape), guess=guess)

    def _of_dtypes(self, name: str) -> Difference:
        shape, dtypes = self.sides.theirs[name].shape, self.sides.dtypes(name)
        advice = "pass --dtype-tolerant if it was converted on purpose"
        guess = f"{dtypes[0]} in the HF folder, {dtypes[1]} in the Megatron checkpoint; {advice}" if dtypes else ""
        return Difference(name, self.sides.key(name), shape, 0, (), math.nan, 0, math.nan, guess, dtypes)

    def _is_equal(self, name: str, progress: Progress) -> bool:
        return any(self._is_equal_in(dtype, name, progress) for dtype in self.sides.common(name))

    def _is_equal_in(self, dtype: str, name: str, progress: Progress) -> bool:
        for box in self.sides.pieces(name, self.options.piece_bytes):
            if not np.array_equal(*self.sides.read(name, box, dtype)):
                return False
            progress(math.prod(box[1]) * DTYPES[self.sides.theirs[name].dtype].itemsize)
        return True

    def _tally(self, name: str, progress: Progress) -> Tally:
        tally = Tally()
        for dtype in self.sides.common(name)[:1]:
            for box in self.sides.pieces(name, self.options.piece_bytes):
                tally.add(box[0], *self.sides.read(name, box, dtype), dtype)
                progress(math.prod(box[1]) * DTYPES[self.sides.theirs[name].dtype].itemsize)
        return tally

    def _each(self, stage: str, names: Iterable[str], work: Callable[[str, Progress], T]) -> list[tuple[str, T]]:
        nbytes = {name: self.sides.theirs[name].nbytes for name in names}
        return each(nbytes, work, self.options.workers, lambda done, total: self.report(stage, done, total))
