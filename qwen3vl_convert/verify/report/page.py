"""The report as one HTML file: no script, nothing loaded from anywhere, for a reader who was not there."""

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from qwen3vl_convert.quantities import amount, duration, size
from qwen3vl_convert.verify.report.markup import Child, Markup, breakable, element, joined, sentence
from qwen3vl_convert.verify.report.pictures import kl_picture, layer_picture, ulp_picture
from qwen3vl_convert.verify.report.style import COLOURS, PAGE, PICTURES
from qwen3vl_convert.verify.report.tables import points_table, prompts_table, settings_table, tensors_table
from qwen3vl_convert.verify.report.tokens import KINDS
from qwen3vl_convert.verify.report.words import (
    MODES,
    by_severity,
    exactness,
    failed,
    largest_for_its_bound,
    names_of,
    verdict,
)
from qwen3vl_convert.verify.result import LogitsReport, PromptResult, Verification, WeightsReport

_STYLE = COLOURS + PICTURES + PAGE
_MARKS = {True: ("✓", "equals", "equal"), False: ("✕", "differs", "differ"), None: ("–", "not-run", "not compared")}
_DIFFERS = {True: "", False: " differs"}
_LONG_WORD = 30
"""Letters of a word of a command that may be broken."""
_LONG_CONTENTS = 900
"""Letters of a prompt before it is folded up."""


@dataclass(frozen=True, slots=True)
class Occasion:
    """When and how a verification was asked for: `date` in UTC, as ISO 8601 has it; `command` as it was typed."""

    date: str = ""
    command: str = ""


Facts: TypeAlias = list[tuple[str, Child]]


def html_report(found: Verification, made: Occasion | None = None) -> str:
    """The whole page, the same for the same arguments.

    Names, paths and prompts are escaped; the policy in its head lets nothing be loaded or run.
    """
    made = made or Occasion()
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy()),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{'The same model' if found.equal else 'Not the same model'}: {_short(found.megatron)}"),
        element("style", Markup(_STYLE)),
    ]
    body = [_header(found), element("main", list(_sections(found, made))), _footer(found)]
    return f"<!doctype html>\n{element('html', element('head', head), element('body', body), lang='en')}\n"


