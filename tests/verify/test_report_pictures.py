"""The pictures of a report: every point, token and count has its mark, and no value breaks them."""

import itertools
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from qwen3vl_convert.quantities import figure
from qwen3vl_convert.verify.report import html_report, kl_picture, layer_picture, stand_alone, ulp_picture
from qwen3vl_convert.verify.report.axis import Decades
from qwen3vl_convert.verify.report.groups import grouped
from qwen3vl_convert.verify.report.markup import text
from qwen3vl_convert.verify.report.tokens import shade
from qwen3vl_convert.verify.result import LogitsReport, Place, PointResult, Verification
from verify.verifications import SAMPLES, difference, failing, huge, odd, passing, points, prompt, weights

EXTERNAL = re.compile(r"""https?:|src\s*=|href\s*=|@import|url\(""")
SVG = "{http://www.w3.org/2000/svg}"


class Attributes(HTMLParser):
    """Of every tag of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(dict(attrs))


def drawn(picture: str) -> ElementTree.Element:
    """As XML, which a file of its own must be."""
    return ElementTree.fromstring(stand_alone(picture))


def count(picture: str, kind: str) -> int:
    """Shapes whose class has the word."""
    return sum(kind in (one.get("class") or "").split() for one in drawn(picture).iter())


def computed(found: Verification) -> LogitsReport:
    assert found.logits is not None
    return found.logits


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_number_of_a_picture_is_one(sample: str) -> None:
    for attributes in Attributes(html_report(SAMPLES[sample]())).found:
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height", "dx"):
            assert re.fullmatch(r"(-?[\d.]+%?)?", attributes.get(name) or ""), attributes
        assert not re.search("nan|inf", (attributes.get("d") or "") + (attributes.get("transform") or ""))


@pytest.mark.parametrize("sample", SAMPLES)
def test_pictures_stand_alone(sample: str) -> None:
    found = SAMPLES[sample]()
    pictures = [ulp_picture(found.weights)]
    if found.logits is not None:
        pictures += [layer_picture(found.logits), kl_picture(found.logits)]
    for picture in pictures:
        file = stand_alone(picture)
        assert ElementTree.fromstring(file).tag == f"{SVG}svg"
        assert not EXTERNAL.search(file.replace('xmlns="http://www.w3.org/2000/svg"', ""))
        assert "prefers-color-scheme:dark" in file
        assert "<script" not in file


def test_every_point_is_a_mark_with_its_values() -> None:
    report = replace(computed(failing()), place=None)
    picture = layer_picture(report)
    every = picture.split('class="every"')[1:]
    marks = sum(
        len(re.findall('class="(?:good|bad) (?:into|out)"', part.split('class="summary"')[0])) for part in every
    )
    assert marks == len(report.points)
    for point in report.points:
        assert f"difference {figure(point.difference)}, allowed {figure(point.allowed)}" in picture
        assert text(point.hf_module) in picture


def test_points_that_fail_have_another_mark() -> None:
    """Circles and squares; two more are in the legend, and one in the ring of the first."""
    report = computed(failing())
    wrong = sum(not point.passed for point in report.points)
    assert wrong == 210
    layers = len({point.layer for point in report.points if not point.passed})
    assert count(layer_picture(report), "bad") == wrong + layers + 2
    assert count(layer_picture(computed(passing())), "bad") == 1


def test_the_first_that_is_wrong_is_flagged() -> None:
    report = computed(failing())
    assert report.place is not None
    again = LogitsReport(**{name: getattr(report, name) for name in report.__slots__})
    for one in (report, again):
        picture = layer_picture(one)
        assert count(picture, "ring") == 1
        assert ">layer 7, self_attention.linear_qkv</text>" in picture
    assert count(layer_picture(computed(passing())), "ring") == 0
    assert count(layer_picture(replace(report, place=Place(None, "unknown"))), "ring") == 0


def test_a_flag_with_a_nan_point_is_found_after_json() -> None:
    """NaN is not equal to itself; a place read from a file is."""
    report = computed(odd())
    assert report.place is not None
    assert report.place.point is not None
    point = replace(report.place.point, difference=float("nan"))
    assert count(layer_picture(replace(report, place=Place(point, ""))), "ring") == 1


def test_points_stand_in_the_order_of_execution() -> None:
    for tower, layers in (("vision", 24), ("text", 28)):
        groups = grouped(points(), tower)
        assert [group.layer for group in groups if group.layer is not None] == list(range(layers))
        places = [group.at(number) for group in groups for number in range(len(group.points))]
        assert places == sorted(places)
        assert 0 < places[0] < places[-1] < 100
        assert [point for group in groups for point in group.points] == [one for one in points() if one.tower == tower]
    assert [group.name for group in grouped(points(), "vision") if group.layer is None] == [
        "patch_embed",
        "deepstack_merger_list 0",
        "deepstack_merger_list 1",
        "deepstack_merger_list 2",
        "merger",
    ]


def after_all_blocks(made: tuple[PointResult, ...]) -> tuple[PointResult, ...]:
    """As our model runs them: the deepstack mergers when all blocks have."""
    mergers = [point for point in made if "deepstack" in point.module]
    last = max(number for number, point in enumerate(made) if point.tower == "vision" and point.layer is not None)
    rest = [(number, point) for number, point in enumerate(made) if point not in mergers]
    before = [point for number, point in rest if number <= last]
    return (*before, *mergers, *(point for number, point in rest if number > last))


def test_deepstack_mergers_stand_after_the_block_that_they_take_from() -> None:
    ran = after_all_blocks(points())
    assert grouped(ran, "vision", (5, 11, 17)) == grouped(points(), "vision")
    names = [group.name for group in grouped(ran, "vision", (2, 20, 23))]
    for merger, block in enumerate((2, 20, 23)):
        assert names.index(f"deepstack_merger_list {merger}") == names.index(f"layer {block}") + 1
    assert [group.name for group in grouped(ran, "vision")][-4:-1] == [
        f"deepstack_merger_list {n}" for n in range(3)
    ]  # where the blocks are not known


@pytest.mark.parametrize("blocks", [(5, 11, 17), (0, 1, 2), (21, 22, 23)], ids=str)
def test_every_module_outside_of_layers_is_named_where_it_is_wide_and_where_it_is_narrow(
    blocks: tuple[int, ...],
) -> None:
    """None is left out for want of room, and none lies over another."""
    picture = layer_picture(replace(computed(passing()), points=after_all_blocks(points()), deepstack=blocks))
    expected = ["patch embed", "deepstack 0", "deepstack 1", "deepstack 2", "merger", "embedding"]
    expected += ["final layernorm", "output layer"]
    texts = [one for one in drawn(picture).iter(f"{SVG}text") if one.text in expected]
    for hidden, pixels in (("tight", 640), ("roomy", 280)):
        shown = [one for one in texts if hidden not in (one.get("class") or "").split()]
        assert [one.text for one in shown] == expected
        for row in {one.get("y") for one in shown}:
            ends = [_reach(one, pixels) for one in shown if one.get("y") == row]
            assert all(right < left for (_, right), (left, _) in itertools.pairwise(ends))
            assert ends[0][0] >= 0
            assert ends[-1][1] <= pixels


def _reach(one: ElementTree.Element, pixels: int) -> tuple[float, float]:
    """From where to where a name goes across a picture of so many pixels, with letters of a usual width."""
    left = float(one.get("x", "").rstrip("%")) / 100 * pixels + float(one.get("dx", "0"))
    return left, left + 6.4 * len(one.text or "")


def test_modules_of_the_third_model_have_their_names_too() -> None:
    names = ("visual.patch_embed", "visual.deepstack_merger_list.0", "visual.merger", "model.norm", "lm_head")
    made = [PointResult(name, "", "output", "vision", None, 1e-7, 1e-6) for name in names]
    assert [group.name for group in grouped(tuple(made), "vision")] == [
        "patch_embed", "deepstack_merger_list 0", "merger", "norm", "lm_head",
    ]  # fmt: skip


def test_the_worst_of_a_group_is_the_one_that_fails() -> None:
    """Not the one with the largest difference, which may be allowed more; NaN is worse than any number."""
    group = grouped(points(1, 1), "text")[1]
    larger = replace(group.points[0], difference=0.5, allowed=0.9)
    fails = replace(group.points[1], difference=0.1, allowed=0.05)
    nan = replace(group.points[2], difference=math.nan)
    assert replace(group, points=(larger, fails)).worst == fails
    assert math.isnan(replace(group, points=(larger, nan, fails)).worst.difference)
    nothing = replace(group.points[0], difference=0.0, allowed=0.0)
    assert replace(group, points=(nothing, larger)).worst == larger


def test_many_points_are_one_mark_per_layer_in_a_page_of_few_megabytes() -> None:
    found = huge()
    report = computed(found)
    text_points = [point for point in report.points if point.tower == "text"]
    assert len(text_points) > 900
    text_model = layer_picture(report).split("Text model")[1]
    marks = len(re.findall('class="(?:good|bad) (?:into|out)"', text_model))
    assert marks == 94 + 3 + 1 + 3, "layers, three modules outside of them, the flag, the legend"
    assert len(html_report(found).encode()) < 3_000_000


def test_every_token_is_a_cell_of_the_colour_of_its_divergence() -> None:
    report = computed(failing())
    tokens = [value for one in report.prompts for value in one.kl]
    found = Counter(
        (one.get("class") or "").removeprefix("cell ") for one in drawn(kl_picture(report)).iter(f"{SVG}rect")
    )
    expected = Counter(shade(value) for value in tokens)
    expected.update([f"k{number}" for number in range(11)] + ["odd"])  # the legend
    assert {kind: number for kind, number in found.items() if kind in expected} == expected


@pytest.mark.parametrize(
    ("kl", "kind"),
    [
        (0.0, "k0"),
        (-1e-12, "k0"),
        (1e-300, "k0"),
        (1e-9, "k0"),
        (1.1e-9, "k1"),
        (1e-8, "k1"),
        (0.5, "k9"),
        (1.0, "k9"),
        (1.1, "k10"),
        (700.0, "k10"),
        (math.nan, "odd"),
        (math.inf, "odd"),
    ],
)
def test_shades(kl: float, kind: str) -> None:
    assert shade(kl) == kind


def test_images_and_videos_are_marked_below_their_tokens() -> None:
    """The cells above the bars are the tokens of that kind."""
    kinds = prompt("mixed", 1e-5, 1e-3).kinds
    rects = list(
        drawn(kl_picture(replace(computed(passing()), prompts=(prompt("mixed", 1e-5, 1e-3),)))).iter(f"{SVG}rect")
    )
    cells = [_box(one) for one in rects if "cell k" in (one.get("class") or "")][: len(kinds)]
    for kind in "iv":
        bars = [_box(one) for one in rects if one.get("class") == f"kind-{kind}" and "%" in one.get("width", "")]
        marked = [
            any(bar[0] - 0.01 <= x and x + width <= bar[0] + bar[1] + 0.01 and y < bar[2] < y + 17 for bar in bars)
            for x, width, y in cells
        ]
        assert marked == [one == kind for one in kinds]


def _box(rect: ElementTree.Element) -> tuple[float, float, float]:
    """x and width in percent, y in pixels."""
    x, width, y = (float(rect.get(name, "").rstrip("%")) for name in ("x", "width", "y"))
    return x, width, y


def test_very_many_tokens_share_cells_and_the_worst_shows() -> None:
    one = prompt("text", 1e-5, 1e-3, "t" * 30_000)
    one = replace(one, kl=(*one.kl[:12_347], 5.0, *one.kl[12_348:]))
    picture = kl_picture(replace(computed(passing()), prompts=(one,)))
    assert count(picture, "cell") < 6_100
    assert count(picture, "k10") == 1 + 1
    assert "tokens 12345 to 12349, the worst (text): 5.0 nats" in picture


def test_bars_of_the_histogram_follow_their_counts() -> None:
    report = weights(difference(1), ulps=(1, 0, 10, 100, 1000, 10_000, 100_000))
    bars = [one for one in drawn(ulp_picture(report)).iter(f"{SVG}rect") if one.get("class") == "bar"]
    widths = [float(bar.get("width", "").rstrip("%")) for bar in bars]
    assert len(widths) == 7
    assert widths[1] == 0 < widths[0] < widths[2] < widths[3] < widths[4] < widths[5] < widths[6] < 60
    assert "100,000" in ulp_picture(report)


def test_an_axis_has_a_place_for_every_value() -> None:
    axis = Decades.of([0.0, 3e-7, 2e-2, math.nan], top=10, height=200)
    heights = [axis.y(value) for value in (math.nan, 2e-2, 1e-3, 3e-7, 0.0)]
    assert heights == sorted(heights)
    assert 10 <= heights[0] < heights[-1] <= 210
    assert axis.y(math.inf) == axis.y(math.nan)
    assert heights[1] - heights[0] > 15
    assert heights[-1] - heights[-2] > 15
    assert axis.y(1e-3) - axis.y(1e-2) == pytest.approx(axis.y(1e-4) - axis.y(1e-3))


@pytest.mark.parametrize("values", [[], [0.0], [math.nan], [1.0], [1e-300, 1e300], [5e-324]])
def test_an_axis_of_strange_values_has_a_few_decades(values: list[float]) -> None:
    axis = Decades.of(values, top=0, height=100)
    assert 2 <= axis.high - axis.low <= 18
    assert all(0 <= axis.y(value) <= 100 for value in (*values, 0.5, 1e-9))
