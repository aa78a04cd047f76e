"""Logits in the checkpoint's own layout, in as many processes: the same numbers as in one, and the same answer."""

import json
import re
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from broken import ITERATION, QUICK, copied
from launcher import torchrun
from models.parallel import run_ranks
from models.planted import lively_checkpoint
from qwen3vl_convert import Dims, ParallelLayout, UsageError, hf_to_megatron
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.model import MegatronModel, open_megatron
from qwen3vl_convert.verify.verification import LogitsOptions
from verify import parallel_rank
from verify.parallel_rank import DIFFERENT, Found, Job
from verify.weight_faults import changed_run

pytestmark = pytest.mark.megatron

# As many layers as deepstack features on the first stage; a vocabulary that two ranks can share only when it is padded.
DENSE = replace(SIZES["tiny"], vision_depth=2, deepstack=(1,), vocab=505)
MOE = replace(DENSE, model_type="qwen3_vl_moe", experts=4, expert_ffn=48, top_k=2, layers=2, vocab=506)
MODELS: dict[str, Dims] = {"dense": DENSE, "tied": replace(DENSE, tied=True), "moe": MOE}


@dataclass(frozen=True)
class Run:
    """A model, the layout that its checkpoint is written in, and how many processes there are if not as many."""

    model: str
    layout: ParallelLayout
    size: int | None = None
    dtype: str = "fp32"

    @property
    def processes(self) -> int:
        return self.size or self.layout.world


RUNS = {
    "tp2 pp2": Run("tied", ParallelLayout(tp=2, pp=2)),
    "tp2 ep2": Run("moe", ParallelLayout(tp=2, ep=2)),
    "ep2 pp2": Run("moe", ParallelLayout(ep=2, pp=2)),
    "ep2 pp2 bf16": Run("moe", ParallelLayout(ep=2, pp=2), dtype="bf16"),
    "pp2 vpp2": Run("tied", ParallelLayout(pp=2, vpp=2)),
    "pp2 uneven": Run("dense", ParallelLayout(pp=2, first_stage_layers=3)),
    "tp2, two replicas": Run("dense", ParallelLayout(tp=2), size=4),
}
QUICK_RUNS = ("tp2 pp2", "tp2 ep2")


@dataclass(frozen=True)
class Checkpoints:
    """Both formats of the models, made when first asked for. Weights are lively: every fault shows."""

    root: Path

    def huggingface(self, model: str) -> Path:
        folder = self.root / model
        return folder if folder.exists() else lively_checkpoint(folder, MODELS[model])

    def megatron(self, model: str, layout: ParallelLayout) -> Path:
        folder = self.root / f"{model} {layout} {layout.first_stage_layers}"
        if not folder.exists():
            padded = -(-MODELS[model].vocab // 2) * 2 + 2
            hf_to_megatron(self.huggingface(model), folder, layout=layout, padded_vocab_size=padded, run=QUICK)
        return folder

    def job(self, run: Run, **settings: Any) -> Job:
        options = LogitsOptions(device="cpu", dtype=run.dtype)
        return Job(self.huggingface(run.model), self.megatron(run.model, run.layout), options=options, **settings)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("parallel"))


Alone = Callable[[str, str], Found]


@pytest.fixture(scope="module")
def alone(checkpoints: Checkpoints) -> Alone:
    """What one process finds for a (model, dtype)."""

    @cache
    def found(model: str, dtype: str) -> Found:
        job = checkpoints.job(Run(model, ParallelLayout(), dtype=dtype))
        (result,) = run_ranks(None, parallel_rank.alone, job)
        assert isinstance(result, Found)
        return result

    return found


