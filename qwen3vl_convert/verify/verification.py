"""`verify`: is a Hugging Face folder the same model as a Megatron checkpoint?

found = verify("Qwen3-VL-8B-Instruct", "runs/vl8b")                              # every weight, bit for bit
found = verify("Qwen3-VL-8B-Instruct", "runs/vl8b", logits=LogitsOptions())      # and what both models compute
found.equal
"""

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.fill import FillOptions
from qwen3vl_convert.huggingface.hub import resolve
from qwen3vl_convert.inspection import (
    HUGGINGFACE,
    MEGATRON,
    huggingface_dialect,
    megatron_dialect,
    sizes_said,
    written_with,
)
from qwen3vl_convert.installed import need
from qwen3vl_convert.model import HuggingFaceModel, MegatronModel, open_huggingface
from qwen3vl_convert.progress import Report, begin
from qwen3vl_convert.storage import StoredTensor
from qwen3vl_convert.torchrun import process, processes
from qwen3vl_convert.verify.result import ULP_BUCKETS, LogitsReport, Side, Verification, WeightsReport
from qwen3vl_convert.verify.weights import compare_weights, open_beside

_PACKAGES = ("qwen3vl-convert", "torch", "transformers", "megatron-core")
_BUILT_WITH = {
    "megatron": {"torch": "torch", "transformers": "transformers", "megatron.core": "megatron-core"},
    "inference": {"torch": "torch", "transformers": "transformers"},
}
"""What is imported to build both models, and the packages that have it, by `LogitsOptions.model`."""
_NOT_READ = WeightsReport(0, 0, (), {}, (0,) * len(ULP_BUCKETS), "", ())


@dataclass(frozen=True, slots=True)
class LogitsOptions:
    """How the logits are compared. `device`: auto, cuda or cpu. `dtype`: fp32 or bf16.

    `model`: what computes with the Megatron checkpoint, `megatron` (Megatron-Core's layers) or `inference` (the
    inference model, which shares no code with transformers or Megatron-Core, and needs neither Megatron-Core).
    `stream`: hold no more of the models than `shelf_bytes` of weights at a time, or the largest of them.
    """

    device: str = "auto"
    dtype: str = "fp32"
    stream: bool = False
    shelf_bytes: int = 6 << 30
    model: str = "megatron"

    def __post_init__(self) -> None:
        if self.dtype not in ("fp32", "bf16"):
            raise UsageError(f"--dtype {self.dtype}: expected fp32 or bf16.")
        if self.device not in ("auto", "cuda", "cpu"):
            raise UsageError(f"--device {self.device}: expected auto, cuda or cpu.")
        if self.model not in ("megatron", "inference"):
            raise UsageError(f"--model {self.model}: expected megatron or inference.")
        if self.stream and self.model == "inference":
            raise UsageError("--stream with --model inference: that model is held whole. Leave one of them.")


def verify(
    huggingface: str | Path,
    megatron: str | Path,
    *,
    iteration: int | str | None = None,
    headless: bool = False,
    dtype_tolerant: bool = False,
    logits: LogitsOptions | None = None,
    options: FillOptions | None = None,
    report: Report | None = None,
    weights: WeightsReport | None = None,
) -> Verification:
    """Compare every weight of a HF folder, or Hub id, with a Megatron checkpoint of any layout; with `logits`, also
    what transformers' model and ours compute with them.

    `dtype_tolerant`: dtypes may differ, and values must be exactly what rounding gives. `weights`: what an earlier
    `verify` of these two found of theirs, which are not read and compared again then: for logits in several dtypes, or
    of several models. Raises `InputError`'s kinds for checkpoints that cannot be compared, `UsageError` where what
    `logits` needs is not installed.
    """
    if logits is not None:
        check_logits(headless, logits)
    theirs = open_huggingface(resolve(huggingface, weights=True).folder, headless=headless)
    ours = open_beside(theirs, Path(megatron), iteration, headless)
    if weights is None and logits is not None and process() > 0:
        weights = _NOT_READ  # under torchrun the others go ahead and wait for the first
    elif weights is None:
        weights = compare_weights(theirs, ours, dtype_tolerant=dtype_tolerant, options=options, report=report)
    compared = None if logits is None else _compare_logits(theirs, ours, logits, weights, report)
    return Verification(
        huggingface=str(huggingface),
        megatron=str(megatron),
        model=theirs.model.dims.model_type,
        weights=weights,
        logits=compared,
        versions=installed_versions(),
        sides=(_their_side(str(huggingface), theirs), _our_side(str(megatron), ours)),
    )


def _their_side(path: str, theirs: HuggingFaceModel) -> Side:
    dialect = huggingface_dialect(theirs.checkpoint, theirs.model.experts_layout)
    return Side(path, f"{HUGGINGFACE}; {dialect}", "", _dtypes(theirs.checkpoint.tensors.values()))


def _our_side(path: str, ours: MegatronModel) -> Side:
    found, dialect = ours.checkpoint, megatron_dialect(ours.checkpoint)
    return Side(path, f"{MEGATRON}; {dialect}", sizes_said(written_with(found)), _dtypes(found.tensors.values()))


def _dtypes(tensors: Iterable[StoredTensor]) -> str:
    return ", ".join(sorted({tensor.dtype for tensor in tensors}))


def _compare_logits(
    theirs: HuggingFaceModel,
    ours: MegatronModel,
    options: LogitsOptions,
    weights: WeightsReport,
    report: Report | None,
) -> LogitsReport:
    _import(options.model, report)
    if processes() > 1:
        if options.model == "inference":
            raise UsageError("--model inference runs in one process: start it without torchrun.")
        from qwen3vl_convert.verify.logits.parallel import compare_logits_in_parallel

        return compare_logits_in_parallel(theirs, ours, options, weights, report)
    from qwen3vl_convert.verify.logits.compare import compare_logits

    return compare_logits(theirs, ours, options, weights, report)


def _import(model: str, report: Report | None) -> None:
    """What both models are built with, which takes seconds, and from a cold disk tens of them."""
    needed = _BUILT_WITH[model]
    begin(report, f"import {', '.join(needed.values())}")
    for module in needed:
        import_module(module)


def check_logits(headless: bool, options: LogitsOptions) -> None:
    """Raise `UsageError`, or `NotInstalled`, unless both models can be built here, on the device that was asked for.
    It is asked before weights are read, which takes minutes.
    """
    if headless:
        raise UsageError("--logits with --headless: a model without an output layer has no logits. Leave one of them.")
    need("--logits", *_BUILT_WITH[options.model], "psutil")
    if options.device == "cuda":
        from qwen3vl_convert.verify.logits.device import device_of

        device_of(options.device)


def installed_versions() -> dict[str, str]:
    """Of what the answer may depend on, by package."""
    found = {package: _version(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | {package: number for package, number in found.items() if number}


@cache
def _version(package: str) -> str:
    """Empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
