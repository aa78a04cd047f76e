"""What a conversion needs: neither torch nor Megatron, nor anything else that takes seconds to import."""

import subprocess
import sys
from pathlib import Path

from qwen3vl_convert import make_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from qwen3vl_convert import hf_to_megatron, inspect, megatron_to_hf
from qwen3vl_convert.verify import verify

hf_to_megatron("model", "checkpoint")
megatron_to_hf("checkpoint", "back")
assert verify("back", "checkpoint").equal and inspect("back").complete
print(sorted({"torch", "megatron", "transformers", "transformer_engine"} & sys.modules.keys()))
"""


def test_a_conversion_imports_neither_torch_nor_megatron(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "tiny-moe")
    command = [sys.executable, "-c", PROGRAM, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
