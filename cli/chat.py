"""chat: a conversation with one checkpoint, on a terminal or line by line from anywhere."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3vl_convert.cli.console import Console
from qwen3vl_convert.cli.options import Iteration, Quiet, parse_iteration
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
    printable,
    room_for,
    told,
    waiting,
)
from qwen3vl_convert.errors import ConvertError, InputError, UsageError
from qwen3vl_convert.installed import need

if TYPE_CHECKING:
    from qwen3vl_convert.inference import Engine
    from qwen3vl_convert.inference.processing import Processing, Spoken

USUAL_TOKENS = 1024
COMMANDS = {
    "/image FILE": "show it a picture with the next message",
    "/video FILE": "show it a video with the next message",
    "/reset": "begin anew",
    "/help": "this list",
    "/exit": "end; so does Ctrl-D",
}
_ASK = "> "


def chat(
    checkpoint: Checkpoint,
    system: Annotated[str | None, typer.Option("--system", help="What the chat's system message says.")] = None,
    config: Config = None,
    iteration: Iteration = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", help="Most tokens of an answer; 1024 by default.", show_default=False),
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: ModelDtype = None,
    quantization: Quantization = None,
    quiet: Quiet = False,
) -> None:
    """Talk to a checkpoint of either format. What was said before is kept in memory and not computed again.

    In it: /image FILE, /video FILE, /reset, /help, /exit. Ctrl-C stops an answer, Ctrl-D ends. Without a terminal each
    line of stdin is a message.
    """
    need("chat", "torch", "transformers")
    with waiting("importing torch and transformers", quiet):
        sampling = Sampling(temperature, top_p, top_k, seed)
        choice = ModelChoice(checkpoint, config, parse_iteration(iteration), device, dtype, quantization)
        processing = choice.processing()
    if processing.template is None:
        raise InputError(
            f"{processing.folder}: expected a chat template (chat_template.jinja, chat_template.json, or in "
            "tokenizer_config.json), found none. Pass --config, or use `generate --raw`."
        )
    with waiting(f"loading {checkpoint}", quiet):
        engine = choice.engine(processing, Console(quiet=quiet).notes)
    talk = Talk(engine, processing, sampling, max_new_tokens, system, quiet)
    if sys.stdin.isatty() and sys.stdout.isatty():
        talk.at_terminal(checkpoint)
    else:
        talk.by_lines()


class Talk:
    """A conversation, and what is to be shown with the next message."""

    def __init__(
        self,
        engine: "Engine",
        processing: "Processing",
        sampling: Sampling,
        max_new_tokens: int | None,
        system: str | None,
        quiet: bool,
    ) -> None:
        self.engine, self.processing, self.sampling = engine, processing, sampling
        self.max_new_tokens, self.system, self.quiet = max_new_tokens, system, quiet
        self.reset()

    def reset(self) -> None:
        from qwen3vl_convert.inference.processing import Message

        self.said: list[Message] = [] if self.system is None else [Message("system", self.system)]
        self.spoken: Spoken | None = None
        self.images: list[str] = []
        self.videos: list[str] = []

    def by_lines(self) -> None:
        """A message from each line of stdin; the first that goes wrong ends it."""
        for line in sys.stdin:
            if not self.take(line.strip()):
                return

    def at_terminal(self, name: str) -> None:
        """Until Ctrl-D or /exit. What goes wrong is told, and the conversation goes on without it."""
        self._note(*self.sampling.notes(self.processing.sampling))
        self._note(f"{name}. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
        for line in typed_lines():
            try:
                if not self.take(line.strip()):
                    return
            except ConvertError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                self._note("\nstopped; the message is forgotten")

    def take(self, line: str) -> bool:
        """A line that was typed: a command or a message. False where it ends the conversation."""
        word, _, rest = line.partition(" ")
        if word == "/exit":
            return False
        if word == "/reset":
            self.reset()
        elif word == "/help":
            self._note(*(f"  {name:12} {what}" for name, what in COMMANDS.items()))
        elif word in ("/image", "/video"):
            self.show(word, rest.strip().strip("'\""))
        elif word.startswith("/") and "/" not in word[1:]:
            raise UsageError(f"{word}: expected one of {', '.join(COMMANDS)}, or a message.")
        elif line:
            self.ask(line)
        return True

    def show(self, command: str, source: str) -> None:
        """Looks at the file now, so that what is wrong with it is told now."""
        if not source:
            raise UsageError(f"{command}: expected a file, found none.")
        if command == "/image":
            self.processing.eyes.image(source)
            self.images.append(source)
        else:
            self.processing.eyes.video(source)
            self.videos.append(source)
        self._note(f"{source} goes with the next message")

    def ask(self, text: str) -> None:
        """One turn. If it fails, it has not been."""
        from qwen3vl_convert.inference.processing import Message

        asked = [*self.said, Message("user", text, tuple(self.images), tuple(self.videos))]
        prompt = self.processing.prepare(asked, spoken=self.spoken)
        tokens = room_for(self.engine, len(prompt.token_ids), self.max_new_tokens, USUAL_TOKENS)
        sampling = self.sampling.parameters(self.processing.sampling, tokens)
        with stoppable() as stopped:
            found = answer(self.engine, prompt, sampling, _say, stopped)
        print()
        self._note(told(found))
        self.said = [*asked, Message("assistant", found.text)]
        self.spoken = self.processing.spoken(prompt, found)
        self.images, self.videos = [], []

    def _note(self, *lines: str) -> None:
        """Talk, which is on stderr, and grey where there is a terminal."""
        if self.quiet:
            return
        from rich.console import Console as Rich

        console = Rich(stderr=True, markup=False, highlight=False)
        for line in lines:
            console.print(line, style="dim", soft_wrap=True)


def _say(text: str) -> None:
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def typed_lines() -> Iterator[str]:
    """Lines from a terminal, with the arrow keys where Python has readline; Ctrl-C takes a line back."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() uses it from now on
    while True:
        try:
            yield input(_ASK)
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)", file=sys.stderr)
        except EOFError:
            print()
            return


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Gives what says whether Ctrl-C was pressed, so that a forward comes to its end; pressed twice it is an exception.

    Without a terminal it is one at once, as ever.
    """
    if not sys.stdin.isatty():
        yield lambda: False
        return
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
