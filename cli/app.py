"""The command line: one line per command."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from qwen3vl_convert.cli import chat, console, convert, diff, generate, look, names, verify
from qwen3vl_convert.installed import NOT_INSTALLED, PROGRAM, program_version

app = typer.Typer(
    name=PROGRAM,
    cls=names.Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        found = program_version()
        print(f"{PROGRAM} {found}" + (", a checkout that is not installed" if found == NOT_INSTALLED else ""))
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", is_eager=True, callback=_say_version)
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the program an error arose.")] = False,
) -> None:
    """Qwen3-VL checkpoints between Hugging Face and Megatron: proven, at the speed of a copy.

    Exit codes: 0 done, 1 compared and different, 2 wrong usage, 3 unusable input, 4 output cannot be written, 70 a bug,
    130 interrupted.
    """
    console.show_traceback = traceback


COMMANDS: dict[str, Callable[..., None]] = {
    "hf-to-megatron": convert.hf_to_megatron,
    "megatron-to-hf": convert.megatron_to_hf,
    "plan": convert.plan,
    "verify": verify.verify,
    "diff": diff.diff,
    "roundtrip": verify.roundtrip,
    "inspect": look.inspect,
    "explain": look.explain,
    "generate": generate.generate,
    "chat": chat.chat,
    "make-checkpoint": look.make_checkpoint,
}
for name, function in COMMANDS.items():
    app.command(name, cls=names.Command)(console.guarded(function))


def main() -> None:
    """Entry point of `qwen3vl-convert`. `--traceback` is understood at any place."""
    arguments = sys.argv[1:]
    if "--traceback" in arguments:
        arguments = ["--traceback", *(a for a in arguments if a != "--traceback")]
    app(arguments, prog_name=PROGRAM)


if __name__ == "__main__":
    main()
