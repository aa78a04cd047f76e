"""Tiny prompts for a model of any tiny configuration, as tensors that a processor could have made.

A prompt is written down as pieces, text, images and videos; ids, patches and grids follow from these. The words and the
patches are random and the same in every run.

    make_prompt("image", config).inputs()         # config: the dictionary in config.json
    MAKERS                                        # the names, for parametrize
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

FAR = 40_000
"""A position past 32k, where angles in less than float32 would be wrong by radians."""


# ---- pieces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    length: int


@dataclass(frozen=True)
class Image:
    """In tokens, not in patches. `time` is 1 for whatever a processor makes."""

    time: int
    height: int
    width: int


@dataclass(frozen=True)
class Video:
    """Frames of height x width tokens, with `gap` tokens of text between two: their time in words."""

    frames: int
    height: int
    width: int
    gap: int


Piece = Text | Image | Video
Row = Sequence[Piece]
Position = tuple[int, int, int]


@dataclass(frozen=True)
class Ids:
    """Tokens with a meaning. Words are numbers from 4 to 499: none of these."""

    image: int = 500
    video: int = 501
    start: int = 502
    end: int = 503
    pad: int = 0

    def block(self, token: int, size: int, marked: bool) -> list[int]:
        return [self.start, *[token] * size, self.end] if marked else [token] * size

    def of(self, row: Row, marked: bool) -> list[int]:
        """The tokens of a row. `marked`: blocks stand between their start and end tokens, as the processor has them."""
        found: list[int] = []

        def words(length: int) -> None:
            found.extend(4 + zlib.crc32(at.to_bytes(4)) % 496 for at in range(len(found), len(found) + length))

        for piece in row:
            if isinstance(piece, Text):
                words(piece.length)
            elif isinstance(piece, Image):
                found += self.block(self.image, piece.time * piece.height * piece.width, marked)
            else:
                for frame in range(piece.frames):
                    words(piece.gap if frame else 0)
                    found += self.block(self.video, piece.height * piece.width, marked)
        return found


def positions_of(row: Row, marked: bool) -> tuple[list[Position], int]:
    """Where each token stands, and the next position: the definition, as a loop that is too simple to be wrong."""
    found: list[Position] = []
    at = 0

    def text(length: int) -> None:
        nonlocal at
        found.extend((at + n, at + n, at + n) for n in range(length))
        at += length

    def block(time: int, height: int, width: int) -> None:
        nonlocal at
        text(marked)
        found.extend((at + t, at + h, at + w) for t in range(time) for h in range(height) for w in range(width))
        at += max(time, height, width)
        text(marked)

    for piece in row:
        if isinstance(piece, Text):
            text(piece.length)
        elif isinstance(piece, Image):
            block(piece.time, piece.height, piece.width)
        else:
            for frame in range(piece.frames):
                text(piece.gap if frame else 0)
                block(1, piece.height, piece.width)
    return found, at


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


# ---- prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prompt:
    """What goes into a model. None is what is not there.

    input_ids, attention_mask (1: token, 0: padding), mm_token_type_ids (1: image, 2: video; transformers 5): [B, S].
    position_ids: [3, B, S], where they are not to be what follows from ids and grids.
    pixel_values, pixel_values_videos: [patches, values], with their grids [count, 3] in patches.
    alone: of sequences that are packed into one row, each as a prompt of its own.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mm_token_type_ids: Tensor
    position_ids: Tensor | None = None
    pixel_values: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    image_grid_thw: Tensor | None = None
    video_grid_thw: Tensor | None = None
    alone: tuple["Prompt", ...] = field(default=())

    @property
    def valid(self) -> Tensor:
        """[B, S]: which tokens are no padding."""
        return self.attention_mask.bool()

    @property
    def cu_seqlens(self) -> Tensor:
        """Where packed sequences start and the last ends: int32 [sequences + 1]."""
        return torch.tensor([0, *(one.input_ids.shape[1] for one in self.alone)]).cumsum(0).int()

    def inputs(self) -> dict[str, Tensor]:
        """What is there, by the names that transformers and Qwen3VLModel share; a mask only if it hides something."""
        names = ("input_ids", "position_ids", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return found if self.valid.all() else found | {"attention_mask": self.attention_mask}


def prompt_of(config: dict[str, Any], rows: Sequence[Row], sides: Sequence[str] | None = None, seed: int = 0) -> Prompt:
    """A batch of rows, padded each on its side (right by default)."""
    vision, ids = config["vision_config"], ids_of(config)
    input_ids, mask = padded([ids.of(row, marked=True) for row in rows], sides or ["right"] * len(rows), ids.pad)
    images, videos = grids(rows, vision["spatial_merge_size"])
    values = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    generator = torch.Generator().manual_seed(seed)
    pixels, frames = (
        None if grid is None else torch.randn(int(grid.prod(1).sum()), values, generator=generator)
        for grid in (images, videos)
    )
    kinds = (input_ids == ids.image).long() + 2 * (input_ids == ids.video).long()
    return Prompt(input_ids, mask, kinds, None, pixels, frames, images, videos)


def ids_of(config: dict[str, Any]) -> Ids:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Ids(*(config[name] for name in names))


def packed(config: dict[str, Any], rows: Sequence[Row]) -> Prompt:
    """Sequences end to end in one row, each of which must come out as it does alone."""
    alone = tuple(prompt_of(config, [row], seed=seed) for seed, row in enumerate(rows))

    def joined(name: str, dim: int) -> Any:
        parts = [getattr(one, name) for one in alone if getattr(one, name) is not None]
        return torch.cat(parts, dim) if parts else None

    visual = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
    return Prompt(
        **{name: joined(name, 1) for name in ("input_ids", "attention_mask", "mm_token_type_ids")},
        **{name: joined(name, 0) for name in visual},
        alone=alone,
    )


def moved(config: dict[str, Any], row: Row, first: int) -> Prompt:
    """One row whose tokens from `first` on stand FAR further along than they do by themselves.

    Attention sees only how far apart two tokens are: `first=0` changes no result but for how exact the angles are,
    and any other puts the two parts far apart.
    """
    position_ids = torch.tensor(positions_of(row, marked=True)[0]).T[:, None].clone()
    position_ids[:, :, first:] += FAR
    return replace(prompt_of(config, [row]), position_ids=position_ids)


SMALL, SQUARE, WIDE, TALL, ONE = Image(1, 2, 3), Image(1, 3, 3), Image(1, 1, 5), Image(1, 5, 2), Image(1, 1, 1)
BIG = Image(1, 5, 7)
"""10 x 14 patches: more than the 8 x 8 position embeddings of the tiny models, where the others have fewer."""
CLIP = Video(3, 2, 2, gap=2)

ROWS: dict[str, Row] = {
    "text": [Text(24)],
    "image": [Text(3), SMALL, Text(5)],
    "image first and last": [SMALL, Text(4), SQUARE],
    "images": [Text(3), SMALL, Text(2), SQUARE, Text(1), WIDE, TALL, ONE, Text(4)],
    "big image": [Text(2), BIG, Text(3)],
    "video": [Text(5), CLIP, Text(4)],
    "videos": [Text(1), CLIP, Text(3), Video(2, 3, 1, gap=3), Text(2)],
    "mixed": [Text(2), SMALL, Text(3), Video(2, 2, 2, gap=2), Text(2), WIDE, Video(1, 2, 3, gap=0), Text(5)],
}
BATCH: list[Row] = [ROWS["mixed"], ROWS["image"], ROWS["text"], ROWS["video"]]

MAKERS: dict[str, Callable[[dict[str, Any]], Prompt]] = {
    **{name: partial(prompt_of, rows=[row]) for name, row in ROWS.items()},
    "batch": lambda config: prompt_of(config, [ROWS["image"], [SMALL, Text(8)], [Text(8), SMALL]]),
    "padded right": lambda config: prompt_of(config, BATCH, ["right"] * 4),
    "padded left": lambda config: prompt_of(config, BATCH, ["left"] * 4),
    "text padded": lambda config: prompt_of(config, [ROWS["text"], [Text(7)]], ["left", "left"]),
    "packed": lambda config: packed(config, BATCH),
    "packed text": lambda config: packed(config, [[Text(9)], [Text(1)], [Text(14)]]),
    "far text": lambda config: moved(config, ROWS["text"], 0),
    "far mixed": lambda config: moved(config, ROWS["mixed"], 0),
    "far apart": lambda config: moved(config, ROWS["text"], 12),
    "image far apart": lambda config: moved(config, ROWS["image"], 3),
}
"""Every prompt, by name."""


def make_prompt(name: str, config: dict[str, Any]) -> Prompt:
    """One of MAKERS, for the special tokens and patch sizes of a configuration."""
    return MAKERS[name](config)
