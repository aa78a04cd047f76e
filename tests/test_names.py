"""What others call our options and commands: it works, or the error says what it is called here. And the program's own
name, version and completion.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

import qwen3vl_convert
from qwen3vl_convert.cli.app import COMMANDS, app
from qwen3vl_convert.cli.names import ALIASES, ARGUMENTS, FITS, HINTS, OTHER_COMMANDS

ROOT = Path(__file__).resolve().parents[1]
GROUP: Any = get_command(app)
OPTIONS = {
    name: {word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts)}
    for name, command in GROUP.commands.items()
}
EXPLAINED = "language_model.decoder.layers.1.self_attention.linear_qkv.weight"


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def said(result: Result) -> str:
    """Without the frame around an error."""
    return " ".join(re.sub("[│╭╮╰╯─]", "", result.stderr).split())


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_the_tables_are_about_names_that_are_not_ours() -> None:
    ours = set().union(*OPTIONS.values())
    assert set(ALIASES.values()) <= ours
    assert not (ALIASES.keys() | HINTS.keys()) & ours
    assert not ALIASES.keys() & HINTS.keys()
    assert all(re.fullmatch(r"--[a-z0-9-]+", name) for name in (*ALIASES, *HINTS))


def test_hints_name_options_and_commands_that_exist() -> None:
    ours = set().union(*OPTIONS.values())
    texts = [*HINTS.values(), *OTHER_COMMANDS.values()]
    assert {word for text in texts for word in re.findall(r"--[a-z-]+", text)} <= ours
    named = {word for text in OTHER_COMMANDS.values() for word in text.split() if word != "or"}
    assert named <= COMMANDS.keys()
    assert not OTHER_COMMANDS.keys() & COMMANDS.keys()


# ---- options ---------------------------------------------------------------------------------------------------------


SPELLINGS = [
    ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"],
    ["--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2"],
    ["--tensor-model-parallel-size=2", "--target-pipeline-model-parallel-size=2"],
    ["--tp", "2", "--pipeline_parallel_size=2"],
]


@pytest.mark.parametrize("words", SPELLINGS, ids=lambda words: words[0])
def test_others_names_of_sizes_mean_the_same(words: list[str]) -> None:
    expected = invoke("explain", EXPLAINED, "--tp", 2, "--pp", 2, "--rank", 3)
    assert expected.exit_code == 0
    assert "rank 3 of TP2 PP2" in expected.stdout
    found = invoke("explain", EXPLAINED, *words, "--rank", 3)
    assert (found.exit_code, found.stdout) == (0, expected.stdout), found.stderr


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_reaches_its_option(name: str) -> None:
    """What the option itself would say of a value that makes no sense, and its own name."""
    ours = ALIASES[name]
    command = next(command for command in COMMANDS if ours in OPTIONS[command])
    words = {"plan": ["hf"], "hf-to-megatron": ["hf", "run"], "megatron-to-hf": ["run", "hf"]}[command]
    assert said(invoke(command, *words, name, "?")) == said(invoke(command, *words, ours, "?"))
    assert invoke(command, *words, name, "?").exit_code in (2, 3)


def here(command: str, *words: str) -> str:
    """What the command says that an option of others' is called here; empty if nothing."""
    result = invoke(command, *REQUIRED[command], *words)
    assert result.exit_code == 2
    before, _, text = said(result).partition("Here: ")
    assert f"No such option: {words[0].partition('=')[0]}" in before
    return text


REQUIRED = {
    name: ["x" for parameter in command.params if parameter.param_type_name == "argument" and parameter.required]
    for name, command in GROUP.commands.items()
}


