"""The tokens of one request, one at a time."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, Self

from qwen3vl_convert.inference.engine.requests import Completion, TokenEvent


@dataclass(slots=True, eq=False)
class Mailbox:
    """What one listener has not read yet."""

    events: deque[TokenEvent] = field(default_factory=deque)
    completion: Completion | None = None
    """There once the request has ended."""


class Steps(Protocol):
    """All that a stream needs of an engine."""

    def abort(self, request_id: int) -> None: ...
    def advance(self) -> None: ...


class TokenStream(Iterator[TokenEvent]):
    """The tokens of one request as they come. Closing it, or dropping it, aborts the request."""

    def __init__(self, engine: Steps, request_id: int, mailbox: Mailbox) -> None:
        self._engine, self.request_id, self._mailbox = engine, request_id, mailbox

    @property
    def completion(self) -> Completion | None:
        """All of it, once it has ended."""
        return self._mailbox.completion

    def __next__(self) -> TokenEvent:
        while not self._mailbox.events:
            if self._mailbox.completion is not None:
                raise StopIteration
            self._engine.advance()
        return self._mailbox.events.popleft()

    def close(self) -> None:
        self._engine.abort(self.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
