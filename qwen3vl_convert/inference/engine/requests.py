"""What is asked of the engine, and what it answers."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal

from torch import Tensor

from qwen3vl_convert.errors import UsageError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, and when to stop. The defaults are greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0: the most probable token, and `top_k`, `top_p`, `min_p` and `seed` mean nothing."""
    top_k: int = 0
    """0: no limit."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Above 1: what is in the prompt or was generated is less probable."""
    presence_penalty: float = 0.0
    """Taken off the logit of what was generated."""
    frequency_penalty: float = 0.0
    """Taken off as often as it was generated."""
    seed: int | None = None
    """The same seed draws the same numbers, whatever else runs beside. None: others each time."""
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    """The text ends before the first of these. Needs a tokenizer."""
    ignore_eos: bool = False
    """Go on after the model's own end of text; `stop_token_ids` still count."""
    logprobs: bool = False

    def __post_init__(self) -> None:
        stop: Any = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else _several("stop", stop))
        object.__setattr__(self, "stop_token_ids", _several("stop_token_ids", self.stop_token_ids))
        self._check_numbers()
        for name in ("max_new_tokens", "top_k", "seed", "stop_token_ids"):
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                _require(_is(value, int) or (name == "seed" and value is None), name, "whole numbers", value)
        _require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        _require(self.top_k >= 0, "top_k", "0, for no limit, or more", self.top_k)
        for one in self.stop:
            _require(one != "" and _is(one, str), "stop", "strings that are not empty", one)

    def _check_numbers(self) -> None:
        for name, (expected, low, high) in _RANGES.items():
            value = getattr(self, name)
            good = _is(value, int | float) and math.isfinite(value)
            _require(good and low <= value <= high, name, expected, value)
        _require(self.top_p > 0, "top_p", "above 0 and at most 1", self.top_p)


_ANY = 1e6
_RANGES = {
    "temperature": ("0, for greedy, or more", 0.0, _ANY),
    "top_p": ("above 0 and at most 1", 0.0, 1.0),
    "min_p": ("from 0 to 1", 0.0, 1.0),
    "repetition_penalty": ("from 0.01 to 100", 0.01, 100.0),
    "presence_penalty": ("a number", -_ANY, _ANY),
    "frequency_penalty": ("a number", -_ANY, _ANY),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VisualInputs:
    """Images and videos of one prompt in its order, as the processor gives them."""

    pixel_values: Tensor | None = None
    """[patches, channels * temporal_patch * patch * patch]."""
    image_grid_thw: Tensor | None = None
    """[images, 3] in patches."""
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None

    def __post_init__(self) -> None:
        _check_pixels("pixel_values", self.pixel_values, "image_grid_thw", self.image_grid_thw)
        _check_pixels("pixel_values_videos", self.pixel_values_videos, "video_grid_thw", self.video_grid_thw)

    def kinds(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """("image" or "video", pixels, grid) of what there is."""
        if self.pixel_values is not None and self.image_grid_thw is not None:
            yield "image", self.pixel_values, self.image_grid_thw
        if self.pixel_values_videos is not None and self.video_grid_thw is not None:
            yield "video", self.pixel_values_videos, self.video_grid_thw


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """A prompt, with as many visual tokens as its images and videos have, and how to go on from it."""

    token_ids: Sequence[int]
    visual: VisualInputs | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        given: Any = self.token_ids  # an array or a tensor is as good
        if isinstance(given, Tensor):
            _require(given.ndim == 1, "token_ids", "one row of numbers", _shape(given))
        ids = _several("token_ids", given.tolist() if hasattr(given, "tolist") else given)
        object.__setattr__(self, "token_ids", ids)
        _require(len(ids) > 0, "token_ids", "at least one token", "none")
        for at, token in enumerate(ids):
            if type(token) is not int or token < 0:
                _require(False, f"token_ids[{at}]", "a whole number, 0 or more", token)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one request; the last one says why it ended."""

    request_id: int
    token_id: int | None
    """None in the event that only says that a request was aborted."""
    text: str
    """What became certain by it: without halves of characters, and without what may be part of a stop string."""
    logprob: float | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Completion:
    """All of an answer."""

    token_ids: tuple[int, ...]
    """With the token that ended it, where one did."""
    text: str
    """Without that token, and without the stop string."""
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were not computed, because another request had."""
    logprobs: tuple[float, ...] | None
    """Of each token under the model alone, natural logarithm. None where not asked for."""
    seconds: float
    """From submission to the last token."""
    first_token_seconds: float | None
    """From submission to the first token. None where there was none."""


def _is(value: object, kind: type | UnionType) -> bool:
    """Whatever annotations say. A flag is no number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _require(good: bool, name: str, expected: str, found: object) -> None:
    if not good:
        raise UsageError(f"{name}: expected {expected}, found {found!r}.")


def _check_pixels(pixels_name: str, pixels: Tensor | None, grid_name: str, grid: Tensor | None) -> None:
    if pixels is None or grid is None:
        _require(pixels is grid, f"{pixels_name} and {grid_name}", "both or neither", "one of them")
        return
    rows = _is(grid, Tensor) and grid.ndim == 2 and grid.shape[1] == 3 and not grid.is_floating_point()
    _require(rows, grid_name, "whole numbers [rows, 3] (time, height, width in patches)", _shape(grid))
    _require(bool((grid > 0).all()), grid_name, "sizes of at least 1", grid.tolist())
    good = _is(pixels, Tensor) and pixels.ndim == 2 and pixels.is_floating_point()
    _require(good, pixels_name, "floating point [patches, values of a patch]", _shape(pixels))
    patches = int(grid.prod(-1).sum())
    _require(len(pixels) == patches, pixels_name, f"{patches} patches, as {grid_name} says", len(pixels))
    _require(bool(pixels.isfinite().all()), pixels_name, "numbers", "infinities or NaN")


def _several(name: str, values: Any) -> tuple[Any, ...]:
    _require(isinstance(values, Iterable) and not isinstance(values, str), name, "several values", values)
    return tuple(values)


def _shape(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


CONTEXT = "the context"


def check_vocabulary(token_ids: Sequence[int], vocab: int) -> None:
    """Raise UsageError for tokens that a model does not have."""
    if max(token_ids, default=0) >= vocab:
        raise UsageError(f"token_ids: expected ids below {vocab}, the vocabulary, found {max(token_ids)}.")


def check_room(prompt: int, new: int, room: Mapping[str, int]) -> None:
    """Raise UsageError if so many tokens can never fit. `room`: how many each thing holds, by its name."""
    name, tokens = min(room.items(), key=lambda item: item[1])
    if prompt + new > tokens:
        raise UsageError(
            f"request: expected at most {tokens} tokens, which is what {name} holds, found {prompt} of the prompt "
            f"and {new} new ones. Shorten the prompt, ask for fewer tokens, or give the engine more "
            f"({'context_length' if name == CONTEXT else 'kv_tokens'})."
        )
