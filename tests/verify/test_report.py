"""The report: one file, nothing from elsewhere, nothing of the data taken for markup, and everything that was found."""

import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from broken import user_environment
from qwen3vl_convert.quantities import figure
from qwen3vl_convert.verify.report import Occasion, html_report
from qwen3vl_convert.verify.report.markup import element, text
from qwen3vl_convert.verify.report.style import COLOURS
from qwen3vl_convert.verify.report.words import by_severity, verdict
from qwen3vl_convert.verify.result import Verification
from verify.verifications import (
    SAMPLES,
    difference,
    different_weights,
    equal_weights,
    failing,
    logits,
    odd,
    passing,
    points,
    prompt,
    verification,
    weights,
)

EMPTY = {"meta", "br", "wbr", "hr"}
EXTERNAL = re.compile(r"""https?:|src\s*=|href\s*=|@import|url\(|//\w+\.""")


class Reader(HTMLParser):
    """Every tag with its attributes, every text; fails where tags are not balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}

    @property
    def said(self) -> str:
        return "".join(self.texts)


@pytest.fixture(params=SAMPLES, scope="module")
def found(request: pytest.FixtureRequest) -> Verification:
    return SAMPLES[request.param]()


@pytest.fixture(scope="module")
def page(found: Verification) -> str:
    return html_report(found)


# ---- one file --------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_holds_nothing_that_runs(page: str) -> None:
    read = Reader(page)
    assert page.startswith("<!doctype html>")
    assert not read.names & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "a",
        "b",
        "i",
        "s",
        "u",
    }
    for _, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "href")]


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    """What the data says is text: only in tags and styles could it be a reference."""
    assert not EXTERNAL.search("".join(re.findall(r"<style>.*?</style>|<[^>]*>", page, re.DOTALL)))


def test_the_policy_lets_only_this_style_in(page: str) -> None:
    read = Reader(page)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [at["content"] for tag, at in read.tags if at.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert set(policy.split("; ")) >= {"default-src 'none'", f"style-src 'sha256-{digest}'", "base-uri 'none'"}
    assert read.tags.index(("meta", {"http-equiv": "Content-Security-Policy", "content": policy})) < [
        tag for tag, _ in read.tags
    ].index("style")


def test_what_comes_from_the_data_is_text() -> None:
    read = Reader(html_report(odd()))
    assert "<script>alert(1)</script>" in read.said
    assert "<b>bold</b>" in read.said
    assert "<a href='https://x.invalid'>" in read.said
    assert read.names == Reader(html_report(failing())).names, "markup of the data's own"


def test_hidden_characters_are_shown_and_the_page_can_be_written() -> None:
    page = html_report(odd())
    assert page.encode("utf-8")
    assert not set(page) & set("\x00\x1b\u202e\udcff")
    assert {r"\u0000b", r"\u202e", r"\udcff", r"\u001b[31m"} <= set(re.findall(r"\\u[0-9a-f]{4}(?:\[31m|b)?", page))


def test_text_is_escaped_in_attributes_too() -> None:
    assert (
        element("g", "<&", aria_label="\"'><script>") == '<g aria-label="&quot;&#x27;&gt;&lt;script&gt;">&lt;&amp;</g>'
    )
    assert text("a\nb") == "a\nb"


# ---- everything that was found ---------------------------------------------------------------------------------------


def test_every_tensor_prompt_setting_and_note_is_there(found: Verification, page: str) -> None:
    said = Reader(page).said
    for one in found.weights.differences:
        assert text(one.name) in page.replace("<wbr>", "")
        assert one.guess in said
    for name in found.weights.settings:
        assert name in said
    for note in found.weights.notes:
        assert note in said
    for version in found.versions.values():
        assert version in said
    for one_prompt in found.logits.prompts if found.logits else ():
        assert one_prompt.name in said
        assert figure(one_prompt.max_abs) in said


ASKED = Occasion("2026-11-27T13:43:34Z", "qwen3vl-convert verify 'a <b>' run --logits")


def test_a_reader_later_learns_when_how_and_on_what(found: Verification) -> None:
    """The date, the command as it was typed, both formats, layout and dtype as stored, versions, the device."""
    said = Reader(html_report(found, ASKED)).said
    assert ASKED.date in said
    assert ASKED.command in said
    for side in found.sides:
        assert side.format in said
        assert side.layout in said
        assert side.dtype in said
    assert all(f"{name} {version}" in said for name, version in found.versions.items())
    if found.logits is not None:
        assert found.logits.device in said
        assert all(program in said for program in found.logits.programs)


def test_what_is_not_known_is_said_to_be_so() -> None:
    said = Reader(html_report(replace(passing(), sides=(), versions={}))).said
    assert said.count("not recorded") == 3


def test_two_dtypes_are_both_named() -> None:
    hf, megatron = equal_weights().sides
    found = replace(equal_weights(), sides=(hf, replace(megatron, dtype="float32", layout="")))
    said = Reader(html_report(found)).said
    assert "bfloat16 for Hugging Face, float32 for Megatron" in said
    assert "Written withnot stated" in said


def test_the_same_arguments_make_the_same_page() -> None:
    """In another process too, where sets have another order."""
    program = (
        "from verify.verifications import failing; from qwen3vl_convert.verify.report import html_report; "
        "import hashlib; print(hashlib.sha256(html_report(failing()).encode()).hexdigest())"
    )
    here = hashlib.sha256(html_report(failing()).encode()).hexdigest()
    for seed in ("1", "2"):
        paths = os.pathsep.join((str(Path(__file__).parents[1]), user_environment()["PYTHONPATH"]))
        environment = {**user_environment(), "PYTHONPATH": paths, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == here


def test_tables_say_what_their_cells_are(page: str) -> None:
    """By header cells with a scope; and beside each cell where a narrow page has no row of headers."""
    tags = Reader(page).tags
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in tags if tag == "th")
    assert all(attributes.get("data-label") for tag, attributes in tags if tag == "td")
    assert all(attributes.get("aria-label") for tag, attributes in tags if tag in ("table",))


def test_pictures_are_described(page: str) -> None:
    pictures = [at for tag, at in Reader(page).tags if tag == "svg" and "picture" in (at.get("class") or "")]
    assert all(at["role"] == "img" and at["aria-label"] for at in pictures)


def test_equal_weights_have_no_histogram_and_the_page_says_so() -> None:
    page = html_report(equal_weights())
    assert "<svg" not in page
    assert "No weight differs" in page
    assert "no model was built" in page


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            passing(),
            "The same model: all 383 tensors are equal bit for bit, and the logits of 5 prompts agree within rounding.",
        ),
        (failing(), "Not the same model: the two part at text layer 7, self_attention.linear_qkv."),
        (equal_weights(), "The same model: all 383 tensors are equal bit for bit."),
        (
            different_weights(),
            "Not the same model: 27 of 383 tensors differ, most of all text layer 0, mlp.gate_proj.weight.",
        ),
        (
            verification(weights(difference(3))),
            "Not the same model: 1 of 383 tensors differs, text layer 3, self_attn.k_proj.weight.",
        ),
        (
            verification(weights(settings={"rope_theta": (1, 2)})),
            "Not the same model: the weights are equal, but the configs differ in rope_theta.",
        ),
        (
            verification(weights(tolerated="rounded"), logits((prompt("text", 1.0, 1e-3),), points())),
            "Not the same model: the logits of 1 prompt of 1 differ by more than rounding, though all 383 tensors are "
            "equal after the rounding that was allowed.",
        ),
        (
            verification(weights(), logits((), ())),
            "Not the same model: no prompt was run, though all 383 tensors are equal bit for bit.",
        ),
    ],
)
def test_the_verdict_is_a_sentence_with_the_place(found: Verification, expected: str) -> None:
    assert verdict(found) == expected
    page = html_report(found).replace("<wbr>", "")
    assert f"<h1>{expected}</h1>" in page
    assert ('class="verdict differs"' in page) == (not found.equal)
    assert page.index("<h1>") < page.index("<h2>")


def test_the_worst_tensor_comes_first() -> None:
    nan = difference(5, max_abs=math.nan, cosine=math.nan)
    infinite = difference(6, max_abs=math.inf, cosine=math.nan)
    bit = difference(4, cosine=1 - 1e-9, max_abs=0.1)
    zero = difference(3, cosine=math.nan, max_abs=3.0)
    other = difference(2, cosine=0.01)
    of_dtypes = replace(difference(1), dtypes=("float32", "bfloat16"))
    assert by_severity([of_dtypes, bit, other, infinite, nan, zero]) == [nan, infinite, zero, other, bit, of_dtypes]
    page = html_report(verification(weights(of_dtypes, bit, other, nan, zero))).replace("<wbr>", "")
    places = [page.index(f'<span class="name">{one.name}') for one in (nan, zero, other, bit, of_dtypes)]
    assert places == sorted(places)


def test_all_tensors_but_the_worst_are_folded_up() -> None:
    page = html_report(different_weights())
    table, folded = page.split("<details>")[0], page.split("<details>")[1]
    assert table.count('scope="row"') == 15
    assert folded.count('scope="row"') == 12
    assert "The other 12 tensors" in folded


# ---- looks -----------------------------------------------------------------------------------------------------------


def contrast(one: str, other: str) -> float:
    """Of two colours #rrggbb, as WCAG 2 defines it."""
    lights = []
    for colour in (one, other):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_what_is_to_be_read_can_be_read(scheme: int) -> None:
    colours = dict(re.findall(r"--([\w-]+):(#[0-9a-f]{6})[;}]", COLOURS.split("@media")[scheme]))
    for ground in ("paper", "right-soft", "wrong-soft"):
        assert contrast(colours["ink"], colours[ground]) > 7
    for ink in ("muted", "right", "wrong"):
        assert contrast(colours[ink], colours["paper"]) > 4.5, ink
    assert contrast(colours["right"], colours["right-soft"]) > 4.5
    assert contrast(colours["wrong"], colours["wrong-soft"]) > 4.5
    for mark in ("limit", "image", "video"):
        assert contrast(colours[mark], colours["paper"]) > 3, mark
    ramp = [contrast(colours[f"k{number}"], colours["paper"]) for number in range(11)]
    assert ramp == sorted(ramp), "the larger, the further from the ground"


# ---- the room --------------------------------------------------------------------------------------------------------


def test_a_report_needs_no_framework() -> None:
    imports = "import sys, json, qwen3vl_convert.verify.report, qwen3vl_convert.verify.terminal"
    program = f"{imports}; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "megatron", "transformers", "rich"} & set(json.loads(done.stdout))
