"""The six published models: built without memory, with the parameters that their files have. The smallest is run."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from models.build import lone_process, provider
from qwen3vl_convert.make import SIZES

pytestmark = pytest.mark.megatron

PARAMETERS = {
    "2b": (2_127_532_032, 406_957_056),
    "4b": (4_437_815_808, 415_347_712),
    "8b": (8_767_123_696, 576_388_336),
    "32b": (33_357_390_064, 595_266_800),
    "30b-a3b": (31_070_754_032, 538_631_408),
    "235b-a22b": (235_670_022_896, 576_388_336),
}
"""All, and those of the vision tower, as published."""


@pytest.fixture(autouse=True, scope="module")
def process() -> Iterator[None]:
    with lone_process():
        yield


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(size: str) -> Any:
    """The model without memory for its weights."""
    settings = provider(SIZES[size], perform_initialization=False)
    settings.finalize()
    with torch.device("meta"):
        return settings.provide()


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=pytest.mark.slow) if size == "235b-a22b" else size for size in PARAMETERS]
)
def test_has_the_parameters_that_were_published(size: str) -> None:
    model = on_meta(size)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert (count(model), count(model.vision_model)) == PARAMETERS[size]


@pytest.mark.slow
def test_the_smallest_runs_with_an_image_and_a_video() -> None:
    model = on_meta("2b").eval()
    fill(model)
    image, video, start, end = 151655, 151656, 151652, 151653
    row = [9707, start, *[image] * 6, end, *[start, *[video] * 4, end] * 2, 13]
    with torch.no_grad():
        logits = model(
            torch.tensor([row]),
            pixel_values=torch.rand(24, 1536),
            image_grid_thw=torch.tensor([[1, 4, 6]]),
            pixel_values_videos=torch.rand(32, 1536),
            video_grid_thw=torch.tensor([[2, 4, 4]]),
        )
    assert logits.shape == (1, len(row), 151936)
    assert logits.isfinite().all()
    assert logits.std() > 0


def fill(model: Any) -> None:
    """Random weights of a sensible scale, in the memory of the largest of them: each is a view of the same numbers."""
    largest = max(parameter.numel() for parameter in model.parameters())
    numbers = torch.randn(largest, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                value = numbers[: parameter.numel()].view(parameter.shape)
            else:
                value = torch.zeros(parameter.shape) if name == "bias" else torch.ones(parameter.shape)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
