"""Where both models are built."""

import torch

from qwen3vl_convert.errors import UsageError


def device_of(asked: str) -> torch.device:
    """`asked`: auto, cuda or cpu. Raises `UsageError` for a GPU that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here. Use --device cpu, or auto.")
    gpu = asked != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
