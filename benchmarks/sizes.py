"""How long whole models take, to Megatron and back, each beside `cp` of the same bytes right before.

    python benchmarks/sizes.py [SIZE ...] [--work FOLDER]     by default 2b 4b 8b

Random weights of the published shapes, one run each, as a user runs them: to the disk (`sync`ed on both sides), with
reading back. A size needs three times its bytes of disk: 13, 27 and 53 GB.
"""

import argparse
import shutil
import subprocess
from pathlib import Path

from convert import PROGRAM, WorkFolder, converted, copied, read_all, size_of

LAYOUTS = {
    "2b": "--tp 2",
    "4b": "--tp 2",
    "8b": "--tp 4",
    "32b": "--tp 8",
    "30b-a3b": "--tp 2 --ep 4",
    "235b-a22b": "--tp 4 --ep 8",
}
HEAD = "| model | GB | layout | cp | to Megatron | cp | back | peak memory, MB |\n|---|---|---|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["2b", "4b", "8b"], metavar="SIZE", help=", ".join(LAYOUTS))
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; left as it was found")
    options = parser.parse_args()
    print(HEAD)
    for size in options.sizes:
        with WorkFolder(options.work) as work:
            print(row(size, work), flush=True)


def row(size: str, work: Path) -> str:
    """One model there and back, as a line of the table."""
    source, megatron, back = work / "hf", work / "megatron", work / "back"
    subprocess.run([*PROGRAM, "make-checkpoint", str(source), "--size", size, "--quiet"], check=True)
    layout = LAYOUTS[size]
    gigabytes = size_of(source) / 1e9
    read_all(source)
    copy_there = copied(source, work / "copy", synced=True)
    there = converted(["hf-to-megatron", *layout.split()], source, megatron, synced=True)
    copy_again = copied(megatron, work / "copy", synced=True)
    again = converted(["megatron-to-hf"], megatron, back, synced=True)
    subprocess.run([*PROGRAM, "verify", str(back), str(megatron), "--quiet"], check=True)
    shutil.rmtree(source)
    memory = max(there.anonymous, again.anonymous)
    named = layout.replace("--", "").replace("tp ", "TP").replace("ep ", "EP")
    times = [f"{run.wall:.0f} s" for run in (copy_there, there, copy_again, again)]
    return "| " + " | ".join([size, f"{gigabytes:.1f}", named, *times, f"{memory:.0f}"]) + " |"


if __name__ == "__main__":
    main()
