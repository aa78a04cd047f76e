"""How findings are put into words, in the terminal and on the page."""

import math
from collections.abc import Mapping, Sequence

from qwen3vl_convert.quantities import amount, apart
from qwen3vl_convert.verify.result import (
    Difference,
    LogitsReport,
    PointResult,
    PromptResult,
    Verification,
    WeightsReport,
)

MODES = {
    "whole": "both models whole in memory",
    "stream": "streamed, one layer in memory at a time",
    "parallel": "whole, the Megatron model in parallel over several processes",
}
"""By `LogitsReport.mode`."""
_TOWERS = {"text": "model.language_model.layers.", "vision": "model.visual.blocks."}
"""What the names of tensors in layers begin with."""


def worst(values: Sequence[float]) -> float:
    """The largest; what is no number counts as larger than all numbers. 0 for none."""
    return max(values, key=badness, default=0.0)


def badness(value: float) -> float:
    return math.inf if math.isnan(value) else value


def elements(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def by_severity(differences: Sequence[Difference]) -> list[Difference]:
    """The worst first: not finite, then by how far the direction is off, then by size."""
    return sorted(differences, key=_severity)


def _severity(one: Difference) -> tuple[bool, bool, float, float, str]:
    finite = math.isfinite(one.max_abs)
    cosine = one.cosine if math.isfinite(one.cosine) else -2.0
    return one.dtypes is not None, finite, cosine, -badness(one.max_abs), one.name


def excess(point: PointResult) -> float:
    """The difference as a multiple of what is allowed."""
    if point.difference == 0:
        return 0.0
    return math.nan if math.isnan(point.allowed) else point.difference / point.allowed if point.allowed else math.inf


def tensor_place(name: str) -> str:
    """`text layer 7, self_attn.k_proj.weight` of a Hugging Face name; what is outside of layers keeps its own."""
    for tower, start in _TOWERS.items():
        layer, dot, rest = name.removeprefix(start).partition(".")
        if name.startswith(start) and layer.isdecimal() and dot:
            return f"{tower} layer {layer}, {rest}"
    return name


def place_name(point: PointResult) -> str:
    """`text layer 7, self_attention.linear_qkv (output)`."""
    return f"{point.name} ({point.side})"


def verdict(found: Verification) -> str:
    """The answer in one sentence."""
    if found.equal:
        return f"The same model: {_same_weights(found.weights)}{_same_logits(found.logits)}."
    return f"Not the same model: {_difference(found)}."


def _same_weights(weights: WeightsReport) -> str:
    return f"all {amount(weights.tensors, 'tensor')} are equal {exactness(weights)}"


def exactness(weights: WeightsReport) -> str:
    """What `equal` means for the weights; `tolerated` tells the whole of it."""
    return "after the rounding that was allowed" if weights.tolerated else "bit for bit"


def _same_logits(logits: LogitsReport | None) -> str:
    return "" if logits is None else f", and {agreement(logits)}"


def agreement(logits: LogitsReport) -> str:
    return f"the logits of {amount(len(logits.prompts), 'prompt')} agree within rounding"


def largest_for_its_bound(logits: LogitsReport) -> str:
    """The difference that is largest for what is allowed, and that; "" where no prompt was run."""
    if logits.worst is None:
        return ""
    found, allowed = apart(logits.worst.max_abs, logits.worst.allowed)
    return f"largest for its bound: {found} of {allowed} allowed ({logits.worst.name})"


def names_of(prompts: Sequence[PromptResult]) -> str:
    """`text (96 tokens), image (57)`."""
    first = [f"{prompts[0].name} ({amount(len(prompts[0].kl), 'token')})"] if prompts else []
    return ", ".join([*first, *(f"{one.name} ({len(one.kl):,})" for one in prompts[1:])])


def computation(logits: LogitsReport, versions: Mapping[str, str]) -> str:
    """Where and how both models ran: `cpu, torch 2.13.0; fp32, and fp64 to tell rounding; both whole in memory`."""
    torch = f", torch {versions['torch']}" if "torch" in versions else ""
    exact = f"{logits.dtype}, and {logits.reference} to tell how much is rounding"
    return f"{logits.device}{torch}; {exact}; {MODES.get(logits.mode, logits.mode)}"


def _difference(found: Verification) -> str:
    weights, logits = found.weights, found.logits
    if logits is not None and logits.place is not None and logits.place.point is not None:
        return f"the two part at {logits.place.point.name}"
    if weights.differences:
        which = "" if len(weights.differences) == 1 else "most of all "
        return f"{_differ(weights)}, {which}{tensor_place(by_severity(weights.differences)[0].name)}"
    if logits is not None and not logits.equal:
        return f"{disagreement(logits)}, though {_same_weights(weights)}"
    return f"the weights are equal, but the configs differ in {', '.join(weights.settings)}"


def _differ(weights: WeightsReport) -> str:
    count = len(weights.differences)
    return f"{count:,} of {amount(weights.tensors, 'tensor')} {'differs' if count == 1 else 'differ'}"


def disagreement(logits: LogitsReport) -> str:
    if not logits.prompts:
        return "no prompt was run"
    bad = failed(logits.prompts)
    return f"the logits of {amount(bad, 'prompt')} of {len(logits.prompts)} differ by more than rounding"


def failed(prompts: Sequence[PromptResult]) -> int:
    return sum(not prompt.passed for prompt in prompts)
