"""Promises of the README for a whole run: what is imported, what a killed run leaves, that bytes are the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen3vl_convert import FillOptions, ParallelLayout, RunOptions, hf_to_megatron, make_checkpoint, megatron_to_hf
from qwen3vl_convert.verify import verify

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = ParallelLayout(tp=2, ep=2)

NOTHING_HEAVY = """
import sys
from qwen3vl_convert import hf_to_megatron, inspect, megatron_to_hf
from qwen3vl_convert.verify import verify

hf_to_megatron("model", "checkpoint")
megatron_to_hf("checkpoint", "back")
assert verify("back", "checkpoint").equal and inspect("back").complete
print(sorted({"torch", "megatron", "transformers", "transformer_engine"} & sys.modules.keys()))
"""
KILLED = """
import os, signal
from qwen3vl_convert import FillOptions, ParallelLayout, RunOptions, hf_to_megatron

def report(stage, done, total):
    if (stage, done > share * total) == (at, True):
        os.kill(os.getpid(), signal.SIGKILL)

at, share = {at!r}, {share}
hf_to_megatron("model", "checkpoint", layout=ParallelLayout(tp=2, ep=2), report=report)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "model", "tiny-moe")
    return tmp_path / "model"


def run(program: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_conversion_imports_neither_torch_nor_megatron(model: Path) -> None:
    done = run(NOTHING_HEAVY, model.parent)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize("at", ["fill", "check"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_killed_run_leaves_no_target_and_goes_on(at: str, share: float, model: Path) -> None:
    done = run(KILLED.format(at=at, share=share), model.parent)
    assert done.returncode == -9
    target, staging = model.parent / "checkpoint", model.parent / ".checkpoint.partial"
    assert not target.exists()
    finished = len((staging / "journal").read_text().splitlines()) - 1
    assert finished > 0 or share == 0
    hf_to_megatron(model, target, layout=LAYOUT, run=RunOptions(resume=True))
    hf_to_megatron(model, model.parent / "whole", layout=LAYOUT)
    assert contents(target) == contents(model.parent / "whole")
    assert not staging.exists()
    assert verify(model, target).equal


def test_same_input_and_options_give_the_same_bytes(model: Path) -> None:
    folders = []
    for workers in (1, 7):
        fill = FillOptions(workers=workers, max_memory=workers << 20)
        megatron, back = (model.parent / str(workers) / name for name in ("checkpoint", "back"))
        hf_to_megatron(model, megatron, layout=LAYOUT, run=RunOptions(fill=fill))
        megatron_to_hf(megatron, back, run=RunOptions(fill=fill))
        folders.append(contents(model.parent / str(workers)))
    assert folders[0] == folders[1]
