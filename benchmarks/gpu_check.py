"""Everything that only a GPU can show, in parts, in the order of what they tell; see docs/gpu-results.md.

    python3 benchmarks/gpu_check.py                     on a machine with a GPU
    LIMIT=540 python3 benchmarks/gpu_check.py           in nine minutes
    python3 benchmarks/gpu_check.py --part verify-8b    one of them
    DEVICE=cpu python3 benchmarks/gpu_check.py          a rehearsal with tiny models on a CPU, not a result

Runs from a plain checkout, installed or not. Options can be given as variables of the environment instead. The exit
code is 1 if anything failed or was skipped; what was found is kept.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu.driver import Options, run_all  # noqa: E402  from beside this file, however it is started
from gpu.page import PAGE, results, write_page  # noqa: E402
from gpu.parts import PARTS, Part  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    if options.list:
        for part in PARTS:
            print(f"{part.name:15} {part.most:4} s  {part.what}")
        return 0
    if options.page:
        write_page(options.out)
        return 0
    parts = [part for part in PARTS if part.name in options.part]
    chosen = Options(options.device, options.limit, options.slack, options.out, options.wheels, options.work)
    run_all(parts, chosen)
    return told(parts, options.out)


def told(parts: Sequence[Part], out: Path) -> int:
    """Say how many passed; the exit code."""
    found = [result for result in results(out) if result.part in parts]
    passed = sum(result.passed for result in found)
    print(f"{passed} of {len(parts)} parts passed: {out / PAGE}")
    return 0 if passed == len(parts) else 1


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said, names = os.environ.get, [part.name for part in PARTS]
    parts = said("PARTS", "").split()
    parser.add_argument("--part", action="append", metavar="NAME", help="(PARTS) one to run; may be repeated")
    parser.add_argument("--list", action="store_true", help="list the parts, with the limit of each")
    parser.add_argument("--device", default=said("DEVICE", "cuda"), help="(DEVICE) cuda, or cpu for a rehearsal")
    parser.add_argument("--limit", type=float, default=said("LIMIT", "3600"), help="(LIMIT) seconds for everything")
    parser.add_argument("--slack", type=float, default=said("SLACK", "1"), help="(SLACK) times each part's own limit")
    parser.add_argument("--out", type=Path, default=said("OUT", "gpu-results"), help="(OUT) folder for the results")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".wheels", help="folder of what this machine lacks")
    parser.add_argument("--work", type=Path, help="folder for checkpoints; left as it was found")
    parser.add_argument("--page", action="store_true", help="write the page again of what is in --out; run nothing")
    options = parser.parse_args(arguments)
    options.part = options.part or parts or names
    for name in options.part:
        if name not in names:
            parser.error(f"--part {name}: expected one of {', '.join(names)}")
    if options.device not in ("cuda", "cpu"):
        parser.error(f"--device {options.device}: expected cuda or cpu")
    if options.device == "cuda" and not (options.list or options.page) and not _gpu():
        parser.error("--device cuda: torch sees no GPU here. To rehearse on a CPU: --device cpu")
    return options


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
    sys.exit(main())
