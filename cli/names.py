"""The names by which users of Megatron, Megatron-Bridge and others know our options and commands, as two tables: what
means the same works, and of the rest the error says what it is called here.
"""

from collections.abc import Iterable, Iterator
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

_SOURCE = "what to read is the first argument, without an option"
_TARGET = "what to make is the second argument, without an option"
_EITHER = "both folders are arguments without an option: hf-to-megatron HF MEGATRON, megatron-to-hf MEGATRON HF"
_COMMAND = "the direction is a command: hf-to-megatron or megatron-to-hf"
_DTYPE = "--dtype bf16, fp16, fp32, or keep, which is the default"
_NO_DEVICES = "nothing is built to convert: no GPU, no processes and no such option are needed"
_FROM_CONFIG = "the model's sizes come from its config.json"

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
    "--hf-model": _EITHER,
    "--hf-model-path": _EITHER,
    "--hf-path": _EITHER,
    "--hf-checkpoint": _EITHER,
    "--hf-dir": _EITHER,
    "--megatron-path": _EITHER,
    "--megatron-model": _EITHER,
    "--mcore-model": _EITHER,
    "--mcore-path": _EITHER,
    "--origin-hf-dir": "--config, for the tokenizer and the settings of the original model",
    "--to-mcore": _COMMAND,
    "--to-megatron": _COMMAND,
    "--to-hf": _COMMAND,
    "--mcore2hf": _COMMAND,
    "--convert-checkpoint-from-megatron-to-transformers": _COMMAND,
    "--torch-dtype": _DTYPE,
    "--params-dtype": _DTYPE,
    "--target-params-dtype": _DTYPE,
    "--bf16": _DTYPE,
    "--fp16": _DTYPE,
    "--fp32": _DTYPE,
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
"""What others say, and what to say here where the values are others or there is no such option."""

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


class Command(TyperCommand):
    """A command that knows the others' names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
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


def _in_our_words(args: list[str], own: set[str]) -> Iterator[str]:
    """Arguments with the options that are called otherwise here, where the command has them."""
    options = set(_options(args))
    for argument in args:
        name, equals, value = argument.partition("=")
        ours = ALIASES.get(_plain(argument)) if argument in options and name not in own else None
        yield f"{ours}{equals}{value}" if ours in own else argument


def _said_here(name: str, own: set[str], command: str) -> str:
    """What an option that the command does not have is called here; nothing if it is unknown, or works."""
    ours = ALIASES.get(_plain(name))
    if ours is None:
        return HINTS.get(_plain(name), "")
    return "" if ours in own else f"{ours}, for which {command} has no use"


def _options(args: Iterable[str]) -> Iterator[str]:
    """Those before a `--`."""
    for argument in args:
        if argument == "--":
            return
        if argument.startswith("--"):
            yield argument


def _plain(argument: str) -> str:
    return argument.partition("=")[0].replace("_", "-")
