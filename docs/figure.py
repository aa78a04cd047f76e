"""Draw a real run of the program as docs/images/demo.svg: the commands are run, and what they print is drawn."""

import io
import re
import tempfile
from pathlib import Path

from examples import run
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

COMMANDS = (
    "qwen3vl-convert make-checkpoint model --size 2b --layers 6",
    "qwen3vl-convert hf-to-megatron model checkpoint --tp 2 --pp 2",
    "qwen3vl-convert megatron-to-hf checkpoint back",
    "qwen3vl-convert verify back checkpoint",
    "qwen3vl-convert explain model.language_model.layers.2.self_attn.k_proj.weight --model back --tp 2 --pp 2 --rank 1",
)
_WIDTH = 116
_STYLES = (
    (re.compile(r"^note: .*$", re.MULTILINE), "dim"),
    (re.compile(r"^ (model|tensors|time|proof|target)\b", re.MULTILINE), "cyan"),
    (re.compile(r"^EQUAL.*$", re.MULTILINE), "bold green"),
    (re.compile(r" : .*$", re.MULTILINE), "yellow"),
)
_PROGRESS = re.compile(r"^\w+: \d+% of .*\n", re.MULTILINE)
"""What a slow disk makes the program say where it has no terminal to draw a bar on."""


def draw(target: Path) -> None:
    """Run the commands in a temporary folder and write the picture."""
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory() as folder:
        for number, command in enumerate(COMMANDS):
            console.print(Text.assemble("" if number == 0 else "\n", ("$ ", "bold green"), (command, "bold")))
            text = Text(_tight(run(command, Path(folder))))
            for pattern, style in _STYLES:
                text.highlight_regex(pattern, style)
            console.print(text)
    # without its web font: pages that show the picture do not load one, and a reader's own monospace font does as well
    template = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = template.replace("Fira Code, monospace", "DejaVu Sans Mono, Menlo, Consolas, monospace")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(console.export_svg(title="qwen3vl-convert", code_format=template, unique_id="demo"))


def _tight(text: str) -> str:
    return re.sub(r"\n{2,}", "\n", _PROGRESS.sub("", text))
