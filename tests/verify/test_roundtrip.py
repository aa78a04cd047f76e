"""roundtrip --logits from outside: as processes, what they print, and what they find of planted faults."""

import json
import os
import pty
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from broken import QUICK, command, command_line, user_environment
from launcher import TOLD
from models.planted import lively_checkpoint
from qwen3vl_convert import ParallelLayout, hf_to_megatron
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.verify import LogitsOptions, roundtrip, verify
from verify.planting import DENSE, MOE

core = pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.megatron, pytest.mark.transformers, pytest.mark.filterwarnings("ignore")]

CPU = ("--logits", "--device", "cpu")
PROMPTS = ["text", "image", "images", "video", "mixed"]
WRONG_HEADS = """
import sys
from qwen3vl_convert.mappings import mapping
right = mapping._bare
mapping._bare = lambda text, weight: right(text, weight.replace("(kv g d) h", "(g kv d) h"))
from qwen3vl_convert.cli.app import main
main()
"""
"""The program with an equation that is wrong and invertible: query heads in the order of the other axis first."""
WRONG_ROPE = """
from qwen3vl_convert.models.rope import InterleavedMRoPE
right = InterleavedMRoPE.forward
def wrong(self, position_ids, *rest, **named):
    return right(self, position_ids + (position_ids > 9).long(), *rest, **named)
InterleavedMRoPE.forward = wrong
from qwen3vl_convert.cli.app import main
main()
"""
"""The program with a model that leaves out a position."""
FAKE_TORCH = "import sys, time; print('torch is imported', file=sys.stderr, flush=True); time.sleep(0.4); sys.exit(9)"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense, moe: HF folders; moe-run: a Megatron checkpoint."""
    at = tmp_path_factory.mktemp("made")
    lively_checkpoint(at / "dense", DENSE)
    lively_checkpoint(at / "moe", MOE)
    hf_to_megatron(at / "moe", at / "moe-run", layout=ParallelLayout(tp=2, ep=2), run=QUICK)
    return at


def run(folder: Path, *arguments: object, program: str | None = None) -> "subprocess.CompletedProcess[str]":
    return command("roundtrip", *arguments, "--scratch", folder, program=program, cwd=folder)


def sections(output: str) -> list[str]:
    return [block.rstrip() for block in re.split(r"\n\s*\n", output) if block.strip()]


def test_it_says_which_models_it_built_of_what_where_and_how_far_apart_they_are(made: Path, tmp_path: Path) -> None:
    done = run(tmp_path, made / "moe", *CPU)
    assert done.returncode == 0, done.stderr
    verdict, steps, prompts, models = sections(done.stdout)
    assert verdict == (
        "EQUAL: there and back, TP2 PP2 EP2 and TP1; both models were built on cpu in fp32, and the logits of 5 "
        "prompts agree within rounding."
    )
    assert [line.split("  ")[0].strip() for line in steps.splitlines()] == [
        "convert to Megatron, TP2 PP2 EP2",
        "compare with the source",
        "import what both models need",
        "build both models, compare logits",
        "convert back",
        "convert again, TP1",
        "compare that with the source",
        "compare what came back",
    ]
    largest = r"largest for its bound: [\d.e-]+ of [\d.e-]+ allowed \((text|images?|video|mixed)\)"
    assert re.search(rf"\d s +equal, 5 prompts: {largest}", steps)
    assert len(re.findall(r"equal, \d+ tensors bit for bit", steps)) == 3
    assert [line.split()[0] for line in prompts.splitlines()] == ["prompt", *PROMPTS]
    assert f"transformers {version('transformers')}, weights of {made / 'moe'} (float32)" in models
    assert f"Qwen3VLModel on megatron-core {core.__version__}, weights of the Megatron checkpoint" in models
    assert "(TP2 PP2 EP2 ETP1, float32)" in models
    assert f"cpu, torch {version('torch')}; fp32, and fp64 to tell how much is rounding" in models
    assert re.search(largest, models)
    assert models.splitlines()[-1] == "The folder that came back is not built: it has the source's bits."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_same_as_json_of_a_megatron_checkpoint(made: Path, tmp_path: Path) -> None:
    done = run(tmp_path, made / "moe-run", *CPU, "--dtype", "bf16", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    models = found["models"]
    assert (models["equal"], models["device"], models["dtype"], models["prompts"]) == (True, "cpu", "bf16", PROMPTS)
    worst = models["worst"]
    assert 0 < worst["max_abs"] <= worst["allowed"]
    assert worst["max_abs"] <= models["max_abs"]
    assert models["weights"] == [f"the Hugging Face folder made of {made / 'moe-run'}", str(made / "moe-run")]
    assert models["programs"][0] == f"transformers {version('transformers')}"
    assert "not built" in found["spared"]
    assert [bool(step["found"] and step["found"]["logits"]) for step in found["steps"]] == [False, True, False, False]


@pytest.mark.slow
def test_without_logits_no_model_is_spoken_of(made: Path, tmp_path: Path) -> None:
    done = run(tmp_path, made / "dense")
    assert sections(done.stdout)[0] == "EQUAL: there and back, TP2 PP2 and TP1."
    assert "model" not in done.stdout.replace(str(made), "")
    found = json.loads(run(tmp_path, made / "dense", "--json").stdout)
    assert (found["models"], found["built"], found["spared"]) == (None, [], "")


@pytest.mark.slow
def test_the_third_model_can_take_the_place_of_megatron_core_s(made: Path, tmp_path: Path) -> None:
    done = run(tmp_path, made / "dense", *CPU, "--model", "inference")
    assert done.returncode == 0, done.stderr
    assert f"the inference model of qwen3vl-convert {version('qwen3vl-convert')}, weights of" in done.stdout


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_equation_that_is_wrong_both_ways_has_the_right_bits_and_other_logits(made: Path, tmp_path: Path) -> None:
    """No round trip of bits can see it; the logits do, and say where."""
    bits = run(tmp_path, made / "moe", program=WRONG_HEADS)
    assert (bits.returncode, bits.stdout.splitlines()[0]) == (0, "EQUAL: there and back, TP2 PP2 EP2 and TP1.")
    done = run(tmp_path, made / "moe", *CPU, program=WRONG_HEADS)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "DIFFERENT: equal bits, another function; both models were built on cpu in fp32, and the logits of 5 prompts "
        "of 5 differ by more than rounding."
    )
    assert any("build both models" in line and "DIFFERENT, 5 prompts: largest for" in line for line in lines)
    (where,) = [line for line in lines if line.startswith("where: ")]
    assert where.startswith("where: text layer 0, self_attention.")
    assert not any("convert back" in line for line in lines), "it goes on after a difference"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_that_computes_something_else_is_found_with_its_place(made: Path, tmp_path: Path) -> None:
    found = json.loads(run(tmp_path, made / "dense", *CPU, "--json", program=WRONG_ROPE).stdout)
    assert (found["equal"], found["models"]["equal"], found["spared"]) == (False, False, "")
    worst = found["models"]["worst"]
    assert worst["max_abs"] > worst["allowed"]
    (step,) = [step for step in found["steps"] if step["found"]]
    assert step["found"]["weights"]["differences"] == []
    assert step["found"]["logits"]["place"]["text"].startswith("text layer 0, self_attention.linear_proj, input")


@pytest.mark.slow
def test_what_came_back_is_compared_itself(made: Path, tmp_path: Path) -> None:
    """A folder that is wrong on the way back and taken for right on the way there: only it can tell."""
    program = f"""
