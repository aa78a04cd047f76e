"""Which tensors go into which file of a new folder, and the index that says so: planned, not written.

The split is that of transformers' save_pretrained, the order that of the published 2B, 4B and 8B, whose files and index
come out byte for byte. A source's own split is reused where there is one: 30B and 235B follow no single order.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.huggingface.files import SINGLE_FILE
from qwen3vl_convert.huggingface.safetensors import Entry
from qwen3vl_convert.storage import DTYPES


def hub_order(names: Iterable[str], dims: Dims) -> list[str]:
    """The given names in the published order: embedding, layers, norm, vision, head; then names that those lack."""
    wanted = set(names)
    known = [name for module in _modules(dims) for name in _parameters(module) if name in wanted]
    rest = wanted.difference(known)
    return known + sorted(rest, key=_natural)


def split_files(entries: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """huggingface_hub's split: in the given order, greedily, a tensor above the limit in a file of its own."""
    if max_shard_bytes < 1:
        raise UsageError(f"--max-shard-size: expected at least 1 byte, found {max_shard_bytes}.")
    files: list[list[Entry]] = []
    current: list[Entry] = []
    filled = 0
    for entry in entries:
        size = _nbytes(entry)
        if size > max_shard_bytes:
            files.append([entry])
            continue
        if filled + size > max_shard_bytes:
            files.append(current)
            current, filled = [], 0
        current.append(entry)
        filled += size
    return [*files, current] if current else files


def file_names(count: int) -> list[str]:
    """`model.safetensors`, or `model-00001-of-00002.safetensors` and so on."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def plan_files(
    entries: Sequence[Entry], max_shard_bytes: int, shard_of: Mapping[str, str] | None = None
) -> dict[str, list[Entry]]:
    """File names with their tensors. `shard_of`, a source's own split, is taken over if its tensors are the same."""
    if shard_of is not None and shard_of.keys() == {name for name, _, _ in entries}:
        reused: dict[str, list[Entry]] = {name: [] for name in sorted(set(shard_of.values()))}
        for entry in entries:
            reused[shard_of[entry[0]]].append(entry)
        return reused
    split = split_files(entries, max_shard_bytes)
    return dict(zip(file_names(len(split)), split, strict=True))


def index_json(files: Mapping[str, Sequence[Entry]], total_size: int) -> str:
    """The text of model.safetensors.index.json; `total_size` is the tensors' bytes."""
    weight_map = {name: file for file, entries in files.items() for name, _, _ in entries}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _nbytes(entry: Entry) -> int:
    _, dtype, shape = entry
    return math.prod(shape) * DTYPES[dtype].itemsize


def _parameters(module: str) -> tuple[str, ...]:
    """A module's parameters, or the parameter itself where experts are fused."""
    return (module, f"{module}.weight", f"{module}.bias")


def _modules(dims: Dims) -> Iterator[str]:
    """Every module that may own parameters, in the published order."""
    text = "model.language_model."
    yield text + "embed_tokens"
    for layer in range(dims.layers):
        for module in (*_ATTENTION, "post_attention_layernorm", *_mlp(dims)):
            yield f"{text}layers.{layer}.{module}"
    yield text + "norm"
    yield from (f"model.visual.{module}" for module in _vision(dims))
    yield "lm_head"


# Within a layer as a Megatron-Core layer owns them: the published models were exported from one.
_ATTENTION = (
    *(f"self_attn.{name}" for name in ("o_proj", "q_proj", "k_proj", "v_proj")),
    "input_layernorm",
    *(f"self_attn.{name}" for name in ("q_norm", "k_norm")),
)
_BLOCK = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
_MERGER = ("norm", "linear_fc1", "linear_fc2")
_GATED = ("gate_proj", "up_proj", "down_proj")


def _mlp(dims: Dims) -> tuple[str, ...]:
    if not dims.moe:
        return tuple(f"mlp.{name}" for name in _GATED)
    one_by_one = (f"mlp.experts.{expert}.{name}" for expert in range(dims.experts) for name in _GATED)
    return ("mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", *one_by_one)


def _vision(dims: Dims) -> Iterator[str]:
    yield from ("patch_embed.proj", "pos_embed")
    yield from (f"blocks.{block}.{module}" for block in range(dims.vision_depth) for module in _BLOCK)
    yield from (f"merger.{module}" for module in _MERGER)
    yield from (
        f"deepstack_merger_list.{merger}.{module}" for merger in range(len(dims.deepstack)) for module in _MERGER
    )


def _natural(name: str) -> list[tuple[int, int, str]]:
    """`a.2` before `a.10`."""
    parts = re.split(r"(\d+)", name)
    return [(int(part.isdigit()), int(part) if part.isdigit() else 0, part) for part in parts]
