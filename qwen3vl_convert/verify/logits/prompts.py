"""The prompts that both models are fed: a few dozen tokens each, with all that Qwen3-VL treats in its own way.

    prompts, notes = verification_prompts(config, folder)      # config: the dictionary in config.json
    ours(**our_arguments(prompts[0].prompt)), theirs(**their_arguments(prompts[0].prompt))

The checkpoint's own processor makes them if it can; else words and pixels are random and the same everywhere: whole
numbers from CRC-32 and from the raw stream of PCG64, which are fixed by definition. What torch draws for a seed differs
between devices and may differ between its releases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.verify.logits.pieces import Image, Row, Text, TokenIds, Video, grids, padded


@dataclass(frozen=True, eq=False)
class Prompt:
    """What goes into a model. None is what is not there.

    input_ids, attention_mask (1: token, 0: padding), mm_token_type_ids (1: image, 2: video; transformers 5): [B, S].
    position_ids: [3, B, S], where they are not to be what follows from ids and grids.
    pixel_values, pixel_values_videos: float32 [patches, values], with their grids [count, 3] in patches.
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
    alone: tuple["Prompt", ...] = ()

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


def our_arguments(prompt: Prompt) -> dict[str, Any]:
    """What our model is called with; packed sequences in one row, which takes megatron-core."""
    if not prompt.alone:
        return dict(prompt.inputs())
    from megatron.core.packed_seq_params import PackedSeqParams

    ends, longest = prompt.cu_seqlens.to(prompt.input_ids.device), int(prompt.cu_seqlens.diff().max())
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
    return {**prompt.inputs(), "packed_seq_params": packed}


def their_arguments(prompt: Prompt) -> dict[str, Tensor]:
    """What transformers' model is called with, of the release that is installed.

    A mask always: without, 4.57 takes positions that jump for packing.
    """
    inputs = prompt.inputs() | {"attention_mask": prompt.attention_mask}
    if int(version("transformers").partition(".")[0]) >= 5:
        inputs["mm_token_type_ids"] = prompt.mm_token_type_ids
    return inputs


def prompt_of(dims: Dims, rows: Sequence[Row], sides: Sequence[str] | None = None, seed: int = 0) -> Prompt:
    """A batch of rows, padded each on its side (right by default)."""
    ids = TokenIds.from_dims(dims)
    tokens = [ids.of(row, marked=True, seed=seed) for row in rows]
    input_ids, mask = padded(tokens, sides or ["right"] * len(rows), ids.pad)
    images, videos = grids(rows, dims.spatial_merge)
    pixels, frames = (_patches(dims, grid, [seed, kind]) for kind, grid in enumerate((images, videos)))
    return Prompt(input_ids, mask, token_types(input_ids, dims), None, pixels, frames, images, videos)


def token_types(input_ids: Tensor, dims: Dims) -> Tensor:
    """1 where an image's token stands, 2 for a video's, else 0. Not a processor's: 4.57's know of images only."""
    return (input_ids == dims.image_token_id).long() + 2 * (input_ids == dims.video_token_id).long()


def _patches(dims: Dims, grid: Tensor | None, seed: Sequence[int]) -> Tensor | None:
    """float32 [patches, values] from -1 to 1: bytes, scaled as a processor scales them.

    Noise, so that no place in a patch is like another: of a real image both halves in time would be the same.
    """
    if grid is None:
        return None
    shape = (int(grid.prod(1).sum()), dims.channels * dims.temporal_patch * dims.patch**2)
    raw = np.random.PCG64(seed).random_raw(-(-shape[0] * shape[1] // 8)).astype("<u8").view(np.uint8)
    return (torch.from_numpy(raw[: shape[0] * shape[1]].reshape(shape)).float() - 127.5) / 127.5


# ---- what is verified ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class NamedPrompt:
    """A prompt of one row without padding. `contents` says what is in it, for a reader."""

    name: str
    contents: str
    prompt: Prompt

    @property
    def kinds(self) -> str:
        """Per token "t" text, "i" image, "v" video."""
        return _kinds(self.prompt)


ROWS: dict[str, Row] = {
    "text": [Text(96)],
    "image": [Text(8), Image(1, 5, 7), Text(12)],
    "images": [Text(3), Image(1, 2, 3), Text(2), Image(1, 3, 3), Text(1), Image(1, 1, 5), Image(1, 6, 2), Text(9)],
    "video": [Text(5), Video(4, 3, 4, gap=3), Text(7)],
    "mixed": [Text(2), Image(1, 4, 2), Text(3), Video(3, 2, 3, gap=4), Text(2), Image(1, 1, 3), Text(8)],
}
"""Text for distances at which rope angles of any theta differ; no two grids alike; two images without a word between
them; one with more rows of patches than a tiny model has position embeddings; more than one frame.
"""


def verification_prompts(
    config: Mapping[str, Any], folder: Path | None = None
) -> tuple[tuple[NamedPrompt, ...], tuple[str, ...]]:
    """Text, one image, several images, a video, all of it; and notes on who made them.

    `config`: the parsed config.json. `folder`: where the processor may be. Raises what `Dims.from_config` does.
    """
    from qwen3vl_convert.verify.logits.processor import NoProcessor, processor_prompts

    dims = Dims.from_config(config)
    try:
        return processor_prompts(dims, folder), ("The checkpoint's own processor made the prompts, of drawn pictures.",)
    except NoProcessor as reason:
        note = f"The prompts are random words and pixels: the checkpoint's own processor {reason}."
        return synthetic_prompts(dims), (note,)


def synthetic_prompts(dims: Dims) -> tuple[NamedPrompt, ...]:
    """Of random words and pixels: nothing is needed but sizes and special tokens."""
    prompts = {name: prompt_of(dims, [row], seed=seed) for seed, (name, row) in enumerate(ROWS.items())}
    return tuple(NamedPrompt(name, contents_of(prompt), prompt) for name, prompt in prompts.items())


def contents_of(prompt: Prompt) -> str:
    """Of a prompt of one row without padding, as `9 tokens of text, image of 4x6 patches, ...`."""
    parts, frames = [], 0
    images, videos = (
        iter([] if grid is None else grid.tolist()) for grid in (prompt.image_grid_thw, prompt.video_grid_thw)
    )
    for kind, run in groupby(_kinds(prompt)):
        if kind == "i":
            _, height, width = next(images)
            parts.append(f"image of {height}x{width} patches")
        elif kind == "v" and not frames:
            count, height, width = next(videos)
            parts.append(f"video of {count} frames of {height}x{width} patches")
            frames = count - 1
        elif kind == "v":
            frames -= 1
        elif not frames:  # else these are the words between two frames
            parts.append(f"{len(list(run))} tokens of text")
    return ", ".join(parts)


def _kinds(prompt: Prompt) -> str:
    return "".join("tiv"[kind] for kind in prompt.mm_token_type_ids[0].tolist())
