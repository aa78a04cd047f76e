"""What `generate` and `chat` share: a checkpoint that can be asked, and how an answer is shown."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_convert.cli.instructions import AmxTrial
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.quantities import amount, duration, figure

if TYPE_CHECKING:
    from qwen3vl_convert.dims import Dims
    from qwen3vl_convert.inference import Completion, Engine, SamplingParams
    from qwen3vl_convert.inference.processing import Prepared, Processing

_MODEL, _SAMPLING = "The model", "How tokens are chosen"
DEVICES, DTYPES = ("auto", "cpu", "cuda"), ("bf16", "fp16", "fp32")
_LONG = 10.0
"""Seconds after which a wait is worth a line where there is no terminal."""

Checkpoint = Annotated[str, typer.Argument(help="A checkpoint of either format, or a Hub id.")]
Config = Annotated[
    str | None,
    typer.Option(
        "--config", help="Folder or Hub id with tokenizer, processor and template, and a Megatron checkpoint's config."
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="auto (a GPU if there is one), cpu or cuda.", rich_help_panel=_MODEL)
]
ModelDtype = Annotated[
    str | None,
    typer.Option("--dtype", help="bf16, fp16 or fp32; by default what is stored.", rich_help_panel=_MODEL),
]
Quantization = Annotated[
    str | None,
    typer.Option("--quantization", help="int8: the text model's weights in eight bits.", rich_help_panel=_MODEL),
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", help="0: the most probable token each time.", rich_help_panel=_SAMPLING),
]
_WITH_TEMPERATURE = "With --temperature; by default what generation_config.json recommends."
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help=f"Of the most probable, this share. {_WITH_TEMPERATURE}", rich_help_panel=_SAMPLING),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", help=f"Of the most probable, so many. {_WITH_TEMPERATURE}", rich_help_panel=_SAMPLING),
]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed, the same answer.", rich_help_panel=_SAMPLING)]


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model, and where and how it computes. Raises `UsageError`."""

    checkpoint: str
    config: str | None
    iteration: int | str | None
    device: str
    dtype: str | None
    quantization: str | None

    def __post_init__(self) -> None:
        for option, value, known in (("--device", self.device, DEVICES), ("--dtype", self.dtype, DTYPES)):
            if value is not None and value not in known:
                raise UsageError(f"{option} {value}: expected one of {', '.join(known)}.")

    @property
    def megatron(self) -> bool:
        from qwen3vl_convert.inspection import is_megatron

        return self.iteration is not None or is_megatron(Path(self.checkpoint))

    def files(self) -> Path | None:
        """Where tokenizer, processor and template are."""
        from qwen3vl_convert.inference.processing import find_files

        return find_files(self.checkpoint, self.config, self.iteration)

    def dims(self) -> "Dims":
        """The model's sizes, without a look at its weights."""
        from qwen3vl_convert.dims import CONFIG_FILE, Dims, read_config
        from qwen3vl_convert.huggingface.hub import resolve
        from qwen3vl_convert.megatron.checkpoint import read_megatron

        if self.megatron and self.config is None:
            return read_megatron(Path(self.checkpoint), self.iteration).dims()
        source, weights = (self.config, False) if self.megatron and self.config else (self.checkpoint, True)
        folder = resolve(source, weights=weights).folder
        return Dims.from_config(read_config(folder), str(folder / CONFIG_FILE))

    def processing(self) -> "Processing":
        """Raises `InputError` where the checkpoint has no tokenizer, before any weight is read."""
        from qwen3vl_convert.inference.processing import open_processing

        return open_processing(self.files(), self.dims(), self.checkpoint)

    def engine(self, processing: "Processing | None", say: Callable[[Iterable[str]], None]) -> "Engine":
        """The model with its weights, ready for one request at a time; `say` is told what a user should know."""
        import torch

        from qwen3vl_convert.inference import Engine, EngineOptions, load_model

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with AmxTrial(device == "cpu" and self.dtype in (None, "bf16")) as trial:
            model = load_model(
                self.checkpoint,
                device=device,
                dtype=self.dtype,
                quantization=self.quantization,
                config=self.config,
                iteration=self.iteration,
            )
            say(trial.conclude() if model.dtype == torch.bfloat16 else ())
        eos = processing.eos_token_ids if processing else ()
        return Engine(model, EngineOptions(max_running=1, eos_token_ids=eos), tokenizer=processing)


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the user says about it; None is the makers' recommendation, where there is one."""

    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None

    def __post_init__(self) -> None:
        if not self.temperature and (self.top_p is not None or self.top_k is not None):
            raise UsageError("--top-p, --top-k: of use with --temperature only. Add it, or leave them out.")
        self.parameters({}, 1)

    def parameters(self, recommended: dict[str, Any], max_new_tokens: int) -> "SamplingParams":
        """Raises `UsageError` for numbers that make no sense."""
        from qwen3vl_convert.inference.engine.requests import SamplingParams

        said = {"top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in said.items() if value is not None}
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            **({**recommended, **given} if self.temperature else {}),
        )

    def notes(self, recommended: dict[str, Any]) -> tuple[str, ...]:
        """What is not as the user said it."""
        said = {"top_p": self.top_p, "top_k": self.top_k}
        taken = [f"{name} {value}" for name, value in recommended.items() if said.get(name) is None]
        return (f"{', '.join(taken)}: from generation_config.json.",) if self.temperature and taken else ()


