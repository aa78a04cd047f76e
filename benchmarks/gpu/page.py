"""Results as they come, and the page that is made of them: docs/gpu-results.md. Imports nothing that may not be
installed.

A part has a file of its own, NAME.jsonl, to which each line is added as soon as it is known: what it ran on, a row for
each check, how it ended. So a part that is killed loses nothing, and a part that is run again takes the place of its
earlier self.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu.parts import PARTS, Part

PAGE = "page.md"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of one of `TABLES`, and whether it is as it must be."""

    table: str
    cells: tuple[str, ...]
    passed: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """How a part ended: ok, FAILED, TIMED OUT or SKIPPED, after how many seconds; `why` where it was skipped."""

    result: str
    seconds: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """All that is known of a part. `facts`: what it ran on, by name; `ended` is None for one that was cut off."""

    part: Part
    facts: dict[str, str]
    rows: tuple[Row, ...]
    ended: Ended | None

    @property
    def failed(self) -> int:
        return sum(not row.passed for row in self.rows)

    @property
    def passed(self) -> bool:
        return self.ended is not None and self.ended.result == "ok" and not self.failed


# ---- files -----------------------------------------------------------------------------------------------------------


def file_of(out: Path, part: Part) -> Path:
    """Where a part's results are."""
    return out / f"{part.name}.jsonl"


def add(out: Path, part: Part, found: Row | Ended | dict[str, str]) -> None:
    """Add a line to a part's results: facts as a dictionary."""
    kind = "facts" if isinstance(found, dict) else type(found).__name__.lower()
    said = found if isinstance(found, dict) else asdict(found)
    with file_of(out, part).open("a") as file:
        file.write(json.dumps({kind: said}) + "\n")


def results(out: Path) -> list[Result]:
    """Of every part that was begun, in the order of `PARTS`."""
    return [_result(part, file_of(out, part)) for part in PARTS if file_of(out, part).exists()]


def _result(part: Part, file: Path) -> Result:
    facts: dict[str, str] = {}
    rows, ended = [], None
    for kind, said in _lines(file):
        if kind == "facts":
            facts |= said
        elif kind == "row":
            rows.append(Row(said["table"], tuple(said["cells"]), said["passed"]))
        else:
            ended = Ended(**said)
    return Result(part, facts, tuple(rows), ended)


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    """(kind, what it says). A last line that was cut off is not counted."""
    for line in file.read_text().splitlines():
        try:
            ((kind, said),) = json.loads(line).items()
        except ValueError:
            return
        yield kind, said


# ---- the page --------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# On a GPU

`make gpu-check`, or without an environment of the project's own `python3 benchmarks/gpu_check.py`, runs everything that
only a GPU can show, in the order of what it tells: kernels and captured graphs, logits of tiny models, then the
verifier, a prefill and the engine at real shapes. Weights are random. Each part is a process with a time limit of its
own and keeps what it finds as it finds it, so that whatever fails or has no time takes nothing else along. The exit
code is 1 if anything failed or was skipped. How much may differ, and why, is said at the top of
`benchmarks/gpu/checks.py`; `--list` lists the parts.

## How to run it

Where the project is installed: `make gpu-check`. Otherwise a checkout is enough, on a machine that has torch for its
GPU, transformers, safetensors, typer, rich, PyYAML, huggingface_hub, psutil, pillow, torchvision and pytest. What it
lacks, if it has no network either, goes into the folder `.wheels` of the checkout before that is carried there:

    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \\
        --platform manylinux2014_x86_64 -d .wheels megatron-core==0.19.2 isal==1.9.1

Then, in the checkout on that machine:

    LIMIT=540 python3 benchmarks/gpu_check.py

| variable | option | means |
| --- | --- | --- |
| `LIMIT` | `--limit` | seconds for everything (default 3600); a part that would not have its least time is skipped |
| `SLACK` | `--slack` | what each part's own limit is multiplied by, for a slower machine (default 1) |
| `PARTS` | `--part` | the parts to run, for a second call that does what the first had no time for (default all) |
| `DEVICE` | `--device` | `cpu` rehearses all of it with tiny models, which says nothing of a GPU (default cuda) |
| `OUT` | `--out` | folder for the results (default `gpu-results`) |

A GPU with 80 GB and a disk with 64 GB free are enough: checkpoints are made by other cores while parts run, and removed
as soon as no part needs them. Most of the time goes into reading weights; on 16 cores it should be ten minutes.

