"""Rotary position embeddings: interleaved M-RoPE of the text model, two-dimensional RoPE of the vision model.

Axes: S sequence, B batch, N heads, D head_dim, F = D / 2 frequencies.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def inverse_frequencies(dim: int, base: float) -> Tensor:
    """base^(-2i / dim) for i < dim / 2, float32, on the CPU: its powers are the same bits on every machine."""
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def apply_rotary(x: Tensor, angles: Tensor, *, in_fp32: bool) -> Tensor:
    """Rotate pairs (i, i + D/2) of x [..., N, D] by angles [..., 1, D]; the result has x's dtype.

    `in_fp32`: rotate in float32 and round once (vision). Otherwise cos and sin are rounded to x's dtype first (text).
    """
    turned = x.float() if in_fp32 else x
    cos, sin = angles.cos().to(turned.dtype), angles.sin().to(turned.dtype)
    first, second = turned.chunk(2, dim=-1)
    return (turned * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class InterleavedMRoPE(nn.Module):
    """Angles of the text model: each frequency belongs to time, height or width, dealt out in turn (THWTHW...TT).

    The interface is that of Megatron-Core's MultimodalRotaryEmbedding, which knows contiguous sections only.
    """

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        # No buffer: `model.bfloat16()` would round it, and with it positions beyond a few hundred.
        self.inv_freq = inverse_frequencies(head_dim, base)

    def forward(self, position_ids: Tensor, mrope_section: Sequence[int], cp_group: Any = None, **_: Any) -> Tensor:
        """position_ids [3, B, S] of any integer type; angles [S, B, 1, D] in float32.

        `mrope_section`: how many frequencies time, height and width have. Positions of this rank alone, where context
        parallelism cuts the sequence: the model has cut them already, hence `cp_group` changes nothing.
        """
        self.inv_freq = self.inv_freq.to(position_ids.device)
        angles_3BSF = position_ids[..., None].float() * self.inv_freq
        axis_F = self.axis_of_frequency(mrope_section).to(position_ids.device)
        angles_BSF = angles_3BSF.gather(0, axis_F.expand(1, *angles_3BSF.shape[1:]))[0]
        return torch.cat((angles_BSF, angles_BSF), dim=-1).transpose(0, 1)[:, :, None]

    def axis_of_frequency(self, mrope_section: Sequence[int]) -> Tensor:
        """[F]: 0 (time), 1 (height) or 2 (width). Height has 1, 4, 7..., width 2, 5, 8..., time the rest."""
        axis = torch.zeros(len(self.inv_freq), dtype=torch.long)
        for number in (1, 2):
            axis[number : 3 * mrope_section[number] : 3] = number
        return axis


class VisionRotaryEmbedding(nn.Module):
    """Angles of rows and columns: a quarter of head_dim frequencies each."""

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(head_dim // 2, base)

    def forward(self, coordinates: Tensor) -> Tensor:
        """coordinates [patches, 2] (row, column); angles [patches, head_dim / 2] in float32."""
        self.inv_freq = self.inv_freq.to(coordinates.device)
        return (coordinates[..., None].float() * self.inv_freq).flatten(1)