def _policy() -> str:
    """Only the style of this page, by its hash, so not even a style attribute."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _short(path: str) -> str:
    """The last part of a path, and the one before it where the last is that of any checkpoint."""
    parts = path.rstrip("/").split("/")
    return "/".join(parts[-2 if parts[-1].startswith(("iter_", "release")) else -1 :]) or path


def _header(found: Verification) -> Markup:
    compared = ["Is ", _name(_short(found.megatron)), " the same model as ", _name(_short(found.huggingface)), "?"]
    answer = element("p", "Equal" if found.equal else "Different", class_="answer")
    told = [element("p", sentence(_full_stop(said))) for said in (_explanation(found),) if said]
    box = element(
        "div", answer, element("h1", sentence(verdict(found))), told, class_="verdict" + _DIFFERS[found.equal]
    )
    return element("header", element("p", *compared, class_="kicker"), box, _checks(found))


def _explanation(found: Verification) -> str:
    """What stands behind the verdict, as far as it is known."""
    if found.logits is not None and found.logits.place is not None:
        return found.logits.place.text
    worst = by_severity(found.weights.differences)[:1]
    return "".join(f"What probably happened to it: {one.guess}" for one in worst if one.guess)


def _full_stop(said: str) -> str:
    said = said[:1].upper() + said[1:]
    return said if not said or said.endswith((".", "!", "?")) else f"{said}."


def _name(name: str) -> Markup:
    return element("span", breakable(name), class_="name")


def _checks(found: Verification) -> Markup:
    weights, logits = found.weights, found.logits
    wrong = len(weights.differences)
    checks = [
        _check("Weights", not wrong, _weights_said(weights)),
        _check(
            "Settings",
            not weights.settings,
            "no difference" if not weights.settings else f"{len(weights.settings)} stated differently",
        ),
        _check("Logits", None if logits is None else logits.equal, _logits_said(logits)),
    ]
    return element("ul", checks, class_="checks")


def _weights_said(weights: WeightsReport) -> str:
    if weights.differences:
        return f"{len(weights.differences):,} of {amount(weights.tensors, 'tensor')} differ"
    return f"{_sizes(weights)}, {exactness(weights)}"


def _sizes(weights: WeightsReport) -> str:
    return f"{amount(weights.tensors, 'tensor')}, {amount(weights.elements, 'element')}"


def _logits_said(logits: LogitsReport | None) -> str:
    if logits is None:
        return "no model was built"
    bad = failed(logits.prompts)
    if bad or not logits.prompts:
        return (
            f"{bad} of {amount(len(logits.prompts), 'prompt')} differ by more than rounding"
            if bad
            else "no prompt was run"
        )
    return f"{amount(len(logits.prompts), 'prompt')} agree within the rounding of {logits.dtype}"


def _check(name: str, passed: bool | None, said: str) -> Markup:
    mark, kind, verb = _MARKS[passed]
    parts = [
        element("span", mark, class_="mark", aria_hidden="true"),
        element("strong", f"{name} {verb}"),
        element("span", said, class_="said"),
    ]
    return element("li", parts, class_=kind)


def _sections(found: Verification, made: Occasion) -> Iterable[Markup]:
    weights, logits = found.weights, found.logits
    yield _section("What was compared", "", element("div", _facts(found, made), class_="columns"))
    if weights.settings:
        yield _section("Settings that differ", "What the two configs state differently.", settings_table(weights))
    if logits is not None:
        yield from _logits_sections(logits)
    yield from _weights_sections(weights)
    if logits is not None:
        yield _section(
            "The prompts", "The same tokens and pixels went into both models.", [_prompt(one) for one in logits.prompts]
        )
    notes = [*weights.notes, *(logits.notes if logits else ())]
    if notes:
        yield _section("Notes", "", element("ul", [element("li", note) for note in notes], class_="plain"))


def _section(title: str, lead: str, *content: Child) -> Markup:
    said = element("p", lead, class_="lead") if lead else ""
    return element("section", element("h2", title), said, *content)


def _logits_sections(logits: LogitsReport) -> Iterable[Markup]:
    yield _section("What both models answer", _threshold(logits), prompts_table(logits))
    if logits.points:
        folded = element("details", element("summary", "The same as a table"), points_table(logits))
        lead = (
            "How far the values inside the two models are from each other, from input to output, as a share of their "
            "size; deepstack mergers stand after the block that they take from. Each mark is what goes into or comes "
            "out of a module, over all prompts."
        )
        yield _section(
            "Layer by layer" if logits.place is None else "Where they part, layer by layer",
            lead,
            _place(logits),
            element("figure", Markup(layer_picture(logits))),
            folded,
        )
    if any(prompt.kl for prompt in logits.prompts):
        lead = (
            "How different the two predictions of the next token are, token by token: KL(Hugging Face || Megatron). "
            "A bar below the cells marks images and videos."
        )
        yield _section("Divergence per token", lead, element("figure", Markup(kl_picture(logits))))


def _threshold(logits: LogitsReport) -> str:
    return (
        f"Each model ran every prompt in {logits.dtype} and again in {logits.reference}, which shows how far rounding "
        f"alone moves its logits: its own error, below with Hugging Face's first. A difference between the two models "
        f"of more than {logits.multiple:g} times both own errors added up is more than rounding, and fails."
    )


def _place(logits: LogitsReport) -> Child:
    if logits.place is None or not logits.place.parameters:
        return ""
    items = [element("li", _name(name)) for name in logits.place.parameters]
    return joined([element("p", "Parameters of that module that differ:"), element("ul", items, class_="plain")])


def _weights_sections(weights: WeightsReport) -> Iterable[Markup]:
    if not weights.differences:
        said = f"No weight differs: {_weights_said(weights)}. So there is no histogram."
        yield element("section", element("h2", "Weights"), element("p", said))
        return
    yield _section("The tensors that differ", "The worst first.", tensors_table(weights))
    if any(weights.ulps):
        lead = (
            "A unit in the last place (ULP) is one step to the next number that the dtype can hold. Few mean rounding; "
            "many mean other values. Bars are as long as the logarithm of the count."
        )
        yield _section("By how much", lead, element("figure", Markup(ulp_picture(weights))))


def _facts(found: Verification, made: Occasion) -> list[Markup]:
    weights, logits = found.weights, found.logits
    compared: Facts = [
        *_side_facts(found),
        ("Model", found.model),
        ("Weights", _sizes(weights)),
        ("Compared", f"{exactness(weights)}: {weights.tolerated}" if weights.tolerated else "bit for bit"),
        ("Time for weights", duration(weights.seconds)),
    ]
    asked: Facts = [
        ("Date", made.date or "not recorded"),
        ("Command", _command(made.command) if made.command else "not recorded"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in found.versions.items()) or "not recorded"),
    ]
    if logits is None:
        return [_list(compared), _list(asked)]
    return [_list([*compared, *asked]), _list(_run_facts(logits))]


def _side_facts(found: Verification) -> Facts:
    """Both checkpoints: where, and as far as it is known in which format, layout and dtype."""
    facts: Facts = [("Hugging Face", _name(found.huggingface)), ("Megatron", _name(found.megatron))]
    if not found.sides:
        return facts
    theirs, ours = found.sides
    dtype = (
        theirs.dtype if theirs.dtype == ours.dtype else f"{theirs.dtype} for Hugging Face, {ours.dtype} for Megatron"
    )
    return [
        facts[0],
        ("Format", theirs.format),
        facts[1],
        ("Format", ours.format),
        ("Written with", ours.layout or "not stated"),
        ("Stored as", dtype),
    ]


def _command(typed: str) -> Markup:
    """May be broken between its words, and within those that are long."""
    words = [element("span", word, class_="word" if len(word) < _LONG_WORD else None) for word in typed.split(" ")]
    return element("span", Markup(" ".join(words)), class_="name")


def _run_facts(logits: LogitsReport) -> Facts:
    theirs, ours = logits.programs
    return [
        ("Both models", f"Hugging Face: {theirs}. Megatron: {ours}."),
        ("Device", logits.device),
        ("Computed in", f"{logits.dtype}, and {logits.reference} to tell how much is rounding"),
        ("Allowed", f"{logits.multiple:g} times what both programs' own rounding makes"),
        ("Prompts", f"{len(logits.prompts)}: {names_of(logits.prompts)}" if logits.prompts else "none was run"),
        ("Logits", largest_for_its_bound(logits) or "not compared"),
        ("How", MODES.get(logits.mode, logits.mode)),
        ("Time for logits", duration(logits.seconds)),
        ("Peak memory", size(logits.peak_bytes)),
    ]


def _list(rows: list[tuple[str, Child]]) -> Markup:
    return element(
        "dl",
        [element(tag, child) for row in rows for tag, child in zip(("dt", "dd"), row, strict=True)],
        class_="facts",
    )


def _prompt(prompt: PromptResult) -> Markup:
    kinds = [f"{prompt.kinds.count(kind):,} {name}" for kind, name in KINDS.items() if kind in prompt.kinds]
    contents = element("p", prompt.contents, class_="contents")
    shown = (
        contents
        if len(prompt.contents) <= _LONG_CONTENTS
        else element("details", element("summary", "Contents"), contents)
    )
    tokens = element("p", f"{amount(len(prompt.kl), 'token')}: {', '.join(kinds)}" if kinds else "", class_="muted")
    return element("div", element("h3", prompt.name), tokens, shown, class_="prompt")


def _footer(found: Verification) -> Markup:
    version = found.versions.get("qwen3vl-convert", "")
    said = f"Made by qwen3vl-convert verify {version}".rstrip()
    return element("footer", element("p", f"{said}. The exit code of the command was {0 if found.equal else 1}."))
