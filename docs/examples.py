"""Run the examples of a page and put what they print under them.

A block that opens with ```console run holds lines `$ command`, each followed by its output. The blocks of a page run
in order in one temporary folder; when a command fails, the page is not written. Figures (seconds, bytes) do not make a
page stale.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"(?<=```console run\n).*?(?=```$)", re.DOTALL | re.MULTILINE)
_VARIES = re.compile(r"(?:< )?\d[\d.]* (s|[kMGT]?B)\b")
_ROOT = Path(__file__).resolve().parents[1]


def commands(block: str) -> list[str]:
    """The commands of a block; one that ends in a backslash goes on in the next line."""
    return re.findall(r"^\$ ((?:.*\\\n)*.*)$", block, re.MULTILINE)


def refreshed(page: str) -> str:
    """The page with the output that its examples have now."""
    with tempfile.TemporaryDirectory() as folder:
        return BLOCK.sub(lambda found: _run_block(found[0], Path(folder)), page)


def run(command: str, folder: Path) -> str:
    """What a shell command prints on stdout and stderr, with `qwen3vl-convert` being this checkout's."""
    program = f'qwen3vl-convert() {{ {shlex.quote(sys.executable)} -m qwen3vl_convert.cli.app "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["bash", "-c", program + command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"$ {command}\n{done.stdout}\nexit code {done.returncode}")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip("\n"))


def _run_block(block: str, folder: Path) -> str:
    shown = []
    for command in commands(block):
        output = run(command, folder)
        shown.append(f"$ {command}\n{output}\n" if output else f"$ {command}\n")
    text = "".join(shown)
    return block if _steady(text) == _steady(block) else text


def _steady(text: str) -> str:
    """Without what differs from run to run: figures, which stages took long enough to be named, and widths."""
    return re.sub(r"[ ─]+", " ", re.sub(r"^ *time .*$", "", _VARIES.sub(r"# \1", text), flags=re.MULTILINE))
