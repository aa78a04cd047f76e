"""Both programs, each in two precisions, on their way through all prompts.

With `stream` all four models are hollow and read each weight where a layer needs it. Otherwise the two in the dtype of
the comparison are in memory, and the exact ones borrow from them. Either way the four go through the layers side by
side, so that what each layer gives can be compared and dropped.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qwen3vl_convert.model import EMBEDDING, HuggingFaceModel, MegatronModel
from qwen3vl_convert.progress import Report
from qwen3vl_convert.storage import DTYPES
from qwen3vl_convert.verify.logits.alignment import Aligned, align
from qwen3vl_convert.verify.logits.convoy import Convoy, Station
from qwen3vl_convert.verify.logits.hollow import Shelf, give_back_memory, hollow_out
from qwen3vl_convert.verify.logits.programs import (
    EXACT,
    Resident,
    Weights,
    build_ours,
    build_theirs,
    fill,
    folder_weights,
    layers_of,
    lend_all,
    our_logits,
    shelf_of,
    their_logits,
)
from qwen3vl_convert.verify.logits.prompts import Prompt
from qwen3vl_convert.verify.logits.trace import HF, MEGATRON, RUNNERS, Trace, points_of

MULTIPLE = 2.0
"""Of the two programs' own errors: how far they may be apart."""

_Runner = tuple[str, bool]


@dataclass(frozen=True, slots=True)
class Mode:
    """How the models are run; `shelf_bytes`: of weights that a hollow model holds at a time. `narrow`: the dtype that
    the weights of both are rounded to first, where their dtypes differ and may.
    """

    dtype: torch.dtype
    device: torch.device
    stream: bool
    shelf_bytes: int
    narrow: torch.dtype | None = None

    def dtypes(self, exact: bool) -> tuple[torch.dtype, ...]:
        """What a runner's weights are rounded to, one after the other: always to the dtype of the comparison."""
        common = (self.dtype,) if self.narrow is None else (self.narrow, self.dtype)
        return (*common, EXACT[self.dtype]) if exact else common


def narrower(theirs: HuggingFaceModel, ours: MegatronModel) -> torch.dtype | None:
    """The dtype that the weights of two checkpoints have in common once the wider is rounded; None for the same."""
    found = [next(iter(side.tensors.values())).dtype for side in (theirs, ours)]
    if found[0] == found[1]:
        return None
    chosen: torch.dtype = getattr(torch, min(reversed(found), key=lambda dtype: DTYPES[dtype].itemsize))
    return chosen


class Refused(Exception):
    """Our model, with the settings that the checkpoint states, does not take a prompt."""


class Outputs(NamedTuple):
    """The logits [S, vocab] of one prompt, in the order of `RUNNERS`."""

    hf_exact: Tensor
    hf: Tensor
    ours_exact: Tensor
    ours: Tensor


class Traffic:
    """Run once. Models are built at once, and their weights read while it runs."""

    revisiting: frozenset[str] = frozenset({HF})
    """Programs that run their vision tower once for images and once for videos."""

    def __init__(self, theirs: HuggingFaceModel, ours: MegatronModel, mode: Mode) -> None:
        self.theirs, self.ours, self.mode = theirs, ours, mode
        self.models = {runner: self._hollow(*runner) for runner in RUNNERS}
        files = folder_weights(theirs, self.models[HF, False])
        self.weights: dict[str, Weights] = {HF: files}
        self.aligned, self.sizes = self._open(files.layout)
        for model in self.models.values():
            hollow_out(model, mode.device)
        self.here = threading.local()

    def _open(self, experts_layout: str) -> tuple[tuple[Aligned, ...], dict[str, int]]:
        """(which modules are which, sizes of the model); finds the weights of ours."""
        from qwen3vl_convert.models.restore import plan_restoring

        restoring = plan_restoring(self.models[MEGATRON, False], self.ours, experts_layout=experts_layout)
        self.weights[MEGATRON] = restoring
        return align(restoring), restoring.opened.model.sizes

    def _hollow(self, program: str, exact: bool) -> nn.Module:
        dtype = self.mode.dtypes(exact)[-1]
        return build_theirs(self.theirs.checkpoint.folder, dtype) if program == HF else self._build(dtype)

    def _build(self, dtype: torch.dtype) -> nn.Module:
        """Our model without weights."""
        return build_ours(self.ours.model.dims, self.ours.model.padded_vocab, dtype)

    def run(self, prompts: Sequence[Prompt], report: Report | None = None) -> tuple[list[Outputs], Trace]:
        """The logits of every prompt, and what was seen on the way. `report` is told of stations that were passed."""
        if not self.mode.stream:
            self._load(report)
        visits = [sum(x is not None for x in (one.pixel_values, one.pixel_values_videos)) for one in prompts]
        eps = torch.finfo(self.mode.dtype).eps
        trace = Trace(points_of(self.aligned), self.sizes, visits, MULTIPLE, eps, self.revisiting)
        for runner, model in self.models.items():
            trace.watch(runner, model, lambda: self.here.prompt)
        works = [partial(self._pass, runner, at, one) for runner in RUNNERS for at, one in enumerate(prompts)]
        try:
            found = Convoy(self._stations(), _counting(report)).run(works)
        finally:
            trace.remove()
        count = len(prompts)
        return [Outputs(*found[at::count]) for at in range(count)], trace

    def _load(self, report: Report | None) -> None:
        """Put the models of the comparison into memory; the exact ones take their weights from there."""
        models = (self.models[HF, False], self.models[MEGATRON, False])
        total, done = sum(parameter.nbytes for model in models for parameter in model.parameters()), 0

        def passed(nbytes: int) -> None:
            nonlocal done
            done = min(done + nbytes, total)
            if report is not None:
                report("read weights", done, total)

        self._fill(HF, passed)
        self._fill(MEGATRON, passed)
        self.weights = {program: Resident(self.models[program, False]) for program in (HF, MEGATRON)}

    def _fill(self, program: str, passed: Callable[[int], None]) -> None:
        mode = self.mode
        fill(self.models[program, False], self.weights[program], mode.dtypes(False), mode.device, passed)

    def _stations(self) -> list[Station]:
        """Of all four models. What one precision of a program read the other needs next; that one clears the shelf."""
        places, mode = _places(self.aligned, self.theirs.model.dims.deepstack), self.mode
        shelves = {name: shelf_of(one, mode.shelf_bytes, mode.device) for name, one in self.weights.items()}
        found = []
        for turn, (program, exact) in enumerate(RUNNERS):
            model, used = self.models[program, exact], [] if exact else [shelves[program]]
            if exact or mode.stream:
                used.append(lend_all(model, shelves[program], mode.dtypes(exact)))
            for name, layer in layers_of(model).items():
                nbytes = sum(parameter.nbytes for parameter in layer.parameters())
                found.append(Station((*_place(places, name), turn), layer, partial(clear_all, used), nbytes))
        return found

    def _pass(self, runner: _Runner, at: int, prompt: Prompt) -> Tensor:
        self.here.prompt = at
        model = self.models[runner]
        if runner[0] == HF:
            return their_logits(model, prompt)
        try:
            return self._logits(model, prompt)
        except ValueError as error:
            raise Refused(str(error)) from error

    def _logits(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """Of our model."""
        return our_logits(model, prompt, self.ours.model.dims.vocab)


def clear_all(shelves: Iterable[Shelf]) -> None:
    """When a layer was passed."""
    for shelf in shelves:
        shelf.clear()
    give_back_memory()


def _counting(report: Report | None) -> Callable[[int, int], None]:
    return (lambda done, total: None) if report is None else partial(report, "logits")


_BLOCKS, _MERGERS = "model.visual.blocks", "model.visual.deepstack_merger_list"
_Key = tuple[int, int]
"""Of a place: (among modules in the order in which ours has and runs them, after that module)."""


def _places(aligned: Iterable[Aligned], deepstack: Sequence[int]) -> dict[str, _Key]:
    """Where the modules with parameters stand among all, by their name in either program: words before the vision tower
    since both look them up first; a merger of transformers' after the block that it takes from, where it is called, or
    our blocks would be through before the next of theirs.
    """
    places = {EMBEDDING[side].removesuffix(".weight"): (-1, 0) for side in range(2)}
    for place, one in enumerate(aligned):
        for name in (one.module, *one.hf_modules):
            places.setdefault(name, (place, 0))
    merged = {f"{_MERGERS}.{level}": _place(places, f"{_BLOCKS}.{block}")[0] for level, block in enumerate(deepstack)}
    after = {name: (merged[owner], 1) for name in places for owner in merged if name.startswith(f"{owner}.")}
    return places | after


def _place(places: Mapping[str, _Key], layer: str) -> _Key:
    """Where a layer stands: at the first of its modules; after all, an output layer that is tied."""
    inside = [place for name, place in places.items() if name == layer or name.startswith(f"{layer}.")]
    return min(inside, default=(len(places), 0))
