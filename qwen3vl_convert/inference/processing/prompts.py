"""What is said and shown, and the text that a model reads of it: the chat's template, then a place for every patch."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_convert.errors import InputError, UsageError
from qwen3vl_convert.inference.processing.libraries import transformers

if TYPE_CHECKING:
    from qwen3vl_convert.inference.engine.requests import VisualInputs
    from qwen3vl_convert.inference.processing.pixels import Pixels

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of a chat. Pictures, then videos, come before the text. Each is a file or, of pictures, a data URL."""

    role: str
    text: str
    images: tuple[str | Path, ...] = ()
    videos: tuple[str | Path, ...] = ()

    def content(self) -> list[dict[str, str]]:
        """As processors of transformers take it."""
        shown = [{"type": "image"} for _ in self.images] + [{"type": "video"} for _ in self.videos]
        return [*shown, {"type": "text", "text": self.text}]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt as the engine takes it, the text that it was made of, and what a user should know."""

    token_ids: list[int]
    visual: "VisualInputs | None"
    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Spoken:
    """A conversation up to the end of an answer: its text, and the tokens that the engine has keys and values of.

    The tokens of an answer are the model's own, which need not be those that the tokenizer would make of its text.
    """

    text: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Marks:
    """How the tokenizer writes the tokens that stand for pictures."""

    image: str
    video: str
    start: str
    end: str

    def of_image(self) -> str:
        return f"{self.start}{self.image}{self.end}"

    def of_video(self) -> str:
        return f"{self.start}{self.video}{self.end}"


def raw_text(message: Message, marks: Marks) -> str:
    """The text as it is; pictures stand before it, unless it says itself where they are to be."""
    images = "" if marks.image in message.text else marks.of_image() * len(message.images)
    videos = "" if marks.video in message.text else marks.of_video() * len(message.videos)
    return images + videos + message.text


def chat_text(tokenizer: Any, template: str, messages: Sequence[Message], where: str) -> str:
    """The chat as the template writes it, up to where the model's answer begins. Raises `InputError`.

    Templates of text models take a text where others take a list of parts, and lose it silently otherwise.
    """
    listed = [{"role": one.role, "content": one.content()} for one in messages]
    plain = [{"role": one.role, "content": one.text} for one in messages]
    has_media = any(one.images or one.videos for one in messages)
    last = messages[-1].text.strip()
    failures = []
    for form in (listed,) if has_media else (listed, plain):
        try:
            text = _rendered(tokenizer, template, form, where)
        except InputError as cause:
            failures.append(cause)
            continue
        if last in text:
            return text
    if failures:
        raise failures[0]
    raise InputError(f"{where}: the prompt is not in what the template makes of it. Pass --raw to do without it.")


def _rendered(tokenizer: Any, template: str, messages: list[Any], where: str) -> str:
    with transformers(f"{where}: the template cannot be used (--raw does without)"):
        return str(
            tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
        )


def expanded(text: str, marks: Marks, images: Sequence["Pixels"], videos: Sequence["Pixels"], merge: int) -> str:
    """The text with as many marks as there are tokens of each picture, and the times of a video's frames between."""
    frames = [
        "".join(
            f"<{second:.1f} seconds>{marks.start}{marks.video * one.tokens_of_frame(merge)}{marks.end}"
            for second in one.seconds
        )
        for one in videos
    ]
    pattern = f"{re.escape(marks.of_video())}|{re.escape(marks.video)}"
    text = _filled(text, pattern, frames, f"videos ({marks.video})")
    tokens = [marks.image * (int(one.grid[0, 0]) * one.tokens_of_frame(merge)) for one in images]
    return _filled(text, re.escape(marks.image), tokens, f"pictures ({marks.image})")


def _filled(text: str, pattern: str, parts: Iterable[str], what: str) -> str:
    """Each place that the pattern matches gets the next part."""
    waiting = list(parts)
    places = len(re.findall(pattern, text))
    if places != len(waiting):
        raise UsageError(
            f"The prompt has places for {places} {what}, and {len(waiting)} are given. "
            "Give as many, or none and they come first."
        )
    given = iter(waiting)
    return re.sub(pattern, lambda _: next(given), text)
