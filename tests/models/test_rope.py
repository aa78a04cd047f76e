"""Rotary embeddings at the published sizes: the models of other tests have too few frequencies to tell all apart."""

import math

import pytest
import torch

from qwen3vl_convert.models.rope import InterleavedMRoPE, VisionRotaryEmbedding


def test_frequencies_are_dealt_out_until_height_and_width_have_theirs() -> None:
    """Of 64, height and width have twenty each; time has the rest, the last four among them."""
    axis = InterleavedMRoPE(head_dim=128, base=5e6).axis_of_frequency([24, 20, 20])
    assert axis.tolist() == [0, 1, 2] * 20 + [0] * 4


@pytest.mark.parametrize("position", [0, 1, 32_769, 262_143])
def test_angles_of_far_positions_are_those_of_float64(position: int) -> None:
    """To float32's rounding of the angle, which grows with it; bfloat16 anywhere would be off by whole turns."""
    rope = InterleavedMRoPE(head_dim=128, base=5e6).bfloat16()  # as a model in training is cast
    angles = rope(torch.tensor([position, 7, 11])[:, None, None], [24, 20, 20])
    assert angles.shape == (1, 1, 1, 128)
    assert angles.dtype == torch.float32
    of_axis = [0, 1, 2] * 20 + [0] * 4
    expected = [(position, 7, 11)[axis] * math.exp(-math.log(5e6) * 2 * i / 128) for i, axis in enumerate(of_axis)]
    torch.testing.assert_close(
        angles.flatten().double(), torch.tensor(expected * 2, dtype=torch.float64), rtol=3e-6, atol=0
    )


def test_angles_of_the_vision_tower_are_those_of_rows_then_columns() -> None:
    angles = VisionRotaryEmbedding(head_dim=8)(torch.tensor([[3, 5]]))
    torch.testing.assert_close(angles, torch.tensor([[3.0, 3 / 100, 5.0, 5 / 100]]))
