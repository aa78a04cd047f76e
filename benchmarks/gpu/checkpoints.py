"""Checkpoints of real shapes, made one after the other by other cores while parts run: each step waits until the disk
has room for it, as those that no part needs any more are removed.
"""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from gpu.parts import Shape

COMMAND = (sys.executable, "-m", "qwen3vl_convert.cli.app")
SPARE = 3.0
"""GB of the disk that are left alone."""
_LOOK = 0.5
"""Seconds between two looks at the disk."""


class Checkpoints:
    """In `folder`, by name; each has hf/ and run/. `log` takes what the commands say, and how long they took."""

    def __init__(self, shapes: Mapping[str, Shape], folder: Path, env: Mapping[str, str], log: IO[str]) -> None:
        self._shapes, self._folder, self._env, self._log = shapes, folder, env, log
        self._settled = {name: threading.Event() for name in shapes}
        self._ready: set[str] = set()
        self._released: set[str] = set()
        self._process: tuple[str, subprocess.Popen[bytes]] | None = None
        self._thread = threading.Thread(target=self._make_all, daemon=True)

    def start(self) -> None:
        """Begin with the first."""
        self._thread.start()

    def path(self, name: str) -> Path:
        """Where it is, or will be."""
        return self._folder / name

    def wait(self, name: str, seconds: float) -> bool:
        """Whether it is ready, after as many seconds at most."""
        self._settled[name].wait(seconds)
        return name in self._ready

    def release(self, name: str) -> None:
        """Remove it, or do not make it."""
        self._released.add(name)
        if self._process is not None and self._process[0] == name:
            self._process[1].terminate()
            self._process[1].wait()
        shutil.rmtree(self.path(name), ignore_errors=True)

    def stop(self) -> None:
        """Remove all, and end what is under way."""
        for name in self._shapes:
            self.release(name)
        if self._thread.ident is not None:
            self._thread.join()

    def _make_all(self) -> None:
        began = time.monotonic()
        for name, shape in self._shapes.items():
            try:
                if all(self._room(name, shape) and self._run(name, step) for step in self._steps(name, shape)):
                    self._ready.add(name)
                    self._say(f"{name}: {shape}, there {time.monotonic() - began:.0f} s after the start")
            except OSError as error:
                self._say(f"{name}: {error}")
            finally:  # no part waits for what will never come
                self._settled[name].set()

    def _steps(self, name: str, shape: Shape) -> Iterator[tuple[str, ...]]:
        folder = self.path(name)
        folder.mkdir(exist_ok=True)
        layers = () if shape.layers is None else ("--layers", str(shape.layers))
        yield "make-checkpoint", str(folder / "hf"), "--size", shape.size, *layers, "--quiet"
        yield "hf-to-megatron", str(folder / "hf"), str(folder / "run"), *shape.layout, "--no-fsync", "--quiet"

    def _room(self, name: str, shape: Shape) -> bool:
        """Wait for it; False where it will never come, or nobody wants it any more."""
        while name not in self._released:
            if shutil.disk_usage(self._folder).free / 1e9 >= shape.gigabytes + SPARE:
                return True
            if not any(self.path(other).exists() for other in self._shapes if other != name):
                self._say(f"{name}: {shape.gigabytes} GB are not free in {self._folder}")
                return False
            time.sleep(_LOOK)
        return False

    def _run(self, name: str, step: tuple[str, ...]) -> bool:
        if name in self._released:
            return False
        process = subprocess.Popen((*COMMAND, *step), env=dict(self._env), stdout=self._log, stderr=self._log)
        self._process = name, process
        code = process.wait()
        self._process = None
        if code and name not in self._released:
            self._say(f"{name}: {' '.join(step)}: exit code {code}")
        return code == 0

    def _say(self, text: str) -> None:
        print(text, file=self._log, flush=True)
