"""The Megatron model's logits beside transformers', and its vision tower at the fixed length that CUDA graphs need."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.checks import BFLOAT16, FLOAT32, ROUNDING, TOLERANCE, Run, bound_in_float32, check, root_mean_square, world
from gpu.models import build_ours, build_theirs, difference, on, tiny
from gpu.page import Row
from models.prompts import Prompt, make_prompt
from models.sides import our_logits, their_logits

PROMPTS = ("text", "image", "images", "video", "mixed", "padded left", "padded right", "packed")
GRIDS = {
    "one image that fills it": [[1, 8, 8]],
    "one image": [[1, 4, 6]],
    "three images": [[1, 4, 6], [1, 2, 2], [1, 6, 4]],
    "a video": [[3, 4, 4]],
    "an image and a video": [[1, 4, 4], [3, 4, 4]],
}
"""Grids of at most FIXED patches, the length of the captured graph."""
FIXED = 64


def logits_of_tiny_models(run: Run) -> Iterator[Row]:
    """Both precisions, every kind of prompt."""
    with world(run.device), torch.no_grad():
        for name in ("tiny", "tiny-moe"):
            folder = tiny(run, name)
            yield from in_float32(run, name, folder)
            yield from in_bfloat16(run, "logits", name, folder, {prompt: prompt for prompt in PROMPTS})


def in_float32(run: Run, name: str, folder: Path) -> Iterator[Row]:
    """The same numbers within rounding."""
    ours, theirs = (build(folder, FLOAT32, run.device) for build in (build_ours, build_theirs))
    config = theirs.config.to_dict()
    on_cpu = theirs if run.device == "cpu" else copy.deepcopy(theirs).to("cpu")
    for what in PROMPTS:
        prompt = make_prompt(what, config)
        there = on(prompt, run.device)
        expected = their_logits(theirs, there)
        spread = difference(expected, their_logits(on_cpu, prompt), there).greatest
        found = difference(our_logits(ours, there), expected, there).greatest
        yield check("logits", what, name, FLOAT32, found, bound_in_float32(spread))


def in_bfloat16(run: Run, part: str, name: str, folder: Path, prompts: dict[str, Any]) -> Iterator[Row]:
    """`prompts`: by what they are called, a prompt or the name of one."""
    exact, theirs = (build_theirs(folder, dtype, run.device) for dtype in (FLOAT32, BFLOAT16))
    ours = build_ours(folder, BFLOAT16, run.device)
    found, yardstick = {}, 0.0
    for what, given in prompts.items():
        prompt: Prompt = make_prompt(given, exact.config.to_dict()) if isinstance(given, str) else given
        prompt = on(prompt, run.device)
        expected = their_logits(exact, prompt)
        yardstick = max(yardstick, difference(their_logits(theirs, prompt), expected, prompt).mean)
        found[what] = difference(our_logits(ours, prompt), expected, prompt).mean
    yield from (check(part, what, name, BFLOAT16, measured, ROUNDING * yardstick) for what, measured in found.items())


# ---- the vision tower at a fixed length ------------------------------------------------------------------------------


def fixed_length_vision(run: Run) -> Iterator[Row]:
    """Padded in training, as captured graphs need it; otherwise not."""
    settings = {"vision_cuda_graph_impl": "transformer_engine", "max_vision_cuda_graph_seq_length": FIXED}
    with world(run.device):
        folder = tiny(run, "tiny")
        exact, rounded = (build_ours(folder, dtype, run.device, **settings) for dtype in (FLOAT32, BFLOAT16))
        for what, grids in GRIDS.items():
            yield from _fixed_length(what, torch.tensor(grids), exact, rounded, run.device)


def _fixed_length(what: str, grid: Tensor, exact: Any, rounded: Any, device: str) -> Iterator[Row]:
    patches = torch.randn(int(grid.prod(1).sum()), 1536, generator=torch.Generator().manual_seed(0)).to(device)
    expected, plain = features(exact.eval(), patches, grid), features(rounded.eval(), patches, grid)
    padded, padded_rounded = features(exact.train(), patches, grid), features(rounded.train(), patches, grid)
    bound = TOLERANCE * max(1.0, float(expected.abs().max()))
    yield check("vision, fixed length", what, "tiny", FLOAT32, float((padded - expected).abs().max()), bound)
    yardstick = ROUNDING * root_mean_square(plain - expected)
    measured = root_mean_square(padded_rounded - expected)
    yield check("vision, fixed length", what, "tiny", BFLOAT16, measured, yardstick)


@torch.no_grad()
def features(model: Any, patches: Tensor, grid: Tensor) -> Tensor:
    """Of the merger and the deepstack mergers, [1 + deepstack, V, h] in float32. Raises ValueError where the layers of
    the tower do not see the length that they are to see.
    """
    tower = model.vision_model
    lengths: list[int] = []
    hook = tower.decoder.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: lengths.append(len((args or (kwargs["hidden_states"],))[0])), with_kwargs=True
    )
    merged, deepstack = tower(patches, grid)
    hook.remove()
    if lengths != [FIXED if tower.training else len(patches)]:
        raise ValueError(f"the vision layers saw {lengths} patches; in training they are to see {FIXED}")
    return torch.stack([merged, *deepstack]).float()
