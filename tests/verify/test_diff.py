"""`diff`: two checkpoints of any formats, against the same said by torch of whole tensors."""

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from broken import DENSE, MOE, copied, edit_json, make
from qwen3vl_convert import ParallelLayout, hf_to_megatron, megatron_to_hf
from qwen3vl_convert.cli import console
from qwen3vl_convert.cli.diff import diff as command
from qwen3vl_convert.errors import InputError, MissingTensors
from qwen3vl_convert.fill import FillOptions
from qwen3vl_convert.verify.diff import DiffReport, diff
from reference import load_huggingface
from verify.weight_faults import OUR_TEXT, TEXT, Bases, changed_folder, changed_run

DOWN = f"{TEXT}1.mlp.down_proj.weight"
NORM = "model.language_model.norm.weight"
EXPERTS = f"{TEXT}1.mlp.experts.gate_up_proj"
HEAD = "lm_head.weight"
CONFIG = "iter_0000000/hf/config.json"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def train(tensors: dict[str, Tensor]) -> None:
    """Two tensors change: the smaller by more."""
    for name in (DOWN, EXPERTS):
        if name in tensors:
            tensors[name][1:4] *= 1.03
    tensors[NORM] += 0.5


def changes(report: DiffReport) -> list[str]:
    return [change.name for change in report.changes]


# -------------------------------------------------------------------------------------------------- equal, in any form


@pytest.mark.parametrize("experts_layout", ["hub", "v5", "per-expert", "scrambled"])
@pytest.mark.parametrize("other", ["hub", "v5", "per-expert", "scrambled"])
def test_expert_layouts_are_one_model(experts_layout: str, other: str, tmp_path: Path) -> None:
    """Made of the same seed by two programs' worth of names: the bits are those of the same Megatron checkpoint."""
    folders = {}
    hub = make(tmp_path / "made", replace(MOE, hidden=32, expert_ffn=20))
    hf_to_megatron(hub, tmp_path / "run")
    for layout in {experts_layout, other}:
        folders[layout] = scrambled(hub, tmp_path / layout) if layout == "scrambled" else tmp_path / layout
        if layout != "scrambled":
            megatron_to_hf(tmp_path / "run", tmp_path / layout, experts_layout=layout)
    report = diff(folders[experts_layout], folders[other])
    assert report.equal
    assert report.tensors == len(load_huggingface(hub))
    assert diff(folders[other], tmp_path / "run").equal


def scrambled(hub: Path, target: Path) -> Path:
    """As transformers 5.0 saved the published layout: each expert's own, cut across the wrong dimension."""
    weights = {}
    for name, tensor in load_huggingface(hub).items():
        if ".experts." not in name:
            weights[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            start = f"{name.rpartition('.')[0]}.{expert}."
            if name.endswith("gate_up_proj"):
                gate, up = matrix.chunk(2)
                weights |= {f"{start}gate_proj.weight": gate, f"{start}up_proj.weight": up}
            else:
                weights[f"{start}down_proj.weight"] = matrix

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        tensors.update(weights)

    return changed_folder(hub, target, change)


@pytest.mark.parametrize("model", ["dense", "tied", "moe"])
def test_formats_and_layouts_are_one_model(model: str, bases: Bases) -> None:
    folder = bases.huggingface(model)
    layout = ParallelLayout(pp=3) if model == "dense" else ParallelLayout(tp=2)
    runs = [bases.megatron(model, layout, padded_vocab_size=120), bases.megatron(model)]
    for a, b in ((folder, folder), (folder, runs[0]), (runs[0], folder), (runs[0], runs[1])):
        report = diff(a, b)
        assert report.equal, report
        assert report.tensors == len(load_huggingface(folder))
        assert report.elements == sum(t.numel() for t in load_huggingface(folder).values())


# ---------------------------------------------------------------------------------------------------------- different


@pytest.mark.parametrize("forms", ["hf hf", "hf megatron", "megatron hf", "megatron megatron"])
@pytest.mark.parametrize("model", ["dense", "moe", "float32"])
def test_what_training_changed(model: str, forms: str, bases: Bases, tmp_path: Path) -> None:
    before = bases.huggingface(model)
    after = changed_folder(before, tmp_path / "after", train)
    a, b = (load_huggingface(path) for path in (before, after))
    sides = {"hf": (before, after)}
    hf_to_megatron(after, tmp_path / "run", layout=ParallelLayout(tp=2) if model == "moe" else None)
    sides["megatron"] = (bases.megatron(model), tmp_path / "run")
    first, second = forms.split()
    report = diff(sides[first][0], sides[second][1], options=FillOptions(workers=1, max_memory=1 << 20))
    assert not report.equal
    expected = [name for name in a if not torch.equal(a[name], b[name])]
    assert len(expected) == 2
    assert sorted(changes(report)) == sorted(expected)
    assert [c.relative for c in report.changes] == sorted((c.relative for c in report.changes), reverse=True)
    for change in report.changes:
        x, y = a[change.name].double(), b[change.name].double()
        assert change.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-12)
        assert change.max_abs == float((y - x).abs().max())
        assert (change.changed, change.elements) == (int((x != y).sum()), x.numel())
        assert change.dtypes == (str(a[change.name].dtype)[6:],) * 2


