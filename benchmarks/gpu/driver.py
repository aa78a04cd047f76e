"""Runs parts one after the other, each in a process of its own with a time limit, and keeps what each has found.
Imports nothing that may not be installed.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu.checkpoints import Checkpoints
from gpu.page import Ended, add, file_of, write_page
from gpu.parts import REHEARSED, SHAPES, Part, Shape

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cli", "mappings")
"""Packages that are symbolic links, which a copy of the tree may have lost."""
KILL_AFTER = 10.0
"""Seconds that a part has to end after it was told to."""


@dataclass(frozen=True, slots=True)
class Options:
    """`limit`: seconds for all; `slack`: what the limit of each part is multiplied by; `wheels`: a folder of those of
    what this machine lacks.
    """

    device: str
    limit: float
    slack: float
    out: Path
    wheels: Path
    work: Path | None = None


def run_all(parts: Sequence[Part], options: Options) -> None:
    """Run them. Whatever happens, what was found is kept in `options.out`."""
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.limit
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=options.work) as folder:
        env = prepared(Path(folder), options)
        shapes = REHEARSED if options.device == "cpu" else SHAPES
        wanted = {part.checkpoint: shapes[part.checkpoint] for part in parts if part.checkpoint}
        with made(wanted, Path(folder), env, options.out) as checkpoints:
            for number, part in enumerate(parts):
                _one(part, options, env, checkpoints, deadline)
                later = {other.checkpoint for other in parts[number + 1 :]}
                if part.checkpoint and part.checkpoint not in later:
                    checkpoints.release(part.checkpoint)


# ---- surroundings ----------------------------------------------------------------------------------------------------


def prepared(work: Path, options: Options) -> dict[str, str]:
    """The environment of what is started: this checkout first, then the wheels."""
    for name in ROOMS:
        _mend(ROOT / "qwen3vl_convert" / name, Path("..") / name)
    site = work / "site"
    if wheels := [wheel for wheel in sorted(options.wheels.glob("*.whl")) if not _installed(wheel)]:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--no-cache-dir",
        ]
        subprocess.run([*pip, "--target", site, *wheels], check=True)
    paths = [ROOT, site, ROOT / "tests", ROOT / "benchmarks"]
    own = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    env = {"NCCL_SOCKET_IFNAME": "lo"} | dict(os.environ) | own  # one process: nothing to find outside
    return env | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})


def _installed(wheel: Path) -> bool:
    """Whether this Python has the package of a wheel already, in whatever version."""
    try:
        version(wheel.name.partition("-")[0])
    except PackageNotFoundError:
        return False
    return True


def _mend(link: Path, target: Path) -> None:
    """A package that is a symbolic link again, where only a file of that name, or nothing, is left of it."""
    if not (link / "__init__.py").exists():
        link.unlink(missing_ok=True)
        link.symlink_to(target)


@contextmanager
def made(wanted: dict[str, Shape], folder: Path, env: dict[str, str], out: Path) -> Iterator[Checkpoints]:
    """Checkpoints, under way; all are gone in the end."""
    with (out / "checkpoints.txt").open("a") as log:
        checkpoints = Checkpoints(wanted, folder, env, log)
        checkpoints.start()
        try:
            yield checkpoints
        finally:
            checkpoints.stop()


# ---- one part --------------------------------------------------------------------------------------------------------


def _one(part: Part, options: Options, env: dict[str, str], checkpoints: Checkpoints, deadline: float) -> None:
    file_of(options.out, part).unlink(missing_ok=True)
    began = time.monotonic()
    most = min(part.most * options.slack, deadline - began)
    if most < part.least:
        ended = Ended("SKIPPED", 0.0, f"{max(0, deadline - began):.0f} s were left, it wants {part.least}")
    elif part.checkpoint and not checkpoints.wait(part.checkpoint, most):
        ended = Ended("FAILED", time.monotonic() - began, "its checkpoint was not there, see checkpoints.txt")
    else:
        ended = _started(part, options, env, checkpoints, began + most)
    add(options.out, part, ended)
    write_page(options.out)
    _tell(part, ended, options.out)


def _started(part: Part, options: Options, env: dict[str, str], checkpoints: Checkpoints, until: float) -> Ended:
    """Run it in a process group of its own, so that nothing of it is left when its time is over."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{part.name}-", dir=options.work) as work:
        needs = ("--checkpoint", str(checkpoints.path(part.checkpoint))) if part.checkpoint else ()
        command = (*command_of(part, options), "--work", work, *needs)
        with (options.out / f"{part.name}.txt").open("w") as said:
            process = subprocess.Popen(
                command, env=env, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
            code = _waited(process, until)
    took = time.monotonic() - began
    if code is None:
        return Ended("TIMED OUT", took)
    return Ended("ok" if code == 0 else "FAILED", took, "" if code in (0, 1) else f"exit code {code}")


def command_of(part: Part, options: Options) -> tuple[str, ...]:
    """What carries a part out, but for its folders."""
    where = ("--device", options.device, "--out", str(options.out.resolve()))
    return sys.executable, "-m", "gpu.part", part.name, *where


def _waited(process: "subprocess.Popen[bytes]", until: float) -> int | None:
    """The exit code; None where its time was over, and it was ended."""
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(KILL_AFTER)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tell(part: Part, ended: Ended, out: Path) -> None:
    line = f"{ended.result:9} {part.name}: {ended.seconds:.0f} s{f', {ended.why}' if ended.why else ''}"
    with (out / "summary.txt").open("a") as summary:
        print(line, file=summary)
    print(line, flush=True)
    text = out / f"{part.name}.txt"
    if ended.result in ("FAILED", "TIMED OUT") and text.exists():
        for last in text.read_text(errors="replace").splitlines()[-6:]:
            print(f"          {last[:300]}", flush=True)
