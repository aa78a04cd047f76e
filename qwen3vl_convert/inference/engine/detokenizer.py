"""Text from tokens as they come: never half a character, and never a part of what may become a stop string."""

from collections.abc import Sequence
from typing import Protocol

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a decoder gives for bytes that are no character, or not yet."""
MOST_HALVES = 3
"""A character has at most 4 bytes, so at most 3 of them are there without being one."""
CONTEXT = 16
"""Tokens that are decoded again with each that comes, or a few more."""


class Tokenizer(Protocol):
    """All that the engine needs of one."""

    def decode(self, ids: list[int], /) -> str: ...


class Detokenizer:
    """The text of one sequence. Costs the decoding of a few tokens for each token.

    A decoder may join tokens (a space that it drops at the start, bytes of one character), so a token is decoded
    together with those of the character before it, and what is new is what that adds.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._known = 0
        """Of `_ids`: those at the start whose text is out, kept for what they do to the next."""
        self._out = 0
        """Characters of the text of `_ids` that are out."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False
        """Whether a stop string has come; nothing comes after it."""

    def add(self, token: int) -> str:
        """One more token; gives the text that has become certain."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        certain = _without_halves(text)
        new = certain[self._out :]
        self._out = max(self._out, len(certain))
        if certain == text:
            self._forget()
        return self._release(new)

    def finish(self) -> str:
        """The text that was held back; there are no more tokens."""
        rest = self._tokenizer.decode(self._ids)[self._out :] if self._ids else ""
        text = self._release(rest) + self._held
        self._ids, self._known, self._out, self._held = [], 0, 0, ""
        return text

    def _forget(self) -> None:
        """All is out: now and then, keep only the tokens that came since it last was."""
        if len(self._ids) > CONTEXT:
            del self._ids[: self._known]
            self._out = len(self._tokenizer.decode(self._ids))
        self._known = len(self._ids)

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        places = [at for one in self._stop if (at := text.find(one)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, one) for one in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _without_halves(text: str) -> str:
    """Less the last characters that may be bytes of one that is not complete."""
    end = len(text)
    while end > len(text) - MOST_HALVES and text[end - 1 : end] == HALF:
        end -= 1
    return text[:end]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
