"""Which pipeline stage has which layer."""

import pytest

from qwen3vl_convert import ParallelLayout
from qwen3vl_convert.errors import UsageError

STAGES = [
    (ParallelLayout(pp=2), [0, 0, 1, 1]),
    (ParallelLayout(pp=2, vpp=2), [0, 1, 0, 1]),
    (ParallelLayout(pp=2, first_stage_layers=3), [0, 0, 0, 1]),
    (ParallelLayout(pp=2, last_stage_layers=1), [0, 0, 0, 1]),
    (ParallelLayout(pp=2, first_stage_layers=3, last_stage_layers=1), [0, 0, 0, 1]),
    (ParallelLayout(pp=3, first_stage_layers=1, last_stage_layers=1), [0, 1, 1, 2]),
]


@pytest.mark.parametrize(
    ("layout", "expected"), STAGES, ids=lambda value: str(value) if isinstance(value, list) else ""
)
def test_stages_of_four_layers(layout: ParallelLayout, expected: list[int]) -> None:
    assert layout.stages(4) == expected


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(pp=2, first_stage_layers=2, last_stage_layers=1),
        ParallelLayout(pp=3, first_stage_layers=1),
        ParallelLayout(pp=2, first_stage_layers=4),
        ParallelLayout(pp=3),
    ],
    ids=str,
)
def test_layers_that_do_not_divide(layout: ParallelLayout) -> None:
    with pytest.raises(UsageError, match="does not divide|do not divide"):
        layout.stages(4)
