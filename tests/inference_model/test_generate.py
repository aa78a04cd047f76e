"""`generate` and `chat`: what is asked, what is printed where, with which exit code; from both formats."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from inference_model.files import IM_END, TINY, edit, ids_of, needs, png, write_files
from models.planted import lively_checkpoint
from qwen3vl_convert import ParallelLayout, hf_to_megatron
from qwen3vl_convert.cli import instructions
from qwen3vl_convert.cli.app import app
from qwen3vl_convert.cli.instructions import VARIABLE, WITHOUT_AMX, AmxTrial
from qwen3vl_convert.cli.speaker import printable, token_ids_of

pytestmark = pytest.mark.transformers
needs("transformers")

ROOT = Path(__file__).resolve().parents[2]
CPU = ("--device", "cpu")


class Made(NamedTuple):
    """One model: with and without the files beside its weights, in both formats."""

    model: Path
    bare: Path
    run: Path
    bare_run: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    at = tmp_path_factory.mktemp("made")
    found = Made(*(at / name for name in Made._fields))
    lively_checkpoint(found.bare, TINY)
    lively_checkpoint(found.model, TINY)
    write_files(found.model)
    hf_to_megatron(found.model, found.run, layout=ParallelLayout(tp=2, pp=2))
    hf_to_megatron(found.bare, found.bare_run)
    return found


def invoke(*arguments: object, said: str | None = None) -> Any:
    """Exit code, stdout and stderr of a command, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=said)


def generate(*arguments: object, said: str | None = None) -> Any:
    return invoke("generate", *arguments, *CPU, said=said)


