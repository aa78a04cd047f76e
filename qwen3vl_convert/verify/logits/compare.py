"""Do both models compute the same? Their logits on the same prompts, and, where they part, the first module that does.

How much they may differ is measured, not chosen. Each program runs twice: in the dtype of the comparison, and in a more
exact one with the same weights. What it differs from itself is its own rounding error e. If both compute one function,
the triangle inequality says |ours - theirs| <= e(ours) + e(theirs) + what is left between the two exact runs; hence the
bound MULTIPLE * (e(ours) + e(theirs)).
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from qwen3vl_convert.errors import InputError
from qwen3vl_convert.model import HuggingFaceModel, MegatronModel, open_megatron
from qwen3vl_convert.progress import Report, begin
from qwen3vl_convert.quantities import size
from qwen3vl_convert.verify.logits.device import device_of
from qwen3vl_convert.verify.logits.hollow import apart
from qwen3vl_convert.verify.logits.place import find_place, refused
from qwen3vl_convert.verify.logits.programs import EXACT
from qwen3vl_convert.verify.logits.prompts import NamedPrompt, Prompt, verification_prompts
from qwen3vl_convert.verify.logits.traffic import MULTIPLE, Mode, Outputs, Refused, Traffic, narrower
from qwen3vl_convert.verify.result import LogitsReport, PointResult, PromptResult, WeightsReport
from qwen3vl_convert.verify.settings import stated
from qwen3vl_convert.verify.verification import LogitsOptions, installed_versions

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
_MOST_OF_MEMORY = 0.8
_THIRD = "The inference model computed in the place of Megatron-Core's."
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
"""Relative difference that is none, where a program happens to have no error of its own."""


def compare_logits(
    theirs: HuggingFaceModel,
    ours: MegatronModel,
    options: LogitsOptions,
    weights: WeightsReport,
    report: Report | None = None,
) -> LogitsReport:
    """Run both programs on the same prompts, ours as the Megatron checkpoint says that it is. `weights`: what is known
    of these; it explains what is found, and says whether dtypes may differ.
    """
    began = time.monotonic()
    device, dtype = device_of(options.device), DTYPES[options.dtype]
    begin(report, "prepare prompts")
    named, notes = verification_prompts(theirs.checkpoint.config, theirs.checkpoint.folder)
    ours = as_stated(ours, theirs)
    stream, reason = (True, ()) if options.stream else _must_stream(theirs, dtype, device)
    if options.model == "inference":
        stream, reason = False, (_THIRD,)
    mode = Mode(dtype, device, stream, options.shelf_bytes, narrower(theirs, ours) if weights.tolerated else None)
    results: tuple[PromptResult, ...] = ()
    points: tuple[PointResult, ...] = ()
    try:
        with _world(options), exact_kernels(), apart(), enough_memory(options):
            begin(report, "build both models")
            traffic = _traffic(options)(theirs, ours, mode)
            outputs, trace = traffic.run([on(one.prompt, device) for one in named], report)
            results = tuple(compared(found, one, dtype) for found, one in zip(outputs, named, strict=True))
        points = trace.results()
        place = None if all(one.passed for one in results) else find_place(trace.first_wrong(), weights)
    except Refused as error:
        place = refused(str(error), weights)
    return LogitsReport(
        programs=programs_of(options),
        device=described(device),
        dtype=options.dtype,
        reference=name_of(EXACT[dtype]),
        multiple=MULTIPLE,
        mode="stream" if stream else "whole",
        prompts=results,
        points=points,
        place=place,
        notes=(*notes, *reason),
        seconds=time.monotonic() - began,
        peak_bytes=peak_bytes(device),
        deepstack=ours.model.dims.deepstack,
    )


def programs_of(options: LogitsOptions) -> tuple[str, str]:
    """What computes with the folder, and with the Megatron checkpoint, with versions."""
    theirs = f"transformers {import_module('transformers').__version__}"
    if options.model == "inference":
        version = installed_versions().get("qwen3vl-convert", "")
        return theirs, f"the inference model of qwen3vl-convert {version}".strip()
    return theirs, f"Qwen3VLModel on megatron-core {import_module('megatron.core').__version__}"


def _world(options: LogitsOptions) -> AbstractContextManager[Any]:
    """What Megatron-Core's layers need around them."""
    if options.model == "inference":
        return nullcontext()
    from qwen3vl_convert.models.world import single_process

    world: AbstractContextManager[Any] = single_process()
    return world


