"""The logits of a Megatron checkpoint in the layout that it was written in: under torchrun, each process with its part.

    torchrun --nproc-per-node 4 -m qwen3vl_convert.cli.app verify HF MEGATRON --logits      # written as TP2 PP2

Our model is in `stages`. transformers' model runs in the first process, with the weights of a layer at a time, so that
it fits where a part of ours does. What modules give is not compared: each process has some of them, or parts of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qwen3vl_convert.errors import UsageError, listing
from qwen3vl_convert.model import HuggingFaceModel, MegatronModel
from qwen3vl_convert.models.ranks import everyones, ranks, together
from qwen3vl_convert.models.world import World, parallel_world
from qwen3vl_convert.progress import Report, begin
from qwen3vl_convert.verify.logits.compare import (
    DTYPES,
    as_stated,
    compared,
    described,
    exact_kernels,
    name_of,
    on,
    peak_bytes,
    programs_of,
)
from qwen3vl_convert.verify.logits.convoy import Convoy, Station
from qwen3vl_convert.verify.logits.device import device_of
from qwen3vl_convert.verify.logits.hollow import apart, hollow_out
from qwen3vl_convert.verify.logits.layout import check_gpus, check_processes, layout_of
from qwen3vl_convert.verify.logits.programs import (
    EXACT,
    build_theirs,
    folder_weights,
    layers_of,
    lend_all,
    shelf_of,
    their_logits,
)
from qwen3vl_convert.verify.logits.prompts import NamedPrompt, Prompt, verification_prompts
from qwen3vl_convert.verify.logits.stages import logits_in_stages
from qwen3vl_convert.verify.logits.traffic import MULTIPLE, Mode, Outputs, clear_all
from qwen3vl_convert.verify.result import LogitsReport, Place, PromptResult, WeightsReport
from qwen3vl_convert.verify.verification import LogitsOptions

PATIENCE = timedelta(days=2)
"""How long processes wait for the first, which runs transformers' model. torchrun ends all of them when one fails."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Task:
    """What is compared and how, in the world in which it is."""

    theirs: HuggingFaceModel
    ours: MegatronModel
    mode: Mode
    world: World


def compare_logits_in_parallel(
    theirs: HuggingFaceModel,
    ours: MegatronModel,
    options: LogitsOptions,
    weights: WeightsReport,
    report: Report | None = None,
) -> LogitsReport:
    """`compare_logits` in the checkpoint's own layout: every process that torchrun started calls it, and all get the
    same report. Processes beyond those of the layout are data parallel. `weights` and `report` matter in the first.

    Raises `UsageError` in all of them for a layout that is not known, or does not fit the model, GPUs or processes.
    What fails in one process is raised in all; but where processes wait for what it sends, torchrun ends them with it.
    """
    began = time.monotonic()
    ours = as_stated(ours, theirs)
    layout = layout_of(ours.checkpoint, ours.model)
    check_processes(layout, ours.checkpoint)
    if options.stream:
        raise UsageError("--stream under torchrun: layers are streamed through one process. Leave one of them out.")
    if device_of(options.device).type == "cuda":
        check_gpus()
    backend = "gloo" if options.device == "cpu" else None
    with parallel_world(layout, backend=backend, timeout=PATIENCE) as world, exact_kernels(), apart(), torch.no_grad():
        mode = Mode(DTYPES[options.dtype], device_of(options.device), True, options.shelf_bytes)  # this rank's own GPU
        task = _Task(theirs, ours, mode, world)
        with together():
            checkpoint = theirs.checkpoint
            named, notes = verification_prompts(checkpoint.config, checkpoint.folder)
        results = _results(task, _firsts(named), report)
        found = _report(task, options, results, weights, notes)
        return _firsts(replace(found, seconds=time.monotonic() - began))


def _results(task: _Task, named: Sequence[NamedPrompt], report: Report | None) -> tuple[PromptResult, ...]:
    """The figures of every prompt, in the first process; in others none."""
    prompts = [on(one.prompt, task.mode.device) for one in named]
    begin(report, f"run the Megatron model in {task.world.size} processes")
    ours = [logits_in_stages(task.ours, task.world, task.mode, exact, prompts) for exact in (True, False)]
    found: tuple[PromptResult, ...] = ()
    with together():
        if task.world.rank == 0:
            outputs = map(Outputs, *_their_logits(task, prompts, report), *ours)
            found = tuple(compared(logits, one, task.mode.dtype) for logits, one in zip(outputs, named, strict=True))
    return found


def _report(
    task: _Task,
    options: LogitsOptions,
    results: tuple[PromptResult, ...],
    weights: WeightsReport,
    notes: tuple[str, ...],
) -> LogitsReport:
    world, device = task.world, task.mode.device
    how = f"The Megatron model ran in {world.size} processes as {world.layout}, transformers' in the first of them."
    return LogitsReport(
        programs=programs_of(options),
        device=described(device),
        dtype=options.dtype,
        reference=name_of(EXACT[task.mode.dtype]),
        multiple=MULTIPLE,
        mode="parallel",
        prompts=results,
        points=(),
        place=None if all(one.passed for one in results) else _place(world, weights),
        notes=(*notes, how),
        seconds=0.0,
        peak_bytes=max(everyones(peak_bytes(device))),
    )


def _place(world: World, weights: WeightsReport) -> Place:
    text = f"In {world.size} processes modules are not compared: run it without torchrun to see where the models part."
    if weights.differences:
        names, guess = listing([one.name for one in weights.differences], 3), weights.differences[0].guess
        text += f" Weights that differ: {names}{f' ({guess})' if guess else ''}."
    if weights.settings:
        text += f" Settings that differ: {listing(weights.settings, 4)}."
    return Place(None, text)


def _firsts(value: T) -> T:
    """What the first process has, in all of them."""
    box = [value]
    if ranks() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


# ---- transformers ----------------------------------------------------------------------------------------------------


def _their_logits(task: _Task, prompts: Sequence[Prompt], report: Report | None) -> tuple[list[Tensor], list[Tensor]]:
    """(exact, in the dtype of the comparison): the logits [S, vocab] of every prompt."""
    mode, folder = task.mode, task.theirs.checkpoint.folder
    exact, model = (build_theirs(folder, mode.dtypes(exact)[-1]) for exact in (True, False))
    shelf = shelf_of(folder_weights(task.theirs, model), mode.shelf_bytes, mode.device)
    stations: list[Station] = []
    for turn, one in enumerate((exact, model)):
        hollow_out(one, mode.device)
        used = [lend_all(one, shelf, mode.dtypes(one is exact)), *([] if one is exact else [shelf])]
        for place, layer in enumerate(layers_of(one).values()):
            nbytes = sum(parameter.nbytes for parameter in layer.parameters())
            stations.append(Station((place, turn), layer, partial(clear_all, used), nbytes))
    works: list[Callable[[], Tensor]] = [
        partial(their_logits, one, prompt) for one in (exact, model) for prompt in prompts
    ]
    found = Convoy(stations, None if report is None else partial(report, "logits")).run(works)
    return found[: len(prompts)], found[len(prompts) :]