def test_zeros_of_another_sign_and_nans(bases: Bases, tmp_path: Path) -> None:
    def zero(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN][0, :4] = 0.0
        tensors[DOWN][1, :2] = math.nan

    def negative(tensors: dict[str, Tensor]) -> None:
        zero(tensors)
        tensors[DOWN][0, :3] = -0.0

    one = changed_folder(bases.huggingface("dense"), tmp_path / "one", zero)
    other = changed_folder(bases.huggingface("dense"), tmp_path / "other", negative)
    assert diff(one, one).equal
    (change,) = diff(one, other).changes
    assert (change.changed, change.relative, change.max_abs) == (3, 0.0, 0.0)
    hf_to_megatron(other, tmp_path / "wide", dtype="fp32")
    by_name = {change.name: change for change in diff(one, tmp_path / "wide").changes}
    assert by_name[DOWN].changed == 3
    (change,) = diff(bases.huggingface("dense"), one).changes
    assert change.relative == math.inf
    assert diff(bases.huggingface("dense"), one).to_json()["equal"] is False


def test_dtypes_are_compared_by_value(bases: Bases) -> None:
    """A difference, though not one of weights: every tensor is listed, with nothing changed."""
    report = diff(bases.huggingface("dense"), bases.megatron("dense", dtype="fp32"))
    assert not report.equal
    assert len(report.changes) == report.tensors
    assert all((c.changed, c.relative, c.dtypes) == (0, 0.0, ("bfloat16", "float32")) for c in report.changes)
    rounded = diff(bases.huggingface("float32"), bases.megatron("float32", dtype="bf16"))
    a = load_huggingface(bases.huggingface("float32"))
    for change in rounded.changes:
        assert change.changed == int((a[change.name] != a[change.name].bfloat16().float()).sum())
        assert change.relative < 2**-8


def test_tensors_of_one_side_and_settings(bases: Bases, tmp_path: Path) -> None:
    tied = changed_folder(bases.huggingface("dense"), tmp_path / "tied", lambda tensors: tensors.pop(HEAD))
    edit_json("config.json", lambda config: config.update({"tie_word_embeddings": True}))(tied)
    report = diff(bases.huggingface("dense"), tied)
    assert (report.only_a, report.only_b, report.changes) == ((HEAD,), (), ())
    assert report.settings == {"tied": (False, True)}
    assert diff(tied, bases.megatron("dense")).only_b == (HEAD,)
    headless = changed_folder(bases.huggingface("dense"), tmp_path / "headless", lambda tensors: tensors.pop(HEAD))
    report = diff(headless, bases.huggingface("dense"))
    assert (report.only_a, report.only_b, report.settings) == ((), (HEAD,), {})


def test_settings_of_a_run(bases: Bases, tmp_path: Path) -> None:
    run = copied(bases.megatron("dense"), tmp_path / "run")
    edit_json(CONFIG, lambda config: config.update({"image_token_id": 89}))(run)
    report = diff(run, bases.huggingface("dense"))
    assert report.settings == {"image_token_id": (89, 90)}
    assert not report.equal
    path = run / "iter_0000000/run_config.yaml"
    path.write_text(path.read_text().replace("layernorm_epsilon: 1.0e-06", "layernorm_epsilon: 1.0e-05"))
    report = diff(bases.megatron("dense"), run)
    assert report.settings == {"image_token_id": (90, 89), "rms_eps (as trained)": (1e-6, 1e-5)}


