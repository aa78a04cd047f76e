"""`make gpu-check`: its first two parts pass on a CPU, what is wrong fails it, and nothing takes along what was found.

Parts are run as the program runs them, each in a process of its own, from a checkout in which nothing is installed.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
PROGRAM = BENCHMARKS / "gpu_check.py"


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its folder in front of sys.path, as Python puts it there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [name for name in sys.modules if name == "gpu" or name.startswith("gpu.")]:
        del sys.modules[name]


# ---- the whole, on a CPU ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.megatron
@pytest.mark.transformers
def test_the_first_two_parts_pass(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    pytest.importorskip("transformers")
    environment = {**os.environ, "DEVICE": "cpu", "SLACK": "8", "PARTS": "sanity tiny", "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--work", str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode()
    text = (tmp_path / "out" / "page.md").read_text()
    assert "69 checks, 0 failed." in text
    for line in (
        "| grouped experts | 700 tokens |",
        "| decoding tiny-moe in bfloat16 by graphs |",
        "| logits | packed | tiny-moe | bfloat16 |",
        "| vision, fixed length | an image and a video | tiny | float32 |",
        "| moe | bfloat16 | 3 |",
        "| tiny-moe | bf16 | inference | whole | equal | equal |",
        "| tiny: rope theta 500000 | fp32 | megatron | whole | different | different |",
    ):
        assert line in text
    assert (tmp_path / "out" / "summary.txt").read_text().count("ok ") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "nothing else is left"


# ---- parts that are made up ------------------------------------------------------------------------------------------

MADE_UP = """
import os, sys, time
from pathlib import Path
from gpu import page, parts

kind, out = sys.argv[1:3]
part = parts.Part(kind, kind, "", 1, 1)
page.add(Path(out), part, page.Row("sanity", (kind, "begun"), kind != "wrong"))
print("printed by", kind)
if kind == "dies":
    os.abort()
time.sleep(60 if kind == "sleeps" else 0)
sys.exit(kind == "wrong")
"""
"""A part that does what its name says."""


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *kinds: str, limit: float = 60, most: int = 50) -> list[Any]:
    """Run made-up parts of these names; gives the results."""
    from gpu import driver, page, parts

    made = tuple(parts.Part(kind, f"one that is {kind}", "", least=2, most=most) for kind in kinds)
    monkeypatch.setattr(page, "PARTS", made)
    monkeypatch.setattr(
        driver, "command_of", lambda part, options: (sys.executable, "-c", MADE_UP, part.name, str(options.out))
    )
    out = tmp_path / "out"
    driver.run_all(made, driver.Options("cpu", limit, 1.0, out, tmp_path / "no wheels", tmp_path))
    return page.results(out)


def test_what_fails_takes_nothing_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something wrong, a process that dies: what came before is kept, and the next part runs."""
    found = run(tmp_path, monkeypatch, "wrong", "dies", "fine")
    said = {one.part.name: (one.ended.result, [row.passed for row in one.rows], one.passed) for one in found}
    assert said == {
        "wrong": ("FAILED", [False], False),
        "dies": ("FAILED", [True], False),
        "fine": ("ok", [True], True),
    }
    text = (tmp_path / "out" / "page.md").read_text()
    assert "| wrong | begun | **NO** |" in text
    assert "| dies | one that is dies | **FAILED: exit code -6** | 1 | 0 |" in text
    assert "3 checks, 1 failed." in text
    assert "printed by wrong" in (tmp_path / "out" / "wrong.txt").read_text()
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert [line.split()[0] for line in summary.splitlines()] == ["FAILED", "FAILED", "ok"]


def test_a_part_whose_time_is_over_is_ended_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    slow, late = run(tmp_path, monkeypatch, "sleeps", "fine", limit=5.5, most=4)
    assert time.monotonic() - began < 40
    assert (slow.ended.result, slow.passed) == ("TIMED OUT", False)
    assert [row.cells for row in slow.rows] == [("sleeps", "begun")]
    assert late.ended.result == "SKIPPED"
    assert "| fine | one that is fine | **SKIPPED: " in (tmp_path / "out" / "page.md").read_text()


