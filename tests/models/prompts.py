"""Tiny prompts for a model of any tiny configuration, as tensors that a processor could have made.

    make_prompt("image", config).inputs()         # config: the dictionary in config.json
    MAKERS                                        # the names, for parametrize

Of pieces as in `qwen3vl_convert.verify.logits.pieces`; here are batches, padding, packing and far positions as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.verify.logits import prompts
from qwen3vl_convert.verify.logits.pieces import Image, Piece, Row, Text, TokenIds, Video, grids, padded
from qwen3vl_convert.verify.logits.prompts import Prompt

__all__ = [
    "BATCH",
    "FAR",
    "MAKERS",
    "ROWS",
    "Ids",
    "Image",
    "Piece",
    "Prompt",
    "Row",
    "Text",
    "Video",
    "grids",
    "make_prompt",
    "padded",
    "positions_of",
    "prompt_of",
]

FAR = 40_000
"""A position past 32k, where angles in less than float32 would be wrong by radians."""
Position = tuple[int, int, int]


@dataclass(frozen=True)
class Ids(TokenIds):
    """Those of the tiny models."""

    image: int = 500
    video: int = 501
    start: int = 502
    end: int = 503
    words: range = range(3, 500)


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


def prompt_of(config: dict[str, Any], rows: Sequence[Row], sides: Sequence[str] | None = None, seed: int = 0) -> Prompt:
    """A batch of rows, padded each on its side (right by default)."""
    return prompts.prompt_of(dims_of(config), rows, sides, seed)


def dims_of(config: dict[str, Any]) -> Dims:
    """Those of a tiny model, but for what a prompt depends on; a config needs to say nothing else."""
    vision = config["vision_config"]
    return replace(
        SIZES["tiny"],
        image_token_id=config["image_token_id"],
        video_token_id=config["video_token_id"],
        vision_start_token_id=config["vision_start_token_id"],
        vision_end_token_id=config["vision_end_token_id"],
        spatial_merge=vision["spatial_merge_size"],
        channels=vision["in_channels"],
        temporal_patch=vision["temporal_patch_size"],
        patch=vision["patch_size"],
    )


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