@pytest.mark.parametrize("name", HINTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_hints_name_options_that_the_command_has(command: str, name: str) -> None:
    text = here(command, name)
    named = set(re.findall(r"--[a-z-]+", text))
    assert named <= OPTIONS[command] or re.fullmatch(rf"--[a-z-]+, for which {command} has no use\.", text)
    assert (text == "") is (command not in FITS.get(HINTS[name], (command,)))


@pytest.mark.parametrize("command", ARGUMENTS)
def test_arguments_are_those_of_the_command(command: str) -> None:
    own = [parameter for parameter in GROUP.commands[command].params if parameter.param_type_name == "argument"]
    assert len(ARGUMENTS[command].split()) == len(own)


def test_every_command_has_its_arguments_but_what_reads_no_checkpoint() -> None:
    assert COMMANDS.keys() - ARGUMENTS.keys() == {"explain"}
    assert set().union(*FITS.values()) <= ARGUMENTS.keys()
    assert FITS.keys() <= set(HINTS.values())


ANSWERS = {
    "hf-to-megatron --load": "what to read is an argument without an option: hf-to-megatron HF MEGATRON.",
    "megatron-to-hf --save": "what to make is an argument without an option: megatron-to-hf MEGATRON HF.",
    "plan --save": "what to make is an argument without an option: plan SOURCE TARGET.",
    "make-checkpoint --save": "what to make is an argument without an option: make-checkpoint TARGET.",
    "make-checkpoint --load": "",
    "inspect --load": "what to read is an argument without an option: inspect PATH.",
    "inspect --save": "",
    "verify --save": "",
    "verify --megatron-path": "the Megatron checkpoint is an argument without an option: verify HF MEGATRON.",
    "explain --hf-model": "",
    "hf-to-megatron --tokenizer-model": "--config, for which hf-to-megatron has no use.",
    "hf-to-megatron --origin-hf-dir": "--config, for which hf-to-megatron has no use.",
    "megatron-to-hf --tokenizer-model": "--config, for the folder that has the tokenizer.",
    "hf-to-megatron --bf16": "--dtype (keep, bf16, fp16 or fp32).",
    "verify --bf16": "--dtype (What the models compute in: fp32 or bf16).",
    "make-checkpoint --torch-dtype": "--dtype (bf16, fp16 or fp32).",
    "diff --bf16": "--dtype, for which diff has no use.",
    "hf-to-megatron --to-megatron": "the direction is a command: hf-to-megatron or megatron-to-hf.",
    "plan --to-megatron": "",
    "verify --device-map": "",
    "make-checkpoint --num-layers": "",
    "plan --force": "--overwrite, for which plan has no use.",
}


@pytest.mark.parametrize("asked", ANSWERS)
def test_what_is_answered(asked: str) -> None:
    assert here(*asked.split()) == ANSWERS[asked]


@pytest.mark.parametrize("spelling", ["--hf_model", "--hf-model=x", "--hf_model=x"])
def test_a_hint_in_another_spelling(spelling: str) -> None:
    assert here("hf-to-megatron", spelling) == here("hf-to-megatron", "--hf-model") != ""


def test_an_option_that_a_command_has_no_use_for() -> None:
    result = invoke("verify", "hf", "run", "--tensor-model-parallel-size", "2")
    assert result.exit_code == 2
    assert "No such option: --tensor-model-parallel-size. Here: --tp, for which verify has no use." in said(result)


def test_what_nobody_calls_so_is_told_as_ever() -> None:
    result = invoke("hf-to-megatron", "hf", "run", "--no-such-option", "2")
    assert result.exit_code == 2
    assert "No such option: --no-such-option" in said(result)
    assert "Here:" not in said(result)


def test_what_follows_two_dashes_is_no_option() -> None:
    result = invoke("inspect", "--", "--load")
    assert result.exit_code == 3
    assert "--load" in result.stderr


@pytest.mark.parametrize("name", [*OTHER_COMMANDS, "hf_to_mcore"])
def test_others_commands_are_told_ours(name: str) -> None:
    result = invoke(name, "hf", "run")
    assert result.exit_code == 2
    assert f"No such command '{name}'. Here: {OTHER_COMMANDS[name.replace('_', '-')]}." in said(result)


# ---- the program -----------------------------------------------------------------------------------------------------


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen3vl_convert", *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_the_version_is_the_installed_one() -> None:
    found = invoke("--version")
    assert (found.exit_code, found.stdout) == (0, f"qwen3vl-convert {version('qwen3vl-convert')}\n")
    assert qwen3vl_convert.__version__ == version("qwen3vl-convert")


def test_a_checkout_says_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3vl_convert.cli.app.program_version", lambda: "unknown")
    assert invoke("--version").stdout == "qwen3vl-convert unknown, a checkout that is not installed\n"


def test_the_module_is_the_program() -> None:
    shown = run("--help").stdout
    assert "Usage: qwen3vl-convert [OPTIONS] COMMAND" in shown
    assert run("--version").stdout == f"qwen3vl-convert {version('qwen3vl-convert')}\n"
    assert run("inspect", "nowhere").returncode == 3


TYPED = "qwen3vl-convert hf-"
ASKED = {
    "bash": {"COMP_WORDS": TYPED, "COMP_CWORD": "1"},
    "zsh": {"_TYPER_COMPLETE_ARGS": TYPED},
    "fish": {"_TYPER_COMPLETE_ARGS": TYPED, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


@pytest.mark.parametrize("shell", ASKED)
def test_completion(shell: str) -> None:
    """The script that a shell takes, and what it is answered by the program."""
    script = run(_QWEN3VL_CONVERT_COMPLETE=f"source_{shell}").stdout
    assert "_QWEN3VL_CONVERT_COMPLETE=complete_" + shell in script
    assert "qwen3vl-convert" in script
    answer = run(_QWEN3VL_CONVERT_COMPLETE=f"complete_{shell}", **ASKED[shell]).stdout
    assert "hf-to-megatron" in answer
    assert "megatron-to-hf" not in answer


def test_completion_is_shown_to_the_shell_that_asks() -> None:
    command = f'"{sys.executable}" -m qwen3vl_convert --show-completion; exit $?'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "complete -o default -F _qwen3vl_convert_completion qwen3vl-convert" in done.stdout
