"""A verification as lines of a terminal, plain, so that they are the same in a pipe: the answer first, then why."""

from collections.abc import Iterable, Sequence

from qwen3vl_convert.verify.report.words import (
    amount,
    by_severity,
    duration,
    elements,
    exactness,
    failed,
    figure,
    memory,
    share,
    worst,
)
from qwen3vl_convert.verify.result import Difference, LogitsReport, PromptResult, Verification, WeightsReport

_HEADER = ("prompt", "tokens", "max diff", "allowed", "KL max", "KL mean", "top-1", "top-5", "")


def terminal_lines(found: Verification, most: int = 20) -> list[str]:
    """What `verify` prints on stdout, `most` tensors at most. The first line starts with `EQUAL:` or `DIFFERENT:`."""
    weights, logits = found.weights, found.logits
    lines = [_first_line(found), *_settings(weights), *_tensors(weights, most)]
    if logits is None:
        return lines
    return [*lines, "", *_prompts(logits), *_place(logits), "", _run(logits)]


def _first_line(found: Verification) -> str:
    weights, logits = found.weights, found.logits
    if found.equal:
        bits = f"{amount(weights.tensors, 'tensor')}, {amount(weights.elements, 'element')}, {exactness(weights)}"
        return f"EQUAL: {bits}{'' if logits is None else f'; {_agreement(logits)}'}."
    parts = [f"{len(weights.differences)} of {amount(weights.tensors, 'tensor')}"]
    parts.append(amount(len(weights.settings), "setting"))
    if logits is not None:
        bad = failed(logits.prompts)
        parts.append(f"{bad} of {amount(len(logits.prompts), 'prompt')}" if logits.prompts else "no prompt was run")
    return f"DIFFERENT: {', '.join(parts)}."


def _agreement(logits: LogitsReport) -> str:
    return f"the logits of {amount(len(logits.prompts), 'prompt')} agree within rounding"


def _settings(weights: WeightsReport) -> Iterable[str]:
    for name, (theirs, ours) in weights.settings.items():
        yield f"  {name}: {theirs} in the HF folder, {ours} in the Megatron checkpoint"


def _tensors(weights: WeightsReport, most: int) -> Iterable[str]:
    ordered = by_severity(weights.differences)
    for one in ordered[:most]:
        yield from _difference(one)
    if len(ordered) > most:
        yield f"  and {len(ordered) - most:,} more (all of them with --json)"


def _difference(one: Difference) -> list[str]:
    """Name and guess, below it the figures; a line where there is no guess."""
    said = _figures(one)
    return [f"  {one.name}: {one.guess}", f"    {said}"] if one.guess else [f"  {one.name}: {said}"]


def _figures(one: Difference) -> str:
    if one.dtypes:
        return f"{one.dtypes[0]} in the HF folder, {one.dtypes[1]} in the Megatron checkpoint"
    count = f"{one.count:,} of {amount(elements(one.shape), 'element')} {'differs' if one.count == 1 else 'differ'}"
    return f"{count}, by {figure(one.max_abs)} or {one.max_ulp:,} ULP at most, the first at {list(one.first)}"


def _prompts(logits: LogitsReport) -> list[str]:
    rows = [_HEADER, *(_row(prompt) for prompt in logits.prompts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return [_aligned(row, widths) for row in rows]


def _row(prompt: PromptResult) -> tuple[str, ...]:
    mean = sum(prompt.kl) / len(prompt.kl) if prompt.kl else 0.0
    sizes = map(figure, (prompt.max_abs, prompt.allowed, worst(prompt.kl), mean))
    shares = map(share, (prompt.top1, prompt.top5))
    return prompt.name, f"{len(prompt.kl):,}", *sizes, *shares, "" if prompt.passed else "differs"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """The name and the mark to the left, figures to the right."""
    cells = [
        text.ljust(width) if column in (0, len(row) - 1) else text.rjust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return f"  {'  '.join(cells)}".rstrip()


def _place(logits: LogitsReport) -> list[str]:
    if logits.place is None:
        return []
    return ["", f"where: {logits.place.text}", *(f"  {name}" for name in logits.place.parameters)]


def _run(logits: LogitsReport) -> str:
    how = f"{logits.dtype} against {logits.reference} on {logits.device}, {logits.mode}"
    return f"{how}; {duration(logits.seconds)}, peak memory {memory(logits.peak_bytes)}"
