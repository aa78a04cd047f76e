"""generate: parse, call, print."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_convert.cli.console import Console
from qwen3vl_convert.cli.options import Iteration, Json, Quiet, parse_iteration
from qwen3vl_convert.cli.speaker import (
    Checkpoint,
    Config,
    Device,
    ModelChoice,
    ModelDtype,
    Quantization,
    Sampling,
    Seed,
    Temperature,
    TopK,
    TopP,
    answer,
    check_prompt,
    printable,
    rate,
    room_for,
    token_ids_of,
    told,
    waiting,
)
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.installed import need

if TYPE_CHECKING:
    from qwen3vl_convert.inference import Completion
    from qwen3vl_convert.inference.processing import Prepared, Processing

USUAL_TOKENS = 128


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to ask; `-` reads it from stdin.", show_default=False)
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", help="A picture to ask about: a file or a data URL. Repeatable.")
    ] = None,
    video: Annotated[list[str] | None, typer.Option("--video", help="A video to ask about. Repeatable.")] = None,
    token_ids: Annotated[
        str | None, typer.Option("--token-ids", help="Instead of PROMPT: its tokens, as 1,2,3. Tokens are printed.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it is, without the chat's template.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="What the chat's system message says.")] = None,
    config: Config = None,
    iteration: Iteration = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", help="Most tokens of the answer; 128 by default.", show_default=False),
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: ModelDtype = None,
    quantization: Quantization = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the text as it comes.", rich_help_panel="Output")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a checkpoint of either format, and print its answer: is it alive?

    Nothing is converted. The answer is the most probable one unless --temperature is given.
    """
    if stream and json:
        raise UsageError("--stream and --json: one object cannot come in pieces. Leave one of them out.")
    need("generate", "torch", *(() if token_ids is not None else ("transformers",)))
    with waiting("importing torch and transformers", quiet or prompt == "-"):
        sampling = Sampling(temperature, top_p, top_k, seed)
        choice = ModelChoice(checkpoint, config, parse_iteration(iteration), device, dtype, quantization)
        processing, asked = _prompt(choice, prompt, token_ids, tuple(image or ()), tuple(video or ()), raw, system)
    sink, recommended = Console(json, quiet), processing.sampling if processing else {}
    sampling.parameters(recommended, 1 if max_new_tokens is None else max_new_tokens)
    check_prompt(choice.dims(), asked.token_ids, max_new_tokens)
    sink.notes((*asked.notes, *sampling.notes(recommended)))
    with waiting(f"loading {checkpoint}", quiet):
        engine = choice.engine(processing, sink.notes)
    streams = stream and not quiet and processing is not None
    tokens = room_for(engine, len(asked.token_ids), max_new_tokens, USUAL_TOKENS)
    found = answer(engine, asked, sampling.parameters(recommended, tokens), _say if streams else _nothing)
    sink.result(_json(found, processing), print if streams else lambda: _show(found, processing))
    if not quiet and not json:
        print(told(found), file=sys.stderr)


def _prompt(
    choice: ModelChoice,
    prompt: str | None,
    token_ids: str | None,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    raw: bool,
    system: str | None,
) -> "tuple[Processing | None, Prepared]":
    """(what made the prompt and can read the answer, the prompt), before any weight is read."""
    from qwen3vl_convert.inference.processing import Message, Prepared

    if token_ids is not None:
        if prompt is not None or images or videos or raw or system is not None:
            raise UsageError("--token-ids is the whole prompt: leave out PROMPT, --image, --video, --raw, --system.")
        return None, Prepared(list(token_ids_of(token_ids)), None, "")
    if prompt is None:
        raise UsageError("expected a PROMPT, found none. Say what to ask, or pass --token-ids.")
    if raw and system is not None:
        raise UsageError("--system with --raw: there is no template to put it into. Leave one of them out.")
    text = sys.stdin.read() if prompt == "-" else prompt
    before = () if system is None else (Message("system", system),)
    processing = choice.processing()
    return processing, processing.prepare((*before, Message("user", text, images, videos)), raw)


def _say(text: str) -> None:
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _nothing(text: str) -> None:
    """The text is printed when all of it is there."""


def _show(found: "Completion", processing: "Processing | None") -> None:
    """The text, or the tokens where nothing can read them."""
    if processing is None:
        print(",".join(map(str, found.token_ids)))
    else:
        print(printable(found.text) if sys.stdout.isatty() else found.text)


def _json(found: "Completion", processing: "Processing | None") -> dict[str, Any]:
    speed = rate(found)
    return {
        "text": found.text if processing else None,
        "token_ids": list(found.token_ids),
        "finish_reason": found.finish_reason,
        "prompt_tokens": found.prompt_tokens,
        "cached_tokens": found.cached_tokens,
        "seconds": round(found.seconds, 4),
        "first_token_seconds": None if found.first_token_seconds is None else round(found.first_token_seconds, 4),
        "tokens_per_second": None if speed is None else round(speed, 2),
    }
