"""The way there and back: convert, compare, convert back, convert again under another layout, compare.

A Hugging Face source goes to Megatron and back, and what came back goes to Megatron once more: both Megatron
checkpoints, and what lies between them, must have the source's bits. A Megatron source starts in the middle.

With logits, transformers' model of the Hugging Face folder and ours of the Megatron checkpoint are built and compared.
That is once for a trip: what else it made has the same bits as one of these, and a model is what its bits make it.
"""

import tempfile
import time
from collections.abc import Iterator
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
from qwen3vl_convert.progress import Report, within
from qwen3vl_convert.torchrun import processes
from qwen3vl_convert.verify.diff import DiffReport, diff
from qwen3vl_convert.verify.result import LogitsReport, Verification
from qwen3vl_convert.verify.verification import LogitsOptions, check_logits, verify

_CUTS = ("tp", "pp", "ep")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a round trip, and what a comparison of it found: `found` of a folder with a Megatron checkpoint,
    `changes` of two folders. A conversion has neither.
    """

    name: str
    seconds: float
    found: Verification | None = None
    changes: DiffReport | None = None

    @property
    def equal(self) -> bool:
        return all(one is None or one.equal for one in (self.found, self.changes))


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """All steps, as far as they were equal: the first that is not is the last. `built`: what the two models were made
    of that `logits` compares, Hugging Face's first; `spared`: why no more were built, if that
    was right. Empty without logits.
    """

    source: str
    layouts: tuple[str, str]
    steps: tuple[Step, ...]
    built: tuple[str, ...] = ()
    spared: str = ""

    @property
    def equal(self) -> bool:
        return all(step.equal for step in self.steps)

    @property
    def compared(self) -> Verification | None:
        """The comparison with which both models were built, if they were."""
        return next((step.found for step in self.steps if step.found is not None and step.found.logits), None)

    @property
    def logits(self) -> LogitsReport | None:
        return None if self.compared is None else self.compared.logits

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        steps = [{**asdict(step), "equal": step.equal} for step in self.steps]
        models = None if self.logits is None else self._models()
        return {"equal": self.equal, **asdict(self), "steps": steps, "models": models}

    def _models(self) -> dict[str, Any]:
        """Of the logits, what a reader asks first; all of it is in the step."""
        assert self.logits is not None
        found, worst = self.logits, self.logits.worst
        return {
            "equal": found.equal,
            "programs": found.programs,
            "weights": self.built,
            "device": found.device,
            "dtype": found.dtype,
            "prompts": [one.name for one in found.prompts],
            "max_abs": max((one.max_abs for one in found.prompts), default=None),
            "worst": worst and {"prompt": worst.name, "max_abs": worst.max_abs, "allowed": worst.allowed},
        }


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
    also after an error. Raises what the conversions and `verify` raise, and `UsageError` under torchrun.
    """
    if processes() > 1:
        raise UsageError("roundtrip runs in one process: start it without torchrun.")
    if logits is not None:
        check_logits(headless, logits)
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
            yield self._to_megatron(f"convert to Megatron, {there}", source, first, there)
            yield self._compare("compare with the source", source, first, self.logits)
            yield self._to_hf("convert back", first, back, source, None)
            yield self._to_megatron(f"convert again, {other}", back, second, other)
            yield self._compare("compare that with the source", source, second, None)
            yield self._diff("compare what came back", source, back)

        built = (str(source), f"the Megatron checkpoint made of {source}")
        spared = "The folder that came back is not built: it has the source's bits."
        return self._trip(source, (str(there), str(other)), steps(), built, spared)

    def from_megatron(self, source: Path, config: str | Path | None, iteration: int | str | None) -> RoundTrip:
        dims = None if config is None else _dims_of(config)
        ours = open_megatron(source, iteration, dims, headless=self.headless)
        other = another(ParallelLayout(), ours.model.dims)
        back, again = self.folder / "back", self.folder / "again"

        def steps() -> Iterator[Step]:
            yield self._to_hf("convert to Hugging Face", source, back, config, iteration)
            yield self._compare("compare with the source", back, source, self.logits, iteration)
            yield self._to_megatron(f"convert to Megatron, {other}", back, again, other)
            yield self._compare("compare that with what came back", back, again, None)

        built = (f"the Hugging Face folder made of {source}", str(source))
        spared = "The Megatron checkpoint made of that folder is not built: it has the folder's bits."
        return self._trip(source, ("as it is", str(other)), steps(), built, spared)

    def _trip(
        self, source: str | Path, layouts: tuple[str, str], steps: Iterator[Step], built: tuple[str, ...], spared: str
    ) -> RoundTrip:
        done = _until_different(steps)
        if self.logits is None:
            return RoundTrip(str(source), layouts, done)
        return RoundTrip(str(source), layouts, done, built, spared if all(step.equal for step in done) else "")

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
            report=within(self.report, name),
        )  # fmt: skip
        return Step(name, time.monotonic() - began, found=found)

    def _diff(self, name: str, source: str | Path, back: Path) -> Step:
        began = time.monotonic()
        changes = diff(source, back, options=self.run.fill, report=within(self.report, name))
        return Step(name, time.monotonic() - began, changes=changes)

    def _to_megatron(self, name: str, source: str | Path, target: Path, layout: ParallelLayout) -> Step:
        began, report = time.monotonic(), within(self.report, name)
        hf_to_megatron(source, target, layout=layout, headless=self.headless, run=self.run, report=report)
        return Step(name, time.monotonic() - began)

    def _to_hf(
        self, name: str, source: Path, target: Path, config: str | Path | None, iteration: int | str | None
    ) -> Step:
        began, report = time.monotonic(), within(self.report, name)
        megatron_to_hf(
            source, target, config=config, iteration=iteration, headless=self.headless, run=self.run, report=report
        )
        return Step(name, time.monotonic() - began)


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