def started(function: Callable[..., Any], job: Job, size: int, *arguments: Any) -> list[Any]:
    """What the function returned in each of the processes, which meet at a port as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_ranks(None, function, replace(job, port=port), *arguments, size=size)


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one.double() - other.double()).abs().max())


# ---- the same as in one process --------------------------------------------------------------------------------------


@pytest.mark.transformers
@pytest.mark.parametrize(
    "name", [name if name in QUICK_RUNS else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_same_as_in_one_process(name: str, checkpoints: Checkpoints, alone: Alone) -> None:
    run = RUNS[name]
    expected = alone(run.model, run.dtype)
    first, *others = started(parallel_rank.in_parallel, checkpoints.job(run), run.processes)
    report = first.report
    assert report.equal
    assert report.place is None
    assert (report.mode, report.points, report.dtype) == ("parallel", (), run.dtype)
    assert any(f"{run.processes} processes as {run.layout}" in note for note in report.notes)
    assert all(other.report == report and not other.logits for other in others)
    assert [one.name for one in report.prompts] == [one.name for one in expected.report.prompts]
    for result, found, logits in zip(report.prompts, first.logits, expected.logits, strict=True):
        for theirs in (0, 1):
            assert found[theirs].dtype == logits[theirs].dtype
            assert apart(found[theirs], logits[theirs]) == 0.0  # transformers' model, layer by layer and as a whole
        exact = 1e-12 if run.dtype == "fp32" else 1e-4
        assert apart(found[2], logits[2]) <= exact * float(logits[2].abs().max())
        assert apart(found[3], logits[3]) <= 2 * result.allowed


@pytest.mark.slow
def test_each_process_holds_a_part_of_the_experts(checkpoints: Checkpoints) -> None:
    """Or this file shows nothing."""
    parts = started(parallel_rank.held, checkpoints.job(RUNS["tp2 ep2"]), 2)
    assert [part["language_model.embedding.word_embeddings.weight"] for part in parts] == [(254, 64)] * 2
    assert [part["language_model.decoder.layers.0.self_attention.linear_proj.weight"] for part in parts] == [
        (64, 32)
    ] * 2
    experts = [{name for name in part if name.startswith("language_model.decoder.layers.1.mlp.exp")} for part in parts]
    assert [len(names) for names in experts] == [2 * 2] * 2  # two of four, in two matrices each


@pytest.mark.slow
def test_each_process_holds_a_part_of_the_layers(checkpoints: Checkpoints) -> None:
    """Tied embeddings are on the first stage and on the last, and while there are none yet none are sent."""
    parts = started(parallel_rank.held, checkpoints.job(RUNS["tp2 pp2"]), 4)
    tables = ["language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"]
    found = [[name for name in part if part[name] == (254, 64)] for part in parts]
    assert found == [tables[:1], tables[:1], tables[1:], tables[1:]]
    assert [any(name.startswith("vision_model.") for name in part) for part in parts] == [True, True, False, False]


# ---- faults of the checkpoint ----------------------------------------------------------------------------------------


def one_shard_twice(weight: Tensor) -> None:
    """[layers, h, inputs]: what the second tensor parallel rank has is what the first has."""
    half = weight.shape[-1] // 2
    weight[..., half:] = weight[..., :half].clone()


def test_one_shard_twice_is_found(checkpoints: Checkpoints, tmp_path: Path) -> None:
    run = RUNS["tp2 pp2"]
    key = "language_model.decoder.layers.self_attention.linear_proj.weight"
    job = checkpoints.job(run, weights=DIFFERENT)
    job = replace(job, megatron=changed_run(job.megatron, tmp_path / "wrong", key, one_shard_twice))
    for found in started(parallel_rank.in_parallel, job, run.processes):
        assert not found.report.equal
        assert not any(prompt.passed for prompt in found.report.prompts)
        place = found.report.place
        assert (place.point, place.parameters) == (None, ())
        for said in ("without torchrun", "lm_head.weight (planted)", "rms_eps (run_config.yaml: model)"):
            assert said in place.text


def test_what_the_run_config_says_is_run(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Weights are right, and a trainer would go on with another rotary base."""
    run = RUNS["tp2 ep2"]
    job = checkpoints.job(run)
    copied(job.megatron, tmp_path / "wrong")
    change_model(tmp_path / "wrong", rotary_base=10_000)
    first, *_ = started(parallel_rank.in_parallel, replace(job, megatron=tmp_path / "wrong"), run.processes)
    assert not first.report.equal
    assert "torchrun" in first.report.place.text


def change_model(megatron: Path, **settings: Any) -> None:
    """Other settings in run_config.yaml; None takes one out."""
    path = megatron / ITERATION / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    model = config["model"] | settings
    config["model"] = {name: value for name, value in model.items() if value is not None}
    path.write_text(yaml.safe_dump(config))


# ---- faults of the run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "expected"), [(2, 4), (3, 4), (1, 4)])
def test_wrong_number_of_processes(size: int, expected: int, checkpoints: Checkpoints) -> None:
    for kind, text in started(parallel_rank.raised, checkpoints.job(RUNS["tp2 pp2"]), size):
        assert kind == "UsageError"
        assert f"written as TP2 PP2, expected {expected} processes or a multiple, found {size}" in text
        assert f"--nproc-per-node {expected}" in text


def test_streaming_is_for_one_process(checkpoints: Checkpoints) -> None:
    job = replace(checkpoints.job(RUNS["tp2 ep2"]), options=LogitsOptions(device="cpu", stream=True))
    for kind, text in started(parallel_rank.raised, job, 2):
        assert (kind, text[:8]) == ("UsageError", "--stream")


