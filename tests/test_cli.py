"""The command line: results on stdout and nothing else there, talk on stderr, exit codes, no import that can wait."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from broken import (
    DENSE,
    MOE,
    QUICK,
    command,
    command_line,
    contents,
    copied,
    edit_tensors,
    make,
    user_environment,
    zeros,
)
from qwen3vl_convert import Explanation, Inspection, ParallelLayout, explain, hf_to_megatron
from qwen3vl_convert.cli import console
from qwen3vl_convert.cli.app import app, main
from qwen3vl_convert.cli.options import parse_bytes, parse_iteration
from qwen3vl_convert.convert import Result
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.make import SIZES as MODELS
from qwen3vl_convert.verify import Verification, WeightsReport

COMMANDS = (
    "hf-to-megatron",
    "megatron-to-hf",
    "plan",
    "verify",
    "diff",
    "roundtrip",
    "inspect",
    "explain",
    "make-checkpoint",
)
SINGLE = "model.safetensors"
QKV = "language_model.decoder.layers.1.self_attention.linear_qkv.weight"
Q_PROJ = "model.language_model.layers.1.self_attn.q_proj.weight"


class Pair(NamedTuple):
    """The same models in both formats."""

    dense: Path
    moe: Path
    dense_run: Path
    moe_run: Path


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    at = tmp_path_factory.mktemp("pair")
    found = Pair(make(at / "dense", DENSE), make(at / "moe", MOE), at / "dense_run", at / "moe_run")
    hf_to_megatron(found.dense, found.dense_run, run=QUICK)
    hf_to_megatron(found.moe, found.moe_run, run=QUICK)
    before = contents(at)
    yield found
    assert contents(at) == before, "a command changed its source"


def invoke(*arguments: object) -> Any:
    """Exit code, stdout and stderr of a command, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --------------------------------------------------------------------------------------------------------- imports

IMPORTS = """
import sys
from qwen3vl_convert.cli.app import main
try:
    main()
finally:
    sys.stderr.write("\\nimported " + " ".join({name.partition(".")[0] for name in sys.modules}))
"""
HEAVY = {"torch", "numpy", "transformers", "megatron", "safetensors", "huggingface_hub", "yaml", "isal"}


def imported(*arguments: object) -> set[str]:
    """The top-level modules that a command has imported when it ends well."""
    run = command(*arguments, program=IMPORTS)
    assert run.returncode == 0, run.stderr
    return set(run.stderr.rpartition("imported ")[2].split())


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_imports_nothing_that_takes_long(name: str) -> None:
    assert not imported(*name.split(), "--help") & HEAVY


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help(name: str) -> None:
    for flag in ("--help", "-h"):
        result = invoke(*name.split(), flag)
        assert result.exit_code == 0
        assert "Usage: " in result.stdout
        assert result.stderr == ""
    shown = " ".join(result.stdout.split())
    assert all(command_name in shown for command_name in (COMMANDS if not name else ("--json",)))


def test_bytes_are_moved_without_frameworks(pair: Pair, tmp_path: Path) -> None:
    """torch, megatron and transformers are for models, the Hub's library is for the Hub."""
    frameworks = {"torch", "transformers", "megatron", "huggingface_hub"}
    assert not imported("hf-to-megatron", pair.moe, tmp_path / "run", "--ep", 2, "--no-fsync") & frameworks
    assert not imported("megatron-to-hf", tmp_path / "run", tmp_path / "back", "--no-fsync") & frameworks
    assert not imported("verify", tmp_path / "back", tmp_path / "run") & frameworks
    assert not imported("inspect", tmp_path / "run") & frameworks
    assert not imported("hf-to-megatron", pair.dense, tmp_path / "fp16", "--dtype", "fp16", "--no-fsync") & frameworks


# ------------------------------------------------------------------------------------------------------ one object


