"""Positions: the published numbers, transformers' own function, and a loop that is too simple to be wrong.

The loop knows a prompt as pieces, text, images and frames, and never looks at token ids; what is tested sees only ids
and grids.
"""

import inspect
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.prompts import Ids, Image, Piece, Row, Text, Video, grids, padded, positions_of
from qwen3vl_convert.models.positions import check_visual_tokens, decode_positions, get_rope_index

TOKENS = Ids()
IMAGE, VIDEO, START, END, PAD = TOKENS.image, TOKENS.video, TOKENS.start, TOKENS.end, TOKENS.pad
IDS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}


def grids_of(rows: Iterable[Row], merge: int) -> dict[str, Any]:
    return dict(zip(("image_grid_thw", "video_grid_thw"), grids(rows, merge), strict=True))


def index_of(ids: Tensor, merge: int = 2, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Positions, once it is clear that what went in can give any."""
    check_visual_tokens(ids, spatial_merge_size=merge, **IDS, **arguments)
    return get_rope_index(ids, spatial_merge_size=merge, vision_start_token_id=START, **IDS, **arguments)


texts = st.builds(Text, st.integers(0, 6))
small = st.integers(1, 4)
images = st.builds(Image, st.integers(1, 2), small, small)
videos = st.builds(Video, st.integers(1, 3), small, small, st.integers(0, 2))
row_lists = st.lists(
    st.lists(texts | images | videos, min_size=1, max_size=6).filter(
        lambda row: bool(positions_of(row, marked=False)[0])
    ),
    min_size=1,
    max_size=4,
)
sides = st.lists(st.sampled_from(["left", "right"]), min_size=4, max_size=4)


# ---- the published numbers -------------------------------------------------------------------------------------------

GOLDEN: dict[str, tuple[Row, int]] = {
    "image": ([Text(3), Image(1, 2, 3), Text(5)], -3),
    "two images": ([Text(3), Image(1, 2, 3), Text(2), Image(1, 3, 3), Text(4)], -9),
    "video": ([Text(5), Video(3, 2, 2, gap=2), Text(4)], -6),
    "mixed": ([Text(2), Image(1, 2, 3), Text(3), Video(2, 2, 2, gap=2), Text(5)], -7),
}
ROWS = {
    "image": [
        [0, 1, 2, 3, *[4, 4, 4, 4, 4, 4], 7, 8, 9, 10, 11, 12],
        [0, 1, 2, 3, *[4, 4, 4, 5, 5, 5], 7, 8, 9, 10, 11, 12],
        [0, 1, 2, 3, *[4, 5, 6, 4, 5, 6], 7, 8, 9, 10, 11, 12],
    ],
    "two images": [[0, 1, 2, 3, *[4] * 6, 7, 8, 9, 10, *[11] * 9, 14, 15, 16, 17, 18]],
    "video": [
        [*range(6), *[6, 6, 6, 6], *range(8, 12), *[12, 12, 12, 12], *range(14, 18), *[18, 18, 18, 18], *range(20, 25)],
        [*range(6), *[6, 6, 7, 7], *range(8, 12), *[12, 12, 13, 13], *range(14, 18), *[18, 18, 19, 19], *range(20, 25)],
        [*range(6), *[6, 7, 6, 7], *range(8, 12), *[12, 13, 12, 13], *range(14, 18), *[18, 19, 18, 19], *range(20, 25)],
    ],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    """The numbers that transformers 4.57.6, 5.17 and 5.23 give alike."""
    row, delta = GOLDEN[name]
    positions, deltas = index_of(torch.tensor([TOKENS.of(row, marked=True)]), **grids_of([row], 2))
    expected = ROWS.get(name, [])
    assert positions[: len(expected), 0].tolist() == expected
    assert positions.dtype == deltas.dtype == torch.int64
    assert deltas.tolist() == [[delta]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_beside_a_shorter_row(name: str, side: str) -> None:
    """A second row with two tokens masked has the positions and the delta of the first, as transformers 5 counts."""
    row, delta = GOLDEN[name]
    ids = TOKENS.of(row, marked=True)
    input_ids, mask = padded([[11, 12, *ids], ids], [side, side], PAD)
    positions, deltas = index_of(input_ids, attention_mask_BS=mask, **grids_of([row, row], 2))
    alone, _ = index_of(torch.tensor([ids]), **grids_of([row], 2))
    assert deltas.tolist() == [[delta], [delta]]
    assert torch.equal(positions[:, 1, mask[1].bool()], alone[:, 0])
    assert torch.equal(positions[:, 0, 2:], alone[:, 0] + 2)
    assert not positions[:, 1, ~mask[1].bool()].any()


# ---- the loop --------------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(rows=row_lists, sides=sides, merge=st.integers(1, 3), marked=st.booleans())
def test_any_prompt(rows: list[Row], sides: list[str], merge: int, marked: bool) -> None:
    """Blocks adjacent, first and last; padding on either side of each row; images and videos in any order."""
    input_ids, mask = padded([TOKENS.of(row, marked) for row in rows], sides[: len(rows)], PAD)
    positions, deltas = index_of(input_ids, merge, attention_mask_BS=mask, **grids_of(rows, merge))
    for index, row in enumerate(rows):
        expected, after = positions_of(row, marked)
        assert [tuple(p) for p in positions[:, index, mask[index].bool()].T.tolist()] == expected
        assert deltas[index].tolist() == [after - len(expected)]
    assert not positions[:, mask == 0].any()


@settings(max_examples=50)
@given(rows=row_lists, tail=st.integers(0, 3), marked=st.booleans())
def test_packed_sequences_are_as_each_alone(rows: list[Row], tail: int, marked: bool) -> None:
    """An empty sequence between two is none; what comes after the last counts from 0 once more."""
    ids = [TOKENS.of(row, marked) for row in rows]
    lengths = torch.tensor([0, *map(len, ids), 0])
    cu_seqlens = lengths.cumsum(0).int()
    packed = torch.tensor([[*(token for one in ids for token in one), *[PAD] * tail]])
    positions, deltas = index_of(packed, cu_seqlens=cu_seqlens, **grids_of(rows, 2))
    expected = [positions_of(row, marked) for row in rows]
    flat = [position for found, _ in expected for position in found]
    assert [tuple(p) for p in positions[:, 0].T.tolist()] == flat + [(n, n, n) for n in range(tail)]
    assert deltas[:, 0].tolist() == [after - len(found) for found, after in expected] + [0]


def test_text_alone() -> None:
    """Without grids, with grids of no rows, and with a mask that has holes."""
    ids = torch.arange(10, 22).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0]])
    none = torch.zeros(0, 3, dtype=torch.int64)
    no_rows: dict[str, Any] = {"image_grid_thw": none, "video_grid_thw": none}
    for arguments in ({}, no_rows):
        positions, deltas = index_of(ids, **arguments)
        assert positions.tolist() == [[[0, 1, 2, 3, 4, 5]] * 2] * 3
        assert deltas.tolist() == [[0], [0]]
        positions, deltas = index_of(ids, attention_mask_BS=mask, **arguments)
        assert positions.tolist() == [[[0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 2, 0]]] * 3
        assert deltas.tolist() == [[0], [0]]


def test_ids_of_images_without_a_grid_are_text() -> None:
    """The function is total; that something is missing is for `check_visual_tokens` to say."""
    ids = torch.tensor([[1, IMAGE, IMAGE, VIDEO, 2]])
    positions, deltas = get_rope_index(ids, spatial_merge_size=2, **IDS)
    assert positions[0].tolist() == [[0, 1, 2, 3, 4]]
    assert deltas.tolist() == [[0]]


def test_padding_may_be_of_any_id() -> None:
    """Masked tokens take no row of a grid, whatever their id."""
    row: Row = [Text(2), Image(1, 2, 3), Text(1)]
    ids = torch.tensor([[IMAGE, VIDEO, *TOKENS.of(row, marked=False), IMAGE]])
    mask = torch.ones_like(ids)
    mask[:, [0, 1, -1]] = 0
    positions, deltas = get_rope_index(ids, attention_mask_BS=mask, spatial_merge_size=2, **IDS, **grids_of([row], 2))
    alone, its_delta = index_of(torch.tensor([TOKENS.of(row, marked=False)]), **grids_of([row], 2))
    assert torch.equal(positions[:, :, 2:-1], alone)
    assert torch.equal(deltas, its_delta)


def test_past_32k() -> None:
    row: Row = [Text(33_000), Image(1, 2, 3), Text(1), Video(300, 4, 5, gap=3), Text(40_000)]
    positions, deltas = index_of(torch.tensor([TOKENS.of(row, marked=False)]), **grids_of([row], 2))
    expected, after = positions_of(row, marked=False)
    assert torch.equal(positions[:, 0].T, torch.tensor(expected))
    assert deltas.tolist() == [[after - len(expected)]]
    assert positions.max() > 70_000


@settings(max_examples=50)
@given(rows=row_lists, sides=sides, steps=st.integers(1, 4), already=st.integers(0, 3))
def test_decoding_goes_on_where_the_prompt_ended(rows: list[Row], sides: list[str], steps: int, already: int) -> None:
    """As if the text that is decoded had been part of the prompt, whatever the padding."""
    input_ids, mask = padded([TOKENS.of(row, marked=False) for row in rows], sides[: len(rows)], PAD)
    _, deltas = index_of(input_ids, attention_mask_BS=mask, **grids_of(rows, 2))
    longer: list[Row] = [[*row, Text(already + steps)] for row in rows]
    lengths = mask.sum(1)
    found = decode_positions(lengths + already, steps, deltas)
    assert found.shape == (3, len(rows), steps)
    for index, row in enumerate(longer):
        expected, _ = positions_of(row, marked=False)
        assert [tuple(p) for p in found[:, index].T.tolist()] == expected[-steps:]
        one = decode_positions(int(lengths[index]) + already, steps, deltas[index : index + 1])
        assert torch.equal(one[:, 0], found[:, index])


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def their_model() -> Any:
    """A model without weights: its function looks only at the configuration."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 5e6}
    text = {"vocab_size": 512, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "out_hidden_size": 8}
    config = transformers.Qwen3VLConfig(
        text_config=text | {"num_key_value_heads": 1, "intermediate_size": 8, "rope_scaling": rope},
        vision_config=vision | {"deepstack_visual_indexes": [0], "spatial_merge_size": 2},
        vision_start_token_id=START,
        vision_end_token_id=END,
        **IDS,
    )
    with torch.device("meta"):
        return transformers.Qwen3VLModel(config)


def their_index(model: Any, ids: Tensor, mask: Tensor | None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Positions and deltas, by either generation's function."""
    arguments = {"input_ids": ids, "attention_mask": mask, **arguments}
    if "mm_token_type_ids" in inspect.signature(model.get_rope_index).parameters:
        arguments["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    positions, deltas = model.get_rope_index(**arguments)
    return positions, deltas


@pytest.mark.transformers
@pytest.mark.parametrize("seed", range(20))
def test_transformers_agrees(seed: int, their_model: Any) -> None:
    """Its releases differ in where padding stands, and in whether a delta counts padding."""
    pick = random.Random(seed)

    def piece() -> Piece:
        size = pick.randint(1, 4), pick.randint(1, 5)
        pieces: list[Piece] = [Text(pick.randint(1, 9)), Image(1, *size), Video(pick.randint(1, 4), *size, gap=2)]
        return pick.choice(pieces)

    rows: list[Row] = [[Text(pick.randint(0, 2)), *(piece() for _ in range(pick.randint(1, 5)))] for _ in range(3)]
    rows = [row for row in rows if positions_of(row, marked=True)[0]]
    ids, mask = padded(
        [TOKENS.of(row, marked=True) for row in rows], [pick.choice(["left", "right"]) for _ in rows], PAD
    )
    theirs, their_deltas = their_index(their_model, ids, mask, **grids_of(rows, 2))
    positions, deltas = index_of(ids, attention_mask_BS=mask, **grids_of(rows, 2))
    assert torch.equal(positions[:, mask == 1], theirs[:, mask == 1])
    padding = (mask == 0).sum(1, keepdim=True)
    assert torch.equal(deltas, their_deltas) or torch.equal(deltas - padding, their_deltas)


@pytest.mark.transformers
@pytest.mark.parametrize("name", GOLDEN)
def test_transformers_agrees_without_a_mask(name: str, their_model: Any) -> None:
    row, _ = GOLDEN[name]
    ids = torch.tensor([TOKENS.of(row, marked=True)] * 2)
    theirs = their_index(their_model, ids, None, **grids_of([row, row], 2))
    for ours, its in zip(index_of(ids, **grids_of([row, row], 2)), theirs, strict=True):
        assert torch.equal(ours, its)


# ---- no waiting for the device ---------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts the operations whose result, or whose result's shape, must be known on the host."""

    WAITING = frozenset(
        {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "bincount"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITING or (name == "repeat_interleave" and "output_size" not in (kwargs or {})):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def prompts() -> Iterator[tuple[str, dict[str, Any]]]:
    rows: list[Row] = [[Text(2), Image(1, 2, 3), Video(2, 2, 2, 1), Text(1)], [Image(1, 1, 5), Text(4)]]
    ids, mask = padded([TOKENS.of(row, marked=False) for row in rows], ["left", "right"], PAD)
    packed = torch.tensor([[token for row in rows for token in TOKENS.of(row, marked=False)]])
    yield "padded", {"input_ids_BS": ids, "attention_mask_BS": mask, **grids_of(rows, 2)}
    cu_seqlens = torch.tensor([0, len(TOKENS.of(rows[0], marked=False)), packed.shape[1]])
    yield "packed", {"input_ids_BS": packed, "cu_seqlens": cu_seqlens, **grids_of(rows, 2)}
    yield "text", {"input_ids_BS": torch.arange(12)[None]}


@pytest.mark.parametrize(("name", "arguments"), list(prompts()))
def test_waits_for_the_device(name: str, arguments: Any) -> None:
    """Positions: never. The check: once."""
    with Waits() as waits:
        get_rope_index(spatial_merge_size=2, **IDS, **arguments)
    assert waits.seen == []
    with Waits() as waits:
        check_visual_tokens(spatial_merge_size=2, **IDS, **arguments)
    assert waits.seen == ["_local_scalar_dense"]


def test_waits_are_seen() -> None:
    with Waits() as waits:
        torch.arange(3).sum().item()
        torch.arange(3).nonzero()
        torch.repeat_interleave(torch.arange(3))
    assert waits.seen == ["_local_scalar_dense", "nonzero", "repeat_interleave"]


# ---- prompts that do not fit their grids -----------------------------------------------------------------------------

SIX, NINE = (1, 4, 6), (1, 6, 6)
X, XX, XXX, V = [IMAGE], [IMAGE] * 2, [IMAGE] * 3, [VIDEO]


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        ([[1, *X]], {}, r"input_ids[0, 1]: expected no image tokens (id 500) without image_grid_thw, found 1."),
        ([[1], V], {}, r"input_ids[1, 0]: expected no video tokens (id 501) without video_grid_thw, found 1."),
        ([[1, *XX, *XXX]], {"image": [SIX]}, "image_grid_thw[0], (1, 4, 6): expected 6 ~ found 5 at input_ids[0, 1];"),
        ([[1, 2, 3]], {"image": [SIX]}, "image_grid_thw[0], (1, 4, 6): expected 6 ~, found 0; in all, expected 6"),
        ([[1, *XXX * 2, *X]], {"image": [SIX]}, "input_ids[0, 7]: expected no ~ after the 6 ~, found 1 more."),
        ([[*XXX * 2, 1, *X]], {"image": [SIX]}, "input_ids[0, 7]: expected no ~ after the 6 ~, found 1 more."),
        ([[*XXX * 4]], {"image": [SIX] * 3}, "image_grid_thw[2], ~ found 0; in all, expected 18, found 12"),
        # As many as there should be, but in another order, cut in two, or across the border of two sequences.
        (
            [[*XXX * 2, 1, *XXX * 2, 2, *XXX]],
            {"image": [SIX, NINE]},
            "[1], (1, 6, 6): expected 9 ~ found 6 at ~[0, 7];",
        ),
        ([[*XXX * 3, 1, *XXX * 2]], {"image": [SIX, NINE]}, "[1], (1, 6, 6): expected 9 ~ found 3 at input_ids[0, 6];"),
        ([[*XX, 1, *XX, *XX]], {"image": [SIX]}, "[0], (1, 4, 6): expected 6 ~ found 2 at input_ids[0, 0];"),
        ([[1, 2, *XXX], [*XXX, 1, 2]], {"image": [SIX]}, "[0], (1, 4, 6): expected 6 ~ found 3 at input_ids[0, 2];"),
        (
            [[1, *XXX * 2]],
            {"image": [SIX], "cu": [0, 3, 7]},
            "[0], (1, 4, 6): expected 6 ~ found 2 at input_ids[0, 1];",
        ),
        (
            [[*V * 2, 1, *V * 6]],
            {"video": [(2, 4, 4)]},
            "video_grid_thw[0], (2, 4, 4): expected 4 ~ found 2 at ~[0, 0];",
        ),
        ([[1, *XXX]], {"image": [(1, 4, 5)]}, "image_grid_thw[0]: expected ~ multiples of 2, found (1, 4, 5)."),
        ([[1, *X]], {"image": [(1, 2, 2), (0, 2, 2)]}, "image_grid_thw[1]: expected ~, found (0, 2, 2)."),
        ([[1, *X]], {"image": [(0, 2, 2), (1, 2, 2)]}, "image_grid_thw[0]: expected ~, found (0, 2, 2)."),
        ([[1, *X]], {"image": [(1, 2, 2)], "mask": [[1, 0]]}, "input_ids[0, 1]: ~ where attention_mask is 0, found 1."),
    ],
)
def test_what_does_not_fit(ids: list[list[int]], arguments: dict[str, Any], message: str) -> None:
    length = max(map(len, ids))
    names = {"image": "image_grid_thw", "video": "video_grid_thw", "mask": "attention_mask_BS", "cu": "cu_seqlens"}
    tensors: dict[str, Any] = {names[name]: torch.tensor(value) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=re.escape(message).replace("\\~", ".*").replace("~", ".*")):
        index_of(torch.tensor([row + [PAD] * (length - len(row)) for row in ids]), **tensors)


@settings(max_examples=80)
@given(rows=row_lists, pick=st.randoms(use_true_random=False))
def test_one_token_more_or_less_is_seen(rows: list[Row], pick: random.Random) -> None:
    """In a prompt that fits, any visual token made a word, and any word made a visual token."""
    ids, mask = padded([TOKENS.of(row, marked=False) for row in rows], ["right"] * len(rows), PAD)
    index_of(ids, attention_mask_BS=mask, **grids_of(rows, 2))
    place = pick.choice(mask.nonzero().tolist())
    at = tuple(place)
    ids[at] = 9 if ids[at] in (IMAGE, VIDEO) else pick.choice([IMAGE, VIDEO])
    with pytest.raises(ValueError, match="expected"):
        index_of(ids, attention_mask_BS=mask, **grids_of(rows, 2))
