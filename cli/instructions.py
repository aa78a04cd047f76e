"""Instructions that a processor says it has, and a virtual machine refuses: torch would end without a word."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

VARIABLE, WITHOUT_AMX = "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16"
"""Of oneDNN, which multiplies for torch; read once, when it first multiplies."""
_TRIAL = "import torch; x = torch.ones(32, 64, dtype=torch.bfloat16); torch.nn.functional.linear(x, x)"
_PROCESSOR = Path("/proc/cpuinfo")
NOTE = "This machine offers AMX and refuses it: done without, more slowly."


class AmxTrial:
    """Whether AMX works, tried by a process beside this one; costs nothing where the processor does not offer it."""

    def __init__(self, wanted: bool) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if wanted and VARIABLE not in os.environ and _offered():
            command = [sys.executable, "-c", _TRIAL]
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def conclude(self) -> tuple[str, ...]:
        """Waits for the answer, has torch do without AMX where it does not work, and says so."""
        if self._process is None or self._process.wait() != -signal.SIGILL:
            return ()
        os.environ[VARIABLE] = WITHOUT_AMX
        return (NOTE,)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody waits any longer."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _offered() -> bool:
    try:
        return "amx_bf16" in _PROCESSOR.read_text(errors="replace")
    except OSError:
        return False
