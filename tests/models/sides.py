"""The two programs that are compared, given the same prompt: our model on Megatron-Core, and transformers' own."""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.prompts import Prompt


def transformers_release() -> tuple[int, int]:
    """(major, minor)."""
    major, minor, *_ = version("transformers").split(".")
    return int(major), int(minor)


def our_inputs(prompt: Prompt) -> dict[str, Any]:
    """Arguments of our model; packed sequences in one row."""
    from megatron.core.packed_seq_params import PackedSeqParams

    if not prompt.alone:
        return dict(prompt.inputs())
    ends, longest = prompt.cu_seqlens.to(prompt.input_ids.device), int(prompt.cu_seqlens.diff().max())
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
    return {**prompt.inputs(), "packed_seq_params": packed}


def their_inputs(prompt: Prompt) -> dict[str, Tensor]:
    """Arguments of transformers' model. With a mask always: without, 4.57 takes positions that jump for packing."""
    inputs = prompt.inputs() | {"attention_mask": prompt.attention_mask}
    if transformers_release() >= (5, 0):
        inputs["mm_token_type_ids"] = prompt.mm_token_type_ids
    return inputs


def our_logits(model: Any, prompt: Prompt) -> Tensor:
    """[B, S, V]."""
    logits: Tensor = model(**our_inputs(prompt))
    return logits


def their_logits(model: Any, prompt: Prompt) -> Tensor:
    """[B, S, V]; packed sequences one by one."""
    if prompt.alone:
        return torch.cat([their_logits(model, one) for one in prompt.alone], dim=1)
    logits: Tensor = model(**their_inputs(prompt)).logits
    return logits


def load_theirs(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    """transformers' model, in evaluation mode; AssertionError unless the folder's tensors are exactly its own."""
    transformers: Any = import_module("transformers")
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()
