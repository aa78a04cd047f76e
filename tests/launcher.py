"""torchrun itself, for the tests that need no less."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from broken import user_environment

TESTS = Path(__file__).resolve().parent
TOLD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
"""What it leaves in the environment of the second of two processes."""


def torchrun(*program: str, folder: Path | None = None, processes: int = 2) -> "subprocess.CompletedProcess[str]":
    """A Python program, given as python takes it, in several processes of one machine, at a port of its own.

    What torchrun notes down for them in the folder for temporary files is gone with it.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = user_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), environment["PYTHONPATH"]])
    with tempfile.TemporaryDirectory(prefix="torchrun-") as scratch:
        environment["TMPDIR"] = scratch
        return subprocess.run(
            [*launch, *program], cwd=folder, capture_output=True, text=True, env=environment, timeout=600, check=False
        )
