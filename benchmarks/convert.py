"""Conversion against `cp` of the same bytes, in the same run: wall time, fill time, peak memory.

    python benchmarks/convert.py [--work FOLDER] [--only dense|moe] [--repeat 3] [--write]

Needs about 30 GB of disk in FOLDER (a temporary one by default). Caches are warm: the source is read once before. Each
conversion runs as a process of its own, whose memory is sampled from /proc; the `cp` beside it runs right before. The
best of `--repeat` runs counts, for both. With `--write`, the table goes to benchmarks/results/convert.md.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "convert.md"
PROGRAM = (sys.executable, "-m", "qwen3vl_convert.cli.app")
SIZES = {"dense": ("2b", None), "moe": ("30b-a3b", 4), "moe, half the depth": ("30b-a3b", 2)}
LAYOUTS = {"TP1": [], "TP2 PP2": ["--tp", "2", "--pp", "2"], "EP4": ["--ep", "4"]}


@dataclass(frozen=True)
class Run:
    """One command: seconds of wall time, and of its stages; peak memory in MB."""

    wall: float
    stages: dict[str, float] = field(default_factory=dict)
    anonymous: float = 0.0
    resident: float = 0.0


@dataclass(frozen=True)
class Row:
    """A conversion and the copies beside it, with and without waiting for the disk."""

    what: str
    gigabytes: float
    copy: Run
    convert: Run
    copy_synced: Run
    convert_synced: Run


def main() -> None:
    options = arguments()
    with WorkFolder(options.work) as work:
        rows = [row for name in chosen(options.only) for row in measure(name, work, options.repeat)]
    text = report(rows, options.repeat)
    print(text)
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; left as it was found")
    parser.add_argument("--only", choices=["dense", "moe"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    return parser.parse_args()


def chosen(only: str | None) -> list[str]:
    return [name for name in SIZES if only is None or name.startswith(only)]


class WorkFolder:
    """A folder that is removed at the end, in `parent` or where temporary files go."""

    def __init__(self, parent: Path | None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)


def measure(name: str, work: Path, repeat: int) -> Iterator[Row]:
    """Both directions in every layout that the model has."""
    size, layers = SIZES[name]
    source = work / "source"
    cut = [] if layers is None else ["--layers", str(layers)]
    subprocess.run([*PROGRAM, "make-checkpoint", str(source), "--size", size, "--quiet", *cut], check=True)
    layouts = ["TP1"] if "half" in name else [n for n in LAYOUTS if n != "EP4" or size.startswith("30b")]
    for layout in layouts:
        megatron, back = work / "megatron", work / "back"
        there, again = ["hf-to-megatron", *LAYOUTS[layout]], ["megatron-to-hf"]
        yield row(f"{name}: to Megatron, {layout}", there, source, megatron, work, repeat)
        yield row(f"{name}: to Hugging Face, from {layout}", again, megatron, back, work, repeat)
        shutil.rmtree(megatron)
        shutil.rmtree(back)
    shutil.rmtree(source)


def row(what: str, command: list[str], source: Path, target: Path, work: Path, repeat: int) -> Row:
    """Alternate copy and conversion, and keep the best of each."""
    print(f"... {what}", file=sys.stderr, flush=True)
    read_all(source)
    runs: dict[str, list[Run]] = {"copy": [], "convert": [], "copy_synced": [], "convert_synced": []}
    for _ in range(repeat):
        for kind, synced in (("", False), ("_synced", True)):
            runs["copy" + kind].append(copied(source, work / "copy", synced))
            runs["convert" + kind].append(converted(command, source, target, synced))
    best = {kind: min(found, key=lambda run: run.wall) for kind, found in runs.items()}
    worst_memory = max(runs["convert"], key=lambda run: run.anonymous)
    best["convert"] = Run(best["convert"].wall, best["convert"].stages, worst_memory.anonymous, worst_memory.resident)
    return Row(what, size_of(source) / 1e9, **best)


def read_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copied(source: Path, target: Path, synced: bool) -> Run:
    """`cp -r`, and with `synced` until all is on the disk. The copy is removed: neither side gets pages for free."""
    os.sync()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    if synced:
        subprocess.run(["sync", "-f", str(target)], check=True)
    wall = time.perf_counter() - began
    shutil.rmtree(target)
    return Run(wall)


def converted(command: list[str], source: Path, target: Path, synced: bool) -> Run:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    began = time.perf_counter()
    arguments = [*command, str(source), str(target), "--json", "--quiet", "--fsync" if synced else "--no-fsync"]
    process = subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
    memory = Memory(process.pid)
    output, _ = process.communicate()
    wall = time.perf_counter() - began
    memory.stop()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Run(wall, json.loads(output)["seconds"], memory.anonymous, memory.resident)


class Memory:
    """Peak memory of a process, sampled while it runs (Linux; zeros elsewhere)."""

    def __init__(self, pid: int) -> None:
        self.path = Path(f"/proc/{pid}/smaps_rollup")
        self.anonymous = self.resident = 0.0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stopped.wait(0.03):
            try:
                fields = dict(line.split(":") for line in self.path.read_text().splitlines()[1:])
            except (OSError, ValueError):
                return
            self.anonymous = max(self.anonymous, int(fields["Anonymous"].split()[0]) / 1000)
            self.resident = max(self.resident, int(fields["Rss"].split()[0]) / 1000)

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()


def report(rows: list[Row], repeat: int) -> str:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    head = (
        f"Best of {repeat}, warm cache, {machine}. `python benchmarks/convert.py --write` made this table.\n\n"
        "| conversion | GB | cp | fill | fill / cp | command | command / cp | synced: cp | command | ratio "
        "| anonymous MB | RSS MB |\n|" + "---|" * 12
    )
    return "\n".join([head, *(line(row) for row in rows)]) + "\n"


def line(row: Row) -> str:
    fill = row.convert.stages["fill"]
    cells = [
        row.what,
        f"{row.gigabytes:.2f}",
        f"{row.copy.wall:.2f} s",
        f"{fill:.2f} s",
        f"**{fill / row.copy.wall:.2f}**",
        f"{row.convert.wall:.2f} s",
        f"**{row.convert.wall / row.copy.wall:.2f}**",
        f"{row.copy_synced.wall:.2f} s",
        f"{row.convert_synced.wall:.2f} s",
        f"{row.convert_synced.wall / row.copy_synced.wall:.2f}",
        f"{row.convert.anonymous:.0f}",
        f"{row.convert.resident:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
