"""What a conversion needs: numpy and small packages. Nothing optional is imported, nor anything that takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen3vl_convert.installed import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = sorted(package.module.partition(".")[0] for package in PACKAGES)
BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

sys.path.insert(0, sys.argv[1])

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Absent())
"""
PROGRAM = """
from qwen3vl_convert import explain, hf_to_megatron, inspect, make_checkpoint, megatron_to_hf, ParallelLayout
from qwen3vl_convert.convert import plan_hf_to_megatron
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.verify import diff, roundtrip, verify

make_checkpoint("model", "tiny-moe")
make_checkpoint("wide", "tiny", dtype="float32")
hf_to_megatron("model", "checkpoint", layout=ParallelLayout(tp=2, ep=2))
megatron_to_hf("checkpoint", "back", experts_layout="per-expert")
assert verify("back", "checkpoint").equal and inspect("back").complete and diff("model", "back").equal
assert roundtrip("model").equal
for dtype in ("bf16", "fp16"):
    hf_to_megatron("wide", dtype, dtype=dtype)
    assert verify("wide", dtype, dtype_tolerant=True).equal
explain("language_model.decoder.layers.0.self_attention.linear_qkv.weight", SIZES["tiny"], rank=0)
print(sorted({name.partition(".")[0] for name in sys.modules} & OPTIONAL))
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, str(ROOT)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_conversion_imports_nothing_optional_even_if_it_is_there(tmp_path: Path) -> None:
    done = run(f"OPTIONAL = set({OPTIONAL})\nimport sys\nsys.path.insert(0, sys.argv[1])\n{PROGRAM}", tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_all_but_models_works_where_nothing_optional_is_installed(tmp_path: Path) -> None:
    done = run(f"OPTIONAL = set({OPTIONAL})\n{BLOCKED}\n{PROGRAM}", tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            "from qwen3vl_convert.models import AutoBridge",
            "qwen3vl_convert.models needs torch, megatron-core and psutil",
        ),
        ("import qwen3vl_convert.inference", "qwen3vl_convert.inference needs torch, which"),
    ],
)
def test_what_needs_more_says_so_as_an_import_error(asked: str, said: str, tmp_path: Path) -> None:
    program = f"try:\n    {asked}\nexcept ImportError as error:\n    print(type(error).__name__, error)"
    done = run(f"OPTIONAL = set({OPTIONAL})\n{BLOCKED}\n{program}", tmp_path)
    assert done.stdout.startswith(f"NotInstalled {said}"), done.stderr
    assert "pip install " in done.stdout
