"""Is it the same model? `verification` is the way in: weights on disk, bit for bit (`weights`), and what both models
compute (`logits`). `roundtrip` converts there and back, `diff` compares any two checkpoints. `result` is what is found,
`report` and `terminal` show it.
"""

from qwen3vl_convert.verify.diff import Change, DiffReport, diff
from qwen3vl_convert.verify.result import (
    Difference,
    LogitsReport,
    Place,
    PointResult,
    PromptResult,
    Verification,
    WeightsReport,
)
from qwen3vl_convert.verify.roundtrip import RoundTrip, roundtrip
from qwen3vl_convert.verify.verification import LogitsOptions, verify

__all__ = [
    "Change",
    "DiffReport",
    "Difference",
    "LogitsOptions",
    "LogitsReport",
    "Place",
    "PointResult",
    "PromptResult",
    "RoundTrip",
    "Verification",
    "WeightsReport",
    "diff",
    "roundtrip",
    "verify",
]
