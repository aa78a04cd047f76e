"""The names by which users of Megatron, Megatron-Bridge and others know our options and commands, as two tables: what
means the same works, and of the rest the error says what it is called here.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from typer.core import TyperCommand, TyperGroup

ALIASES = {
    "--tensor-model-parallel-size": "--tp",
    "--tensor-parallel-size": "--tp",
    "--target-tensor-model-parallel-size": "--tp",
    "--target-tensor-parallel-size": "--tp",
    "--pipeline-model-parallel-size": "--pp",
    "--pipeline-parallel-size": "--pp",
    "--target-pipeline-model-parallel-size": "--pp",
    "--target-pipeline-parallel-size": "--pp",
    "--virtual-pipeline-model-parallel-size": "--vpp",
    "--num-virtual-stages-per-pipeline-rank": "--vpp",
    "--expert-model-parallel-size": "--ep",
    "--expert-parallel-size": "--ep",
    "--target-expert-model-parallel-size": "--ep",
    "--target-expert-parallel-size": "--ep",
    "--expert-tensor-parallel-size": "--etp",
    "--target-expert-tensor-parallel-size": "--etp",
    "--decoder-first-pipeline-num-layers": "--first-stage-layers",
    "--decoder-last-pipeline-num-layers": "--last-stage-layers",
    "--ckpt-format": "--format",
    "--dist-ckpt-format": "--format",
    "--ckpt-step": "--iteration",
    "--max-workers": "--workers",
}
"""What others call it, and what it is here: the same thing with the same values. `_` for `-` works, too."""

ARGUMENTS = {
    "hf-to-megatron": "HF MEGATRON",
    "megatron-to-hf": "MEGATRON HF",
    "plan": "SOURCE TARGET",
    "verify": "HF MEGATRON",
    "diff": "A B",
    "roundtrip": "SOURCE",
    "inspect": "PATH",
    "generate": "CHECKPOINT PROMPT",
    "chat": "CHECKPOINT",
    "make-checkpoint": "TARGET",
}
"""What commands take without an option, if it is a checkpoint, in their order."""

_SOURCE = "what to read is an argument without an option: {usage}"
_TARGET = "what to make is an argument without an option: {usage}"
_HF = "the Hugging Face folder is an argument without an option: {usage}"
_MEGATRON = "the Megatron checkpoint is an argument without an option: {usage}"
_COMMAND = "the direction is a command: hf-to-megatron or megatron-to-hf"
_NO_DEVICES = "nothing is built to convert: no GPU, no processes and no such option are needed"
_FROM_CONFIG = "the model's sizes come from its config.json"

_CONVERSIONS = ("hf-to-megatron", "megatron-to-hf")
_READING = tuple(command for command in ARGUMENTS if command != "make-checkpoint")
FITS = {
    _SOURCE: _READING,
    _TARGET: (*_CONVERSIONS, "plan", "make-checkpoint"),
    _HF: tuple(ARGUMENTS),
    _MEGATRON: _READING,
    _COMMAND: _CONVERSIONS,
    _NO_DEVICES: (*_CONVERSIONS, "plan"),
    _FROM_CONFIG: _READING,
}
"""The commands of which a hint is true; all, if it does not stand here."""

HINTS = {
    "--num-layers-per-virtual-pipeline-stage": "--vpp, which counts model chunks per rank: layers / (PP x that number)",
    "--load": _SOURCE,
    "--load-dir": _SOURCE,
    "--source": _SOURCE,
    "--input": _SOURCE,
    "--save": _TARGET,
    "--save-dir": _TARGET,
    "--output": _TARGET,
    "--output-dir": _TARGET,
    "--target": _TARGET,
    "--hf-model": _HF,
    "--hf-model-path": _HF,
    "--hf-path": _HF,
    "--hf-checkpoint": _HF,
    "--hf-dir": _HF,
    "--megatron-path": _MEGATRON,
    "--megatron-model": _MEGATRON,
    "--mcore-model": _MEGATRON,
    "--mcore-path": _MEGATRON,
    "--origin-hf-dir": "--config, for the tokenizer and the settings of the original model",
    "--to-mcore": _COMMAND,
    "--to-megatron": _COMMAND,
    "--to-hf": _COMMAND,
    "--mcore2hf": _COMMAND,
    "--convert-checkpoint-from-megatron-to-transformers": _COMMAND,
    "--torch-dtype": "--dtype",
    "--params-dtype": "--dtype",
    "--target-params-dtype": "--dtype",
    "--bf16": "--dtype",
    "--fp16": "--dtype",
    "--fp32": "--dtype",
    "--context-parallel-size": "no option: weights do not depend on context parallelism",
    "--sequence-parallel": "no option: weights do not depend on sequence parallelism",
    "--distributed-timeout-minutes": _NO_DEVICES,
    "--device-map": _NO_DEVICES,
    "--use-cpu-initialization": _NO_DEVICES,
    "--num-layers": _FROM_CONFIG,
    "--hidden-size": _FROM_CONFIG,
    "--num-attention-heads": _FROM_CONFIG,
    "--model-type": _FROM_CONFIG,
    "--tokenizer-model": "--config, for the folder that has the tokenizer",
    "--vocab-size": "--padded-vocab-size, for the rows of the embedding",
    "--test-convert-precision": "the command verify, or roundtrip",
    "--no-progress": "--quiet",
    "--force": "--overwrite",
    "--not-strict": "no option: what no mapping claims, or is missing, is an error; register_mapping adds mappings",
    "--strict": "no option: what no mapping claims, or is missing, is always an error",
}
"""What others say, and what to say here where the values are others or there is no such option. An option alone is
followed by what the command's help says of it.
"""

OTHER_COMMANDS = {
    "import": "hf-to-megatron",
    "export": "megatron-to-hf",
    "convert": "hf-to-megatron or megatron-to-hf",
    "hf-to-mcore": "hf-to-megatron",
    "hf2mcore": "hf-to-megatron",
    "hf2mg": "hf-to-megatron",
    "to-mcore": "hf-to-megatron",
    "mcore-to-hf": "megatron-to-hf",
    "mcore2hf": "megatron-to-hf",
    "mg2hf": "megatron-to-hf",
    "to-hf": "megatron-to-hf",
    "compare": "verify or diff",
}


_OPTION = re.compile(r"--[a-z-]+")


class Command(TyperCommand):
    """A command that knows the others' names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {
            name: str(getattr(parameter, "help", None) or "")
            for parameter in self.params
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        for argument in _options(args):
            name = argument.partition("=")[0]
            if name not in own and (said := _said_here(name, own, str(ctx.info_name))):
                ctx.fail(f"No such option: {name}. Here: {said}.")
        return super().parse_args(ctx, list(_in_our_words(args, own)))