def test_a_check_that_raises_does_not_end_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import checks, page, part, parts

    def raises(run: Any) -> Iterator[Any]:
        yield page.Row("sanity", ("before", "yes"), True)
        raise ValueError("a kernel\nwas wrong")

    def fine(run: Any) -> Iterator[Any]:
        yield page.Row("sanity", ("after", "yes"), True)

    monkeypatch.setitem(sys.modules, "made_up", type("made_up", (), {"CHECKS": (raises, fine)}))
    one = parts.Part("both", "", "made_up", 1, 1)
    before, error, after = part.rows(checks.Run("cpu", tmp_path), one)
    assert (before.cells[0], after.cells[0]) == ("before", "after")
    assert (error.cells, error.passed) == (("both", "raises", "ValueError: a kernel was wrong"), False)


def test_one_that_was_cut_off_is_said_to_be(tmp_path: Path) -> None:
    """The machine went away in the middle of a line."""
    from gpu import page
    from gpu.parts import PARTS

    page.add(tmp_path, PARTS[0], {"device": "cuda", "said": "2026-11-27: a GPU"})
    page.add(tmp_path, PARTS[0], page.Row("sanity", ("process groups", "nccl"), True))
    with page.file_of(tmp_path, PARTS[0]).open("a") as file:
        file.write('{"row": {"table": "san')
    (found,) = page.results(tmp_path)
    assert (len(found.rows), found.ended, found.passed) == (1, None, False)
    page.write_page(tmp_path)
    text = (tmp_path / page.PAGE).read_text()
    assert "| **cut off** | 1 | 0 | - |" in text
    assert "2026-11-27: a GPU. 1 checks, 0 failed." in text
    assert page.REHEARSAL not in text


