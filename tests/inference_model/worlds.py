"""A tiny checkpoint of each kind, transformers' model of it, ours, and what transformers computes: the oracle.

world = make_world("moe", folder); world.expected(prompt)                     # logits [S, vocab]
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.planted import lively_checkpoint
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.verify.logits.pieces import Image, Row, Text, Video
from qwen3vl_convert.verify.logits.prompts import Prompt, prompt_of, their_arguments

KINDS = {
    "dense": replace(SIZES["tiny"], dtype="float32"),
    "tied": replace(SIZES["tiny"], tied=True, dtype="float32"),
    "moe": replace(SIZES["tiny-moe"], dtype="float32"),
}
ROWS: dict[str, Row] = {
    "text": [Text(21)],
    "image": [Text(3), Image(1, 2, 3), Text(5)],
    "images": [Text(3), Image(1, 2, 3), Text(2), Image(1, 4, 3), Text(4)],
    "video": [Text(5), Video(3, 2, 2, 2), Text(4)],
    "mixed": [Text(2), Image(1, 3, 3), Text(3), Video(2, 2, 3, 2), Text(5), Image(1, 2, 2), Text(2)],
}
NEAR = 2e-5
"""How far logits in float32 may be from transformers' on a CPU."""


@dataclass(frozen=True)
class World:
    dims: Dims
    folder: Path
    theirs: Any
    ours: Any

    def prompt(self, row: Row, seed: int = 0) -> Prompt:
        return prompt_of(self.dims, [row], seed=seed)

    def expected(self, prompt: Prompt, more: list[int] | None = None, device: str = "cpu") -> Tensor:
        """Logits [S + more, vocab] of a whole forward of transformers, of a prompt that goes on with `more` tokens."""
        if more:
            ids = torch.cat((prompt.input_ids, torch.tensor([more])), dim=1)
            types = torch.cat((prompt.mm_token_type_ids, torch.zeros(1, len(more), dtype=torch.int64)), dim=1)
            prompt = replace(prompt, input_ids=ids, mm_token_type_ids=types, attention_mask=torch.ones_like(ids))
        inputs = {name: tensor.to(device) for name, tensor in their_arguments(prompt).items()}
        with torch.no_grad():
            logits: Tensor = self.theirs(**inputs, use_cache=False).logits[0]
        return logits


def make_world(kind: str, folder: Path) -> World:
    import transformers

    from qwen3vl_convert.inference import load_model

    dims = KINDS[kind]
    lively_checkpoint(folder, dims)
    made: Any = transformers.AutoModelForImageTextToText
    theirs = made.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return World(dims, folder, theirs, load_model(folder))


def visual(prompt: Prompt) -> dict[str, Tensor | None]:
    """The pixels and grids of a prompt, by the names that a ForwardBatch and a request have for them."""
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    return {name: getattr(prompt, name) for name in names}
