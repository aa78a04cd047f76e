"""Order, split and index against the published repositories, and huggingface_hub's own split."""

import hashlib
import json
import random
from typing import Any

import pytest
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.serialization._base import split_state_dict_into_shards_factory

from huggingface.samples import SIZES, model_shapes, published, tiny_config
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.huggingface.safetensors import Entry, header_bytes
from qwen3vl_convert.huggingface.writer import file_names, hub_order, index_json, plan_files, split_files
from recorded import HEADERS

GB = 10**9


def entries_of(size: str) -> list[Entry]:
    """The published tensors in our order."""
    header = json.loads((HEADERS / f"{size}.json").read_text())["tensors"]
    names = hub_order(header, Dims.from_config(published(size)))
    return [(name, "bfloat16", tuple(header[name])) for name in names]


def file_size(entries: list[Entry]) -> int:
    header = header_bytes(entries)
    table = json.loads(header[8:])
    return len(header) + int(max(entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"))


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ("2b", [4_255_140_312]),
        ("4b", [4_967_229_296, 3_908_490_048]),
        ("8b", [4_902_275_944, 4_915_962_496, 4_999_831_048, 2_716_270_024]),
    ],
)
def test_published_files(size: str, sizes: list[int]) -> None:
    files = plan_files(entries_of(size), 5 * GB)
    assert [file_size(entries) for entries in files.values()] == sizes
    assert list(files) == file_names(len(sizes))


@pytest.mark.parametrize(
    ("size", "total", "length", "sha256"),
    [("4b", 8_875_631_616, 64_742, "58a7841d"), ("8b", 17_534_247_392, 67_759, "520b2e05")],
)
def test_published_index(size: str, total: int, length: int, sha256: str) -> None:
    text = index_json(plan_files(entries_of(size), 5 * GB), total)
    assert len(text) == length
    assert hashlib.sha256(text.encode()).hexdigest().startswith(sha256)


@pytest.mark.parametrize(("size", "count"), [("32b", 14), ("30b", 13)])
def test_published_number_of_files(size: str, count: int) -> None:
    assert len(split_files(entries_of(size), 5 * GB)) == count


@pytest.mark.parametrize("size", SIZES)
def test_order_lists_exactly_the_names_given(size: str) -> None:
    header = json.loads((HEADERS / f"{size}.json").read_text())["tensors"]
    dims = Dims.from_config(published(size))
    ordered = hub_order(header, dims)
    assert sorted(ordered) == sorted(header)
    modules = [name.split(".")[2] if name != "lm_head.weight" else name for name in ordered]
    text = ["embed_tokens", *["layers"] * modules.count("layers"), "norm"]
    vision = modules[len(text) : len(text) + sum(".visual." in name for name in header)]
    assert modules == text + vision + modules[len(text) + len(vision) :]
    assert [name for name in ordered if ".visual." in name] == [name for name in header if ".visual." in name]
    numbers = [int(name.split(".")[3]) for name in ordered if ".layers." in name]
    assert numbers == sorted(numbers)


def test_order_of_names_that_the_hub_does_not_have() -> None:
    dims = Dims.from_config(tiny_config(moe=True))
    extra = ["score.10.weight", "score.2.weight", "model.language_model.layers.0.self_attn.q_proj.bias"]
    names = [*model_shapes(dims, "per-expert"), *extra]
    random.Random(0).shuffle(names)
    ordered = hub_order(names, dims)
    assert sorted(ordered) == sorted(names)
    assert ordered[-3:] == ["lm_head.weight", "score.2.weight", "score.10.weight"]
    q_proj = ordered.index("model.language_model.layers.0.self_attn.q_proj.weight")
    assert ordered[q_proj + 1] == extra[2]
    experts = [name.split("experts.")[1] for name in ordered if "layers.1.mlp.experts" in name]
    assert experts[:4] == ["0.gate_proj.weight", "0.up_proj.weight", "0.down_proj.weight", "1.gate_proj.weight"]


@pytest.mark.parametrize("seed", range(30))
def test_split_is_huggingface_hubs(seed: int) -> None:
    chance = random.Random(seed)
    entries: list[Entry] = [
        (f"t{number}", "float16", (chance.randint(0, 12),)) for number in range(chance.randint(1, 30))
    ]
    limit = chance.randint(1, 40)
    sizes = {name: 2 * shape[0] for name, _, shape in entries}
    expected = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    files = plan_files(entries, limit)
    assert {file: [name for name, _, _ in part] for file, part in files.items()} == expected.filename_to_tensors
    text = index_json(files, expected.metadata["total_size"])
    index: dict[str, Any] = {"metadata": expected.metadata, "weight_map": expected.tensor_to_filename}
    assert text == json.dumps(index, indent=2, sort_keys=True) + "\n"


def test_split_of_tensors_is_huggingface_hubs() -> None:
    import torch

    tensors = {"a": torch.zeros(5), "b": torch.zeros(2, 2), "c": torch.zeros(9)}
    entries: list[Entry] = [(name, "float32", tuple(tensor.shape)) for name, tensor in tensors.items()]
    expected = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=36
    )
    found = {file: [name for name, _, _ in part] for file, part in plan_files(entries, 36).items()}
    assert found == expected.filename_to_tensors


def test_limit_that_is_none() -> None:
    with pytest.raises(UsageError, match="--max-shard-size: expected at least 1 byte, found 0"):
        split_files([], 0)
    assert split_files([], 1) == []


def test_a_sources_own_split_is_kept() -> None:
    entries: list[Entry] = [("a", "float32", (4,)), ("b", "float32", (4,)), ("c", "float32", (4,))]
    own = {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    assert list(plan_files(entries, GB, own)) == ["model.safetensors"]
    own["c"] = own["a"]
    files = plan_files(entries, GB, own)
    assert files == {own["b"]: entries[1:2], own["a"]: [entries[0], entries[2]]}
    assert list(files) == sorted(files)
