"""The notation: what a layout says, that views never copy, and that clipping a view to a box is exact."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_convert.errors import MisshapenTensor, UsageError
from qwen3vl_convert.mappings import Equation, Layout, Term, View

SIZES = {"kv": 2, "g": 3, "d": 4, "h": 5}


def positions(view: View) -> list[tuple[int, ...]]:
    """The memory index of every element, in the view's order: the definition of a view, spelled out."""
    found = []
    for index in itertools.product(*(range(size) for size in view.sizes)):
        at = list(view.start)
        for i, axis in zip(index, view.axes, strict=True):
            at[axis.dim] += i * axis.step
        found.append(tuple(at))
    return found


def test_open_gives_a_dimension_per_axis() -> None:
    view = Layout("(kv g d) h").open(SIZES)
    assert view.names == ("kv", "g", "d", "h")
    assert view.sizes == (2, 3, 4, 5)
    assert Layout("(kv g d) h").shape(SIZES) == (24, 5)


def test_a_view_of_a_tensor_is_no_copy() -> None:
    tensor = torch.arange(120).reshape(24, 5)
    view = Layout("(kv g d) h").open(SIZES).ordered(("h", "g", "kv", "d"))
    opened = view.of(tensor)
    assert opened.data_ptr() == tensor.data_ptr()
    assert torch.equal(opened, tensor.view(2, 3, 4, 5).permute(3, 1, 0, 2))


def test_a_view_of_a_transposed_tensor_is_no_copy_either() -> None:
    tensor = torch.arange(120).reshape(5, 24).t()
    opened = Layout("(kv g d) h").open(SIZES).of(tensor)
    assert opened.data_ptr() == tensor.data_ptr()
    assert torch.equal(opened, tensor.contiguous().view(2, 3, 4, 5))


def test_narrow_select_and_split_are_by_name() -> None:
    tensor = torch.arange(2 * 5 * 4 * 3).reshape(40, 3)
    whole = Layout("(kv * d) h").open({"kv": 2, "*": 5, "d": 4, "h": 3})
    q = whole.narrow("*", 0, 3).split("*", ["g"], {"g": 3})
    v = whole.narrow("*", 4, 1).split("*", [], {})
    groups = tensor.view(2, 5, 4, 3)
    assert torch.equal(q.of(tensor), groups[:, :3])
    assert torch.equal(v.of(tensor), groups[:, 4])
    assert torch.equal(q.select("kv", 1).narrow("h", 1, 2).of(tensor), groups[1, :3, :, 1:])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(a b) a", "repeats the axis a"),
        ("a b a", "repeats the axis a"),
        ("(a", "expected axes"),
        ("a : b", "expected axes"),
        ("a-b", "expected axes"),
        ("", "nothing"),
        ("... h", "stands alone"),
    ],
)
def test_a_malformed_layout_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Layout(text)


@pytest.mark.parametrize(
    ("layout", "shape", "known", "solved"),
    [
        ("f h", (6, 5), {}, {"f": 6, "h": 5}),
        ("(kv g d) h", (24, 5), {"kv": 2, "g": 3}, {"d": 4, "h": 5}),
        ("(kv d) h", (8, 5), {"kv": 2, "d": 4, "h": 5}, {}),
    ],
)
def test_shapes_tell_sizes(layout: str, shape: tuple[int, ...], known: dict[str, int], solved: dict[str, int]) -> None:
    assert Layout(layout).solve(shape, known, "x") == solved


@pytest.mark.parametrize(
    ("shape", "known"), [((6,), {}), ((7, 5), {"kv": 2, "g": 3}), ((8, 6), {"kv": 2, "d": 4, "h": 5})]
)
def test_shapes_that_contradict_sizes_are_refused(shape: tuple[int, ...], known: dict[str, int]) -> None:
    layout = "(kv d) h" if "d" in known else "(kv g d) h"
    with pytest.raises(MisshapenTensor, match="a.weight: expected"):
        Layout(layout).solve(shape, known, "a.weight")


@st.composite
def views(draw: st.DrawFn) -> View:
    """A view of a random layout: some axes grouped, some narrowed, some selected."""
    names = draw(st.permutations(["a", "b", "c", "d"]))
    sizes = {name: draw(st.integers(1, 4)) for name in names}
    cuts = draw(st.sets(st.integers(1, 3), max_size=3))
    bounds = [0, *sorted(cuts), 4]
    groups = [names[i:j] for i, j in itertools.pairwise(bounds)]
    view = Layout(" ".join(f"({' '.join(group)})" for group in groups)).open(sizes)
    for axis in view.axes:
        first = draw(st.integers(0, axis.size - 1))
        length = draw(st.integers(1, axis.size - first))
        selected = draw(st.integers(0, 3)) == 0
        view = view.select(axis.name, first) if selected else view.narrow(axis.name, first, length)
    return view.ordered(draw(st.permutations(view.names)))


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return offsets, tuple(draw(st.integers(1, size - o)) for size, o in zip(shape, offsets, strict=True))


@given(st.data())
def test_clip_is_exact_and_disjoint(data: st.DataObject) -> None:
    """Every element of a view inside a box is in exactly one of the ranges, and no other element is."""
    view = data.draw(views())
    offsets, sizes = data.draw(boxes(view.shape))
    clipped = [at for ranges in view.clip(offsets, sizes) for at in positions(view.narrowed(ranges))]
    inside = [at for at in positions(view) if all(o <= i < o + s for i, o, s in zip(at, offsets, sizes, strict=True))]
    assert sorted(clipped) == sorted(inside)


@given(st.data())
def test_strides_within_a_box(data: st.DataObject) -> None:
    """A view inside a box, addressed in the box's own memory, is the same elements."""
    view = data.draw(views())
    offsets, sizes = view.bounds()
    tensor = torch.arange(math.prod(view.shape)).reshape(view.shape)
    box = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].clone()
    first, strides = view.strides(offsets, sizes)
    assert torch.equal(box.as_strided(view.sizes, strides, first), view.of(tensor))


@pytest.mark.parametrize(
    ("megatron", "hf", "reason"),
    [
        ("a : (kv d) h", ["b : (kv g d) h"], "has the axis g"),
        ("a : (kv g d) h", ["b : (kv d) h"], "lacks the axis g"),
        ("a : h f", ["b : h f", "c : h f"], "several need a `\\*`"),
        ("a : (* f) h", ["b : (* f) h"], "belongs to Megatron's side"),
        ("a.{e} : h", ["b : h"], "lacks the axis e"),
        ("a : (* f) h", ["b.{x} : f h"], "cannot live in the name"),
        ("a : h", [], "0 HF tensors"),
    ],
)
def test_an_equation_that_is_no_bijection_is_refused(megatron: str, hf: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Equation(Term.parse(megatron), tuple(Term.parse(text) for text in hf))


def test_an_axis_in_the_name_and_in_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="lives in the name and in memory at once"):
        Term.parse("layers.{l}.weight : l h")


def test_names_are_matched_exactly() -> None:
    term = Term.parse("a.{l}.b.weight{e} : h")
    assert term.match("a.3.b.weight17") == {"l": 3, "e": 17}
    assert term.match("a.03.b.weight17") is None, "leading zeros would give one tensor two names"
    assert term.match("a.3.b.weight") is None
    assert term.at({"l": 3, "e": 17}) == "a.3.b.weight17"
