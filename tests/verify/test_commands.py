"""verify and roundtrip on the command line: what is printed and written, exit codes, and that nothing is left."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from broken import QUICK, command
from qwen3vl_convert import ParallelLayout, convert, hf_to_megatron, make_checkpoint
from qwen3vl_convert.cli.app import app
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.verify import verification
from verify.weight_faults import changed_folder

SMALL = replace(SIZES["tiny"], layers=3, vision_depth=3, deepstack=(0, 2))
SMALL_MOE = replace(SMALL, model_type="qwen3_vl_moe", experts=4, top_k=2, expert_ffn=48)
UP = "model.language_model.layers.1.mlp.up_proj.weight"

needs_models = pytest.mark.usefixtures("models")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense, moe: HF folders; with -run: Megatron checkpoints of them."""
    at = tmp_path_factory.mktemp("made")
    for name, dims in {"dense": SMALL, "moe": SMALL_MOE}.items():
        make_checkpoint(at / name, dims)
        hf_to_megatron(at / name, at / f"{name}-run", layout=ParallelLayout(tp=2), run=QUICK)
    return at


@pytest.fixture
def models() -> None:
    pytest.importorskip("megatron.core")
    pytest.importorskip("transformers")


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def json_of(*words: object, code: int = 0) -> Any:
    result = invoke(*words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


# ---- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.megatron
@pytest.mark.transformers
@pytest.mark.filterwarnings("ignore")
@needs_models
class TestLogits:
    @pytest.mark.parametrize("name", ["dense", "moe"])
    def test_of_one_model(self, made: Path, name: str, tmp_path: Path) -> None:
        page = tmp_path / "report.html"
        found = json_of(
            "verify", made / name, made / f"{name}-run", "--logits", "--stream", "--device", "cpu", "--report", page
        )
        assert found["equal"] is True
        assert found["logits"]["mode"] == "stream"
        assert [one["name"] for one in found["logits"]["prompts"]] == ["text", "image", "images", "video", "mixed"]
        assert found["logits"]["place"] is None
        assert {"torch", "transformers", "megatron-core"} <= found["versions"].keys()
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
        assert page.read_text().startswith("<!doctype html>")

    @pytest.mark.slow
    def test_of_two(self, made: Path, tmp_path: Path) -> None:
        other = changed_folder(made / "dense", tmp_path / "other", lambda found: found[UP].mul_(1.5))
        human = invoke("verify", other, made / "dense-run", "--logits", "--device", "cpu")
        assert human.exit_code == 1
        assert human.stdout.startswith("DIFFERENT: 1 of ")
        assert "text layer 1, mlp.linear_fc1" in human.stdout
        assert UP in human.stdout
        found = json_of("verify", other, made / "dense-run", "--logits", "--device", "cpu", code=1)
        assert found["equal"] is False
        assert found["logits"]["place"]["parameters"] == [UP]

    @pytest.mark.slow
    def test_in_bfloat16(self, made: Path) -> None:
        found = json_of("verify", made / "dense", made / "dense-run", "--logits", "--device", "cpu", "--dtype", "bf16")
        assert (found["equal"], found["logits"]["dtype"], found["logits"]["reference"]) == (True, "bf16", "fp32")

    def test_a_gpu_that_is_not_there(self, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        result = invoke("verify", made / "dense", made / "dense-run", "--logits", "--device", "cuda")
        assert result.exit_code == 2
        assert "--device cpu" in result.stderr

    @pytest.mark.slow
    def test_models_that_do_not_fit_are_streamed(self, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from qwen3vl_convert.verify.logits import compare

        monkeypatch.setattr(compare, "_MOST_OF_MEMORY", 1e-9)
        found = json_of("verify", made / "dense", made / "dense-run", "--logits", "--device", "cpu")
        assert found["logits"]["mode"] == "stream"
        assert any("layer by layer, as with --stream" in note for note in found["logits"]["notes"])

    def test_fewer_layers_than_deepstack_features(self, tmp_path: Path) -> None:
        make_checkpoint(tmp_path / "hf", replace(SMALL, layers=1))
        hf_to_megatron(tmp_path / "hf", tmp_path / "run", run=QUICK)
        result = invoke("verify", tmp_path / "hf", tmp_path / "run", "--logits", "--device", "cpu")
        assert result.exit_code == 3
        assert "2 deepstack features" in result.stderr


WRONG_USE = [
    (["--stream"], "--stream: of use with --logits only"),
    (["--device", "cpu", "--dtype", "fp32"], "--device, --dtype: of use with --logits only"),
    (["--logits", "--dtype", "fp8"], "--dtype fp8: expected fp32 or bf16"),
    (["--logits", "--device", "tpu"], "--device tpu: expected auto, cuda or cpu"),
    (["--logits", "--headless"], "a model without an output layer has no logits"),
    (["--max-memory", "much"], "--max-memory much: expected a size"),
]


@pytest.mark.parametrize(("options", "said"), WRONG_USE, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_use(made: Path, options: list[str], said: str) -> None:
    result = invoke("verify", made / "dense", made / "dense-run", *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_what_is_not_installed_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    result = invoke("verify", made / "dense", made / "dense-run", "--logits")
    assert result.exit_code == 2
    assert "--logits needs megatron-core, which is not installed: pip install" in result.stderr


def test_a_report_takes_no_file_s_place(made: Path, tmp_path: Path) -> None:
    page = tmp_path / "mine.html"
    page.write_text("mine")
    for path, said in ((page, "exists"), (tmp_path / "nowhere" / "page.html", "is no folder")):
        result = invoke("verify", made / "dense", made / "dense-run", "--report", path)
        assert result.exit_code == 4
        assert said in result.stderr
    assert page.read_text() == "mine"


def test_a_report_of_weights_alone(made: Path, tmp_path: Path) -> None:
    assert invoke("verify", made / "dense", made / "dense-run", "--report", tmp_path / "page.html").exit_code == 0
    assert "bit for bit" in re.sub(r"<[^>]+>|\s+", " ", (tmp_path / "page.html").read_text())


def test_a_report_says_when_and_by_what_command_it_was_made(made: Path, tmp_path: Path) -> None:
    page = tmp_path / "a page.html"
    before = datetime.now(UTC).replace(microsecond=0)
    done = command("verify", made / "moe", made / "moe-run", "--workers", 1, "--report", page)
    assert done.returncode == 0, done.stderr
    said = re.sub(r"<[^>]+>", "", page.read_text())
    assert f"qwen3vl-convert verify {made / 'moe'} {made / 'moe-run'} --workers 1 --report &#x27;{page}&#x27;" in said
    (date,) = re.findall(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", said)
    assert before <= datetime.fromisoformat(date.replace("Z", "+00:00")) <= datetime.now(UTC)
    assert "TP2 PP1 EP1 ETP1" in said
    assert "megatron torch_dist; keys: stacked, common.pt" in said
    assert "huggingface; names: hub, experts: hub" in said
    assert "bfloat16" in said


def test_a_bug_is_no_answer(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 means that the models differ."""

    def broken(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(verification, "compare_weights", broken)
    result = invoke("verify", made / "dense", made / "dense-run")
    assert result.exit_code == 70
    assert "surprise" in result.stderr
    assert "bug" in result.stderr


# ---- roundtrip -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that must be empty again."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["dense", "moe", "dense-run", "moe-run"])
def test_there_and_back(made: Path, name: str, scratch: Path) -> None:
    found = json_of("roundtrip", made / name, "--scratch", scratch)
    assert found["equal"] is True
    assert found["layouts"][0] != found["layouts"][1]
    compared = [step["found"] for step in found["steps"] if step["found"]]
    assert len(compared) == 2
    assert all(one["weights"]["tensors"] > 50 for one in compared)
    folders = [step["changes"] for step in found["steps"] if step["changes"]]
    assert len(folders) == (0 if name.endswith("run") else 1), "what came back, itself"
    assert all(one["tensors"] > 50 and one["changes"] == [] for one in folders)
    assert all(step["equal"] for step in found["steps"])


def test_as_a_person_reads_it(made: Path, scratch: Path) -> None:
    result = invoke("roundtrip", made / "moe", "--scratch", scratch, "--tp", 2, "--ep", 4)
    assert result.exit_code == 0
    assert result.stdout.startswith("EQUAL: there and back, TP2 EP4 and TP1.")
    assert "TP2 EP4" in result.stdout


@pytest.mark.megatron
@pytest.mark.transformers
@pytest.mark.filterwarnings("ignore")
@needs_models
@pytest.mark.parametrize("name", ["moe", "dense-run"])
def test_with_logits(made: Path, name: str, scratch: Path) -> None:
    found = json_of("roundtrip", made / name, "--scratch", scratch, "--logits", "--device", "cpu")
    assert [bool(step["found"]["logits"]) for step in found["steps"] if step["found"]] == [True, False]


def test_what_comes_back_changed_is_told(
    made: Path, scratch: Path, patched: Callable[[str, Callable[..., Any]], None]
) -> None:
    def wrong(source: Path, target: Path, **options: Any) -> None:
        convert.megatron_to_hf(source, scratch / "right", **options)
        changed_folder(scratch / "right", target, lambda found: found[UP].neg_())
        for path in (scratch / "right").iterdir():
            path.unlink()
        (scratch / "right").rmdir()

    patched("megatron_to_hf", wrong)
    result = invoke("roundtrip", made / "dense", "--scratch", scratch)
    assert result.exit_code == 1
    assert result.stdout.startswith("DIFFERENT: ")
    assert UP in result.stdout


@pytest.mark.parametrize("stage", ["hf_to_megatron", "megatron_to_hf", "verify"])
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (OSError, 4)])
def test_interrupted_it_leaves_nothing(
    made: Path,
    scratch: Path,
    stage: str,
    error: type[BaseException],
    code: int,
    patched: Callable[[str, Callable[..., Any]], None],
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    patched(stage, stop)
    assert invoke("roundtrip", made / "dense", "--scratch", scratch).exit_code == code


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """Replace a name of the module, which has the name of its function."""
    module = sys.modules["qwen3vl_convert.verify.roundtrip"]
    return lambda name, value: monkeypatch.setattr(module, name, value)


def test_a_scratch_folder_that_is_not_there(made: Path, tmp_path: Path) -> None:
    result = invoke("roundtrip", made / "dense", "--scratch", tmp_path / "nowhere")
    assert result.exit_code == 4