def check_prompt(dims: "Dims", token_ids: Sequence[int], asked: int | None) -> None:
    """Raise `UsageError`, before any weight is read, for tokens that the model does not have, or too many for it."""
    from qwen3vl_convert.inference.engine.requests import CONTEXT, check_room, check_vocabulary

    check_vocabulary(token_ids, dims.vocab)
    check_room(len(token_ids), asked or 1, {CONTEXT: dims.max_positions})


def room_for(engine: "Engine", prompt_tokens: int, asked: int | None, usual: int) -> int:
    """How many tokens an answer may have: as asked for, or the usual as far as they fit."""
    if asked is not None:
        return asked
    most: int = min(engine.context_length, engine.allocator.total * engine.options.page_size)
    return max(1, min(usual, most - prompt_tokens))


def answer(
    engine: "Engine",
    prompt: "Prepared",
    sampling: "SamplingParams",
    say: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> "Completion":
    """Ask, and `say` the text as it comes; until it ends, or `stopped` says so. Raises as the engine does."""
    from qwen3vl_convert.inference import Request

    with engine.stream(Request(token_ids=prompt.token_ids, visual=prompt.visual, sampling=sampling)) as stream:
        for event in stream:
            if event.text:
                say(event.text)
            if stopped():
                stream.close()
                break
    completion = stream.completion
    assert completion is not None
    return completion


def rate(found: "Completion") -> float | None:
    """Tokens in a second, once the first is there; None where there is no second one."""
    if found.first_token_seconds is None or len(found.token_ids) < 2:
        return None
    decoding: float = max(found.seconds - found.first_token_seconds, 1e-9)
    return (len(found.token_ids) - 1) / decoding


def told(found: "Completion") -> str:
    """One line about how it went."""
    first = "" if found.first_token_seconds is None else f", the first after {duration(found.first_token_seconds)}"
    speed = rate(found)
    fast = "" if speed is None else f", then {figure(speed)} tokens/s"
    cached = f" ({found.cached_tokens} from the cache)" if found.cached_tokens else ""
    ended = {"length": "; cut off at the most tokens", "abort": "; stopped"}.get(found.finish_reason, "")
    return f"{amount(found.prompt_tokens, 'token')} in{cached}, {len(found.token_ids):,} out{first}{fast}{ended}"


def printable(text: str) -> str:
    """Without what could move a terminal's cursor: a checkpoint is untrusted, and so is what it says."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


@contextmanager
def waiting(what: str, quiet: bool) -> Iterator[None]:
    """Says on stderr what takes a while: a spinner on a terminal, a line elsewhere if it took long."""
    began = time.monotonic()
    if quiet or not sys.stderr.isatty():
        yield
        if not quiet and (took := time.monotonic() - began) > _LONG:
            print(f"{what}: {duration(took)}", file=sys.stderr)
        return
    from rich.console import Console as Rich

    with Rich(stderr=True).status(what):
        yield


def token_ids_of(text: str) -> tuple[int, ...]:
    """`1,2,3` or `1 2 3`. Raises `UsageError`."""
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() and len(part) < 12 for part in parts):
        raise UsageError(f"--token-ids {text[:60]}: expected numbers with commas between them, such as 1,2,3.")
    return tuple(int(part) for part in parts)