def test_a_layout_that_the_model_cannot_be_run_in(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Three features enter after the first layers, and the first stage has two: of such a checkpoint the weights are
    right.
    """
    dims = replace(DENSE, vision_depth=3, deepstack=(0, 1, 2))
    layout = ParallelLayout(pp=2)
    lively_checkpoint(tmp_path / "hf", dims)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", layout=layout, run=QUICK)
    for kind, text in started(parallel_rank.raised, Job(tmp_path / "hf", tmp_path / "megatron"), 2):
        assert kind == "UsageError"
        assert re.search(r"written as PP2, in which .* 2 text layers.* without torchrun", text)


@pytest.mark.slow
@pytest.mark.parametrize("where", [0, 3])
def test_what_one_cannot_read_is_raised_in_all(where: int, checkpoints: Checkpoints) -> None:
    found = started(parallel_rank.cannot_read, checkpoints.job(RUNS["tp2 pp2"]), 4, where)
    told = "a planted fault"
    expected = [("CorruptFile", told if rank == where else f"rank {where}: {told}") for rank in range(4)]
    assert found == expected


@pytest.mark.slow
def test_what_fails_in_transformers_is_raised_in_all(checkpoints: Checkpoints) -> None:
    found = started(parallel_rank.cannot_run_theirs, checkpoints.job(RUNS["tp2 ep2"]), 2, 0)
    assert found == [("CorruptFile", "a planted fault"), ("CorruptFile", "rank 0: a planted fault")]


# ---- the layout of a checkpoint --------------------------------------------------------------------------------------


def opened(checkpoints: Checkpoints, run: Run, target: Path, **settings: Any) -> MegatronModel:
    """A copy of a checkpoint that says other things of its run."""
    copied(checkpoints.megatron(run.model, run.layout), target)
    change_model(target, **settings)
    return open_megatron(target)


@pytest.mark.parametrize("name", RUNS)
def test_layout_is_the_one_that_was_written(name: str, checkpoints: Checkpoints) -> None:
    from qwen3vl_convert.verify.logits.layout import layout_of

    run = RUNS[name]
    ours = open_megatron(checkpoints.megatron(run.model, run.layout))
    assert layout_of(ours.checkpoint, ours.model) == run.layout


def test_layout_of_what_megatron_lm_wrote(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """There is no run_config.yaml, and its arguments have other names for an uneven pipeline."""
    from qwen3vl_convert.verify.logits.layout import layout_of

    run = RUNS["pp2 uneven"]
    copied(checkpoints.megatron(run.model, run.layout), tmp_path / "lm")
    (tmp_path / "lm" / ITERATION / "run_config.yaml").unlink()
    ours = open_megatron(tmp_path / "lm")
    assert layout_of(ours.checkpoint, ours.model) == run.layout


def test_experts_are_cut_as_all_else_unless_it_is_said(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Megatron-Core's default; and a dense model has none, whatever is said of them."""
    from qwen3vl_convert.verify.logits.layout import layout_of

    unsaid = {"expert_tensor_parallel_size": None, "expert_model_parallel_size": None}
    moe = opened(checkpoints, RUNS["tp2 ep2"], tmp_path / "moe", **unsaid)
    assert layout_of(moe.checkpoint, moe.model) == ParallelLayout(tp=2, etp=2)
    said = {"expert_tensor_parallel_size": 2, "expert_model_parallel_size": 4}
    dense = opened(checkpoints, RUNS["tp2, two replicas"], tmp_path / "dense", **said)
    assert layout_of(dense.checkpoint, dense.model) == ParallelLayout(tp=2)


def test_a_checkpoint_that_does_not_say(checkpoints: Checkpoints, tmp_path: Path) -> None:
    from qwen3vl_convert.verify.logits.layout import layout_of

    ours = opened(checkpoints, RUNS["tp2 ep2"], tmp_path / "quiet", tensor_model_parallel_size=None)
    with pytest.raises(UsageError, match=r"expected the layout .* found it in neither\. Run it without torchrun"):
        layout_of(ours.checkpoint, ours.model)


@pytest.mark.parametrize("size", [3, -2, "two", 2.0])
def test_a_layout_that_cannot_be(size: Any, checkpoints: Checkpoints, tmp_path: Path) -> None:
    from qwen3vl_convert.verify.logits.layout import layout_of

    ours = opened(checkpoints, RUNS["tp2 ep2"], tmp_path / "odd", tensor_model_parallel_size=size)
    with pytest.raises(UsageError, match=re.escape(f"written with tp={size!r}")):
        layout_of(ours.checkpoint, ours.model)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3vl_convert.verify.logits import layout

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for processes in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        layout.check_gpus()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="found 3 processes and 2 GPUs"):
        layout.check_gpus()


# ---- torchrun --------------------------------------------------------------------------------------------------------


LAUNCHED = RUNS["pp2 uneven"]


def under_torchrun(job: Job, *arguments: str) -> "subprocess.CompletedProcess[str]":
    program = ("-m", "verify.parallel_rank", str(job.huggingface), str(job.megatron), *arguments)
    return torchrun(*program, processes=LAUNCHED.processes)


@pytest.mark.slow
def test_under_torchrun(checkpoints: Checkpoints) -> None:
    done = under_torchrun(checkpoints.job(LAUNCHED))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"]
    assert found["mode"] == "parallel"
    assert "2 processes as PP2" in found["notes"][-1]


@pytest.mark.slow
def test_nobody_waits_for_a_process_that_failed_in_the_pipeline(checkpoints: Checkpoints) -> None:
    """It ends, and torchrun ends the first stage, which has asked for its logits."""
    done = under_torchrun(checkpoints.job(LAUNCHED), "1")
    assert done.returncode == 1
    assert "CorruptFile: a planted fault" in done.stderr
    assert not done.stdout