import sys
from pathlib import Path
import qwen3vl_convert.verify
trip = sys.modules["qwen3vl_convert.verify.roundtrip"]
there, back = trip.hf_to_megatron, trip.megatron_to_hf
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from verify.weight_faults import changed_folder
NAME = "model.language_model.layers.0.mlp.up_proj.weight"
def negated(source, target):
    return changed_folder(Path(source), Path(target), lambda found: found[NAME].neg_())
def to_hf(source, target, **options):
    back(source, target.with_name("right"), **options)
    negated(target.with_name("right"), target)
def to_megatron(source, target, **options):
    if Path(source).name == "back":
        source = negated(source, target.with_name("mended"))
    there(source, target, **options)
trip.megatron_to_hf, trip.hf_to_megatron = to_hf, to_megatron
from qwen3vl_convert.cli.app import main
main()
"""
    done = run(tmp_path, made / "dense", program=program)
    assert done.returncode == 1, done.stderr
    verdict, steps, *_ = sections(done.stdout)
    assert verdict == "DIFFERENT: what comes back is not what went."
    assert re.search(r"compare that with the source .* equal", steps)
    assert re.search(r"compare what came back .* DIFFERENT", steps)
    assert "layers.0.mlp.up_proj.weight" in done.stdout


def test_torchrun_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="start it without torchrun"):
        roundtrip(made / "dense")


# ---- progress --------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which torch says when it is imported, and ends the program."""
    (tmp_path / "fake" / "torch").mkdir(parents=True)
    (tmp_path / "fake" / "torch" / "__init__.py").write_text(FAKE_TORCH)
    paths = (str(tmp_path / "fake"), user_environment()["PYTHONPATH"])
    return {**user_environment(), "PYTHONPATH": os.pathsep.join(paths)}


