"""A planned conversion, and what the planning of both directions shares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from qwen3vl_convert.errors import InputError, UsageError
from qwen3vl_convert.huggingface.hub import Resolved
from qwen3vl_convert.model import EMBEDDING, OUTPUT, Model
from qwen3vl_convert.plan import Link, Plan
from qwen3vl_convert.storage import StoredTensor

DTYPE_OPTIONS = {"keep": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Conversion:
    """A planned conversion: everything is known, nothing is written."""

    direction: Literal["hf-to-megatron", "megatron-to-hf"]
    source: str
    model: Model
    plan: Plan
    options: dict[str, Any]
    check_data: Callable[[], list[str]]
    notes: tuple[str, ...]
    manifest_path: str
    rank_bytes: tuple[int, ...]


def target_dtypes(linked: dict[str, list[Link]], source: dict[str, StoredTensor], option: str) -> dict[str, str]:
    """The dtype of every target tensor: the one asked for, or that of its sources, which must agree."""
    if option not in DTYPE_OPTIONS:
        raise UsageError(f"--dtype {option}: expected one of {', '.join(DTYPE_OPTIONS)}.")
    asked = DTYPE_OPTIONS[option]
    dtypes = {}
    for name, into in linked.items():
        found = {source[link.source_name].dtype for link in into}
        if asked is None and len(found) > 1:
            raise InputError(
                f"{name} would be made of tensors of different dtypes, {' and '.join(sorted(found))}. "
                f"Pass --dtype bf16, fp16 or fp32."
            )
        dtypes[name] = asked or found.pop()
    return dtypes


def padding_of(model: Model, megatron: dict[str, StoredTensor]) -> dict[str, int]:
    """Elements of padding in the Megatron tensors that have any."""
    surplus = (model.padded_vocab - model.dims.vocab) * model.dims.hidden
    return {name: surplus for name in (EMBEDDING[0], OUTPUT[0]) if surplus and name in megatron}


def said(source: Resolved) -> str:
    """A source as the manifest names it: a Hub id with its commit, or the name of a folder, never its path."""
    return f"{source.repo}@{source.revision}" if source.repo else source.folder.resolve().name