In `OUT`, `summary.txt` has a line per part, `NAME.txt` what a part printed, `NAME.jsonl` what it found, and `page.md`
is this page with the figures: copy it to `docs/gpu-results.md` to record them. Results of several calls become one page
when their files lie in one folder: `python3 benchmarks/gpu_check.py --out FOLDER --page`.

`make gpu-rehearsal` (`DEVICE=cpu python3 benchmarks/gpu_check.py`) rehearses everything in a few minutes without a GPU;
the tests rehearse the first two parts.

"""
"""What the page says whatever was found."""

NOTHING = """\
## Results

No figures have been recorded: it has not been run on a GPU yet.
"""

REHEARSAL = "**A rehearsal on a CPU with tiny models: it shows that the script works, and nothing of a GPU.**\n\n"


@dataclass(frozen=True, slots=True)
class Table:
    """`note` is said below it."""

    head: tuple[str, ...]
    note: str


TABLES = {
    "errors": Table(("part", "check", "error"), "What a check raised; its part's text has the traceback."),
    "sanity": Table(("what", "found"), ""),
    "logits": Table(
        ("part", "what", "model", "dtype", "measured", "bound"),
        "Measured is the greatest difference in float32, and the root mean square error in bfloat16.",
    ),
    "served": Table(
        ("served", "dtype", "CUDA graphs", "largest difference", "allowed"),
        "Prompts of text, images and video, one after the other, prefilled in chunks of 24 tokens and decoded for 12 "
        "steps by captured graphs: none captured is a failure, unless the host has to choose the experts. Figures as "
        "in the table of logits.",
    ),
    "verified": Table(
        (
            *("verify --logits", "dtype", "model", "mode", "expected", "found"),
            *("largest difference", "allowed", "time", "peak memory"),
        ),
        "Of the prompt that came nearest to what is allowed, or beyond it. Weights are compared once, for themselves; "
        "the time has another reading of them in it. Memory is the device's.",
    ),
    "prefill": Table(
        ("prefill, bfloat16", "Megatron model", "transformers, sdpa", "ratio"),
        "Best of several runs, the two in turn; a ratio below one means that the Megatron model took less time.",
    ),
    "generated": Table(
        (
            *("engine", "batch", "CUDA graphs", "prefill, tokens/s", "transformers", "ratio"),
            *("decode, tokens/s", "transformers", "ratio", "bandwidth"),
        ),
        "Beside transformers' `generate` on the same weights; a ratio above one means that the engine is faster. "
        "Bandwidth: how much of that of a copy decoding reaches, if it reads each weight and each cached key and value "
        "once.",
    ),
}
"""In the order of the page."""


def page(found: Sequence[Result]) -> str:
    """The whole page; of no results, what it says before there are any."""
    if not found:
        return INTRODUCTION + NOTHING
    rows = [row for result in found for row in result.rows]
    failed = sum(not row.passed for row in rows)
    heading = f"## Results\n\n{_rehearsal(found)}{_facts(found)} {len(rows)} checks, {failed} failed.\n\n"
    tables = (_table(name, [row for row in rows if row.table == name]) for name in TABLES)
    return INTRODUCTION + heading + _summary(found) + "".join(tables)


def write_page(out: Path) -> None:
    """Write it anew, whole or not at all."""
    staged = out / f"{PAGE}.part"
    staged.write_text(page(results(out)))
    staged.replace(out / PAGE)


def _rehearsal(found: Sequence[Result]) -> str:
    return REHEARSAL if any(result.facts.get("device") == "cpu" for result in found) else ""


def _facts(found: Sequence[Result]) -> str:
    """What it ran on, once for all parts that say the same."""
    said = dict.fromkeys(result.facts.get("said", "") for result in found)
    return " ".join(f"{one}." for one in said if one)


def _summary(found: Sequence[Result]) -> str:
    head = ("part", "what", "result", "checks", "failed", "seconds")
    return _lined(head, [_part_cells(result) for result in found]) + "\n"


def _part_cells(result: Result) -> tuple[str, ...]:
    ended = result.ended or Ended("cut off", 0)
    said = f"{ended.result}: {ended.why}" if ended.why else ended.result
    took = f"{ended.seconds:.0f}" if result.ended else "-"
    shown = said if said in ("ok",) else f"**{said}**"
    return result.part.name, result.part.what, shown, str(len(result.rows)), str(result.failed), took


def _table(name: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    table = TABLES[name]
    lines = _lined((*table.head, "passed"), ((*row.cells, "yes" if row.passed else "**NO**") for row in rows))
    return f"{lines}\n{table.note}\n\n" if table.note else f"{lines}\n"


def _lined(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |\n" for cells in lines)
