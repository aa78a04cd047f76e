"""A prefill of the Megatron model beside transformers with sdpa attention, and bfloat16 logits of longer prompts."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.checks import BFLOAT16, Run, synchronize, world
from gpu.logits import in_bfloat16
from gpu.models import build_ours, build_theirs, config_of, on
from gpu.page import Row
from models.prompts import Image, Prompt, Text, Video, prompt_of
from models.sides import our_logits, their_logits


def times(run: Run) -> Iterator[Row]:
    """Tokens of text with an image of as many features, all logits; batches of one and four."""
    tokens, side = (16, 4) if run.small else (1024, 32)
    row: list[Text | Image | Video] = [Text(tokens // 2), Image(1, side, side), Text(tokens // 2)]
    with world(run.device), torch.no_grad():
        ours = build_ours(run.hf, BFLOAT16, run.device)
        theirs = build_theirs(run.hf, BFLOAT16, run.device, attention="sdpa")
        for rows in (1, 4):
            prompt = on(prompt_of(config_of(run.hf), [row] * rows), run.device)
            what = f"{run.shape} shapes, {tokens} tokens and an image of {side * side} features, batch {rows}"
            work = partial(our_logits, ours, prompt), partial(their_logits, theirs, prompt)
            yield timing(what, *alternately(*work, repeat=2 if run.small else 8, device=run.device))


def timing(what: str, ours: float, theirs: float) -> Row:
    """In seconds. There is nothing to pass."""
    cells = [f"{1000 * seconds:.1f} ms" for seconds in (ours, theirs)]
    return Row("prefill", (what, *cells, f"{ours / theirs:.2f}"), True)


def alternately(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], repeat: int, device: str
) -> tuple[float, float]:
    """Seconds: the best of several runs of each, in turn; the first of each does not count."""
    taken = [(seconds(ours, device), seconds(theirs, device)) for _ in range(repeat)]
    best, other = (min(times[1:]) for times in zip(*taken, strict=True))
    return best, other


def seconds(work: Callable[[], Tensor], device: str) -> float:
    """From one moment at which the device is idle to the next."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def logits(run: Run) -> Iterator[Row]:
    """In bfloat16."""
    with world(run.device), torch.no_grad():
        prompts = prompts_of(config_of(run.hf), run.small)
        yield from in_bfloat16(run, f"logits, {run.shape} shapes", str(run.shape), run.hf, prompts)


def prompts_of(config: dict[str, Any], small: bool) -> dict[str, Prompt]:
    """Longer than those of the tiny models."""
    side = 2 if small else 16
    image, video = Image(1, side, side), Video(4, side, side // 2, gap=3)
    return {
        "image": prompt_of(config, [[Text(40), image, Text(40)]]),
        "video": prompt_of(config, [[Text(40), video, Text(40)]]),
        "image and video, two rows": prompt_of(config, [[Text(9), image, Text(20), video, Text(9)], [Text(30), image]]),
    }


CHECKS = (times, logits)