def test_a_second_call_adds_to_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a part that is run again takes its own place."""
    from gpu import page
    from gpu.parts import PARTS

    first, second = PARTS[:2]
    for part, passed in ((second, False), (first, True)):
        page.add(tmp_path, part, page.Row("sanity", (part.name, "said"), passed))
    assert [one.part.name for one in page.results(tmp_path)] == [first.name, second.name]
    found = run(tmp_path, monkeypatch, "wrong", "fine")
    again = run(tmp_path, monkeypatch, "wrong")
    assert [len(one.rows) for one in (*found, *again)] == [1, 1, 1]


# ---- what must fail --------------------------------------------------------------------------------------------------


def test_a_dense_model_without_graphs_fails() -> None:
    pytest.importorskip("transformers")
    from gpu.served import row_of

    assert row_of("dense", torch.bfloat16, 3, True, 0.0, 1.0).passed
    assert not row_of("dense", torch.bfloat16, 0, True, 0.0, 1.0).passed
    assert row_of("moe", torch.float32, 0, False, 0.0, 1.0).passed
    assert not row_of("dense", torch.bfloat16, 3, True, float("nan"), 1.0).passed


@pytest.mark.filterwarnings("ignore")
def test_a_capture_that_fails_fails_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `cuda_graphs=None` the engine would go on without."""
    from gpu import checks, part, parts, sanity

    from qwen3vl_convert.inference.engine import cuda_graphs

    def refuse(forward: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(sanity, "CHECKS", (sanity.decoding_by_graphs,))
    one = parts.part_named("sanity")
    monkeypatch.setattr(cuda_graphs, "direct", refuse)
    (row,) = part.rows(checks.Run("cpu", tmp_path), one)
    assert (row.table, row.passed) == ("errors", False)
    assert "not permitted when stream is capturing" in row.cells[-1]


@pytest.mark.megatron
@pytest.mark.transformers
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_wrong_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of ours are put off by a thousandth after they were loaded; one prompt, one dtype."""
    pytest.importorskip("megatron.core")
    from gpu import checks, logits, models

    def build_wrong(*arguments: Any) -> Any:
        model = models.build_ours(*arguments)
        with torch.no_grad():
            model.language_model.decoder.layers[1].mlp.linear_fc2.weight.mul_(1.001)
        return model

    run = checks.Run("cpu", tmp_path)
    monkeypatch.setattr(logits, "PROMPTS", ("text",))
    with checks.world("cpu"), torch.no_grad():
        (right,) = logits.in_float32(run, "tiny", models.tiny(run, "tiny"))
        monkeypatch.setattr(logits, "build_ours", build_wrong)
        (wrong,) = logits.in_float32(run, "tiny", models.tiny(run, "tiny"))
    assert (right.passed, wrong.passed) == (True, False)


def test_a_yardstick_that_is_itself_off_excuses_nothing() -> None:
    from gpu import checks

    assert checks.bound_in_float32(0.0) == checks.TOLERANCE
    assert checks.bound_in_float32(1e-5) == pytest.approx(3e-5)
    assert checks.bound_in_float32(2.0) == checks.FAR
    assert not checks.check("logits", "text", "tiny", torch.float32, float("nan"), 1.0).passed


# ---- surroundings ----------------------------------------------------------------------------------------------------


def test_packages_that_a_copy_lost_are_there_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A symbolic link that has become a file with its target, one that is gone, and one that is right."""
    from gpu import driver

    package = tmp_path / "qwen3vl_convert"
    package.mkdir()
    for name in driver.ROOMS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (package / "cli").write_text("../cli")
    monkeypatch.setattr(driver, "ROOT", tmp_path)
    options = driver.Options("cpu", 1, 1, tmp_path, tmp_path / "no wheels")
    env = driver.prepared(tmp_path, options)
    assert all((package / name / "__init__.py").exists() for name in driver.ROOMS)
    assert driver.prepared(tmp_path, options) == env
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in driver.prepared(tmp_path, replace(options, device="cuda")).keys() - os.environ


def test_wheels_are_for_what_is_missing(tmp_path: Path) -> None:
    """These are none: pip is asked for the one that no package of here has, and cannot."""
    from gpu import driver

    options = driver.Options("cpu", 1, 1, tmp_path, tmp_path / "wheels")
    options.wheels.mkdir()
    (options.wheels / "pytest-1.0-py3-none-any.whl").touch()
    driver.prepared(tmp_path, options)
    (options.wheels / "not_here-1.0-py3-none-any.whl").touch()
    with pytest.raises(subprocess.CalledProcessError, match="not_here"):
        driver.prepared(tmp_path, options)


def test_checkpoints_wait_for_room_and_go_when_they_are_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second fits only once the first is gone; a third that never fits is given up."""
    from gpu import checkpoints, driver, parts

    shapes = {
        "first": replace(parts.REHEARSED["2b"], gigabytes=6.0),
        "second": replace(parts.REHEARSED["2b"], gigabytes=6.0),
        "never": replace(parts.REHEARSED["2b"], gigabytes=100.0),
    }

    def usage(folder: Path) -> Any:
        taken = 6e9 if (tmp_path / "first").exists() and any((tmp_path / "first").iterdir()) else 0
        return type("Usage", (), {"free": 12e9 - taken})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(checkpoints, "COMMAND", (sys.executable, "-c", FAKE))
    env = driver.prepared(tmp_path, driver.Options("cpu", 1, 1, tmp_path, tmp_path / "no wheels"))
    with (tmp_path / "log.txt").open("w") as log:
        made = checkpoints.Checkpoints(shapes, tmp_path, env, log)
        made.start()
        assert not made.wait("second", 3.0)
        made.release("first")
        assert made.wait("second", 30.0)
        made.release("second")
        assert not made.wait("never", 30.0)
        made.stop()
    assert "100.0 GB are not free" in (tmp_path / "log.txt").read_text()
    assert not any((tmp_path / name).exists() for name in shapes)


FAKE = "import sys, pathlib; pathlib.Path(sys.argv[2 if sys.argv[1].startswith('make') else 3]).mkdir(parents=True)"
"""Makes the folder that the command would make."""


# ---- the program -----------------------------------------------------------------------------------------------------


def test_it_says_what_it_can_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    main = runpy.run_path(str(PROGRAM), run_name="gpu_check")["main"]
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()][:3] == ["sanity", "tiny", "verify-2b"]
    monkeypatch.setenv("PARTS", "sanity nothing")
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cpu"])
    assert "--part nothing: expected one of sanity, tiny" in capsys.readouterr().err
    if not torch.cuda.is_available():
        monkeypatch.setenv("PARTS", "sanity")
        with pytest.raises(SystemExit, match="2"):
            main([])
        assert "--device cpu" in capsys.readouterr().err


def test_the_page_of_the_documentation_is_the_programs() -> None:
    from gpu import page

    text = (ROOT / "docs" / "gpu-results.md").read_text()
    assert text.startswith(page.INTRODUCTION)
    assert page.REHEARSAL not in text
    assert page.page([]) == page.INTRODUCTION + page.NOTHING
