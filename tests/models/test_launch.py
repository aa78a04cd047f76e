"""Programs under torchrun itself, whose one store serves all that their processes do one after another."""

import time
from pathlib import Path

import pytest

from launcher import torchrun
from qwen3vl_convert import make_checkpoint
from qwen3vl_convert.verify import verify

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "drop_in.py"
THEIRS, OURS = "from megatron.bridge import AutoBridge", "from qwen3vl_convert import AutoBridge"

WORLDS = """
import torch
import torch.distributed as dist

from qwen3vl_convert import AutoBridge, ParallelLayout
from qwen3vl_convert.models import parallel_world

for name in ("first", "second"):
    with parallel_world(ParallelLayout(tp=2)):
        AutoBridge.import_ckpt("hf", name)
AutoBridge.import_ckpt("hf", "third")
dist.init_process_group("gloo")
total = torch.ones(())
dist.all_reduce(total)
assert total == 2
dist.destroy_process_group()
"""

DIES = """
import time

from qwen3vl_convert import AutoBridge

def main():
    provider = AutoBridge.from_hf_pretrained("hf").to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    provider.initialize_model_parallel(seed=0)
    from torch.distributed import get_rank
    if get_rank() == 1:
        END
    time.sleep(60)
    print("nobody told it")

main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a Hugging Face folder `hf`."""
    make_checkpoint(tmp_path / "hf", "tiny")
    return tmp_path


def ran(script: str, folder: Path, *arguments: str) -> tuple[int, str, str]:
    (folder / "script.py").write_text(script)
    done = torchrun("script.py", *arguments, folder=folder)
    return done.returncode, done.stdout, done.stderr


def test_the_script_of_megatron_bridge_s(folder: Path) -> None:
    """There and back, each done by one of the processes."""
    code, _, errors = ran(SCRIPT.read_text().replace(THEIRS, OURS), folder, "hf", "megatron", "back")
    assert code == 0, errors
    assert (folder / "back" / "model.safetensors").read_bytes() == (folder / "hf" / "model.safetensors").read_bytes()


def test_processes_meet_again_and_again(folder: Path) -> None:
    """In worlds, for conversions within and without them, and in a group of the user's own."""
    code, _, errors = ran(WORLDS, folder)
    assert code == 0, errors
    assert all(verify(folder / "hf", folder / name).equal for name in ("first", "second", "third"))


@pytest.mark.parametrize("end", ["raise ValueError('a planted fault')", "raise SystemExit(3)"], ids=["raises", "exits"])
def test_a_rank_that_ends_takes_the_job_with_it(end: str, folder: Path) -> None:
    """It waits for no other."""
    began = time.monotonic()
    code, said, errors = ran(DIES.replace("END", end), folder)
    assert code == 1
    assert "nobody told it" not in said, f"after {time.monotonic() - began:.0f} s"
    assert ("a planted fault" in errors) == ("fault" in end)