IMPORTS = "import torch, transformers, megatron-core"
COMMANDS = {"verify": ("moe", "moe-run"), "roundtrip": ("moe",)}


@pytest.mark.parametrize("name", COMMANDS)
def test_that_libraries_are_imported_is_said_before_it_takes_its_time(
    name: str, made: Path, slow_torch: dict[str, str]
) -> None:
    line = command_line(name, *(made / part for part in COMMANDS[name]), *CPU)
    done = subprocess.run(line, capture_output=True, text=True, env=slow_torch, check=False)
    assert (done.returncode, done.stdout) == (9, ""), done.stderr
    assert done.stderr.splitlines()[-2].endswith(f"{IMPORTS} ...")
    assert done.stderr.splitlines()[-1] == "torch is imported"
    done = subprocess.run([*line, "--quiet"], capture_output=True, text=True, env=slow_torch, check=False)
    assert done.stderr == "torch is imported\n"


def test_on_a_terminal_too_below_the_step_that_it_belongs_to(made: Path, slow_torch: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    line = command_line("roundtrip", made / "moe", *CPU)
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=theirs, text=True, env=slow_torch, check=False)
    os.close(theirs)
    shown = _all_of(ours)
    os.close(ours)
    assert done.returncode == 9
    assert re.search(rf"compare with the source.*\n.*compare.*\n.*{IMPORTS}", shown)
    assert shown.index(IMPORTS) < shown.index("torch is imported")


def _all_of(descriptor: int) -> str:
    shown = b""
    try:
        while chunk := os.read(descriptor, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_what_comes_after_the_imports_is_told_too(made: Path, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    trip = roundtrip(
        made / "dense",
        logits=LogitsOptions(device="cpu"),
        scratch=tmp_path,
        report=lambda *told: said.append(told),
    )
    assert trip.equal
    begun = list(dict.fromkeys(stage for stage, _, _ in said))
    step = "compare with the source"
    expected = [f"{step}: {name}" for name in ("compare", IMPORTS, "prepare prompts", "build both models")]
    expected += [f"{step}: {name}" for name in ("read weights", "logits")]
    assert [stage for stage in begun if stage.startswith(f"{step}: ")] == expected
    ends = {stage: (done, total) for stage, done, total in said}
    assert all(done == total for done, total in ends.values())
    assert all(total > 0 for stage, (_, total) in ends.items() if stage.endswith(("weights", "logits", "fill")))


# ---- where ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "asked", "kind"), [(True, "auto", "cuda"), (False, "auto", "cpu"), (True, "cpu", "cpu")]
)
def test_models_are_built_on_a_gpu_where_there_is_one(
    there: bool, asked: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from qwen3vl_convert.verify.logits.device import device_of

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert device_of(asked).type == kind
    assert LogitsOptions().device == "auto"


def test_a_gpu_that_is_not_there_is_told_before_anything_is_read(tmp_path: Path) -> None:
    options = LogitsOptions(device="cuda")
    with pytest.raises(UsageError, match="torch sees no GPU here"):
        roundtrip(tmp_path / "nothing", logits=options)
    with pytest.raises(UsageError, match="torch sees no GPU here"):
        verify(tmp_path / "nothing", tmp_path / "nothing", logits=options)
