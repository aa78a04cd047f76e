"""The way there and back: convert, compare, convert back, convert again under another layout, compare.

A Hugging Face source goes to Megatron and back, and what came back goes to Megatron once more: if both Megatron
checkpoints have the source's bits, so has what lies between them. A Megatron source starts in the middle.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwen3vl_convert.convert import RunOptions, hf_to_megatron, megatron_to_hf
from qwen3vl_convert.dims import CONFIG_FILE, Dims, read_config
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.fill import FillOptions
from qwen3vl_convert.huggingface.hub import resolve
from qwen3vl_convert.model import open_huggingface, open_megatron
from qwen3vl_convert.parallel import ParallelLayout
from qwen3vl_convert.verify.result import Verification
from qwen3vl_convert.verify.verification import LogitsOptions, Report, check_installed, verify

_CUTS = ("tp", "pp", "ep")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a round trip: what was done, and what a comparison found (None for a conversion)."""

    name: str
    seconds: float
    found: Verification | None

    @property
    def equal(self) -> bool:
        return self.found is None or self.found.equal


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """All steps, as far as they were equal: the first that is not is the last."""

    source: str
    layouts: tuple[str, str]
    steps: tuple[Step, ...]

    @property
    def equal(self) -> bool:
        return all(step.equal for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"equal": self.equal, **asdict(self)}


def roundtrip(
    source: str | Path,
    *,
    layout: ParallelLayout | None = None,
    config: str | Path | None = None,
    iteration: int | str | None = None,
    headless: bool = False,
    logits: LogitsOptions | None = None,
    scratch: Path | None = None,
    options: FillOptions | None = None,
    report: Report | None = None,
) -> RoundTrip:
    """Convert `source`, a checkpoint of either format, there and back, and compare every element; with `logits` also
    what both models compute.

    `layout` is that of the first Megatron checkpoint (default: cut in two wherever the model can be); the second has
    another. Checkpoints lie in a folder in `scratch` (default: where temporary files are) that is removed at the end,
    also after an error. Raises what the conversions and `verify` raise.
    """
    if logits is not None:
        check_installed(headless)
    run = RunOptions(options or FillOptions(), fsync=False)
    with tempfile.TemporaryDirectory(prefix="qwen3vl-convert-", dir=scratch) as folder:
        trip = _Trip(Path(folder), headless, logits, run, report)
        if _is_huggingface(source):
            return trip.from_huggingface(source, layout)
        return trip.from_megatron(Path(source), config, iteration)


def _is_huggingface(source: str | Path) -> bool:
    folder = Path(source)
    return not folder.is_dir() or (folder / CONFIG_FILE).is_file()


@dataclass(frozen=True, slots=True)
class _Trip:
    folder: Path
    headless: bool
    logits: LogitsOptions | None
    run: RunOptions
    report: Report | None

    def from_huggingface(self, source: str | Path, asked: ParallelLayout | None) -> RoundTrip:
        theirs = open_huggingface(resolve(source, weights=True).folder, headless=self.headless)
        there = asked or cut_in_two(theirs.model.dims)
        other = another(there, theirs.model.dims)
        first, back, second = (self.folder / name for name in ("there", "back", "again"))

        def steps() -> Iterator[Step]:
            yield self._do(f"convert to Megatron, {there}", lambda: self._to_megatron(source, first, there))
            yield self._compare("compare with the source", source, first, self.logits)
            yield self._do("convert back", lambda: self._to_hf(first, back, source, None))
            yield self._do(f"convert again, {other}", lambda: self._to_megatron(back, second, other))
            yield self._compare("compare with the source", source, second, None)

        return RoundTrip(str(source), (str(there), str(other)), _until_different(steps()))

    def from_megatron(self, source: Path, config: str | Path | None, iteration: int | str | None) -> RoundTrip:
        dims = None if config is None else _dims_of(config)
        ours = open_megatron(source, iteration, dims, headless=self.headless)
        other = another(ParallelLayout(), ours.model.dims)
        back, again = self.folder / "back", self.folder / "again"

        def steps() -> Iterator[Step]:
            yield self._do("convert to Hugging Face", lambda: self._to_hf(source, back, config, iteration))
            yield self._compare("compare with the source", back, source, self.logits, iteration)
            yield self._do(f"convert to Megatron, {other}", lambda: self._to_megatron(back, again, other))
            yield self._compare("compare with what came back", back, again, None)

        return RoundTrip(str(source), ("as it is", str(other)), _until_different(steps()))

    def _do(self, name: str, work: Callable[[], object]) -> Step:
        began = time.monotonic()
        work()
        return Step(name, time.monotonic() - began, None)

    def _compare(
        self,
        name: str,
        theirs: str | Path,
        ours: Path,
        logits: LogitsOptions | None,
        iteration: int | str | None = None,
    ) -> Step:
        began = time.monotonic()
        found = verify(
            theirs, ours, iteration=iteration, headless=self.headless, logits=logits, options=self.run.fill,
            report=self.report,
        )  # fmt: skip
        return Step(name, time.monotonic() - began, found)

    def _to_megatron(self, source: str | Path, target: Path, layout: ParallelLayout) -> None:
        hf_to_megatron(source, target, layout=layout, headless=self.headless, run=self.run, report=self.report)

    def _to_hf(self, source: Path, target: Path, config: str | Path | None, iteration: int | str | None) -> None:
        megatron_to_hf(
            source, target, config=config, iteration=iteration, headless=self.headless, run=self.run,
            report=self.report,
        )  # fmt: skip


def _until_different(steps: Iterator[Step]) -> tuple[Step, ...]:
    done = []
    for step in steps:
        done.append(step)
        if not step.equal:
            break
    return tuple(done)


def _dims_of(config: str | Path) -> Dims:
    folder = resolve(config, weights=False).folder
    return Dims.from_config(read_config(folder), str(folder / CONFIG_FILE))


def cut_in_two(dims: Dims) -> ParallelLayout:
    """Two parts wherever the model can be cut into two."""
    layout = ParallelLayout()
    for size in _CUTS:
        layout = _allowed(layout, size, dims) or layout
    return layout


def another(layout: ParallelLayout, dims: Dims) -> ParallelLayout:
    """A layout that is not this one: whole, or where this one is whole cut in two."""
    return cut_in_two(dims) if layout == ParallelLayout() else ParallelLayout()


def _allowed(layout: ParallelLayout, size: str, dims: Dims) -> ParallelLayout | None:
    candidate = replace(layout, **{size: 2})
    try:
        candidate.validate(dims, dims.vocab)
    except UsageError:
        return None
    return candidate
