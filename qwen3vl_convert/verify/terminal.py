"""What was found as lines of a terminal, plain, so that they are the same in a pipe: the answer first, then why."""

from collections.abc import Iterable, Iterator, Sequence

from qwen3vl_convert.quantities import amount, apart, duration, figure, share, size
from qwen3vl_convert.verify.report.words import (
    agreement,
    by_severity,
    computation,
    disagreement,
    elements,
    exactness,
    failed,
    largest_for_its_bound,
    worst,
)
from qwen3vl_convert.verify.result import Difference, LogitsReport, PromptResult, Verification, WeightsReport
from qwen3vl_convert.verify.roundtrip import RoundTrip, Step

_HEADER = ("prompt", "tokens", "max diff", "allowed", "KL max", "KL mean", "top-1", "top-5", "")


def terminal_lines(found: Verification, most: int = 20, built: Sequence[str] = ()) -> list[str]:
    """What `verify` prints on stdout, `most` tensors at most. The first line starts with `EQUAL:` or `DIFFERENT:`.

    `built`: what the checkpoints are called, if not by their paths.
    """
    weights, logits = found.weights, found.logits
    lines = [_first_line(found), *_settings(weights), *_tensors(weights, most)]
    if logits is None:
        return lines
    return [*lines, "", *_prompts(logits), *_place(logits), "", *_run(found, logits, built)]


def _first_line(found: Verification) -> str:
    weights, logits = found.weights, found.logits
    if found.equal:
        bits = f"{amount(weights.tensors, 'tensor')}, {amount(weights.elements, 'element')}, {exactness(weights)}"
        return f"EQUAL: {bits}{'' if logits is None else f'; {agreement(logits)}'}."
    parts = [f"{len(weights.differences)} of {amount(weights.tensors, 'tensor')}"]
    parts.append(amount(len(weights.settings), "setting"))
    if logits is not None:
        bad = failed(logits.prompts)
        parts.append(f"{bad} of {amount(len(logits.prompts), 'prompt')}" if logits.prompts else "no prompt was run")
    return f"DIFFERENT: {', '.join(parts)}."


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
    sizes = (*apart(prompt.max_abs, prompt.allowed), *map(figure, (worst(prompt.kl), mean)))
    shares = (share(prompt.top1, 0), share(prompt.top5, 0))
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


def _run(found: Verification, logits: LogitsReport, built: Sequence[str]) -> list[str]:
    """Which models ran, with which weights, where and how, and how far apart they were at most."""
    theirs, ours = built or (found.huggingface, found.megatron)
    return [
        f"Hugging Face  {logits.programs[0]}, weights of {theirs}{_stored(found, 0)}",
        f"Megatron      {logits.programs[1]}, weights of {ours}{_stored(found, 1)}",
        f"computed on   {computation(logits, found.versions)}",
        f"logits        {largest_for_its_bound(logits) or 'no prompt was run'}; "
        f"{duration(logits.seconds)}, peak memory {size(logits.peak_bytes)}",
    ]


def _stored(found: Verification, side: int) -> str:
    """` (TP2 PP1 EP2 ETP1, bfloat16)`, as far as it is known."""
    known = [text for text in (found.sides[side].layout, found.sides[side].dtype) if text] if found.sides else []
    return f" ({', '.join(known)})" if known else ""


# ---- roundtrip -------------------------------------------------------------------------------------------------------


def trip_verdict(trip: RoundTrip) -> str:
    """The answer of `roundtrip` in one line."""
    if trip.equal:
        built = "" if trip.logits is None else f"; {_both_built(trip.logits)}"
        return f"EQUAL: there and back, {' and '.join(trip.layouts)}{built}."
    last = trip.steps[-1]
    bits = last.found is None or not last.found.weights.equal
    parts = ["what comes back is not what went" if bits else "equal bits, another function"]
    if trip.logits is not None and not trip.logits.equal:
        parts.append(_both_built(trip.logits))
    return f"DIFFERENT: {'; '.join(parts)}."


def _both_built(logits: LogitsReport) -> str:
    said = agreement(logits) if logits.equal else disagreement(logits)
    return f"both models were built on {logits.device} in {logits.dtype}, and {said}"


def trip_rows(trip: RoundTrip) -> list[tuple[str, str, str]]:
    """(step, time, what was found); the two models have rows of their own."""
    return [row for step in trip.steps for row in _rows(step)]


def _rows(step: Step) -> Iterator[tuple[str, str, str]]:
    logits = step.found.logits if step.found is not None else None
    if step.found is None or logits is None:
        yield step.name, duration(step.seconds), _found(step)
        return
    weights = step.found.weights.seconds
    yield step.name, duration(weights), _found(step)
    yield "import what both models need", duration(step.seconds - weights - logits.seconds), ""
    equal = "equal" if logits.equal else "DIFFERENT"
    agree = f"{equal}, {amount(len(logits.prompts), 'prompt')}: {largest_for_its_bound(logits)}"
    yield "build both models, compare logits", duration(logits.seconds), agree


def _found(step: Step) -> str:
    if step.changes is not None:
        return _equality(step.changes.equal, step.changes.tensors)
    return _equality(step.found.weights.equal, step.found.weights.tensors) if step.found is not None else ""


def _equality(equal: bool, tensors: int) -> str:
    return f"equal, {amount(tensors, 'tensor')} bit for bit" if equal else "DIFFERENT"


def trip_lines(trip: RoundTrip) -> list[str]:
    """What stands below the table: of both models where they agree, or all of the comparison that found a difference.
    Not the changes of two folders, which `diff` shows.
    """
    if trip.logits is not None and trip.equal:
        assert trip.compared is not None
        return [*_prompts(trip.logits), "", *_run(trip.compared, trip.logits, trip.built), trip.spared]
    wrong = trip.steps[-1]
    if wrong.equal or wrong.found is None:
        return []
    return terminal_lines(wrong.found, built=trip.built if wrong.found is trip.compared else ())