def _traffic(options: LogitsOptions) -> type[Traffic]:
    if options.model != "inference":
        return Traffic
    from qwen3vl_convert.verify.logits.third import ThirdTraffic

    return ThirdTraffic


def as_stated(ours: MegatronModel, theirs: HuggingFaceModel) -> MegatronModel:
    """The checkpoint as the model that it says it is, of which opening took the folder's word."""
    dims = stated(ours.checkpoint, theirs.model.dims)
    if dims.tied == ours.model.dims.tied:
        return replace(ours, model=replace(ours.model, dims=dims))
    layout = theirs.model.experts_layout
    return open_megatron(ours.checkpoint.folder, None, dims, "hub" if layout == "none" else layout)


# ---- figures ---------------------------------------------------------------------------------------------------------


def compared(outputs: Outputs, prompt: NamedPrompt, dtype: torch.dtype) -> PromptResult:
    """All figures of one prompt, computed in float64."""
    hf_exact, hf, ours_exact, ours = (logits.double() for logits in outputs)
    gap = (hf - ours).abs()
    own = (float((hf - hf_exact).abs().max()), float((ours - ours_exact).abs().max()))
    return PromptResult(
        name=prompt.name,
        contents=prompt.contents,
        kinds=prompt.kinds,
        max_abs=float(gap.max()),
        mean_abs=float(gap.mean()),
        allowed=MULTIPLE * sum(own) + ROUNDING[dtype] * float(hf_exact.abs().max()),
        own_errors=own,
        kl=tuple(_divergence(hf, ours).tolist()),
        top1=_agreement(hf, ours, 1),
        top5=_agreement(hf, ours, 5),
    )


def _divergence(hf: Tensor, ours: Tensor) -> Tensor:
    """KL(HF || ours) [S] in nats."""
    log_hf, log_ours = (functional.log_softmax(logits, dim=-1) for logits in (hf, ours))
    return (log_hf.exp() * (log_hf - log_ours)).sum(-1).clamp(min=0)


def _agreement(hf: Tensor, ours: Tensor, most: int) -> float:
    """The share of positions where both have the same `most` likeliest tokens, in whatever order."""
    one, other = (logits.topk(most, dim=-1).indices.sort(dim=-1).values for logits in (hf, ours))
    return float((one == other).all(-1).double().mean())


def name_of(dtype: torch.dtype) -> str:
    """As on the command line."""
    return next(name for name, one in DTYPES.items() if one == dtype)


# ---- where -----------------------------------------------------------------------------------------------------------


def _must_stream(theirs: HuggingFaceModel, dtype: torch.dtype, device: torch.device) -> tuple[bool, tuple[str, ...]]:
    """(whether two models are too large for the memory, a note that says so)."""
    needed = 2 * dtype.itemsize * sum(tensor.numel for tensor in theirs.tensors.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed <= _MOST_OF_MEMORY * free:
        return False, ()
    said = f"Both models in memory would take {size(needed)}, and {size(free)} are free"
    return True, (f"{said}: they are run layer by layer, as with --stream.",)


def on(prompt: Prompt, device: torch.device) -> Prompt:
    """The prompt with its tensors there."""
    moved: dict[str, Any] = {name: x.to(device) for name, x in vars(prompt).items() if isinstance(x, Tensor)}
    return replace(prompt, **moved)


def described(device: torch.device) -> str:
    """For a reader."""
    return "cpu" if device.type == "cpu" else f"cuda ({torch.cuda.get_device_name(device)})"


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def enough_memory(options: LogitsOptions) -> Iterator[None]:
    """Raises `InputError` where a GPU's memory does not suffice."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        remedy = "--max-memory with less than 6GiB, or --device cpu" if options.stream else "--stream"
        raise InputError(f"The models do not fit into the GPU's memory: use {remedy}. {error}") from error


@contextmanager
def exact_kernels() -> Iterator[None]:
    """No TensorFloat-32, which convolutions take for float32 on a GPU unless they are told. On a CPU no oneDNN: its
    bfloat16 ends in an illegal instruction on machines that offer AMX and refuse it.
    """
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    onednn: Any = torch.backends.mkldnn
    used = onednn.set_flags(False)[0]
    try:
        yield
    finally:
        onednn.set_flags(used)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept
