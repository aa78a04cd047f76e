"""Draw a real conversation as docs/images/chat.svg: `qwen3vl-convert chat` on a terminal, with a model of its own.

docs/chat_figure.py           teach a tiny model a few answers by heart, and ask it; needs pillow, and some minutes
docs/chat_figure.py FOLDER    the same, and the model stays there

There is no small checkpoint of Qwen3-VL that can speak, and random weights say nothing that is worth a picture.
"""

import fcntl
import io
import itertools
import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests have a tokenizer of bytes
IMAGE = ROOT / "docs" / "images" / "chat.svg"
WIDTH = 110
COLOURS = {"green": (40, 170, 70), "yellow": (240, 210, 40)}
WHO = ("Who are you?", "A Qwen3-VL with 0.8 million parameters that has learned a few answers by heart.")
SEEN = "What do you see?"
ASKED = ("Who are you?", "/image flag.png", SEEN, "And at the top?", "/exit")
STEPS = 260


def flag(path: Path, top: str, bottom: str) -> Path:
    """Two stripes."""
    from PIL import Image

    image = Image.new("RGB", (64, 64), COLOURS[bottom])
    image.paste(COLOURS[top], (0, 0, 64, 32))
    image.save(path)
    return path


def lessons(folder: Path) -> Iterator[list[tuple[str, tuple[Path, ...], str]]]:
    """Conversations: (what is asked, what is shown with it, the answer) of each turn."""
    for top, bottom in itertools.permutations(COLOURS, 2):
        picture = flag(folder / f"{top}-{bottom}.png", top, bottom)
        seen = (SEEN, (picture,), f"Two stripes: {top} above, {bottom} below.")
        yield [seen]
        yield [(WHO[0], (), WHO[1]), seen, ("And at the top?", (), f"{top.capitalize()}.")]


def taught(folder: Path) -> Path:
    """A checkpoint that has learned the lessons; transformers' own model does the learning."""
    import transformers

    from inference_model.files import TINY, write_files
    from qwen3vl_convert import make_checkpoint
    from qwen3vl_convert.inference.processing import open_processing

    model_folder = folder / "model"
    make_checkpoint(model_folder, TINY, dtype="float32")
    write_files(model_folder)
    processing = open_processing(model_folder, TINY)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
    samples = [sample(processing, lesson) for lesson in lessons(folder)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for step in range(STEPS):
        loss = sum(model(**one).loss for one in samples) / len(samples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {float(loss):.3f}", flush=True)
    model.save_pretrained(model_folder)
    return model_folder


def sample(processing: Any, lesson: list[tuple[str, tuple[Path, ...], str]]) -> dict[str, torch.Tensor]:
    """Inputs of transformers' model, whose loss is over the answers and the marks that end them."""
    from qwen3vl_convert.inference.processing import Message

    said, ids, labels = [], list[int](), list[int]()
    end = processing.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for asked, shown, answer in lesson:
        said.append(Message("user", asked, shown))
        prompt = processing.prepare(said)
        ids += prompt.token_ids[len(ids) :]
        labels += [-100] * (len(ids) - len(labels))
        ids += (learned := [*processing.tokenizer(answer)["input_ids"], end])
        labels += learned
        said.append(Message("assistant", answer))
    found = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    found["mm_token_type_ids"] = (found["input_ids"] == processing.dims.image_token_id).long()
    return found | {"pixel_values": prompt.visual.pixel_values, "image_grid_thw": prompt.visual.image_grid_thw}


def conversation(model: Path) -> str:
    """What a terminal shows, as it was written to it."""
    pid, end = pty.fork()
    if not pid:
        os.chdir(model.parent)
        os.environ |= {
            "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
            "TERM": "xterm-256color",
            "OMP_NUM_THREADS": "1",
        }
        os.execv(
            sys.executable, [sys.executable, "-m", "qwen3vl_convert.cli.app", "chat", model.name, "--device", "cpu"]
        )
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    shown = ""
    for line in ASKED:
        shown += until(end, "> ")
        os.write(end, f"{line}\n".encode())
    shown += until(end, "\0")
    os.waitpid(pid, 0)
    return shown


def until(end: int, text: str) -> str:
    """What comes until `text` is the last of it, or until the program has ended."""
    shown = b""
    while not re.sub(rb"\x1b\[\?\d+[hl]", b"", shown).endswith(b"\n" + text.encode()):
        if not select.select([end], [], [], 120)[0]:
            raise SystemExit(f"nothing more after two minutes: {shown.decode(errors='replace')}")
        try:
            shown += os.read(end, 65536)
        except OSError:
            break
    return shown.decode(errors="replace")


def draw(shown: str, target: Path = IMAGE) -> None:
    """Write the picture of what a terminal was given."""
    shown = re.sub(r"\x1b\[\?\d+[hl]|\r", "", shown)
    shown = shown[shown.index("model. /help") :].strip()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), ("qwen3vl-convert chat model", "bold")))
    text = Text.from_ansi(shown)
    text.highlight_regex(re.compile(r"^> .*$", re.MULTILINE), "bold cyan")
    text.highlight_regex(re.compile(r"^model\. /help.*$", re.MULTILINE), "dim")
    console.print(text)
    template = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = template.replace("Fira Code, monospace", "DejaVu Sans Mono, Menlo, Consolas, monospace")
    target.write_text(console.export_svg(title="qwen3vl-convert chat", code_format=template, unique_id="chat"))


def main(place: Path) -> None:
    model = taught(place)
    flag(place / "flag.png", "green", "yellow")
    written = conversation(model)
    print(written)
    draw(written)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
