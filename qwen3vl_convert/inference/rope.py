"""Rotary position embeddings. What is computed is kept for the forward at hand, so that all layers share it.

A table of all positions would be read as often as cos and sin are computed here, and take 128 MiB.

Axes: T tokens, D head_dim, F = D / 2 frequencies.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

CosSin = tuple[Tensor, Tensor]
"""(cos, sin) [T, F] each."""


@cache
def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i / dim) for i < dim / 2 in float32; computed on the CPU, whose powers are the same bits everywhere.

    No buffer of a module: a model that is moved to bfloat16 would round it, and one that is made without memory for
    its weights would lose it.
    """
    with torch.device("cpu"), torch.inference_mode(False):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        return (1.0 / theta**exponents).to(device)


@cache
def axis_of_frequency(frequencies: int, section: tuple[int, ...], interleaved: bool, device: torch.device) -> Tensor:
    """[F]: whether a frequency turns with time (0), height (1) or width (2).

    `section`: how many each has. Interleaved they are dealt out in turn, THWTHW..., as long as height and width have
    some left, and time has the rest; otherwise they stand one after the other.
    """
    if not interleaved:
        axes = [axis for axis, count in enumerate(section) for _ in range(count)]
    else:
        axes = [i % 3 if i % 3 and i < 3 * section[i % 3] else 0 for i in range(frequencies)]
    if len(axes) != frequencies:
        raise ValueError(
            f"mrope_section {list(section)}: expected {frequencies} frequencies in all, found {len(axes)}."
        )
    with torch.inference_mode(False):
        return torch.tensor(axes, device=device)


def mrope(positions: Tensor, head_dim: int, theta: float, section: Sequence[int], interleaved: bool) -> CosSin:
    """Of the text model, in float32, for positions [3, T] (time, height, width) or [T] (the same in all three)."""
    frequency_F = inverse_frequencies(head_dim, theta, positions.device)
    if positions.dim() == 1:
        position_TF = positions[:, None].float()
    else:
        axis_F = axis_of_frequency(len(frequency_F), tuple(section), interleaved, positions.device)
        position_TF = positions.float().index_select(0, axis_F).T
    angle_TF = position_TF * frequency_F
    return angle_TF.cos(), angle_TF.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + F) of x [T, heads, D] by angles whose cos and sin are [T, F], in their dtype."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
