"""The two programs that are compared, given the same prompt: our model on Megatron-Core, and transformers' own."""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3vl_convert.verify.logits.prompts import Prompt, our_arguments, their_arguments

our_inputs = our_arguments
"""As the tests of training call it."""


def transformers_release() -> tuple[int, int]:
    """(major, minor)."""
    major, minor, *_ = version("transformers").split(".")
    return int(major), int(minor)


def our_logits(model: Any, prompt: Prompt) -> Tensor:
    """[B, S, V]."""
    logits: Tensor = model(**our_arguments(prompt))
    return logits


def their_logits(model: Any, prompt: Prompt) -> Tensor:
    """[B, S, V]; packed sequences one by one."""
    if prompt.alone:
        return torch.cat([their_logits(model, one) for one in prompt.alone], dim=1)
    logits: Tensor = model(**their_arguments(prompt)).logits
    return logits


def load_theirs(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    """transformers' model, in evaluation mode; AssertionError unless the folder's tensors are exactly its own."""
    transformers: Any = import_module("transformers")
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()
