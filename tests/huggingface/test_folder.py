"""Reading folders: the golden ones against the safetensors library, tiny ones in every shape, and broken ones."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from huggingface.samples import make_folder, model_shapes, save, tiny_config, write_index
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import (
    ConfigError,
    CorruptFile,
    DuplicateTensors,
    InputError,
    MissingTensors,
    UnknownTensors,
    UnsafeFile,
    UnsupportedFormat,
)
from qwen3vl_convert.huggingface.folder import read_folder
from recorded import HUGGINGFACE

CONFIG = tiny_config()
SHAPES = model_shapes(Dims.from_config(CONFIG))
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "one", CONFIG)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "two", CONFIG, files=2)


def index_of(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


@pytest.mark.parametrize("name", ["dense", "dense-tied", "moe", "moe-v5"])
def test_golden_folders(name: str) -> None:
    checkpoint = read_folder(HUGGINGFACE / name)
    assert set(checkpoint.tensors) == set(model_shapes(checkpoint.dims, "v5" if name == "moe-v5" else "hub"))
    assert checkpoint.prefix == "hub"
    assert checkpoint.notes == ()
    assert [path.name for path in checkpoint.auxiliary] == (["generation_config.json"] if name == "moe-v5" else [])
    assert checkpoint.total_size == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    for file in checkpoint.files:
        raw = file.read_bytes()
        with safe_open(file, "pt") as library:
            for key in library.keys():  # noqa: SIM118
                (chunk,) = checkpoint.tensors[key].chunks
                expected = library.get_tensor(key)
                assert (chunk.file, chunk.sizes, checkpoint.shard_of[key]) == (file, tuple(expected.shape), file.name)
                found = raw[chunk.start : chunk.start + checkpoint.tensors[key].nbytes]
                assert found == expected.view(torch.uint8).numpy().tobytes()


def test_one_file_and_several_hold_the_same(one: Path, two: Path) -> None:
    single, sharded = read_folder(one), read_folder(two)
    assert set(single.tensors) == set(sharded.tensors) == set(SHAPES)
    assert {name: tensor.shape for name, tensor in sharded.tensors.items()} == SHAPES
    assert single.total_size == sharded.total_size
    assert [file.name for file in sharded.files] == [FIRST, SECOND]
    assert sharded.shard_of == index_of(two)
    by_place = sorted(SHAPES, key=lambda name: (sharded.shard_of[name], sharded.tensors[name].chunks[0].start))
    assert sharded.order == tuple(sharded.tensors) == tuple(by_place)


def test_base_model_names_become_the_hubs(tmp_path: Path) -> None:
    shapes = {name.removeprefix("model."): shape for name, shape in SHAPES.items()} | {"score.weight": (1, 16)}
    checkpoint = read_folder(make_folder(tmp_path, CONFIG, shapes))
    assert checkpoint.prefix == "base-model"
    assert set(checkpoint.tensors) == {*SHAPES, "score.weight"}
    assert all(tensor.name == name for name, tensor in checkpoint.tensors.items())


def test_what_travels_along_and_what_does_not(one: Path) -> None:
    along = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.model"]
    not_along = [
        "training_args.bin",
        "model.gguf",
        "pytorch_model.bin.index.json",
        "qwen3vl_convert.json",
        ".gitattributes",
    ]
    for name in along + not_along:
        (one / name).write_text(name)
    for name in ("1_Pooling", ".cache"):
        (one / name).mkdir()
    (one / "gone.json").symlink_to(one / "nowhere")
    checkpoint = read_folder(one)
    assert [path.name for path in checkpoint.auxiliary] == along
    assert checkpoint.notes == (
        "subfolders are not copied: 1_Pooling",
        "broken links are not copied: gone.json",
        "weights in other formats are not read and not copied: model.gguf, training_args.bin",
    )


def test_a_single_file_may_have_any_name(one: Path) -> None:
    (one / "model.safetensors").rename(one / "weights.safetensors")
    assert read_folder(one).shard_of.keys() == SHAPES.keys()


def test_files_outside_the_index_are_not_read(two: Path) -> None:
    (two / "old.safetensors").write_bytes(b"not even safetensors")
    checkpoint = read_folder(two)
    assert checkpoint.notes == (f"not in {INDEX}, so not read and not copied: old.safetensors",)


def test_mixed_dtypes_are_allowed_and_said(tmp_path: Path) -> None:
    dtypes = {"lm_head.weight": "float32", "model.visual.pos_embed.weight": "float16"}
    checkpoint = read_folder(make_folder(tmp_path, CONFIG, dtype=dtypes))
    assert checkpoint.notes == ("mixed dtypes: bfloat16 in 68 tensors, float16 in 1, float32 in 1",)
    assert checkpoint.tensors["lm_head.weight"].dtype == "float32"


def test_a_config_that_claims_another_dtype_is_said(tmp_path: Path) -> None:
    checkpoint = read_folder(make_folder(tmp_path, CONFIG, dtype="float32"))
    assert checkpoint.notes == ("config.json says bfloat16, the tensors are float32; the tensors count",)


# --- links


def test_the_hub_caches_links_are_followed(one: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(one.iterdir())):
        file.rename(repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert set(read_folder(snapshot).tensors) == set(SHAPES)
    linked = tmp_path / "a link to the folder"
    linked.symlink_to(snapshot)
    assert set(read_folder(linked).tensors) == set(SHAPES)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_links_that_leave_the_folder_are_refused(one: Path, tmp_path: Path, name: str) -> None:
    (one / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text("{}")
    (one / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeFile, match=f"{name}: expected a file of the folder, found a link to .*secret"):
        read_folder(one)


def test_links_inside_the_folder_are_followed(one: Path) -> None:
    (one / "b.json").write_text("{}")
    (one / "a.json").symlink_to("b.json")
    assert [path.name for path in read_folder(one).auxiliary] == ["a.json", "b.json"]


# --- folders that are not one checkpoint


def test_no_folder(tmp_path: Path, one: Path) -> None:
    with pytest.raises(InputError, match="absent: expected a model folder, found nothing"):
        read_folder(tmp_path / "absent")
    with pytest.raises(InputError, match="expected a model folder, found a file"):
        read_folder(one / "config.json")


def test_no_config(one: Path) -> None:
    (one / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json: cannot be read"):
        read_folder(one)


def test_no_weights(one: Path) -> None:
    (one / "model.safetensors").unlink()
    with pytest.raises(MissingTensors, match=r"expected model.safetensors or .*, found neither"):
        read_folder(one)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pytorch_model.bin", "a PyTorch pickle"),
        ("model.Q4_K_M.gguf", "GGUF"),
        ("consolidated.00.pth", "a PyTorch pickle"),
        ("model.onnx", "ONNX"),
        ("__0_0.distcp", "a Megatron distributed checkpoint"),
    ],
)
def test_other_formats_are_refused_by_name(one: Path, name: str, what: str) -> None:
    (one / "model.safetensors").rename(one / name)
    with pytest.raises(UnsupportedFormat, match=f"found {name}: {name} is {what}"):
        read_folder(one)


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "adapter_model.safetensors"])
def test_several_files_without_index(one: Path, name: str) -> None:
    save(one / name, {"lm_head.weight": (1,)})
    with pytest.raises(InputError, match=rf"found {name}, model.safetensors and no {INDEX}.*Add the index"):
        read_folder(one)


def test_one_shard_of_several_without_index(two: Path) -> None:
    (two / INDEX).unlink()
    (two / FIRST).unlink()
    with pytest.raises(
        MissingTensors, match=f"expected 00002|expected 2 weight files and {INDEX}, found {SECOND} alone"
    ):
        read_folder(two)


def test_index_and_single_file(two: Path) -> None:
    save(two / "model.safetensors", SHAPES)
    with pytest.raises(InputError, match=f"found both model.safetensors and {INDEX}"):
        read_folder(two)


def test_missing_shard(two: Path) -> None:
    (two / SECOND).unlink()
    with pytest.raises(MissingTensors, match=f"{INDEX} names {SECOND}, found no such file"):
        read_folder(two)


def test_tensor_of_the_index_that_no_file_has(two: Path) -> None:
    write_index(two, index_of(two) | {"model.visual.more.weight": FIRST})
    with pytest.raises(MissingTensors, match=f"{INDEX} expects model.visual.more.weight in {FIRST}, found none"):
        read_folder(two)


def test_tensor_of_a_file_that_the_index_lacks(two: Path) -> None:
    index = index_of(two)
    file = index.pop("lm_head.weight")
    write_index(two, index)
    with pytest.raises(UnknownTensors, match=f"found lm_head.weight in {file}, not in {INDEX}"):
        read_folder(two)


def test_tensor_in_another_file_than_the_index_says(two: Path) -> None:
    index = index_of(two)
    index["lm_head.weight"] = SECOND if index["lm_head.weight"] == FIRST else FIRST
    write_index(two, index)
    with pytest.raises(InputError, match=f"lm_head.weight: {INDEX} expects it in {index['lm_head.weight']}, found in"):
        read_folder(two)


def test_tensor_in_two_files(two: Path) -> None:
    save(two / SECOND, {name: shape for name, shape in SHAPES.items() if index_of(two)[name] == SECOND} | {"x": (1,)})
    save(two / FIRST, {name: shape for name, shape in SHAPES.items() if index_of(two)[name] == FIRST} | {"x": (1,)})
    with pytest.raises(DuplicateTensors, match=f"x: expected in one file, found in {FIRST} and {SECOND}"):
        read_folder(two)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/model.safetensors", "sub/m.safetensors", "..", ".", "", ".hidden.safetensors",
     "a\\b.safetensors", "c:m.safetensors", "m\0.safetensors", 3, None],
)  # fmt: skip
def test_index_that_names_a_path(two: Path, name: Any) -> None:
    write_index(two, index_of(two) | {"lm_head.weight": name})
    with pytest.raises(UnsafeFile, match=f"{INDEX}: lm_head.weight: expected the name of a file in the folder"):
        read_folder(two)


def test_index_that_names_a_pickle(two: Path) -> None:
    write_index(two, index_of(two) | {"lm_head.weight": "model.bin"})
    with pytest.raises(UnsupportedFormat, match=r"expected a safetensors file, found 'model.bin'"):
        read_folder(two)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected a weight_map"),
        ('{"weight_map": {}}', "expected a weight_map"),
        ('{"weight_map": ["a"]}', "expected a weight_map"),
        ("[]", "expected a JSON object, found list"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "the key 'a' stands twice"),
    ],
)
def test_broken_index(two: Path, content: str, message: str) -> None:
    (two / INDEX).write_text(content)
    with pytest.raises(CorruptFile, match=f"{INDEX}: {message}"):
        read_folder(two)


def test_broken_file(one: Path) -> None:
    os.truncate(one / "model.safetensors", 5000)
    with pytest.raises(CorruptFile, match=r"model.safetensors: expected a header|it is cut short"):
        read_folder(one)
