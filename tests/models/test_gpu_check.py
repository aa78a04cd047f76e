"""`make gpu-check` on a CPU: it runs, its page is whole, and a model that is wrong fails it."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.megatron, pytest.mark.transformers]
pytest.importorskip("megatron.core")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of the script, which puts its folders in front of sys.path."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return runpy.run_path(str(SCRIPT), run_name="gpu_check")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_it_passes_and_writes_its_page(program: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert program["main"](["--device", "cpu", "--quick", "--work", str(tmp_path), "--write", str(page)]) == 0
    text = page.read_text()
    assert "61 checks, 0 failed" in text
    for part in (
        "| logits | packed |",
        "| vision, fixed length |",
        "| logits, tiny shapes |",
        "prefill, bfloat16",
        "| tiny: rope theta 500000 | bf16 | whole |",
        "| moe | bfloat16 |",
    ):
        assert part in text
    assert text.startswith("# On a GPU\n\n" + program["INTRODUCTION"])
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_wrong_fails_it(
    program: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of ours are put off by a thousandth after they were loaded; one prompt, one dtype."""
    names = program["main"].__globals__
    build = names["build_ours"]

    def build_wrong(*arguments: Any) -> Any:
        model = build(*arguments)
        with torch.no_grad():
            model.language_model.decoder.layers[1].mlp.linear_fc2.weight.mul_(1.001)
        return model

    monkeypatch.setitem(names, "build_ours", build_wrong)
    monkeypatch.setitem(names, "PROMPTS", ("text",))
    monkeypatch.setitem(
        names, "everything", lambda run: (list(names["in_float32"](run, "tiny", names["tiny"](run, "tiny"))), [])
    )
    for other in ("verifications", "served"):
        monkeypatch.setitem(names, other, lambda *_: [])
    assert program["main"](["--device", "cpu", "--quick", "--work", str(tmp_path)]) == 1


def test_what_is_no_number_does_not_pass(program: dict[str, Any]) -> None:
    assert not program["Check"]("part", "what", "model", torch.float32, float("nan"), 1.0).passed


def test_a_machine_without_a_gpu_is_told_of(program: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program["main"]([])
    assert "--device cpu --quick" in capsys.readouterr().err