def test_a_run_that_states_no_sizes(bases: Bases, tmp_path: Path) -> None:
    run = copied(bases.megatron("dense"), tmp_path / "run")
    (run / CONFIG).unlink()
    (run / "iter_0000000/run_config.yaml").unlink()
    assert diff(run, bases.huggingface("dense")).equal
    assert diff(bases.huggingface("dense"), run).equal
    with pytest.raises(InputError, match="neither hf/config.json nor"):
        diff(run, run)


def test_iterations_of_one_run(bases: Bases, tmp_path: Path) -> None:
    run = copied(bases.megatron("dense"), tmp_path / "run")
    after = changed_run(
        bases.megatron("dense"), tmp_path / "after", f"{OUR_TEXT}mlp.linear_fc2.weight", lambda stack: stack[1].mul_(2)
    )
    copied(after / "iter_0000000", run / "iter_0000007")
    assert diff(run, run, iteration_a=0, iteration_b=0).equal
    assert changes(diff(run, run, iteration_a=0, iteration_b=7)) == [DOWN]


# --------------------------------------------------------------------------------------------------------------- errors


def test_models_of_different_sizes(bases: Bases, tmp_path: Path) -> None:
    other = make(tmp_path / "other", replace(DENSE, layers=2))
    with pytest.raises(InputError, match=r"different sizes \(layers = 3 and 2, heads = 6 and 4, kv_heads = 3 and 2\)"):
        diff(bases.huggingface("dense"), other)
    with pytest.raises(InputError, match="model_type = qwen3_vl and qwen3_vl_moe"):
        diff(bases.huggingface("dense"), bases.megatron("moe"))


def test_what_is_incomplete(bases: Bases, tmp_path: Path) -> None:
    broken = changed_folder(bases.huggingface("dense"), tmp_path / "broken", lambda tensors: tensors.pop(DOWN))
    with pytest.raises(MissingTensors, match=DOWN):
        diff(bases.huggingface("dense"), broken)


# --------------------------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_a_stack(tmp_path: Path) -> None:
    dims = replace(MOE, layers=1, hidden=256, experts=48, expert_ffn=512)
    folder = make(tmp_path / "source", dims)
    name = f"{TEXT}0.mlp.experts.gate_up_proj"
    after = changed_folder(folder, tmp_path / "after", lambda tensors: tensors[name][37].mul_(4))
    hf_to_megatron(after, tmp_path / "run")
    tracemalloc.start()
    report = diff(folder, tmp_path / "run", options=FillOptions(workers=2, max_memory=4 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert changes(report) == [name]
    assert load_huggingface(folder)[name].nbytes == 24 << 20
    assert peak < 12 << 20, peak


# -------------------------------------------------------------------------------------------------------- command line


def invoke(*arguments: object) -> Result:
    import typer

    app = typer.Typer()
    app.command()(console.guarded(command))
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command(bases: Bases, tmp_path: Path) -> None:
    before, run = bases.huggingface("dense"), bases.megatron("dense")
    equal = invoke(before, run)
    assert (equal.exit_code, equal.stdout.split(":")[0]) == (0, "EQUAL")
    after = changed_folder(before, tmp_path / "after", train)
    different = invoke(run, after)
    assert different.exit_code == 1
    assert "DIFFERENT: 2 of" in different.stdout
    assert different.stdout.index(NORM) < different.stdout.index(DOWN)
    assert DOWN not in invoke(run, after, "--top", 1).stdout
    found = json.loads(invoke(run, after, "--json").stdout)
    assert [change["name"] for change in found["changes"]] == [NORM, DOWN]
    assert found["formats"] == ["megatron", "huggingface"]
    assert (invoke(run, after, "--quiet").stdout, invoke(run, after, "--quiet").exit_code) == ("", 1)
    assert invoke(before, bases.huggingface("moe")).exit_code == 3
    assert invoke(before, tmp_path / "nowhere").exit_code == 3
    assert invoke(before, after, "--top", -1).exit_code == 2