def json_of(*arguments: object, code: int = 0) -> dict[str, Any]:
    """What a command prints with --json: one object and nothing else."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == code, result.output
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def names_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def test_json_of_conversions(pair: Pair, tmp_path: Path) -> None:
    there = json_of("hf-to-megatron", pair.dense, tmp_path / "run", "--tp", 2)
    back = json_of("megatron-to-hf", tmp_path / "run", tmp_path / "back")
    assert there.keys() == back.keys() == names_of(Result)
    assert (there["direction"], back["direction"]) == ("hf-to-megatron", "megatron-to-hf")
    assert there["options"]["layout"] == {"tp": 2, "pp": 1, "vpp": None, "ep": 1, "etp": 1} | {
        "first_stage_layers": None,
        "last_stage_layers": None,
    }
    assert there["target"] == str(tmp_path / "run")
    for result, folder in ((there, tmp_path / "run"), (back, tmp_path / "back")):
        assert not result["dry_run"]
        assert result["model"] == "qwen3_vl"
        assert result["dtype"] == "bfloat16"
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        assert {name: sizes[name] for name in result["files"]} == result["files"]
        assert {name for name in sizes if "qwen3vl_convert.json" not in name} == set(result["files"])
        assert {"plan", "fill", "check", "publish"} <= result["seconds"].keys()


def test_json_of_plans(pair: Pair, tmp_path: Path) -> None:
    planned = json_of("plan", pair.dense, tmp_path / "run", "--tp", 2)
    dry = json_of("hf-to-megatron", pair.dense, tmp_path / "run", "--tp", 2, "--dry-run")
    assert planned.keys() == dry.keys() == names_of(Result)
    assert planned["dry_run"]
    assert dry["dry_run"]
    done = json_of("hf-to-megatron", pair.dense, tmp_path / "run", "--tp", 2)
    for name in ("files", "tensors", "data_bytes", "total_bytes", "buffer_bytes", "options"):
        assert planned[name] == dry[name] == done[name]
    back = json_of("plan", pair.dense_run, tmp_path / "back")
    assert back["direction"] == "megatron-to-hf"


def test_json_of_verify(pair: Pair) -> None:
    found = json_of("verify", pair.dense, pair.dense_run)
    assert found.keys() == {"equal"} | names_of(Verification)
    assert found["weights"].keys() == names_of(WeightsReport)
    assert json_of("verify", pair.moe, pair.moe_run)["equal"] is True


@pytest.mark.parametrize("name", Pair._fields)
def test_json_of_inspect(name: str, pair: Pair) -> None:
    found = json_of("inspect", getattr(pair, name))
    assert found.keys() == names_of(Inspection)
    assert found["dims"].keys() == names_of(Dims)
    assert found["complete"]
    assert found["problem"] is None
    assert found["format"] == ("megatron torch_dist" if name.endswith("run") else "huggingface")
    assert found["model"] == ("qwen3_vl_moe" if name.startswith("moe") else "qwen3_vl")


def test_json_of_explain() -> None:
    found = json_of("explain", QKV, "--tp", 2, "--rank", 1)
    assert found.keys() == names_of(Explanation)
    assert found["rank"] == 1
    assert [part["hf"].split(".")[-2] for part in found["slices"]] == ["q_proj", "k_proj", "v_proj"]


def test_json_of_make_checkpoint(tmp_path: Path) -> None:
    made = json_of("make-checkpoint", tmp_path / "made", "--layers", 1)
    assert made.keys() == {"target", "nbytes", "dims"}
    assert made["nbytes"] == sum(path.stat().st_size for path in (tmp_path / "made").iterdir())
    assert made["dims"]["layers"] == 1


def test_stdout_has_the_object_alone_in_a_real_process(pair: Pair, tmp_path: Path) -> None:
    run = command("hf-to-megatron", pair.moe, tmp_path / "run", "--pp", 2, "--json", "--no-fsync")
    assert run.returncode == 0
    assert json.loads(run.stdout)["notes"] != []
    assert run.stdout.startswith("{\n")
    assert run.stdout.endswith("\n}\n")
    assert run.stderr == ""


# ----------------------------------------------------------------------------------------- quiet, progress, writing


def test_quiet(pair: Pair, tmp_path: Path) -> None:
    for arguments in (
        ("hf-to-megatron", pair.moe, tmp_path / "run", "--pp", 2, "--no-fsync"),
        ("megatron-to-hf", tmp_path / "run", tmp_path / "back", "--no-fsync"),
        ("verify", tmp_path / "back", tmp_path / "run"),
        ("make-checkpoint", tmp_path / "made"),
    ):
        run = command(*arguments, "--quiet")
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["hf-to-megatron", "verify"])
def test_quiet_work_that_takes_long(name: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_LINE_EVERY", 0.0)
    second = tmp_path / "run" if name == "hf-to-megatron" else pair.dense_run
    assert invoke(name, pair.dense, second, "--quiet").output == ""


def test_quiet_errors_are_said(pair: Pair, tmp_path: Path) -> None:
    run = command("hf-to-megatron", pair.dense, tmp_path / "run", "--tp", 3, "--quiet")
    assert run.returncode == 2
    assert run.stderr.startswith("error: --tp 3")


def test_progress_goes_to_stderr(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_LINE_EVERY", 0.0)
    result = invoke("hf-to-megatron", pair.dense, tmp_path / "run", "--json")
    assert json.loads(result.stdout)["data_bytes"] > 0
    lines = result.stderr.splitlines()
    assert any(line.startswith("fill: 100 % of") for line in lines)
    assert any(line.startswith("check: 100 % of") for line in lines)


def test_progress_on_a_terminal(pair: Pair, tmp_path: Path) -> None:
    """A bar, on stderr, while stdout is a file."""
    ours, theirs = pty.openpty()
    line = command_line("hf-to-megatron", pair.dense, tmp_path / "run", "--json", "--no-fsync")
    run = subprocess.run(line, stdout=subprocess.PIPE, stderr=theirs, text=True, env=user_environment())
    os.close(theirs)
    shown = b""
    while chunk := _read_terminal(ours):
        shown += chunk
    os.close(ours)
    assert run.returncode == 0
    assert json.loads(run.stdout)["dry_run"] is False
    assert b"fill" in shown
    assert b"check" in shown


def _read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # how Linux says that the other end is closed
        return b""


@pytest.mark.parametrize("arguments", [("plan",), ("hf-to-megatron", "--dry-run")], ids=" ".join)
def test_plans_write_nothing(
    arguments: tuple[str, ...], pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *rest = arguments
    result = invoke(name, pair.moe, "deep/target", *rest, "--ep", 4, "--etp", 2)
    assert result.exit_code == 0
    assert "__7_0.distcp" in result.stdout
    assert "a plan; nothing was written" in result.stdout
    assert list(tmp_path.iterdir()) == []
    back = invoke("plan" if name == "plan" else "megatron-to-hf", pair.moe_run, "target", *rest)
    assert back.exit_code == 0
    assert SINGLE in back.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_plan_does_not_mind_an_existing_target(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"")
    assert invoke("plan", pair.dense, tmp_path).exit_code == 0
    assert invoke("hf-to-megatron", pair.dense, tmp_path, "--dry-run").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_plan_names_the_problems(pair: Pair, tmp_path: Path) -> None:
    folder = copied(pair.dense, tmp_path / "source")
    edit_tensors(lambda tensors: tensors.pop(Q_PROJ))(folder)
    result = invoke("plan", folder)
    assert result.exit_code == 3
    assert Q_PROJ in result.stderr


# ------------------------------------------------------------------------------------------------------- exit codes


def test_exit_codes(pair: Pair, tmp_path: Path) -> None:
    other = copied(pair.dense, tmp_path / "other")
    edit_tensors(lambda tensors: tensors.update({Q_PROJ: zeros("BF16", 32, 32)}))(other)
    assert invoke("verify", pair.dense, pair.dense_run).exit_code == 0
    different = invoke("verify", other, pair.dense_run)
    assert different.exit_code == 1
    assert Q_PROJ in different.stdout
    assert invoke("verify", pair.dense).exit_code == 2
    assert invoke("no-such-command").exit_code == 2
    assert invoke("hf-to-megatron", tmp_path / "nowhere", tmp_path / "t").exit_code == 3
    assert invoke("verify", pair.dense, pair.moe_run).exit_code == 3
    existing = invoke("hf-to-megatron", pair.dense, other)
    assert existing.exit_code == 4
    assert "--overwrite" in existing.stderr
    assert invoke("make-checkpoint", other).exit_code == 4


def test_json_of_a_difference(pair: Pair, tmp_path: Path) -> None:
    other = copied(pair.dense, tmp_path / "other")
    edit_tensors(lambda tensors: tensors.update({Q_PROJ: zeros("BF16", 32, 32)}))(other)
    verdict = json_of("verify", other, pair.dense_run, code=1)
    assert verdict["equal"] is False
    assert [difference["name"] for difference in verdict["weights"]["differences"]] == [Q_PROJ]


def test_inspect_of_something_incomplete(pair: Pair, tmp_path: Path) -> None:
    folder = copied(pair.dense, tmp_path / "source")
    edit_tensors(lambda tensors: tensors.pop(Q_PROJ))(folder)
    found = json_of("inspect", folder, code=3)
    assert found["complete"] is False
    assert Q_PROJ in found["problem"]
    human = invoke("inspect", folder)
    assert human.exit_code == 3
    assert "NO: " in human.stdout


TRACEBACKS = [("--traceback", "plan"), ("plan", "--traceback")]


@pytest.mark.parametrize("words", TRACEBACKS, ids=" ".join)
def test_traceback(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At any place; the exit code stays what it is without."""
    monkeypatch.setattr(sys, "argv", ["qwen3vl-convert", *words, str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 3
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert "ConfigError" in said or "MissingTensors" in said
    monkeypatch.setattr(sys, "argv", ["qwen3vl-convert", "plan", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 3
    assert "Traceback" not in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- inspect and explain


def test_inspect_for_people(pair: Pair) -> None:
    shown = " ".join(invoke("inspect", pair.moe).stdout.split())
    assert "huggingface; names: hub, experts: hub" in shown
    assert "complete yes" in shown
    shown = " ".join(invoke("inspect", pair.moe_run).stdout.split())
    assert "megatron torch_dist; keys: stacked" in shown
    assert "written with TP1 PP1 EP1 ETP1" in shown
    assert invoke("inspect", pair.moe_run / "iter_0000000").exit_code == 0
    assert invoke("inspect", pair.moe_run, "--iteration", 3).exit_code == 3


EXPLANATIONS: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "QKV": ((QKV,), ("QKVMapping", "(kv * d) h", "l (kv * d) h", "kv = 8")),
    "from the other side": ((Q_PROJ,), ("QKVMapping", "(kv g d) h")),
    "a size": ((Q_PROJ, "--model", "2B"), ("h = 2048",)),
    "gate": (("model.language_model.layers.0.mlp.gate_proj.weight",), ("GatedMLPMapping", "(* f) h")),
    "experts": (
        ("model.language_model.layers.0.mlp.experts.gate_up_proj",),
        ("ExpertMLPGateUpProjMapping", "e h (s i)", "e = 128", "l e (s i) h"),
    ),
    "experts in another layout": (
        ("model.language_model.layers.0.mlp.experts.gate_up_proj", "--experts-layout", "v5"),
        ("e (s i) h",),
    ),
    "router": (("language_model.decoder.layers.3.mlp.router.weight",), ("e h", "mlp.gate.weight")),
    "vision": (
        ("model.visual.blocks.3.attn.qkv.weight",),
        ("ConcatenatedQKVMapping", "vision_model.decoder.layers.{b}.self_attention.linear_qkv.weight"),
    ),
    "the slice of a rank": (
        ("lm_head.weight", "--tp", 4, "--pp", 2, "--rank", 5),
        ("rank 5 of TP4 PP2 holds", "[37984:75968, 0:4096] = lm_head.weight[37984:75968, 0:4096]"),
    ),
    "slices that are no boxes": (
        (QKV, "--tp", 2, "--rank", 1),
        ("[kv 4:8, g 0:4, d 0:128, h 0:4096] = " + Q_PROJ + "[2048:4096, 0:4096]",),
    ),
    "a rank that holds nothing": (("lm_head.weight", "--pp", 2, "--rank", 0), ("nothing of it",)),
}


@pytest.mark.parametrize("case", EXPLANATIONS.values(), ids=EXPLANATIONS.keys())
def test_explain(case: tuple[tuple[object, ...], tuple[str, ...]]) -> None:
    arguments, says = case
    result = invoke("explain", *arguments)
    assert result.exit_code == 0, result.output
    for text in says:
        assert text in result.stdout


def test_the_slices_of_all_ranks_are_the_whole() -> None:
    """Of a tensor that no two ranks hold: each box says as many elements as its axes, and together they are all."""
    dims, layout = MODELS["tiny-moe"], ParallelLayout(tp=2, pp=2, ep=2, etp=2)
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    counted = 0
    for rank in range(layout.world):
        for part in explain(name, dims, layout=layout, rank=rank).slices:
            held = prod(stop - start for start, stop in part.hf_axes.values())
            for box in (part.megatron_box, part.hf_box):
                assert box is None or prod(stop - start for start, stop in box) == held
            counted += held
    assert counted == dims.experts * 2 * dims.expert_ffn * dims.hidden


def test_explain_takes_the_sizes_of_a_folder(pair: Pair) -> None:
    result = invoke("explain", Q_PROJ, "--model", pair.dense)
    assert "h = 32" in result.stdout


UNEXPLAINED: dict[str, tuple[tuple[object, ...], int, str]] = {
    "a misspelling": (("model.language_model.layers.1.self_attn.q_prj.weight",), 3, "Did you mean"),
    "nothing like it": (("foo",), 3, "no mapping claims it"),
    "rank beyond the world": (("lm_head.weight", "--tp", 2, "--rank", 2), 2, "--rank 2"),
    "negative rank": (("lm_head.weight", "--rank", -1), 2, "--rank -1"),
    "model": (("lm_head.weight", "--model", "3b"), 2, "--model 3b"),
    "layout": (("lm_head.weight", "--tp", 7), 2, "--tp 7"),
    "experts-layout": (("model.language_model.layers.0.mlp.experts.down_proj", "--experts-layout", "huh"), 2, "huh"),
}


@pytest.mark.parametrize("case", UNEXPLAINED.values(), ids=UNEXPLAINED.keys())
def test_explain_refuses(case: tuple[tuple[object, ...], int, str]) -> None:
    arguments, code, says = case
    result = invoke("explain", *arguments)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert result.stdout == ""


MADE_WRONG: dict[str, tuple[tuple[object, ...], str]] = {
    "size": (("--size", "7b"), "--size 7b"),
    "dtype": (("--dtype", "int8"), "--dtype int8"),
    "keep": (("--dtype", "keep"), "--dtype keep"),
    "layers": (("--layers", 0), "--layers 0"),
    "experts-layout": (("--size", "tiny-moe", "--experts-layout", "huh"), "huh"),
    "max-shard-size": (("--max-shard-size", "0"), "--max-shard-size"),
}


@pytest.mark.parametrize("case", MADE_WRONG.values(), ids=MADE_WRONG.keys())
def test_make_checkpoint_refuses(case: tuple[tuple[object, ...], str], tmp_path: Path) -> None:
    result = invoke("make-checkpoint", tmp_path / "made", *case[0])
    assert result.exit_code == 2, result.output
    assert case[1] in result.stderr
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ sizes

BYTES = {
    "0": 0,
    "7": 7,
    "7B": 7,
    "7b": 7,
    " 10 GB ": 10 * 10**9,
    "5GB": 5 * 10**9,
    "5G": 5 * 10**9,
    "5gb": 5 * 10**9,
    "2GiB": 2 << 30,
    "2gib": 2 << 30,
    "512MiB": 512 << 20,
    "500kB": 500_000,
    "500K": 500_000,
    "1TiB": 1 << 40,
    "1.5GiB": 3 << 29,
    "0.1kB": 100,
    "9007199254740993": 9007199254740993,
}


@pytest.mark.parametrize(("text", "nbytes"), BYTES.items())
def test_parse_bytes(text: str, nbytes: int) -> None:
    assert parse_bytes(text, "--max-memory") == nbytes


NO_BYTES = [
    "",
    " ",
    "GB",
    "-1",
    "-1GB",
    "1e9",
    "1,5GB",
    "1.GB",
    ".5GB",
    "5PB",
    "5GBB",
    "5iB",
    "5GB5",
    "lots",
    "1 2",
    "0x10",
]


@pytest.mark.parametrize("text", NO_BYTES)
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(UsageError, match=r"--max-memory .*: expected a size such as 5GB or 512MiB"):
        parse_bytes(text, "--max-memory")


@pytest.mark.parametrize(("text", "value"), [(None, None), ("release", "release"), ("0", 0), ("0000012", 12)])
def test_parse_iteration(text: str | None, value: int | str | None) -> None:
    assert parse_iteration(text) == value


@pytest.mark.parametrize("text", ["", "-1", "1.5", "latest", "iter_0000001", "²", "9" * 5000])
def test_parse_iteration_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="--iteration"):
        parse_iteration(text)
