"""How numbers and findings are put into words, in the terminal and on the page."""

import math
from collections.abc import Sequence

from qwen3vl_convert.verify.result import (
    Difference,
    LogitsReport,
    PointResult,
    PromptResult,
    Verification,
    WeightsReport,
)

_TOWERS = {"text": "model.language_model.layers.", "vision": "model.visual.blocks."}
"""What the names of tensors in layers begin with."""


def figure(value: float) -> str:
    """Few digits: `0`, `0.31`, `3.1e-7`, `NaN`, `-∞`."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value == 0 or 1e-3 <= abs(value) < 999.5:
        return f"{value:.3g}"
    if 999.5 <= abs(value) < 9999.5:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def share(value: float) -> str:
    """`99.98 %`, rounded down: 100 % is all of them, and 0 % none."""
    if 0 < value < 1e-4:
        return "< 0.01 %"
    return f"{math.floor(value * 10000) / 100:g} %" if math.isfinite(value) else figure(value)


def direction(cosine: float) -> str:
    """A cosine, of which what is missing to 1 matters: `1 - 3.1e-7`."""
    return f"1 - {figure(1 - cosine)}" if 0.999 < cosine < 1 else figure(cosine)


def amount(count: int, one: str, many: str = "") -> str:
    """`1 tensor`, `1,024 tensors`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def memory(nbytes: float) -> str:
    """`4.26 GB`; decimal units."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(max(nbytes, 1)) / 3 + 1e-4), len(units) - 1)
    return f"{nbytes / 1000**power:.3g} {units[power]}"


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
    if logits is None:
        return ""
    return f", and the logits of {amount(len(logits.prompts), 'prompt')} agree within rounding"


def _difference(found: Verification) -> str:
    weights, logits = found.weights, found.logits
    if logits is not None and logits.place is not None and logits.place.point is not None:
        return f"the two part at {logits.place.point.name}"
    if weights.differences:
        which = "" if len(weights.differences) == 1 else "most of all "
        return f"{_differ(weights)}, {which}{tensor_place(by_severity(weights.differences)[0].name)}"
    if logits is not None and not logits.equal:
        return f"{_failed_prompts(logits)}, though {_same_weights(weights)}"
    return f"the weights are equal, but the configs differ in {', '.join(weights.settings)}"


def _differ(weights: WeightsReport) -> str:
    count = len(weights.differences)
    return f"{count:,} of {amount(weights.tensors, 'tensor')} {'differs' if count == 1 else 'differ'}"


def _failed_prompts(logits: LogitsReport) -> str:
    if not logits.prompts:
        return "no prompt was run"
    bad = failed(logits.prompts)
    return f"the logits of {amount(bad, 'prompt')} of {len(logits.prompts)} differ by more than rounding"


def failed(prompts: Sequence[PromptResult]) -> int:
    return sum(not prompt.passed for prompt in prompts)