def json_of(*arguments: object) -> dict[str, Any]:
    result = generate(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# ---- the answer ------------------------------------------------------------------------------------------------------


def test_the_answer_is_transformers_greedy_one(made: Made) -> None:
    """With its own tokenizer, template, model and loop."""
    import torch
    import transformers

    from models.sides import load_theirs
    from qwen3vl_convert.inference.processing.libraries import transformers as silent

    with silent("the test"):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(made.model)
        template = json.loads((made.model / "chat_template.json").read_text())["chat_template"]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        theirs: Any = load_theirs(made.model)
        answer = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, pad_token_id=0
        )
    expected = answer[0, ids.shape[1] :].tolist()
    found = json_of(made.model, "Hello", "--max-new-tokens", 16)
    assert found["prompt_tokens"] == ids.shape[1]
    assert found["token_ids"] == expected
    assert found["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_both_formats_say_the_same(made: Made) -> None:
    ours, theirs = (json_of(path, "Hello, 世界", "--max-new-tokens", 12) for path in (made.run, made.model))
    assert ours["token_ids"] == theirs["token_ids"]
    assert len(set(ours["token_ids"])) > 3, "an answer of one word over and over compares little"
    assert json_of(made.run / "iter_0000000", "Hello, 世界", "--max-new-tokens", 12)["token_ids"] == ours["token_ids"]
    assert json_of(made.run, "Hello, 世界", "--iteration", 0, "--max-new-tokens", 12)["token_ids"] == ours["token_ids"]


def test_only_the_answer_is_on_stdout(made: Made) -> None:
    said = json_of(made.model, "Hello", "--max-new-tokens", 8)["text"]
    result = generate(made.model, "Hello", "--max-new-tokens", 8)
    assert (result.exit_code, result.stdout) == (0, said + "\n")
    assert result.stderr.startswith("24 tokens in, 8 out, the first after ")
    assert result.stderr.endswith("tokens/s; cut off at the most tokens\n")
    assert generate(made.model, "Hello", "--max-new-tokens", 8, "--stream").stdout == said + "\n"
    quiet = generate(made.model, "Hello", "--max-new-tokens", 8, "--quiet", "--stream")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_json_says_how_it_went(made: Made) -> None:
    found = json_of(made.model, "Hello", "--max-new-tokens", 8)
    assert list(found) == [
        "text",
        "token_ids",
        "finish_reason",
        "prompt_tokens",
        "cached_tokens",
        "seconds",
        "first_token_seconds",
        "tokens_per_second",
    ]
    assert (found["finish_reason"], found["prompt_tokens"], found["cached_tokens"]) == ("length", 24, 0)
    assert 0 < found["first_token_seconds"] < found["seconds"]
    assert json_of(made.model, "Hello", "--max-new-tokens", 1)["tokens_per_second"] is None


def test_without_a_number_it_says_as_much_as_is_usual_and_fits(made: Made) -> None:
    assert len(json_of(made.bare, "--token-ids", "3,4")["token_ids"]) == 128
    almost = ",".join(["3"] * (TINY.max_positions - 5))
    assert len(json_of(made.bare, "--token-ids", almost)["token_ids"]) == 5


def test_it_ends_where_generation_config_says(made: Made, tmp_path: Path) -> None:
    first, second, *_ = json_of(made.model, "Hello", "--max-new-tokens", 8)["token_ids"]
    assert first != second
    files = write_files(tmp_path / "files", eos=(IM_END, second))
    found = json_of(made.model, "Hello", "--max-new-tokens", 8, "--config", files)
    assert (found["token_ids"], found["finish_reason"]) == ([first, second], "stop")


def test_raw_and_system_prompts(made: Made) -> None:
    assert json_of(made.model, "Hello", "--raw", "--max-new-tokens", 1)["prompt_tokens"] == 5
    with_system = json_of(made.model, "Hello", "--system", "Be kind.", "--max-new-tokens", 1)
    assert with_system["prompt_tokens"] == 24 + len("system\nBe kind.\n") + 2


def test_a_prompt_from_stdin(made: Made) -> None:
    result = generate(made.model, "-", "--raw", "--max-new-tokens", 1, "--json", said="from there")
    assert json.loads(result.stdout)["prompt_tokens"] == len("from there")


def test_tokens_in_tokens_out(made: Made) -> None:
    """Which needs neither tokenizer nor transformers."""
    found = json_of(made.bare_run, "--token-ids", "72, 101 108", "--max-new-tokens", 4)
    assert found["text"] is None
    result = generate(made.bare, "--token-ids", "72,101,108", "--max-new-tokens", 4, "--stream")
    assert result.stdout == ",".join(map(str, found["token_ids"])) + "\n"
    assert json_of(made.model, "Hel", "--raw", "--max-new-tokens", 4)["token_ids"] == found["token_ids"]


def test_a_picture_is_seen(made: Made, tmp_path: Path) -> None:
    one, other = png(tmp_path / "a.png"), png(tmp_path / "b.png", number=2)
    answers = [json_of(made.run, "What?", "--image", path, "--max-new-tokens", 12) for path in (one, other)]
    assert answers[0]["prompt_tokens"] == 24 + 6 + 2  # six marks, and one at either end; both prompts have five letters
    assert answers[0]["token_ids"] != answers[1]["token_ids"]
    both = json_of(made.run, "What?", "--image", one, "--image", other, "--max-new-tokens", 1)
    assert both["prompt_tokens"] == 24 + 2 * 8


def test_other_precisions_are_used(made: Made) -> None:
    """They round: after a while a tiny model says something else, after eight bits sooner than after sixteen."""
    asked = (made.model, "Hello", "--max-new-tokens", 128)
    exact, half, eight = (
        json_of(*asked, *more)["token_ids"] for more in ((), ("--dtype", "fp16"), ("--quantization", "int8"))
    )
    assert half[:2] == exact[:2]
    assert exact != half != eight != exact


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_a_seed_makes_the_same_answer_again(made: Made) -> None:
    hot = (made.model, "Hello", "--temperature", 1.5, "--max-new-tokens", 12, "--seed")
    one, again, other = (json_of(*hot, seed)["token_ids"] for seed in (1, 1, 2))
    assert one == again != other


def test_what_the_makers_recommend_is_used_and_said(made: Made) -> None:
    result = generate(made.model, "Hello", "--temperature", 0.7, "--max-new-tokens", 1)
    assert result.stderr.startswith("note: top_p 0.8: from generation_config.json.\n")
    greedy = generate(made.model, "Hello", "--max-new-tokens", 1)
    own = generate(made.model, "Hello", "--max-new-tokens", 1, "--temperature", 0.7, "--top-p", 0.5)
    assert "note:" not in greedy.stderr + own.stderr


def test_one_of_one_is_the_most_probable(made: Made) -> None:
    greedy = json_of(made.model, "Hello", "--max-new-tokens", 8)["token_ids"]
    assert json_of(made.model, "Hello", "--max-new-tokens", 8, "--temperature", 9, "--top-k", 1)["token_ids"] == greedy


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("name", ["bare", "bare_run"])
def test_without_a_tokenizer_it_says_what_to_do(made: Made, command: str, name: str) -> None:
    path = getattr(made, name)
    prompt = ("Hello",) if command == "generate" else ()
    result = invoke(command, path, *prompt)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith(f"error: {path}: expected a tokenizer")
    assert "--config" in result.stderr
    assert "--token-ids" in result.stderr
    found = invoke(command, path, *prompt, *CPU, "--config", made.model, "--max-new-tokens", 2, said="Hello\n")
    assert found.exit_code == 0, found.stderr


USAGE: dict[str, tuple[tuple[object, ...], str]] = {
    "nothing asked": ((), "expected a PROMPT"),
    "a prompt and tokens": (("Hello", "--token-ids", "1"), "--token-ids is the whole prompt"),
    "a picture and tokens": (("--image", "a.png", "--token-ids", "1"), "--token-ids is the whole prompt"),
    "no numbers": (("--token-ids", "one"), "expected numbers with commas"),
    "tokens it does not have": (("--token-ids", "512"), "expected ids below 512"),
    "stream and json": (("Hello", "--stream", "--json"), "--stream and --json"),
    "system and raw": (("Hello", "--raw", "--system", "x"), "--system with --raw"),
    "top-p without temperature": (("Hello", "--top-p", "0.5"), "of use with --temperature only"),
    "top-k without temperature": (("Hello", "--top-k", "5"), "of use with --temperature only"),
    "no share": (("Hello", "--temperature", "1", "--top-p", "3"), "top_p: expected above 0 and at most 1"),
    "negative": (("Hello", "--temperature", "-1"), "temperature: expected 0"),
    "no tokens": (("Hello", "--max-new-tokens", "0"), "max_new_tokens: expected at least 1"),
    "no dtype": (("Hello", "--dtype", "int4"), "--dtype int4: expected one of bf16, fp16, fp32"),
    "no device": (("Hello", "--device", "tpu"), "--device tpu: expected one of auto, cpu, cuda"),
    "no quantization": (("Hello", "--quantization", "fp8"), "int8 is"),
    "too long": (("x" * 2000, "--raw"), "has 2000 tokens, expected fewer than 1024"),
    "too much": (("Hello", "--max-new-tokens", "5000"), "expected at most 1024 tokens"),
    "an address": (("Hello", "--image", "https://example.org/a.png"), "Nothing is fetched"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage(made: Made, case: str) -> None:
    arguments, says = USAGE[case]
    result = invoke("generate", made.model, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert says in result.stderr


def test_a_picture_that_is_not_there_is_told_before_weights_are_read(made: Made, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for path in made.model.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    result = generate(tmp_path / "model", "Hello", "--image", tmp_path / "nowhere.png")
    assert result.exit_code == 3
    assert "nowhere.png: expected a file, found nothing" in result.stderr


IMPOSSIBLE: dict[str, tuple[tuple[object, ...], str]] = {
    "tokens it does not have": (("--token-ids", "3,512"), "expected ids below 512, the vocabulary, found 512"),
    "a prompt too long": (("--token-ids", ",".join("3" * 1024)), "expected at most 1024 tokens"),
    "an answer too long": (("--token-ids", "3,4", "--max-new-tokens", 1023), "expected at most 1024 tokens"),
    "an answer of none": (("--token-ids", "3", "--max-new-tokens", 0), "max_new_tokens: expected at least 1"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
@pytest.mark.parametrize("name", ["bare", "bare_run"])
def test_what_can_never_be_answered_is_told_before_weights_are_read(
    made: Made, name: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("qwen3vl_convert.inference.load_model", read)
    arguments, says = IMPOSSIBLE[case]
    result = generate(getattr(made, name), *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr


def test_what_a_terminal_is_shown_moves_no_cursor() -> None:
    assert printable("a\x1b[2Jb\tc\nd\x07\r\u202e世") == "a[2Jb\tc\nd世"


@pytest.mark.parametrize("text", ["1,2,3", "1 2 3", " 1, 2,3 "])
def test_spellings_of_tokens(text: str) -> None:
    assert token_ids_of(text) == (1, 2, 3)


# ---- chat ------------------------------------------------------------------------------------------------------------


def chat(made: Made, *lines: str, more: tuple[object, ...] = ()) -> Any:
    return invoke("chat", made.model, *CPU, "--max-new-tokens", 21, *more, said="".join(f"{line}\n" for line in lines))


def test_a_chat_line_by_line(made: Made) -> None:
    first = json_of(made.model, "Hello", "--max-new-tokens", 21)["text"]
    result = chat(made, "Hello", "Why?", "", "/reset", "Hello", "/exit", "never said")
    assert result.exit_code == 0
    assert result.stdout.startswith(first + "\n")
    assert result.stdout.endswith("\n" + first + "\n")
    assert result.stderr.count("tokens in") == 3


def test_what_was_said_is_not_computed_again(made: Made) -> None:
    """24 tokens and 21 of the answer, of which 20 were computed, are two full pages of 16; then 30 and 21 more."""
    told = [line for line in chat(made, "Hello", "Why?", "And?").stderr.splitlines() if "tokens in" in line]
    assert [line.partition(",")[0] for line in told] == [
        "24 tokens in",
        "70 tokens in (32 from the cache)",
        "116 tokens in (80 from the cache)",
    ]


def test_a_chat_is_the_template_of_all_that_was_said(made: Made) -> None:
    """The last answer is the one that all of it gets, put together by hand, with the model's own tokens in it."""
    from qwen3vl_convert.inference.processing import open_processing

    said = chat(made, "Hello", "Why?", more=("--system", "Be kind.")).stdout
    asked = ids_of("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    first = answer_to(made, asked)
    again = ids_of("<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    second = answer_to(made, asked + first + again)
    read = open_processing(made.model, TINY).decode
    assert said == f"{read(first)}\n{read(second)}\n"


def answer_to(made: Made, token_ids: list[int]) -> list[int]:
    asked = ("--token-ids", ",".join(map(str, token_ids)), "--max-new-tokens", 21)
    found: list[int] = json_of(made.bare, *asked)["token_ids"]
    return found


def test_a_picture_in_a_chat(made: Made, tmp_path: Path) -> None:
    path = png(tmp_path / "with space.png")
    told = chat(made, f"/image '{path}'", "What?", "And?", "/reset", "What?").stderr.splitlines()
    counts = [line.split()[0] for line in told if "tokens in" in line]
    assert counts == ["32", "78", "24"]


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("/nonsense", 2, "/nonsense: expected one of /image FILE"),
        ("/image", 2, "/image: expected a file"),
        ("/image nowhere.png", 3, "nowhere.png: expected a file, found nothing"),
        ("x" * 2000, 2, "/reset begins anew"),
    ],
)
def test_without_a_terminal_the_first_error_ends_it(made: Made, line: str, code: int, says: str) -> None:
    result = chat(made, line, "Hello")
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in result.stderr


def test_a_path_is_a_message(made: Made) -> None:
    assert chat(made, "/etc/passwd is a file").stderr.startswith("40 tokens in")


def test_a_chat_needs_a_template(made: Made, tmp_path: Path) -> None:
    files = write_files(tmp_path / "files")
    (files / "chat_template.json").unlink()
    result = invoke("chat", made.model, "--config", files)
    assert result.exit_code == 3
    assert "expected a chat template" in result.stderr
    edit(files / "tokenizer_config.json", chat_template="{{ messages[-1].content }}")
    assert invoke("chat", made.model, "--config", files, *CPU, said="Hello\n").exit_code == 0


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.pid, self.end = pty.fork()
        if not self.pid:
            os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
            os.execv(sys.executable, [sys.executable, *command])
        self.shown = ""

    def until(self, text: str) -> str:
        """What is shown up to `text`, and with it."""
        limit = time.monotonic() + 120
        while text not in self.shown:
            assert time.monotonic() < limit, self.shown
            if select.select([self.end], [], [], 1)[0]:
                try:
                    self.shown += os.read(self.end, 65536).decode(errors="replace")
                except OSError:  # Linux says so when the program has ended
                    break
        before, found, self.shown = self.shown.partition(text)
        return before + found

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(made: Made) -> Iterator[Terminal]:
    found = Terminal("-m", "qwen3vl_convert.cli.app", "chat", str(made.model), "--device", "cpu")
    yield found
    os.close(found.end)


@pytest.mark.skipif(sys.platform != "linux", reason="terminals of other systems end otherwise")
def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(made: Made, terminal: Terminal) -> None:
    assert "/help lists the commands" in terminal.until("> ")
    terminal.type("/nonsense\n")
    assert "expected one of" in terminal.until("\n> ")
    terminal.type("Hello\n")
    terminal.until("Hello\r\n")
    assert select.select([terminal.end], [], [], 60)[0], "no answer"
    terminal.type("\x03")
    stopped = terminal.until("\n> ")
    assert "; stopped" in stopped
    terminal.type("half a line")
    terminal.until("half a line")
    time.sleep(0.5)  # Python overlooks a Ctrl-C that comes in the very moment between a key and the wait for the next
    terminal.type("\x03")
    assert "ends)" in terminal.until("\n> ")
    terminal.type("/help\n")
    assert "begin anew" in terminal.until("\n> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


# ---- around it -------------------------------------------------------------------------------------------------------

QUICK = """
import sys
from qwen3vl_convert.cli import app
print(sorted({"torch", "transformers", "PIL", "jinja2", "rich.progress"} & sys.modules.keys()))
"""


def test_nothing_large_is_imported_before_it_is_needed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", QUICK], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(VARIABLE, raising=False)
    path = tmp_path / "cpuinfo"
    path.write_text("flags : sse2 avx512f amx_bf16 amx_tile\n")
    monkeypatch.setattr(instructions, "_PROCESSOR", path)
    monkeypatch.setattr(instructions, "_TRIAL", f"import os; os.kill(os.getpid(), {int(signal.SIGILL)})")
    return path


@pytest.mark.usefixtures("offered")
def test_an_instruction_that_is_refused_is_done_without() -> None:
    with AmxTrial(wanted=True) as trial:
        assert [note for note in trial.conclude() if "AMX" in note]
    assert os.environ[VARIABLE] == WITHOUT_AMX


def test_an_instruction_that_works_is_used(offered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AmxTrial(wanted=False) as trial:
        assert trial.conclude() == ()
    monkeypatch.setattr(instructions, "_TRIAL", "")
    with AmxTrial(wanted=True) as trial:
        assert trial.conclude() == ()
    monkeypatch.setattr(instructions, "_TRIAL", "import time; time.sleep(1000)")
    with AmxTrial(wanted=True):
        pass  # ended with the program that nobody waits for
    offered.write_text("flags : sse2 avx2\n")
    with AmxTrial(wanted=True) as trial:
        assert trial.conclude() == ()
    assert VARIABLE not in os.environ
