"""The command line: one line per command."""

import sys
from typing import Annotated

import typer

from qwen3vl_convert.cli import chat, console, convert, diff, generate, look, verify

app = typer.Typer(
    name="qwen3vl-convert",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _all(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the program an error arose.")] = False,
) -> None:
    """Qwen3-VL checkpoints between Hugging Face and Megatron: proven, at the speed of a copy.

    Exit codes: 0 done, 1 compared and different, 2 wrong usage, 3 unusable input, 4 output cannot be written, 70 a bug,
    130 interrupted.
    """
    console.show_traceback = traceback


app.command("hf-to-megatron")(console.guarded(convert.hf_to_megatron))
app.command("megatron-to-hf")(console.guarded(convert.megatron_to_hf))
app.command("plan")(console.guarded(convert.plan))
app.command("verify")(console.guarded(verify.verify))
app.command("diff")(console.guarded(diff.diff))
app.command("roundtrip")(console.guarded(verify.roundtrip))
app.command("inspect")(console.guarded(look.inspect))
app.command("explain")(console.guarded(look.explain))
app.command("generate")(console.guarded(generate.generate))
app.command("chat")(console.guarded(chat.chat))
app.command("make-checkpoint")(console.guarded(look.make_checkpoint))


def main() -> None:
    """Entry point of `qwen3vl-convert`. `--traceback` is understood at any place."""
    arguments = sys.argv[1:]
    if "--traceback" in arguments:
        arguments = ["--traceback", *(a for a in arguments if a != "--traceback")]
    app(arguments)


if __name__ == "__main__":
    main()
