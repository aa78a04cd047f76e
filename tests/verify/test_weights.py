"""`compare_weights`: what is equal, what is measured where it is not, dtypes, padding, heads, settings, memory."""

import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from broken import MOE, edit_json, make, put, stored
from qwen3vl_convert import ParallelLayout, hf_to_megatron, megatron_to_hf
from qwen3vl_convert.errors import InputError, MisshapenTensor, MissingTensors
from qwen3vl_convert.fill import FillOptions
from qwen3vl_convert.model import open_huggingface
from qwen3vl_convert.storage import DTYPES
from qwen3vl_convert.verify.result import ULP_BUCKETS, WeightsReport
from qwen3vl_convert.verify.weights import compare, open_beside, tally
from qwen3vl_convert.verify.weights.bits import encoded, rounded, ulps, values
from reference import load_huggingface
from verify.weight_faults import (
    OUR_TEXT,
    PADDED,
    TEXT,
    Bases,
    changed_folder,
    changed_run,
    compared,
    found,
    guesses,
    run_of_changed,
)

DOWN = f"{TEXT}1.mlp.down_proj.weight"
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
OUR_EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUR_HEAD = "language_model.output_layer.weight"
CONFIG = "iter_0000000/hf/config.json"
INTEGERS = {"bfloat16": torch.int16, "float16": torch.int16, "float32": torch.int32}
UNSIGNED = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


# ----------------------------------------------------------------------------------------------------- what is equal


LAYOUTS = [
    ("dense", ParallelLayout()),
    ("dense", ParallelLayout(pp=3)),
    ("wide", ParallelLayout(tp=4, pp=2)),
    ("tied", ParallelLayout(tp=2)),
    ("moe", ParallelLayout(tp=2, ep=3)),
    ("moe", ParallelLayout(ep=2, etp=2, pp=2)),
    ("square moe", ParallelLayout(ep=2)),
    ("float32", ParallelLayout(pp=3)),
]


@pytest.mark.parametrize(("model", "layout"), LAYOUTS, ids=str)
def test_right_checkpoints_are_equal(model: str, layout: ParallelLayout, bases: Bases) -> None:
    report = compared(bases.huggingface(model), bases.megatron(model, layout, padded_vocab_size=120))
    assert report.equal
    assert report.differences == ()
    assert report.settings == {}
    assert report.tolerated == ""
    assert sum(report.ulps) == 0
    tensors = load_huggingface(bases.huggingface(model))
    assert (report.tensors, report.elements) == (len(tensors), sum(t.numel() for t in tensors.values()))


@pytest.mark.parametrize("experts_layout", ["hub", "v5", "per-expert"])
def test_expert_layouts_are_equal(experts_layout: str, bases: Bases, tmp_path: Path) -> None:
    megatron_to_hf(bases.megatron("moe"), tmp_path / "back", experts_layout=experts_layout)
    assert compared(tmp_path / "back", bases.megatron("moe")).equal


def test_the_same_nans_are_equal(bases: Bases, tmp_path: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN].view(torch.int16)[0, :3] = torch.tensor([0x7FC1, -0x3F, 0x7F80], dtype=torch.int16)

    folder = changed_folder(bases.huggingface("dense"), tmp_path / "source", damage)
    hf_to_megatron(folder, tmp_path / "run")
    assert compared(folder, tmp_path / "run").equal


def test_nans_of_another_payload_differ(bases: Bases, tmp_path: Path) -> None:
    def damage(payload: int):
        return lambda tensors: tensors[DOWN].view(torch.int16)[0, :1].fill_(payload)

    folder = changed_folder(bases.huggingface("dense"), tmp_path / "source", damage(0x7FC1))
    run = run_of_changed(bases.huggingface("dense"), tmp_path, damage(0x7FC2))
    assert found(compared(folder, run))[DOWN].count == 1


def test_zeros_of_another_sign_differ(bases: Bases, tmp_path: Path) -> None:
    folder = changed_folder(bases.huggingface("dense"), tmp_path / "source", lambda t: t[DOWN][2, 3:5].fill_(0.0))
    run = run_of_changed(bases.huggingface("dense"), tmp_path, lambda t: t[DOWN][2, 3:5].fill_(-0.0))
    difference = found(compared(folder, run))[DOWN]
    assert (difference.count, difference.first, difference.max_abs, difference.max_ulp) == (2, (2, 3), 0.0, 1)


# ----------------------------------------------------------------------------------------------- how much is different


