"""Memory and time of `verify --logits --stream` by depth: what is held must not grow with the model.

    python benchmarks/verify_stream.py [--size 30b-a3b] [--layers 6 12] [--dtype fp32] [--work FOLDER]

For each depth a checkpoint with random weights of the real shapes is made and converted (17 GB twice for 12 layers of
30b-a3b), verified in a process of its own, and removed. Memory is that process's own (anonymous), read from the kernel
while it runs: pages of the checkpoint's files, which it maps as it reads, are not counted, since the kernel drops them
when it wants to. Needs Linux.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwen3vl_convert import ParallelLayout, hf_to_megatron, make_checkpoint  # noqa: E402

LAYOUTS = {"moe": ParallelLayout(tp=2, ep=2), "dense": ParallelLayout(tp=2)}


@dataclass(frozen=True)
class Measured:
    layers: int
    checkpoint_bytes: int
    peak_bytes: int
    seconds: float
    equal: bool

    def cells(self) -> list[str]:
        return [
            str(self.layers),
            f"{self.checkpoint_bytes / 1e9:.1f} GB",
            f"{self.peak_bytes / 1e9:.2f} GB",
            f"{self.seconds:.0f} s",
            "yes" if self.equal else "NO",
        ]


def measure(size: str, layers: int, dtype: str, work: Path) -> Measured:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        theirs, ours = Path(folder) / "hf", Path(folder) / "megatron"
        dims = make_checkpoint(theirs, size, layers=layers)
        hf_to_megatron(theirs, ours, layout=LAYOUTS["moe" if dims.moe else "dense"])
        nbytes = sum(path.stat().st_size for path in theirs.glob("*.safetensors"))
        command = [sys.executable, "-m", "qwen3vl_convert.cli.app", "verify", str(theirs), str(ours)]
        began = time.monotonic()
        peak, printed = watched([*command, "--logits", "--stream", "--device", "cpu", "--dtype", dtype, "--json"])
        return Measured(layers, nbytes, peak, time.monotonic() - began, json.loads(printed)["equal"])


def watched(command: list[str]) -> tuple[int, str]:
    """(the most anonymous memory that a command held, what it printed)."""
    peak = 0
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=sys.stderr, cwd=ROOT)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.05)
        printed.seek(0)
        return peak, printed.read()


def anonymous(pid: int) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # it has just ended
        return 0
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="30b-a3b")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12])
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    print("| layers | checkpoint | peak memory | time | equal |\n| --- | --- | --- | --- | --- |")
    for layers in options.layers:
        found = measure(options.size, layers, options.dtype, options.work)
        print("| " + " | ".join(found.cells()) + " |", flush=True)


if __name__ == "__main__":
    main()
