"""Prompts written down as pieces, text, images and videos, and the tokens that follow from them.

    TokenIds.from_dims(dims).of([Text(3), Image(1, 2, 3), Text(5)], marked=True)       # 16 tokens

Words are random and the same everywhere, as CRC-32 is.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qwen3vl_convert.dims import Dims


@dataclass(frozen=True, slots=True)
class Text:
    length: int


@dataclass(frozen=True, slots=True)
class Image:
    """In tokens, not in patches. `time` is 1 for whatever a processor makes."""

    time: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Video:
    """Frames of height x width tokens, with `gap` tokens of text between two: their time in words."""

    frames: int
    height: int
    width: int
    gap: int


Piece = Text | Image | Video
Row = Sequence[Piece]


@dataclass(frozen=True)
class TokenIds:
    """Tokens with a meaning, and `words`, a range that has none of them."""

    image: int
    video: int
    start: int
    end: int
    words: range
    pad: int = 0

    @classmethod
    def from_dims(cls, dims: Dims) -> "TokenIds":
        visual = (dims.image_token_id, dims.video_token_id, dims.vision_start_token_id, dims.vision_end_token_id)
        ends = dims.eos_token_id if isinstance(dims.eos_token_id, tuple) else (dims.eos_token_id,)
        return cls(*visual, words=_longest_gap([*visual, dims.bos_token_id, *ends], dims.vocab))

    def of(self, row: Row, marked: bool, seed: int = 0) -> list[int]:
        """The tokens of a row. `marked`: blocks stand between their start and end tokens, as the processor has them."""
        found: list[int] = []
        for piece in row:
            if isinstance(piece, Text):
                found += self._words(len(found), piece.length, seed)
            elif isinstance(piece, Image):
                found += self._block(self.image, piece.time * piece.height * piece.width, marked)
            else:
                for frame in range(piece.frames):
                    found += self._words(len(found), piece.gap if frame else 0, seed)
                    found += self._block(self.video, piece.height * piece.width, marked)
        return found

    def _words(self, first: int, length: int, seed: int) -> Iterator[int]:
        for at in range(first, first + length):
            yield self.words[zlib.crc32(at.to_bytes(4, "big") + seed.to_bytes(4, "big")) % len(self.words)]

    def _block(self, token: int, size: int, marked: bool) -> list[int]:
        return [self.start, *[token] * size, self.end] if marked else [token] * size


def _longest_gap(special: Iterable[int | None], vocab: int) -> range:
    """Published models have their special tokens after the words; in others a few may stand before them."""
    bounds = [-1, *sorted({id for id in special if id is not None and id < vocab}), vocab]
    return max((range(left + 1, right) for left, right in pairwise(bounds)), key=len)


def grids(rows: Iterable[Row], merge: int) -> tuple[Tensor | None, Tensor | None]:
    """Of images and of videos, in patches [count, 3]; None if there are none, as processors have it."""
    pieces = [piece for row in rows for piece in row]
    images = [(p.time, p.height * merge, p.width * merge) for p in pieces if isinstance(p, Image)]
    videos = [(p.frames, p.height * merge, p.width * merge) for p in pieces if isinstance(p, Video)]
    return torch.tensor(images) if images else None, torch.tensor(videos) if videos else None


def padded(rows: Sequence[list[int]], sides: Sequence[str], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, longest], each row padded on its side, "left" or "right"."""
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=torch.int64)
    for index, (row, side) in enumerate(zip(rows, sides, strict=True)):
        here = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[index, here], mask[index, here] = torch.tensor(row, dtype=torch.int64), 1
    return ids, mask