class Group(TyperGroup):
    """The program, which knows the others' names of commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0].replace("_", "-") if args else ""
        if name in OTHER_COMMANDS and name not in self.commands:
            ctx.fail(f"No such command '{args[0]}'. Here: {OTHER_COMMANDS[name]}.")
        return super().resolve_command(ctx, args)


def _in_our_words(args: list[str], own: Container[str]) -> Iterator[str]:
    """Arguments with the options that are called otherwise here, where the command has them."""
    options = set(_options(args))
    for argument in args:
        name, equals, value = argument.partition("=")
        ours = ALIASES.get(_plain(argument)) if argument in options and name not in own else None
        yield f"{ours}{equals}{value}" if ours in own else argument


def _said_here(name: str, own: Mapping[str, str], command: str) -> str:
    """What an option that the command does not have is called here; nothing if it is unknown, or works.

    `own`: the command's options, with their help.
    """
    plain = _plain(name)
    said = ALIASES.get(plain) or HINTS.get(plain, "")
    ours = _OPTION.match(said)
    if ours is not None and ours[0] not in own:
        return f"{ours[0]}, for which {command} has no use"
    if plain in ALIASES or command not in FITS.get(said, (command,)):
        return ""
    if said in own:
        return f"{said} ({own[said].partition('. ')[0].rstrip('.')})"
    return said.format(usage=f"{command} {ARGUMENTS.get(command, '')}")


def _options(args: Iterable[str]) -> Iterator[str]:
    """Those before a `--`."""
    for argument in args:
        if argument == "--":
            return
        if argument.startswith("--"):
            yield argument


def _plain(argument: str) -> str:
    return argument.partition("=")[0].replace("_", "-")