@pytest.mark.parametrize("model", ["dense", "float32"])
def test_what_is_measured(model: str, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same computed by torch on whole tensors; blocks of a few rows each."""
    monkeypatch.setattr(tally, "BLOCK", 100)

    def train(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN][5:30, 7:] *= 1.01
        tensors[DOWN][17, 3] = 3.0

    folder = bases.huggingface(model)
    run = run_of_changed(folder, tmp_path, train)
    report = compared(folder, run, options=FillOptions(workers=1, max_memory=1 << 20))
    a, b = (load_huggingface(path)[DOWN] for path in (folder, tmp_path / "changed"))
    (difference,) = report.differences
    assert difference.name == DOWN
    assert difference.megatron_name == f"{OUR_TEXT}mlp.linear_fc2.weight"
    assert difference.shape == tuple(a.shape)
    assert difference.count == int((a != b).sum())
    assert difference.first == tuple((a != b).nonzero()[0].tolist())
    assert difference.max_abs == float((a.double() - b.double()).abs().max())
    cosine = torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0)
    assert difference.cosine == pytest.approx(float(cosine), rel=1e-12)
    integers = (a.view(INTEGERS[str(a.dtype)[6:]]).long() - b.view(INTEGERS[str(a.dtype)[6:]]).long()).abs()
    same_sign = torch.signbit(a) == torch.signbit(b)
    assert same_sign.all() or a[17, 3] < 0
    assert difference.max_ulp >= int(integers[same_sign].max())
    assert sum(report.ulps) == difference.count
    assert len(report.ulps) == len(ULP_BUCKETS)


def test_buckets_of_ulps(bases: Bases, tmp_path: Path) -> None:
    steps = [1, 2, 3, 4, 5, 16, 17, 256, 257, 300, 1000, -1, -4, -300]

    def move(tensors: dict[str, Tensor]) -> None:
        bits = tensors[DOWN].view(torch.int16)
        bits[0, : len(steps)] = 0x3F80 + torch.tensor(steps, dtype=torch.int16)

    folder = changed_folder(bases.huggingface("dense"), tmp_path / "source", lambda t: t[DOWN][0].fill_(1.0))
    both = changed_folder(folder, tmp_path / "both", move)
    hf_to_megatron(both, tmp_path / "run")
    report = compared(folder, tmp_path / "run")
    assert dict(zip(ULP_BUCKETS, report.ulps, strict=True)) == {
        "1": 2, "2": 1, "3-4": 3, "5-16": 2, "17-256": 2, "257-65536": 4, "more": 0,
    }  # fmt: skip
    assert found(report)[DOWN].max_ulp == 1000


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(["bfloat16", "float16", "float32"]))
def test_ulps_count_steps_of_nextafter(data: st.DataObject, dtype: str) -> None:
    width = 16 if dtype != "float32" else 32
    bits = data.draw(st.integers(0, 2**width - 1))
    start = torch.tensor(bits - 2**width if bits >= 2 ** (width - 1) else bits, dtype=INTEGERS[dtype])
    number = start.view(getattr(torch, dtype))
    steps = data.draw(st.integers(1, 5))
    towards = torch.tensor(data.draw(st.sampled_from([math.inf, -math.inf])), dtype=number.dtype)
    moved = number
    for _ in range(steps):
        moved = torch.nextafter(moved, towards)
    if not (number.isfinite() and moved.isfinite()):
        return
    raw = [np.array([int(n.view(INTEGERS[dtype])) & (2**width - 1)], UNSIGNED[dtype]) for n in (number, moved)]
    assert int(ulps(raw[0], raw[1], dtype)[0]) == steps


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_ulps_across_zero(dtype: str) -> None:
    sign = 1 << (8 * DTYPES[dtype].itemsize - 1)
    bits = np.array([3, sign | 2, 0, sign | 1], UNSIGNED[dtype])
    assert ulps(bits[:2], bits[2:], dtype).tolist() == [3, 1]
    assert ulps(bits[:1], bits[1:2], dtype).tolist() == [5]
    assert ulps(bits[2:3], np.array([sign], UNSIGNED[dtype]), dtype).tolist() == [1]


# ------------------------------------------------------------------------------------------------------------- dtypes


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), st.sampled_from(["bfloat16", "float16", "float32"])
)
def test_rounding_is_torch_s(patterns: list[int], target: str) -> None:
    wide = np.array(patterns, np.uint32)
    numbers = torch.from_numpy(wide.view(np.int32)).view(torch.float32)
    expected = numbers.to(getattr(torch, target))
    ours = torch.from_numpy(values(rounded(wide, "float32", target), target))
    lost = expected.isinf() & numbers.isfinite()
    assert bool(ours[lost].isnan().all())
    assert torch.equal(ours[~lost].nan_to_num(7.0), expected[~lost].float().nan_to_num(7.0))
    doubles = numbers.double() * 1.1
    twice = torch.from_numpy(values(encoded(doubles.numpy(), "float32"), "float32"))
    assert torch.equal(twice.nan_to_num(7.0), doubles.float().nan_to_num(7.0))


def test_float64_is_rounded_once() -> None:
    """Half way between two bfloat16 in float32, and a little less in float64."""
    below = np.array([1 + 2**-8 - 2**-40, -(1 + 2**-8 - 2**-40), 1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 3 * 2**-8])
    assert encoded(below, "bfloat16").tolist() == [0x3F80, 0xBF80, 0x3F81, 0x3F80, 0x3F82]


CASTS = [("dense", "fp32"), ("dense", "fp16"), ("float32", "bf16"), ("float32", "fp16")]


@pytest.mark.parametrize(("model", "dtype"), CASTS, ids=str)
def test_other_dtypes(model: str, dtype: str, bases: Bases) -> None:
    folder, run = bases.huggingface(model), bases.megatron(model, dtype=dtype)
    refused = compared(folder, run)
    assert len(refused.differences) == refused.tensors
    difference = found(refused)[DOWN]
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    assert difference.dtypes == (str(load_huggingface(folder)[DOWN].dtype)[6:], names[dtype])
    assert "--dtype-tolerant" in difference.guess
    report = compared(folder, run, dtype_tolerant=True)
    assert report.equal
    assert names[dtype] in report.tolerated


def test_other_dtypes_the_other_way_round(bases: Bases, tmp_path: Path) -> None:
    """bfloat16 that was made of float16: rounding the folder's would be another thing."""
    run = bases.megatron("float32", dtype="fp16")
    megatron_to_hf(run, tmp_path / "back", dtype="bf16")
    assert compared(tmp_path / "back", run, dtype_tolerant=True).equal


def test_one_ulp_beside_the_rounding(bases: Bases, tmp_path: Path) -> None:
    def step(stack: Tensor) -> None:
        stack.view(torch.int16)[1, 3, 5] += 1

    base = bases.megatron("float32", dtype="bf16")
    run = changed_run(base, tmp_path / "run", f"{OUR_TEXT}mlp.linear_fc2.weight", step)
    difference = found(compared(bases.huggingface("float32"), run, dtype_tolerant=True))[DOWN]
    assert (difference.count, difference.first, difference.max_ulp, difference.dtypes) == (1, (3, 5), 1, None)
    assert difference.guess == "nowhere more than 1 ULP apart: rounded in another way, only row 3, column 5"


def test_overflow_is_a_difference(bases: Bases, tmp_path: Path) -> None:
    """What no conversion of ours writes: the infinity that rounding gives."""
    folder = bases.huggingface("bright")
    run = run_of_changed(folder, tmp_path, lambda t: t[DOWN].copy_(t[DOWN].half().clamp(-6e4, 6e4)), dtype="fp16")

    def overflow(stack: Tensor) -> None:
        stack[1, 0, 7], stack[1, 5, 2] = math.inf, -math.inf

    damaged = changed_run(run, tmp_path / "damaged", f"{OUR_TEXT}mlp.linear_fc2.weight", overflow)
    report = compared(folder, damaged, dtype_tolerant=True)
    assert guesses(report) == {DOWN: "overflow of float16: 2 infinities, the first at [0, 7]"}
    assert found(report)[DOWN].max_abs == math.inf
    cut = changed_run(
        run,
        tmp_path / "cut",
        f"{OUR_TEXT}mlp.linear_fc2.weight",
        lambda stack: stack[1].masked_fill_(stack[1] > 6e4, 0),
    )
    assert "cut off at the largest float16: 2 of them" in guesses(compared(folder, cut, dtype_tolerant=True))[DOWN]


# -------------------------------------------------------------------------------------------------- padding and heads


def test_padding_of_zeros_is_noted(bases: Bases) -> None:
    report = compared(bases.huggingface("dense"), bases.megatron("dense", padded_vocab_size=PADDED))
    assert report.equal
    for key in (OUR_EMBEDDING, OUR_HEAD):
        assert any(note.startswith(f"{key}: 32 rows") and note.endswith("zeros.") for note in report.notes)


@pytest.mark.parametrize(("key", "name"), [(OUR_EMBEDDING, EMBEDDING), (OUR_HEAD, HEAD)])
def test_padding_that_holds_numbers(key: str, name: str, bases: Bases, tmp_path: Path) -> None:
    base = bases.megatron("dense", padded_vocab_size=PADDED)
    run = changed_run(base, tmp_path / "run", key, lambda table: table[100:, 4:].normal_())
    report = compared(bases.huggingface("dense"), run)
    assert not report.equal
    (difference,) = report.differences
    assert (difference.name, difference.megatron_name, difference.shape) == (name, key, (PADDED, 32))
    assert (difference.count, difference.first) == (28 * 28, (100, 4))
    assert difference.guess.startswith(f"padding not zero: rows 96:128 of {key}")


def test_padding_of_one_row_is_noted(bases: Bases, tmp_path: Path) -> None:
    base = bases.megatron("dense", padded_vocab_size=PADDED)
    run = changed_run(base, tmp_path / "run", OUR_EMBEDDING, lambda table: table[96:].fill_(0.5))
    report = compared(bases.huggingface("dense"), run)
    assert report.equal
    assert any("not zeros" in note for note in report.notes)


def test_padding_and_a_token_are_said_at_once(bases: Bases, tmp_path: Path) -> None:
    base = bases.megatron("dense", padded_vocab_size=PADDED)

    def change(table: Tensor) -> None:
        table[100] = 1.0
        table[7] = 0.0

    run = changed_run(base, tmp_path / "run", OUR_EMBEDDING, change)
    (difference,) = compared(bases.huggingface("dense"), run).differences
    assert difference.guess.startswith("zeros in place of 32 weights, only token 7; padding not zero")


def test_a_head_that_should_be_tied(bases: Bases, tmp_path: Path) -> None:
    base = bases.megatron("tied", padded_vocab_size=PADDED)
    dtype, shape, data = stored(base, OUR_EMBEDDING)
    run = changed_run(base, tmp_path / "run", OUR_EMBEDDING, lambda table: None)
    put(run, OUR_HEAD, dtype, shape, data)
    assert compared(bases.huggingface("tied"), run).equal
    bits = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(shape).clone()
    bits[4] *= 2
    put(run, OUR_HEAD, dtype, shape, bits.view(torch.uint8).numpy().tobytes())
    report = compared(bases.huggingface("tied"), run)
    (difference,) = report.differences
    assert (difference.name, difference.megatron_name, difference.first[0]) == (HEAD, OUR_HEAD, 4)
    assert difference.guess.startswith("tied head not tied")
    put(run, OUR_HEAD, dtype, (shape[1], shape[0]))
    with pytest.raises(MisshapenTensor, match="expected \\(96 rows or more, 32\\)"):
        compared(bases.huggingface("tied"), run)


def test_an_untied_folder_beside_a_tied_run(bases: Bases, tmp_path: Path) -> None:
    """The head of the folder is not in the checkpoint, whose own config says that it need not be."""

    def untied(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING] * 4

    folder = changed_folder(bases.huggingface("tied"), tmp_path / "untied", untied)
    edit_json("config.json", lambda config: _tie(config, False))(folder)
    report = compared(folder, bases.megatron("tied"))
    assert told(report) == {"tied": (False, True)}
    assert list(found(report)) == [HEAD]
    assert found(report)[HEAD].guess.endswith("compared with its embedding; scaled by 0.25")
    same = changed_folder(folder, tmp_path / "same", lambda t: t.update({HEAD: t[EMBEDDING]}))
    alike = compared(same, bases.megatron("tied"))
    assert alike.differences == ()
    assert not alike.equal


def test_a_tied_folder_beside_an_untied_run(bases: Bases, tmp_path: Path) -> None:
    folder = changed_folder(bases.huggingface("dense"), tmp_path / "tied", lambda tensors: tensors.pop(HEAD))
    edit_json("config.json", lambda config: _tie(config, True))(folder)
    report = compared(folder, bases.megatron("dense"))
    assert told(report) == {"tied": (True, False)}
    assert list(found(report)) == [HEAD]


def told(report: WeightsReport) -> dict[str, tuple[Any, Any]]:
    """The settings, without the places where they are stated."""
    return {name.partition(" (")[0]: pair for name, pair in report.settings.items()}


def _tie(config: dict[str, object], tied: bool) -> None:
    config["tie_word_embeddings"] = tied
    text = config["text_config"]
    assert isinstance(text, dict)
    if "tie_word_embeddings" in text:
        text["tie_word_embeddings"] = tied


def test_what_is_missing_is_an_error(bases: Bases, tmp_path: Path) -> None:
    """The folder is untied, and so does the checkpoint's config say."""
    folder = changed_folder(bases.huggingface("dense"), tmp_path / "headless", lambda tensors: tensors.pop(HEAD))
    hf_to_megatron(folder, tmp_path / "run", headless=True)
    with pytest.raises(MissingTensors, match=OUR_HEAD):
        open_beside(open_huggingface(bases.huggingface("dense")), tmp_path / "run")
    with pytest.raises(InputError):
        compared(bases.huggingface("dense"), bases.megatron("moe"))


# ----------------------------------------------------------------------------------------------------------- settings

SETTINGS: dict[str, tuple[dict[str, Any], tuple[Any, Any]]] = {
    "rope_theta": ({"rope_theta": 500000.0}, (5e6, 5e5)),
    "mrope_section": ({"mrope_section": [2, 4, 2]}, ((4, 2, 2), (2, 4, 2))),
    "top_k": ({"num_experts_per_tok": 3}, (2, 3)),
    "rms_eps": ({"rms_norm_eps": 1e-5}, (1e-6, 1e-5)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_text_model(name: str, bases: Bases, tmp_path: Path) -> None:
    changes, pair = SETTINGS[name]
    run = changed_run(bases.megatron("moe"), tmp_path / "run", OUR_EMBEDDING, lambda table: None)

    def change(config: dict[str, Any]) -> None:
        text = config["text_config"]
        for place in (text, *(v for v in text.values() if isinstance(v, dict))):
            place.update({key: value for key, value in changes.items() if key in place})

    edit_json(CONFIG, change)(run)
    report = compared(bases.huggingface("moe"), run)
    assert report.settings == {f"{name} (hf/config.json)": pair}
    assert report.differences == ()
    assert not report.equal


def test_other_settings(bases: Bases, tmp_path: Path) -> None:
    run = changed_run(bases.megatron("moe"), tmp_path / "run", OUR_EMBEDDING, lambda table: None)

    def change(config: dict[str, Any]) -> None:
        config["image_token_id"] = 89
        config["vision_config"]["deepstack_visual_indexes"] = [1, 0]

    edit_json(CONFIG, change)(run)
    report = compared(bases.huggingface("moe"), run)
    assert report.settings == {
        "deepstack (hf/config.json)": ((0, 1), (1, 0)),
        "image_token_id (hf/config.json)": (90, 89),
    }


# ------------------------------------------------------------------------------------------------------ limits, memory


def test_only_the_first_are_guessed_at(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            tensor *= 2

    run = run_of_changed(bases.huggingface("dense"), tmp_path, scale)
    monkeypatch.setattr(compare, "MOST_GUESSES", 5)
    report = compared(bases.huggingface("dense"), run)
    assert len(report.differences) == report.tensors
    assert [d.guess for d in report.differences] == ["scaled by 2"] * 5 + [""] * (report.tensors - 5)
    assert all(d.count and d.max_ulp for d in report.differences)


def test_progress_reaches_its_end(bases: Bases, tmp_path: Path) -> None:
    run = run_of_changed(bases.huggingface("dense"), tmp_path, lambda tensors: tensors[DOWN].mul_(2))
    seen: dict[str, tuple[int, int]] = {}
    compared(bases.huggingface("dense"), run, report=lambda stage, done, total: seen.update({stage: (done, total)}))
    assert seen.keys() == {"compare", "measure"}
    assert all(done == total for done, total in seen.values())


def test_memory_does_not_grow_with_a_stack(tmp_path: Path) -> None:
    """Experts of 24 MiB in one tensor, one of them wrong: never the whole stack in memory."""
    dims = replace(MOE, layers=1, hidden=256, experts=48, expert_ffn=512)
    folder = make(tmp_path / "source", dims)
    name = f"{TEXT}0.mlp.experts.gate_up_proj"
    run = run_of_changed(folder, tmp_path, lambda tensors: tensors[name][37].mul_(4))
    nbytes = load_huggingface(folder)[name].nbytes
    tracemalloc.start()
    report = compared(folder, run, options=FillOptions(workers=2, max_memory=4 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert guesses(report) == {name: "expert 37: scaled by 4"}
    assert nbytes == 24 << 20
    assert peak < 12 << 20, peak
