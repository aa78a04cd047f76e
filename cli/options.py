"""The options that several commands share, each written once."""

import re
from decimal import Decimal
from typing import Annotated

import typer

from qwen3vl_convert.errors import UsageError

_LAYOUT, _RUN, _OUTPUT = "Parallel layout", "How it is carried out", "Output"
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024), ("", 1000))
}

_LONGEST_ITERATION = 18
"""Digits; Python refuses to make a number of several thousand."""

Tp = Annotated[int, typer.Option("--tp", help="Tensor parallel size.", rich_help_panel=_LAYOUT)]
Pp = Annotated[int, typer.Option("--pp", help="Pipeline parallel size.", rich_help_panel=_LAYOUT)]
Vpp = Annotated[
    int | None, typer.Option("--vpp", help="Virtual pipeline: model chunks per pipeline rank.", rich_help_panel=_LAYOUT)
]
Ep = Annotated[int, typer.Option("--ep", help="Expert parallel size.", rich_help_panel=_LAYOUT)]
Etp = Annotated[int, typer.Option("--etp", help="Tensor parallel size of the experts.", rich_help_panel=_LAYOUT)]
FirstStage = Annotated[
    int | None,
    typer.Option(
        "--first-stage-layers", help="Layers on the first pipeline stage, if uneven.", rich_help_panel=_LAYOUT
    ),
]
LastStage = Annotated[
    int | None,
    typer.Option("--last-stage-layers", help="Layers on the last pipeline stage, if uneven.", rich_help_panel=_LAYOUT),
]
Dtype = Annotated[str, typer.Option("--dtype", help="keep, bf16, fp16 or fp32. `keep` copies bits.")]
Headless = Annotated[
    bool, typer.Option("--headless", help="The model has no output layer (embedding models), and is not tied.")
]
Iteration = Annotated[str | None, typer.Option("--iteration", help="Which iteration to read; the newest by default.")]
Format = Annotated[str, typer.Option("--format", help="torch_dist.")]
PaddedVocab = Annotated[
    int | None, typer.Option("--padded-vocab-size", help="Rows of the embedding, padded with zeros.")
]
VocabDivisor = Annotated[
    int | None,
    typer.Option("--make-vocab-size-divisible-by", help="Pad the embedding to a multiple; Megatron-LM wants 128 x TP."),
]
ForCore = Annotated[
    str, typer.Option("--for-megatron-core", help="any, 0.16 (to 0.18: common.pt) or 0.19 (common_state).")
]
MaxShard = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size", help="Largest file, as 5GB; by default split as the source, or as --config, or by 5GB."
    ),
]
MaxMemory = Annotated[str, typer.Option("--max-memory", help="Most memory for buffers, as 2GiB.", rich_help_panel=_RUN)]
Workers = Annotated[
    int | None,
    typer.Option("--workers", help="Threads; as many as cores (at most 8) by default.", rich_help_panel=_RUN),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=_RUN)]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace TARGET when the new one is complete.", rich_help_panel=_RUN),
]
Fsync = Annotated[
    bool,
    typer.Option("--fsync/--no-fsync", help="Wait until all is on the disk before publishing.", rich_help_panel=_RUN),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.", rich_help_panel=_RUN)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=_OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.", rich_help_panel=_OUTPUT)]


def parse_bytes(text: str, option: str) -> int:
    """`2GiB`, `5GB`, `500M` or a plain number, in bytes. Raises `UsageError` naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTkmgt]?i?[Bb]?)\s*", text)
    unit = (
        match[2].replace("b", "B").replace("k", "K").replace("m", "M").replace("g", "G").replace("t", "T")
        if match
        else ""
    )
    if match is None or unit not in _UNITS:
        raise UsageError(f"{option} {text}: expected a size such as 5GB or 512MiB.")
    return int(Decimal(match[1]) * _UNITS[unit])


def parse_iteration(text: str | None) -> int | str | None:
    """A number, `release`, or nothing."""
    if text is None or text == "release":
        return text
    if not text.isdecimal() or len(text) > _LONGEST_ITERATION:
        raise UsageError(f"--iteration {text}: expected a number or `release`.")
    return int(text)
