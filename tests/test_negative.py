"""What cannot be converted is refused by name, says what to do, has the right exit code and leaves nothing behind."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from broken import (
    DENSE,
    INDEX,
    ITERATION,
    MOE,
    QUICK,
    REPOSITORY,
    TIED,
    Case,
    Raw,
    check_refusal,
    command,
    contents,
    copied,
    edit_chunk,
    edit_config,
    edit_header,
    edit_json,
    edit_metadata,
    edit_tensors,
    make,
    put,
    read_safetensors,
    stored,
    table,
    write_safetensors,
    zeros,
)
from qwen3vl_convert import ParallelLayout, RunOptions, UsageError, hf_to_megatron, megatron_to_hf
from qwen3vl_convert.cli.app import app
from qwen3vl_convert.errors import (
    ConfigError,
    CorruptFile,
    DuplicateTensors,
    InputError,
    MisshapenTensor,
    MissingTensors,
    UnknownTensors,
    UnsafeFile,
    UnsupportedFormat,
)
from qwen3vl_convert.megatron.checkpoint import read_megatron
from qwen3vl_convert.megatron.metadata import Metadata
from qwen3vl_convert.verify import verify

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
OUR_EMBEDDING, OUR_HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
LAYER, OUR_LAYERS = "model.language_model.layers.1.", "language_model.decoder.layers."
QKV, FC2 = OUR_LAYERS + "self_attention.linear_qkv.weight", OUR_LAYERS + "mlp.linear_fc2.weight"
Damage = Callable[[Path], object]
ROWS = 112
"""Rows of the padded embedding; the vocabulary has 96."""


class Bases(NamedTuple):
    """Sound checkpoints, of which the tests damage copies. `many` has several files, `padded` a padded vocabulary."""

    dense: Path
    many: Path
    tied: Path
    moe: Path
    dense_run: Path
    tied_run: Path
    moe_run: Path
    padded_run: Path


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    at = tmp_path_factory.mktemp("bases")
    dense, tied, moe = make(at / "dense", DENSE), make(at / "tied", TIED), make(at / "moe", MOE)
    for source in (dense, tied, moe):
        hf_to_megatron(source, at / f"{source.name}_run", run=QUICK)
    hf_to_megatron(dense, at / "padded_run", padded_vocab_size=ROWS, run=QUICK)
    runs = (at / f"{name}_run" for name in ("dense", "tied", "moe", "padded"))
    return Bases(dense, make(at / "many", DENSE, files=3), tied, moe, *runs)


def refuse_huggingface(case: Case, base: Path, tmp_path: Path) -> None:
    folder = copied(base, tmp_path / "source")
    case.damage(folder)
    check_refusal(case, hf_to_megatron, folder, tmp_path / "out" / "target", 3)


def refuse_megatron(case: Case, base: Path, tmp_path: Path) -> None:
    run = copied(base, tmp_path / "source")
    case.damage(run)
    check_refusal(case, megatron_to_hf, run, tmp_path / "out" / "target", 3)


# -------------------------------------------------------------------------------------------- Hugging Face: tensors


def without(name: str) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.pop(name))


def with_tensor(name: str, tensor: Raw) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.update({name: tensor}))


HF_TENSORS = {
    "missing": Case(
        MissingTensors,
        ("lacks 1 tensors", LAYER + "self_attn.k_proj.weight"),
        without(LAYER + "self_attn.k_proj.weight"),
    ),
    "missing embedding": Case(MissingTensors, ("lacks 1 tensors", EMBEDDING), without(EMBEDDING)),
    "missing in the vision tower": Case(
        MissingTensors, ("model.visual.blocks.1.attn.qkv.bias",), without("model.visual.blocks.1.attn.qkv.bias")
    ),
    "unknown": Case(
        UnknownTensors,
        ("model.visual.spare.weight", "register_mapping"),
        with_tensor("model.visual.spare.weight", zeros("BF16", 3)),
    ),
    "unknown layer": Case(
        UnknownTensors,
        ("model.language_model.layers.2.input_layernorm.weight",),
        with_tensor("model.language_model.layers.2.input_layernorm.weight", zeros("BF16", 32)),
    ),
    "misspelt": Case(
        MissingTensors,
        ("model.language_model.norm.weight", "model.language_model.norm.wieght", "no mapping claims"),
        edit_tensors(
            lambda t: t.update({"model.language_model.norm.wieght": t.pop("model.language_model.norm.weight")})
        ),
    ),
    "transposed": Case(
        MisshapenTensor,
        (LAYER + "mlp.down_proj.weight", "expected (32, 48)", "found (48, 32)"),
        with_tensor(LAYER + "mlp.down_proj.weight", zeros("BF16", 48, 32)),
    ),
    "a row too many": Case(
        MisshapenTensor,
        (LAYER + "self_attn.v_proj.weight", "(16, 32)", "(17, 32)"),
        with_tensor(LAYER + "self_attn.v_proj.weight", zeros("BF16", 17, 32)),
    ),
    "as many elements, other shape": Case(
        MisshapenTensor,
        (LAYER + "self_attn.q_proj.weight", "(32, 32)", "found (64, 16)"),
        with_tensor(LAYER + "self_attn.q_proj.weight", zeros("BF16", 64, 16)),
    ),
    "embedding of fewer rows": Case(
        MisshapenTensor, (EMBEDDING, "(96, 32)", "(95, 32)"), with_tensor(EMBEDDING, zeros("BF16", 95, 32))
    ),
    "scalar embedding": Case(MisshapenTensor, (EMBEDDING, "found ()"), with_tensor(EMBEDDING, zeros("BF16"))),
    "patch embedding as a matrix": Case(
        MisshapenTensor,
        ("model.visual.patch_embed.proj.weight", "found (32, 1536)"),
        with_tensor("model.visual.patch_embed.proj.weight", zeros("BF16", 32, 1536)),
    ),
    "integers": Case(
        UnsupportedFormat,
        (LAYER + "input_layernorm.weight", "is int32", "Save the weights in"),
        with_tensor(LAYER + "input_layernorm.weight", zeros("I32", 32)),
    ),
    "doubles": Case(UnsupportedFormat, (HEAD, "is float64"), with_tensor(HEAD, zeros("F64", 96, 32))),
    "mixed dtypes over layers": Case(
        InputError,
        (FC2, "bfloat16 and float32", "--dtype bf16"),
        with_tensor(LAYER + "mlp.down_proj.weight", zeros("F32", 32, 48)),
    ),
    "mixed dtypes of q, k and v": Case(
        InputError,
        (QKV, "bfloat16 and float16", "--dtype"),
        with_tensor(LAYER + "self_attn.k_proj.weight", zeros("F16", 16, 32)),
    ),
    "no head": Case(MissingTensors, (HEAD, "not tied", "--headless"), without(HEAD)),
    "a head beside --headless": Case(UsageError, ("--headless", HEAD), options={"headless": True}),
    "block FP8": Case(
        UnsupportedFormat,
        ("quantised", "FP8", LAYER + "mlp.down_proj.weight_scale_inv"),
        with_tensor(LAYER + "mlp.down_proj.weight_scale_inv", zeros("F32", 1, 1)),
    ),
    "GPTQ": Case(
        UnsupportedFormat, ("GPTQ", "qweight"), with_tensor(LAYER + "mlp.down_proj.qweight", zeros("I32", 4, 32))
    ),
    "bare FP8": Case(
        UnsupportedFormat, ("quantised", HEAD, "float8_e4m3fn"), with_tensor(HEAD, zeros("F8_E4M3", 96, 32))
    ),
    "names of a DDP module": Case(
        UnsupportedFormat,
        ("module.lm_head.weight", "DistributedDataParallel"),
        edit_tensors(lambda t: [t.update({f"module.{name}": t.pop(name)}) for name in list(t)]),
    ),
    "no tensor at all": Case(UnknownTensors, ("found none",), edit_tensors(dict.clear)),
}


@table(HF_TENSORS)
def test_huggingface_tensors(case: Case, bases: Bases, tmp_path: Path) -> None:
    folder = copied(bases.dense, tmp_path / "source")
    case.damage(folder)
    code = 2 if case.error is UsageError else 3
    check_refusal(case, hf_to_megatron, folder, tmp_path / "out" / "target", code)


EXPERTS = LAYER + "mlp.experts."
HF_EXPERTS = {
    "missing experts": Case(MissingTensors, (EXPERTS + "down_proj",), without(EXPERTS + "down_proj")),
    "misshapen experts": Case(
        MisshapenTensor,
        (EXPERTS + "gate_up_proj (8, 32, 47)", "moe_intermediate_size"),
        with_tensor(EXPERTS + "gate_up_proj", zeros("BF16", 8, 32, 47)),
    ),
    "one expert fewer": Case(
        MisshapenTensor,
        (EXPERTS + "down_proj (7, 24, 32)", "num_experts"),
        with_tensor(EXPERTS + "down_proj", zeros("BF16", 7, 24, 32)),
    ),
    "one layer in the v5 layout": Case(
        MisshapenTensor,
        ('"hub"', f'{EXPERTS}* is "v5"', "save the model again"),
        edit_tensors(
            lambda t: t.update(
                {EXPERTS + "gate_up_proj": zeros("BF16", 8, 48, 32), EXPERTS + "down_proj": zeros("BF16", 8, 32, 24)}
            )
        ),
    ),
    "gate_up and down in different layouts": Case(
        MisshapenTensor,
        (EXPERTS + "down_proj (8, 32, 24)",),
        with_tensor(EXPERTS + "down_proj", zeros("BF16", 8, 32, 24)),
    ),
    "both ways": Case(
        InputError,
        (EXPERTS + "3.up_proj.weight", "two checkpoints"),
        with_tensor(EXPERTS + "3.up_proj.weight", zeros("BF16", 24, 32)),
    ),
    "an --experts-layout that is not": Case(
        MisshapenTensor, ('"v5"', '"hub"', "pass --experts-layout hub"), options={"experts_layout": "v5"}
    ),
    "router of another size": Case(
        MisshapenTensor,
        (LAYER + "mlp.gate.weight", "(8, 32)"),
        with_tensor(LAYER + "mlp.gate.weight", zeros("BF16", 9, 32)),
    ),
    "mixed dtypes of experts": Case(
        InputError,
        (OUR_LAYERS + "mlp.experts.experts.linear_fc2.weight", "--dtype"),
        with_tensor(EXPERTS + "down_proj", zeros("F32", 8, 24, 32)),
    ),
}


@table(HF_EXPERTS)
def test_huggingface_experts(case: Case, bases: Bases, tmp_path: Path) -> None:
    refuse_huggingface(case, bases.moe, tmp_path)


def test_mixed_dtypes_convert_when_one_is_asked_for(bases: Bases, tmp_path: Path) -> None:
    folder = copied(bases.dense, tmp_path / "source")
    with_tensor(LAYER + "mlp.down_proj.weight", zeros("F32", 32, 48))(folder)
    assert hf_to_megatron(folder, tmp_path / "target", dtype="fp32", run=QUICK).dtype == "float32"


# ---------------------------------------------------------------------------------------------- Hugging Face: files


def shift(number: int, by: int) -> Callable[[Path], None]:
    def change(header: dict[str, Any]) -> None:
        entry = sorted(
            (value for name, value in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"]
        )[number]
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]

    return edit_header(change)


def overwrite(file: str, content: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content)


def remove(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def all_of(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def truncate(file: str, by: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - by)


SINGLE = "model.safetensors"
HF_FILES = {
    "truncated": Case(CorruptFile, (SINGLE, "cut short", "again"), truncate(SINGLE, 1)),
    "longer than its header says": Case(
        CorruptFile,
        (SINGLE, "bytes that no tensor claims"),
        lambda f: os.truncate(f / SINGLE, (f / SINGLE).stat().st_size + 8),
    ),
    "cut in the header": Case(CorruptFile, (SINGLE, "cut short"), lambda f: os.truncate(f / SINGLE, 500)),
    "empty": Case(CorruptFile, (SINGLE, "cut short"), overwrite(SINGLE, b"")),
    "header longer than the file": Case(
        CorruptFile, (SINGLE, "1099511627776 bytes"), overwrite(SINGLE, struct.pack("<Q", 1 << 40) + b"{}")
    ),
    "header that is no JSON": Case(
        CorruptFile, (SINGLE, "JSON"), overwrite(SINGLE, struct.pack("<Q", 8) + b"not JSON")
    ),
    "overlap": Case(CorruptFile, (SINGLE, "overlaps"), shift(3, -8)),
    "hole": Case(CorruptFile, (SINGLE, "hole"), shift(3, 8)),
    "first tensor inside the header": Case(CorruptFile, (SINGLE, "data_offsets"), shift(0, -8)),
    "shape that needs more bytes": Case(
        CorruptFile, (SINGLE, HEAD, "needs 6208 bytes"), edit_header(lambda h: h[HEAD].update(shape=[97, 32]))
    ),
    "shape beyond all numbers": Case(
        CorruptFile, (SINGLE, HEAD), edit_header(lambda h: h[HEAD].update(shape=[2**62, 2**62]))
    ),
    "unheard-of dtype": Case(CorruptFile, (HEAD, "'BF17'"), edit_header(lambda h: h[HEAD].update(dtype="BF17"))),
    "Git LFS pointer": Case(
        CorruptFile, ("git lfs pull",), overwrite(SINGLE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    ),
    "pickle for weights": Case(
        UnsupportedFormat,
        ("pytorch_model.bin", "PyTorch pickle"),
        lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
    ),
    "no weights": Case(MissingTensors, (SINGLE,), remove(SINGLE)),
    "a link out of the folder": Case(
        UnsafeFile,
        ("tokenizer.json", "outside"),
        lambda f: (f / "tokenizer.json").symlink_to("/etc/hostname"),
    ),
}


@table(HF_FILES)
def test_huggingface_files(case: Case, bases: Bases, tmp_path: Path) -> None:
    refuse_huggingface(case, bases.dense, tmp_path)


def of_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    return edit_json(INDEX, lambda index: change(index["weight_map"]))


def twice(folder: Path) -> None:
    """The head, wherever it is, once more in the first file."""
    first, *_ = sorted(folder.glob("*.safetensors"))
    write_safetensors(first, {**read_safetensors(first), HEAD: zeros("BF16", 96, 32)})


HF_SHARDS = {
    "in two files": Case(DuplicateTensors, (HEAD, "model-00001-of-", "Remove"), twice),
    "index that leads outside": Case(
        UnsafeFile, (HEAD, "'../model.safetensors'"), of_index(lambda m: m.update({HEAD: "../model.safetensors"}))
    ),
    "index with an absolute path": Case(
        UnsafeFile, (HEAD, "/etc/x.safetensors"), of_index(lambda m: m.update({HEAD: "/etc/x.safetensors"}))
    ),
    "index that lacks a tensor": Case(UnknownTensors, (HEAD, INDEX), of_index(lambda m: m.pop(HEAD))),
    "index with a tensor too many": Case(
        MissingTensors, ("ghost.weight", INDEX), of_index(lambda m: m.update({"ghost.weight": m[HEAD]}))
    ),
    "index that is no JSON": Case(CorruptFile, (INDEX, "JSON"), overwrite(INDEX, b"{")),
    "missing shard": Case(
        MissingTensors,
        ("model-00001-of-", "no such file"),
        lambda f: min(f.glob("*.safetensors")).unlink(),
    ),
    "missing index": Case(InputError, (INDEX, "Add the index"), remove(INDEX)),
    "truncated shard": Case(
        CorruptFile, ("model-00002-of-", "cut short"), lambda f: truncate(sorted(f.glob("*.safetensors"))[1].name, 2)(f)
    ),
    "another model's file beside": Case(
        InputError, (f"both {SINGLE} and {INDEX}",), lambda f: write_safetensors(f / SINGLE, {HEAD: zeros("BF16", 1)})
    ),
}


@table(HF_SHARDS)
def test_huggingface_shards(case: Case, bases: Bases, tmp_path: Path) -> None:
    refuse_huggingface(case, bases.many, tmp_path)


# --------------------------------------------------------------------------------------------- Hugging Face: config


def of_text(**changes: Any) -> Callable[[Path], None]:
    return edit_config(lambda config: config["text_config"].update(changes))


CONFIGS = {
    "missing": Case(ConfigError, ("config.json: cannot be read",), remove("config.json")),
    "no JSON": Case(ConfigError, ("config.json", "JSON"), overwrite("config.json", b"{]")),
    "nested without end": Case(ConfigError, ("config.json",), overwrite("config.json", b'{"a":' * 100_000)),
    "another model": Case(
        UnsupportedFormat, ("'qwen2_5_vl'",), edit_config(lambda c: c.update(model_type="qwen2_5_vl"))
    ),
    "hidden said twice": Case(
        ConfigError, ("hidden_size", "says 32", "says 64", "Remove"), edit_config(lambda c: c.update(hidden_size=64))
    ),
    "tied and not tied": Case(
        ConfigError, ("tie_word_embeddings", "make them equal"), of_text(tie_word_embeddings=True)
    ),
    "a negative size": Case(ConfigError, ("num_hidden_layers", "found -2"), of_text(num_hidden_layers=-2)),
    "a size beyond reason": Case(ConfigError, ("num_hidden_layers",), of_text(num_hidden_layers=10**12)),
    "more layers than there are": Case(
        MissingTensors, ("model.language_model.layers.2.", "lacks"), of_text(num_hidden_layers=3)
    ),
    "fewer layers than there are": Case(
        UnknownTensors, ("model.language_model.layers.1.", "no mapping claims"), of_text(num_hidden_layers=1)
    ),
    "a larger vocabulary": Case(MisshapenTensor, (EMBEDDING, "(100, 32)"), of_text(vocab_size=100)),
    "heads that do not divide": Case(ConfigError, ("num_key_value_heads = 3",), of_text(num_key_value_heads=3)),
    "no rope": Case(ConfigError, ("rope_scaling",), edit_config(lambda c: c["text_config"].pop("rope_scaling"))),
    "biases that are not there": Case(MissingTensors, (LAYER + "self_attn.k_proj.bias",), of_text(attention_bias=True)),
    "quantised": Case(
        UnsupportedFormat,
        ("quantization_config", "gptq", "unquantised model"),
        edit_config(lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4})),
    ),
    "experts in a dense folder": Case(
        MissingTensors,
        ("experts",),
        edit_config(lambda c: (c.update(model_type="qwen3_vl_moe"), c["text_config"].update(moe_intermediate_size=24))),
    ),
}


@table(CONFIGS)
def test_huggingface_configs(case: Case, bases: Bases, tmp_path: Path) -> None:
    refuse_huggingface(case, bases.dense, tmp_path)


# ------------------------------------------------------------------------------------------------------------ heads


def test_headless_there_and_back(bases: Bases, tmp_path: Path) -> None:
    folder = copied(bases.dense, tmp_path / "source")
    without(HEAD)(folder)
    hf_to_megatron(folder, tmp_path / "run", headless=True, run=QUICK)
    case = Case(MissingTensors, (OUR_HEAD, "--headless"))
    check_refusal(case, megatron_to_hf, tmp_path / "run", tmp_path / "out" / "target", 3)
    megatron_to_hf(tmp_path / "run", tmp_path / "back", headless=True, run=QUICK)
    assert read_safetensors(tmp_path / "back" / SINGLE) == read_safetensors(folder / SINGLE)


def test_an_equal_head_of_a_tied_model_is_left_out(bases: Bases, tmp_path: Path) -> None:
    folder = copied(bases.tied, tmp_path / "source")
    edit_tensors(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING]}))(folder)
    result = hf_to_megatron(folder, tmp_path / "run", run=QUICK)
    assert f"{HEAD} equals {EMBEDDING} and is left out: the model is tied." in result.notes
    assert verify(bases.tied, tmp_path / "run").equal
    dtype, shape, data = stored(tmp_path / "run", OUR_EMBEDDING)
    put(tmp_path / "run", OUR_HEAD, dtype, shape, data)
    result = megatron_to_hf(tmp_path / "run", tmp_path / "back", run=QUICK)
    assert f"{OUR_HEAD} equals {OUR_EMBEDDING} and is left out: the model is tied." in result.notes
    assert read_safetensors(tmp_path / "back" / SINGLE) == read_safetensors(bases.tied / SINGLE)


DIFFERENT_HEADS = [("BF16", 96, 32), ("BF16", 32, 96), ("F32", 96, 32), ("BF16",)]


@pytest.mark.parametrize("head", DIFFERENT_HEADS, ids=str)
def test_a_different_head_of_a_tied_model(head: tuple[Any, ...], bases: Bases, tmp_path: Path) -> None:
    case = Case(InputError, (HEAD, EMBEDDING, "they differ", "tie_word_embeddings"), with_tensor(HEAD, zeros(*head)))
    refuse_huggingface(case, bases.tied, tmp_path)


def test_a_different_head_of_a_tied_run(bases: Bases, tmp_path: Path) -> None:
    says = (OUR_HEAD, OUR_EMBEDDING, "they differ")
    refuse_megatron(
        Case(InputError, says, lambda run: put(run, OUR_HEAD, "bfloat16", (96, 32))), bases.tied_run, tmp_path
    )


# --------------------------------------------------------------------------------------------------------- Megatron


def without_key(key: str) -> Callable[[Path], None]:
    return edit_metadata(lambda metadata: metadata.tensors.pop(key))


def with_key(key: str, dtype: str, *shape: int) -> Callable[[Path], None]:
    return lambda run: put(run, key, dtype, shape)


def reshaped(key: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    """`.metadata` gives each layer's chunk another shape than its blob has."""

    def change(metadata: Metadata) -> None:
        entry = metadata.tensors[key]
        chunks = tuple(replace(chunk, sizes=(1, *shape[1:])) for chunk in entry.chunks)
        metadata.tensors[key] = replace(entry, shape=shape, chunks=chunks)

    return edit_metadata(change)


def without_chunk(metadata: Metadata) -> None:
    metadata.tensors[FC2] = replace(metadata.tensors[FC2], chunks=metadata.tensors[FC2].chunks[1:])


def of_iteration(*damages: Damage) -> Damage:
    return lambda run: all_of(*damages)(run / ITERATION)


def run_config(text: str) -> Damage:
    """Another `run_config.yaml`, and no config.json beside it."""
    return of_iteration(remove("hf"), overwrite("run_config.yaml", text.encode()))


OBJECTS = "!!python/object/apply:os.getcwd []"
FILE = "__0_0.distcp"
MEGATRON = {
    "missing": Case(MissingTensors, ("lacks 1 tensors", QKV, "--config"), without_key(QKV)),
    "missing embedding": Case(MissingTensors, ("lacks " + OUR_EMBEDDING,), without_key(OUR_EMBEDDING)),
    "no head": Case(MissingTensors, (OUR_HEAD, "--headless"), without_key(OUR_HEAD)),
    "unknown": Case(
        UnknownTensors, ("language_model.spare", "register_mapping"), with_key("language_model.spare", "bfloat16", 3)
    ),
    "an adapter": Case(
        UnknownTensors,
        ("linear_qkv.adapter",),
        with_key(OUR_LAYERS + "linear_qkv.adapter.linear_in.weight", "bfloat16", 2, 4),
    ),
    "misshapen": Case(MisshapenTensor, (FC2, "(2, 32, 48)", "(2, 48, 32)"), with_key(FC2, "bfloat16", 2, 48, 32)),
    "a layer too many": Case(MisshapenTensor, (FC2, "(3, 32, 48)"), with_key(FC2, "bfloat16", 3, 32, 48)),
    "scalar embedding": Case(MisshapenTensor, (OUR_EMBEDDING, "found ()"), with_key(OUR_EMBEDDING, "bfloat16")),
    "one-dimensional embedding": Case(
        MisshapenTensor, (OUR_EMBEDDING, "found (3072,)"), with_key(OUR_EMBEDDING, "bfloat16", 3072)
    ),
    "integers": Case(UnsupportedFormat, (FC2, "int32"), with_key(FC2, "int32", 2, 32, 48)),
    "doubles": Case(UnsupportedFormat, (FC2, "float64"), with_key(FC2, "float64", 2, 32, 48)),
    "chunks overlap": Case(CorruptFile, (FC2, "overlaps"), edit_chunk(FC2, 1, offsets=(0, 1, 0), sizes=(1, 31, 48))),
    "chunk twice": Case(CorruptFile, (FC2, "twice"), edit_chunk(FC2, 1, offsets=(0, 0, 0))),
    "hole": Case(CorruptFile, (FC2, "there is none at"), edit_metadata(without_chunk)),
    "chunk too small": Case(CorruptFile, (FC2, "elements"), edit_chunk(FC2, 1, sizes=(1, 31, 48))),
    "chunk outside its tensor": Case(CorruptFile, (FC2, "not within"), edit_chunk(FC2, 1, offsets=(2, 0, 0))),
    "two chunks in the same bytes": Case(
        CorruptFile,
        (FC2, "share bytes"),
        edit_metadata(
            lambda m: m.tensors.update(
                {
                    FC2: replace(
                        m.tensors[FC2],
                        chunks=tuple(
                            replace(
                                c,
                                relative_path=m.tensors[FC2].chunks[0].relative_path,
                                offset=m.tensors[FC2].chunks[0].offset,
                            )
                            for c in m.tensors[FC2].chunks
                        ),
                    )
                }
            )
        ),
    ),
    "path outside the folder": Case(UnsafeFile, ("'../x.distcp'",), edit_chunk(FC2, 0, relative_path="../x.distcp")),
    "absolute path": Case(UnsafeFile, ("/etc/passwd",), edit_chunk(FC2, 0, relative_path="/etc/passwd")),
    "file that is not there": Case(CorruptFile, ("'__7_0.distcp'",), edit_chunk(FC2, 0, relative_path="__7_0.distcp")),
    "chunk in the middle of a blob": Case(CorruptFile, (FILE,), edit_chunk(FC2, 0, offset=64)),
    "truncated": Case(CorruptFile, (FILE, "ends at byte"), of_iteration(truncate(FILE, 1))),
    "emptied": Case(CorruptFile, (FILE,), of_iteration(overwrite(FILE, b""))),
    "zeroed": Case(
        CorruptFile,
        (FILE, "torch.save"),
        of_iteration(lambda f: (f / FILE).write_bytes(bytes((f / FILE).stat().st_size))),
    ),
    "removed": Case(CorruptFile, (FILE, "not there"), of_iteration(remove(FILE))),
    "blob of another dtype": Case(
        CorruptFile,
        (FC2, "expected float16", "found bfloat16"),
        edit_metadata(lambda m: m.tensors.update({FC2: replace(m.tensors[FC2], dtype="float16")})),
    ),
    "blob of another shape": Case(CorruptFile, (FC2, "expected bfloat16 (1, 48, 32)"), reshaped(FC2, (2, 48, 32))),
    ".metadata cut short": Case(CorruptFile, (".metadata",), of_iteration(truncate(".metadata", 9))),
    ".metadata empty": Case(CorruptFile, (".metadata",), of_iteration(overwrite(".metadata", b""))),
    ".metadata missing": Case(InputError, (ITERATION, ".metadata", "incomplete"), of_iteration(remove(".metadata"))),
    "metadata.json no JSON": Case(CorruptFile, ("metadata.json",), of_iteration(overwrite("metadata.json", b"["))),
    "metadata.json nested without end": Case(
        CorruptFile, ("metadata.json",), of_iteration(overwrite("metadata.json", b"[" * 100_000))
    ),
    "fsdp_dtensor": Case(
        UnsupportedFormat,
        ("fsdp_dtensor", "--ckpt-format torch_dist"),
        of_iteration(remove("metadata.json")),
    ),
    "zarr": Case(
        UnsupportedFormat,
        ("metadata.json", "'zarr'"),
        of_iteration(edit_json("metadata.json", lambda m: m.update(sharded_backend="zarr"))),
    ),
    "zarr without .metadata": Case(
        UnsupportedFormat,
        ("metadata.json", "'zarr'"),
        of_iteration(remove(".metadata"), overwrite("metadata.json", b'{"sharded_backend": "zarr"}')),
    ),
    "names of Pai-Megatron-Patch": Case(
        UnsupportedFormat,
        ("Pai-Megatron-Patch",),
        with_key("vision_model.projection.encoder.linear_fc1.weight", "bfloat16", 3),
    ),
    "names of ms-swift": Case(
        UnsupportedFormat, ("ms-swift",), with_key("visual.visual.blocks.0.norm1.weight", "bfloat16", 3)
    ),
    "names of a wrapped model": Case(
        UnsupportedFormat, ("module.x.weight", "wrapped"), with_key("module.x.weight", "bfloat16", 3)
    ),
    "text only": Case(
        UnsupportedFormat,
        ("text-only", "decoder."),
        edit_metadata(
            lambda m: [
                m.tensors.update({key.removeprefix("language_model."): m.tensors.pop(key)}) for key in list(m.tensors)
            ]
        ),
    ),
    "stacked and numbered keys": Case(
        UnsupportedFormat,
        (OUR_LAYERS + "*", "one style"),
        with_key(OUR_LAYERS + "0.mlp.linear_fc2.weight", "bfloat16", 32, 48),
    ),
    "tracker without a number": Case(
        CorruptFile,
        ("latest_checkpointed_iteration.txt", "'soon'", "--iteration"),
        overwrite("latest_checkpointed_iteration.txt", b"soon"),
    ),
    "tracker of an absent iteration": Case(
        InputError, ("iter_0000007", ITERATION, "--iteration"), overwrite("latest_checkpointed_iteration.txt", b"7")
    ),
    "tracker of control characters": Case(
        CorruptFile,
        ("latest_checkpointed_iteration.txt",),
        overwrite("latest_checkpointed_iteration.txt", b"\x1b[2J\xff"),
    ),
    "several iterations without tracker": Case(
        InputError,
        (ITERATION, "iter_0000007", "--iteration"),
        all_of(
            lambda run: shutil.copytree(run / ITERATION, run / "iter_0000007"),
            remove("latest_checkpointed_iteration.txt"),
        ),
    ),
    "an absent --iteration": Case(InputError, ("iter_0000009", ITERATION), options={"iteration": 9}),
    "no sizes": Case(
        ConfigError, ("run_config.yaml", "--config"), of_iteration(remove("hf"), remove("run_config.yaml"))
    ),
    "sizes that are no YAML": Case(ConfigError, ("run_config.yaml", "--config"), run_config("model: {")),
    "YAML that makes objects": Case(ConfigError, ("run_config.yaml",), run_config(OBJECTS)),
    "YAML nested without end": Case(ConfigError, ("run_config.yaml",), run_config("[" * 2000)),
    "YAML with an impossible date": Case(ConfigError, ("run_config.yaml",), run_config("a: 2001-99-99")),
    "another model's run_config": Case(
        ConfigError, ("vision_config", "--config"), run_config("model: {num_layers: 2}")
    ),
    "common.pt damaged": Case(
        CorruptFile,
        ("common.pt",),
        all_of(
            edit_metadata(lambda m: m.objects.pop("common_state/shard_0_1")),
            overwrite(f"{ITERATION}/common.pt", b"PK"),
        ),
    ),
    "fewer rows than the vocabulary": Case(
        UnknownTensors,
        (OUR_EMBEDDING, "has 96 rows", "vocab_size = 100", "--config"),
        of_iteration(edit_json("hf/config.json", lambda c: c["text_config"].update(vocab_size=100))),
    ),
    "rows beyond the vocabulary that are no padding": Case(
        InputError,
        (OUR_EMBEDDING, "has 96 rows", "vocab_size = 90", "not padding", "--config"),
        of_iteration(edit_json("hf/config.json", lambda c: c["text_config"].update(vocab_size=90))),
    ),
}


@table(MEGATRON)
def test_megatron(case: Case, bases: Bases, tmp_path: Path) -> None:
    refuse_megatron(case, bases.dense_run, tmp_path)


def padded(key: str, last: bytes) -> Callable[[Path], None]:
    """The last row of a padded tensor replaced."""

    def damage(run: Path) -> None:
        dtype, shape, data = stored(run, key)
        put(run, key, dtype, shape, data[: -len(last)] + last)

    return damage


@pytest.mark.parametrize("key", [OUR_EMBEDDING, OUR_HEAD])
def test_padding_that_is_none(key: str, bases: Bases, tmp_path: Path) -> None:
    says = (key, f"has {ROWS} rows", "vocab_size = 96", "not padding", "--config")
    refuse_megatron(Case(InputError, says, padded(key, b"\0\1")), bases.padded_run, tmp_path)


def test_padding_is_dropped_and_said(bases: Bases, tmp_path: Path) -> None:
    result = megatron_to_hf(bases.padded_run, tmp_path / "back", run=QUICK)
    assert f"{OUR_EMBEDDING}: {ROWS - 96} rows of padding are dropped." in result.notes
    assert read_safetensors(tmp_path / "back" / SINGLE) == read_safetensors(bases.dense / SINGLE)


def test_head_and_embedding_padded_differently(bases: Bases, tmp_path: Path) -> None:
    case = Case(MisshapenTensor, (OUR_HEAD, f"({ROWS}, 32)"), lambda run: put(run, OUR_HEAD, "bfloat16", (104, 32)))
    refuse_megatron(case, bases.padded_run, tmp_path)


@pytest.mark.parametrize("key", [FC2, QKV])
def test_megatron_tensors_of_different_dtypes(key: str, bases: Bases, tmp_path: Path) -> None:
    """Megatron's are the larger tensors: none of Hugging Face's is made of two of them, so each keeps its dtype."""
    run = copied(bases.dense_run, tmp_path / "run")
    put(run, key, "float32", stored(run, key)[1])
    result = megatron_to_hf(run, tmp_path / "back", run=QUICK)
    assert result.dtype == "bfloat16, float32"


MOE_FC2 = OUR_LAYERS + "mlp.experts.experts.linear_fc2.weight"
MEGATRON_EXPERTS = {
    "missing": Case(MissingTensors, (MOE_FC2,), without_key(MOE_FC2)),
    "an expert fewer": Case(MisshapenTensor, (MOE_FC2, "(2, 7, 32, 24)"), with_key(MOE_FC2, "bfloat16", 2, 7, 32, 24)),
    "not stacked by layer": Case(
        MisshapenTensor, (MOE_FC2, "found (8, 32, 24)"), with_key(MOE_FC2, "bfloat16", 8, 32, 24)
    ),
    "match without anything to match": Case(
        UsageError,
        ("--experts-layout match",),
        of_iteration(remove("qwen3vl_convert.json")),
        {"experts_layout": "match"},
    ),
    "an unknown --experts-layout": Case(UsageError, ("--experts-layout huh",), options={"experts_layout": "huh"}),
}


@table(MEGATRON_EXPERTS)
def test_megatron_experts(case: Case, bases: Bases, tmp_path: Path) -> None:
    run = copied(bases.moe_run, tmp_path / "source")
    case.damage(run)
    code = 2 if case.error is UsageError else 3
    check_refusal(case, megatron_to_hf, run, tmp_path / "out" / "target", code)


def cut(shape: tuple[int, ...], data: bytes) -> list[tuple[tuple[int, ...], bytes]]:
    """A tensor cut along its first dimension."""
    size = len(data) // shape[0]
    return [(shape[1:], data[at : at + size]) for at in range(0, len(data), size)]


def numbered(key: str, shape: tuple[int, ...], data: bytes) -> Iterator[tuple[str, tuple[int, ...], bytes]]:
    """A stacked tensor as some Megatrons store it: a key for each layer, each expert and each half of a SwiGLU."""
    for layer, (inner, part) in enumerate(cut(shape, data)):
        name = key.replace(OUR_LAYERS, f"{OUR_LAYERS}{layer}.")
        if ".experts." not in key:
            yield name, inner, part
            continue
        for expert, (matrix, content) in enumerate(cut(inner, part)):
            single = name.replace(".experts.experts.", f".experts.experts.{expert}.")
            if "linear_fc1" in key:
                rows = (matrix[0] // 2, matrix[1])
                yield f"{single}_w", rows, content[: len(content) // 2]
                yield f"{single}_v", rows, content[len(content) // 2 :]
            else:
                yield single, matrix, content


def number_all(run: Path) -> None:
    stacked = [key for key in read_megatron(run).tensors if key.startswith(OUR_LAYERS)]
    for key in stacked:
        dtype, shape, data = stored(run, key)
        edit_metadata(lambda metadata, key=key: metadata.tensors.pop(key))(run)  # type: ignore[misc]
        for name, inner, part in numbered(key, shape, data):
            put(run, name, dtype, inner, part)


def test_experts_of_different_dtypes_in_one_tensor(bases: Bases, tmp_path: Path) -> None:
    """The one case on the way back in which several tensors of Megatron make one of Hugging Face."""
    run = copied(bases.moe_run, tmp_path / "source")
    number_all(run)
    megatron_to_hf(run, tmp_path / "sound", run=QUICK)
    assert read_safetensors(tmp_path / "sound" / SINGLE) == read_safetensors(bases.moe / SINGLE)
    put(run, f"{OUR_LAYERS}1.mlp.experts.experts.5.linear_fc2.weight", "float32", (32, 24))
    case = Case(InputError, (LAYER + "mlp.experts.down_proj", "bfloat16 and float32", "--dtype"))
    check_refusal(case, megatron_to_hf, run, tmp_path / "out" / "target", 3)
    assert megatron_to_hf(run, tmp_path / "bf16", dtype="bf16", run=QUICK).dtype == "bfloat16"


MANIFESTS: list[Any] = [
    [],
    {"options": []},
    {"options": "x"},
    {"options": {"shard_of": {"lm_head.weight": 3}}},
    {"options": {"shard_of": "x"}},
    {"experts_layout": []},
]


@pytest.mark.parametrize("manifest", [json.dumps(m) for m in MANIFESTS] + ["[" * 100_000, "\xff"], ids=lambda t: t[:30])
def test_a_strange_manifest_counts_for_nothing(manifest: str, bases: Bases, tmp_path: Path) -> None:
    """It only ever gives defaults, and anybody may have written it."""
    run = copied(bases.dense_run, tmp_path / "run")
    (run / ITERATION / "qwen3vl_convert.json").write_text(manifest, encoding="latin-1")
    megatron_to_hf(run, tmp_path / "back", run=QUICK)
    assert read_safetensors(tmp_path / "back" / SINGLE) == read_safetensors(bases.dense / SINGLE)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/x.safetensors", "a\0.safetensors", "x.bin", "\x1b[2J.safetensors"]
)
def test_a_manifest_does_not_choose_where_files_go(file: str, bases: Bases, tmp_path: Path) -> None:
    run = copied(bases.dense_run, tmp_path / "run")
    names = read_safetensors(bases.dense / SINGLE)
    edit_json("qwen3vl_convert.json", lambda m: m["options"].update(shard_of=dict.fromkeys(names, file)))(
        run / ITERATION
    )
    megatron_to_hf(run, tmp_path / "out" / "back", run=QUICK)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["back"]
    assert sorted(path.name for path in (tmp_path / "out" / "back").glob("*.safetensors")) == [SINGLE]


def test_files_that_travel_along_come_from_the_checkpoint(bases: Bases, tmp_path: Path) -> None:
    """Neither a link nor a folder that is one brings in what lies outside."""
    run = copied(bases.dense_run, tmp_path / "run")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.txt").write_text("secret")
    (run / ITERATION / "hf").rename(run / ITERATION / "old")
    (run / ITERATION / "hf").symlink_to(tmp_path / "private")
    megatron_to_hf(run, tmp_path / "back", run=QUICK)
    assert not (tmp_path / "back" / "secret.txt").exists()


# ---------------------------------------------------------------------------------------------------------- --config


def test_config_of_another_model(bases: Bases, tmp_path: Path) -> None:
    case = Case(MissingTensors, ("router.weight", "--config that of another model"), options={"config": bases.moe})
    refuse_megatron(case, bases.dense_run, tmp_path)


@pytest.mark.parametrize("text", ["model: {", OBJECTS, "model: {num_layers: 2}"])
def test_config_helps_where_the_checkpoint_says_nothing_sound(text: str, bases: Bases, tmp_path: Path) -> None:
    run = copied(bases.dense_run, tmp_path / "source")
    run_config(text)(run)
    result = megatron_to_hf(run, tmp_path / "back", config=bases.dense, run=QUICK)
    assert any("run_config.yaml" in note for note in result.notes)
    assert read_safetensors(tmp_path / "back" / SINGLE) == read_safetensors(bases.dense / SINGLE)


@pytest.mark.parametrize("options", [{}, {"experts_layout": "match"}], ids=["plain", "match"])
def test_config_may_come_without_weights(options: dict[str, Any], bases: Bases, tmp_path: Path) -> None:
    """As a Hub id's does: only its config and the files beside it are downloaded."""
    config = copied(bases.moe, tmp_path / "config")
    for file in config.glob("*.safetensors*"):
        file.unlink()
    (config / "tokenizer.json").write_text("{}")
    megatron_to_hf(bases.moe_run, tmp_path / "back", config=config, run=QUICK, **options)
    assert read_safetensors(tmp_path / "back" / SINGLE) == read_safetensors(bases.moe / SINGLE)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"


def test_config_that_is_nowhere(bases: Bases, tmp_path: Path) -> None:
    case = Case(InputError, ("no such folder",), options={"config": tmp_path / "nowhere"})
    refuse_megatron(case, bases.dense_run, tmp_path)


# --------------------------------------------------------------------------------------------------------- pickles


class _Payload:
    """Creates a file when a stock unpickler meets it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def shown_to_be_one(marker: Path) -> None:
    """The payload does run in a stock unpickler: else the tests would show nothing."""
    pickle.loads(pickle.dumps(_Payload(marker)))  # noqa: S301
    assert marker.exists()


def test_a_payload_in_metadata_does_not_run(bases: Bases, tmp_path: Path) -> None:
    run, marker = copied(bases.dense_run, tmp_path / "source"), tmp_path / "executed"
    (run / ITERATION / ".metadata").write_bytes(pickle.dumps(_Payload(marker)))
    case = Case(UnsafeFile, (".metadata", "'posix' 'mkdir'", "Nothing was executed"))
    check_refusal(case, megatron_to_hf, run, tmp_path / "out" / "target", 3)
    assert CliRunner().invoke(app, ["inspect", str(run)]).exit_code == 3
    assert not marker.exists()
    shown_to_be_one(marker)


@pytest.mark.parametrize("name", ["common.pt", "payload.distcp"])
def test_a_payload_in_the_common_state_does_not_run(name: str, bases: Bases, tmp_path: Path) -> None:
    """Weights do not need the common state: they are converted, and a note says what was left alone."""
    torch = pytest.importorskip("torch")
    run, marker = copied(bases.dense_run, tmp_path / "source"), tmp_path / "executed"
    torch.save(_Payload(marker), run / ITERATION / name)

    def take_over(metadata: Metadata) -> None:
        entry = metadata.objects.pop("common_state/shard_0_1")
        if name != "common.pt":
            length = (run / ITERATION / name).stat().st_size
            metadata.objects["common_state/shard_0_1"] = replace(entry, relative_path=name, offset=0, length=length)

    edit_metadata(take_over)(run)
    result = megatron_to_hf(run, tmp_path / "target")
    assert any("are not read" in note and "Nothing was executed" in note for note in result.notes)
    assert not marker.exists()
    shown_to_be_one(marker)


# ---------------------------------------------------------------------------------------------------------- legacy


@pytest.mark.parametrize("inside", [".", "iter_0000005", "release"])
def test_legacy_folders(inside: str, tmp_path: Path) -> None:
    (tmp_path / "source" / inside / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "source" / inside / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"")
    case = Case(UnsupportedFormat, ("legacy", "mp_rank", "torch_dist"))
    check_refusal(case, megatron_to_hf, tmp_path / "source", tmp_path / "out" / "target", 3)


@pytest.mark.parametrize("files", [(), ("config.json",), (SINGLE, "config.json")])
def test_folders_that_are_no_run(files: tuple[str, ...], bases: Bases, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for file in files:
        shutil.copy(bases.dense / file, tmp_path / "source")
    case = Case(InputError, ("no Megatron checkpoint", ".metadata"))
    check_refusal(case, megatron_to_hf, tmp_path / "source", tmp_path / "out" / "target", 3)


# ---------------------------------------------------------------------------------------------------------- layouts


class Layout(NamedTuple):
    sizes: dict[str, Any]
    says: tuple[str, ...]
    moe: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012  never changed


LAYOUTS = {
    "TP and heads": Layout({"tp": 3}, ("--tp 3", "num_attention_heads = 4")),
    "TP beyond heads": Layout({"tp": 8}, ("--tp 8", "num_attention_heads = 4")),
    "TP and kv heads": Layout({"tp": 4}, ("--tp 4", "num_key_value_heads = 6"), options={"heads": 12, "kv_heads": 6}),
    "TP and ffn": Layout({"tp": 4}, ("--tp 4", "intermediate_size = 50"), options={"ffn": 50}),
    "TP and the vision tower's ffn": Layout(
        {"tp": 4}, ("--tp 4", "vision tower's intermediate_size = 42"), options={"vision_ffn": 42}
    ),
    "TP and the vision tower's heads": Layout(
        {"tp": 4}, ("--tp 4", "vision tower's num_heads = 2"), options={"vision_heads": 2}
    ),
    "TP and vocabulary": Layout(
        {"tp": 4}, ("--tp 4", "vocab", "98", "--make-vocab-size-divisible-by"), options={"vocab": 98}
    ),
    "EP and experts": Layout({"ep": 3}, ("--ep 3", "num_experts = 8"), moe=True),
    "EP beyond experts": Layout({"ep": 16}, ("--ep 16", "num_experts = 8"), moe=True),
    "ETP and expert ffn": Layout({"etp": 7}, ("--etp 7", "moe_intermediate_size = 24"), moe=True),
    "EP without experts": Layout({"ep": 2}, ("--ep 2", "no experts")),
    "ETP without experts": Layout({"etp": 2}, ("--etp 2", "no experts")),
    "PP and layers": Layout({"pp": 2}, ("3 layers", "pp * vpp = 2"), options={"layers": 3}),
    "PP beyond layers": Layout({"pp": 4}, ("2 layers", "4")),
    "VPP and layers": Layout({"pp": 2, "vpp": 2}, ("2 layers", "pp * vpp = 4")),
    "VPP without PP": Layout({"vpp": 2}, ("--vpp 2", "--pp")),
    "TP 0": Layout({"tp": 0}, ("--tp 0", "1 or more")),
    "PP -1": Layout({"pp": -1}, ("--pp -1", "1 or more")),
    "stages without PP": Layout({"first_stage_layers": 1}, ("--first-stage-layers", "--pp 2")),
    "stages with VPP": Layout({"pp": 2, "vpp": 2, "last_stage_layers": 1}, ("no --vpp",)),
    "stages that are too many": Layout({"pp": 2, "first_stage_layers": 2}, ("2 layers", "first stage")),
    "stages that do not add up": Layout({"pp": 2, "first_stage_layers": 1, "last_stage_layers": 2}, ("2 layers",)),
    "a middle that does not divide": Layout(
        {"pp": 3, "first_stage_layers": 1}, ("leave 3 for 2",), options={"layers": 4}
    ),
    "a negative stage": Layout({"pp": 2, "first_stage_layers": -1}, ("--first-stage-layers -1", "1 or more")),
    "an empty stage": Layout({"pp": 2, "last_stage_layers": 0}, ("--last-stage-layers 0", "1 or more")),
}


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(case: Layout, bases: Bases, tmp_path: Path) -> None:
    source = bases.moe if case.moe else bases.dense
    if case.options:
        source = make(tmp_path / "source", replace(DENSE, **case.options))

    def convert(source: Path, target: Path, **options: Any) -> None:
        hf_to_megatron(source, target, layout=ParallelLayout(**case.sizes), **options)

    check_refusal(Case(UsageError, case.says), convert, source, tmp_path / "out" / "target", 2)


# ---------------------------------------------------------------------------------------------------------- options

RUN_OPTIONS = {
    "dtype": (["--dtype", "int8"], "--dtype int8"),
    "max-memory in words": (["--max-memory", "lots"], "--max-memory lots"),
    "max-memory too small": (["--max-memory", "100kB"], "--max-memory is too small"),
    "max-memory zero": (["--max-memory", "0"], "--max-memory is too small"),
    "max-memory negative": (["--max-memory=-1GB"], "--max-memory -1GB"),
    "workers zero": (["--workers", "0"], "--workers 0"),
    "workers negative": (["--workers", "-3"], "--workers -3"),
    "experts-layout": (["--experts-layout", "huh"], "--experts-layout"),
    "experts-layout of a dense model": (["--experts-layout", "v5"], "dense"),
    "iteration": (["--iteration", "newest"], "--iteration newest"),
    "negative iteration": (["--iteration", "-5"], "--iteration -5"),
    "resume and overwrite": (["--resume", "--overwrite"], "--resume and --overwrite"),
    "unknown option": (["--tensor-parallel", "2"], "--tensor-parallel"),
}
OPTIONS = {
    "hf-to-megatron": {
        **RUN_OPTIONS,
        "iteration too large": (["--iteration", "10000000"], "--iteration 10000000"),
        "for-megatron-core": (["--for-megatron-core", "0.5"], "--for-megatron-core 0.5"),
        "format": (["--format", "zarr"], "--format zarr"),
        "padded-vocab-size": (["--padded-vocab-size", "95"], "--padded-vocab-size 95"),
        "negative padded-vocab-size": (["--padded-vocab-size", "-1"], "--padded-vocab-size -1"),
        "padded-vocab-size zero": (["--padded-vocab-size", "0"], "--padded-vocab-size 0"),
        "make-vocab-size-divisible-by": (["--make-vocab-size-divisible-by", "0"], "--make-vocab-size-divisible-by 0"),
        "padded in two ways": (
            ["--padded-vocab-size", "128", "--make-vocab-size-divisible-by", "64"],
            "exclude each other",
        ),
        "tp in words": (["--tp", "two"], "--tp"),
    },
    "megatron-to-hf": {
        **{name: case for name, case in RUN_OPTIONS.items() if name != "experts-layout of a dense model"},
        "max-shard-size": (["--max-shard-size", "big"], "--max-shard-size big"),
        "max-shard-size zero": (["--max-shard-size", "0"], "--max-shard-size"),
        "experts-layout that is only read": (["--experts-layout", "scrambled"], "--experts-layout scrambled"),
    },
}


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [(name, *case) for name, cases in OPTIONS.items() for case in cases.values()],
    ids=[f"{name} {case}" for name, cases in OPTIONS.items() for case in cases],
)
def test_options(name: str, arguments: list[str], says: str, bases: Bases, tmp_path: Path) -> None:
    source = bases.dense if name == "hf-to-megatron" else bases.dense_run
    before = contents(source)
    result = CliRunner().invoke(app, [name, str(source), str(tmp_path / "out" / "target"), *arguments])
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()
    assert contents(source) == before


def test_a_format_that_is_not_written_yet(bases: Bases, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["hf-to-megatron", str(bases.dense), str(tmp_path / "t"), "--format", "torch"])
    assert result.exit_code == 3
    assert "torch_dist" in result.stderr
    assert not list(tmp_path.iterdir())


def test_run_options_that_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        RunOptions(resume=True, overwrite=True)


# ------------------------------------------------------------------------------------------------------------ dtypes


def number(pattern: str, value: int, dtype: str, *shape: int) -> Raw:
    """A tensor whose last element has these bits."""
    tensor = zeros(dtype, *shape)
    last = struct.pack(pattern, value)
    return Raw(dtype, shape, tensor.data[: -len(last)] + last)


BF16_1E30, F32_1E30, F32_LARGEST = 0x714A, 0x7149F2CA, 0x7F7FFFFF
OVERFLOWS = {
    "bf16 to fp16": (number("<H", BF16_1E30, "BF16", 32, 48), "fp16", "1e+30", "float16"),
    "fp32 to fp16": (number("<I", F32_1E30, "F32", 32, 48), "fp16", "1e+30", "float16"),
    "fp32 to bf16": (number("<I", F32_LARGEST, "F32", 32, 48), "bf16", "3.403e+38", "bfloat16"),
}


@pytest.mark.parametrize("overflow", OVERFLOWS.values(), ids=OVERFLOWS.keys())
def test_a_value_that_does_not_fit(overflow: tuple[Raw, str, str, str], bases: Bases, tmp_path: Path) -> None:
    tensor, dtype, value, says = overflow
    case = Case(
        InputError,
        (FC2, f"a value of {value} does not fit {says}", "--dtype"),
        with_tensor(LAYER + "mlp.down_proj.weight", tensor),
        {"dtype": dtype},
    )
    refuse_huggingface(case, bases.dense, tmp_path)


def test_a_value_that_does_not_fit_on_the_way_back(bases: Bases, tmp_path: Path) -> None:
    data = number("<H", BF16_1E30, "BF16", 2, 32, 48).data
    case = Case(
        InputError,
        (LAYER + "mlp.down_proj.weight", "float16", "--dtype"),
        lambda run: put(run, FC2, "bfloat16", (2, 32, 48), data),
        {"dtype": "fp16"},
    )
    refuse_megatron(case, bases.dense_run, tmp_path)


def test_infinity_and_nan_fit_everywhere(bases: Bases, tmp_path: Path) -> None:
    folder = copied(bases.dense, tmp_path / "source")
    patterns = b"".join(struct.pack("<H", bits) for bits in (0x7F80, 0xFF80, 0x7FC1, 0x8000))
    tensor = Raw("BF16", (32, 48), patterns + bytes(2 * 32 * 48 - len(patterns)))
    with_tensor(LAYER + "mlp.down_proj.weight", tensor)(folder)
    hf_to_megatron(folder, tmp_path / "run", dtype="fp16", run=QUICK)
    _, _, data = stored(tmp_path / "run", FC2)
    found = struct.unpack("<4H", data[2 * 32 * 48 :][:8])
    assert [found[0], found[1], found[3]] == [0x7C00, 0xFC00, 0x8000]
    assert found[2] & 0x7C00 == 0x7C00
    assert found[2] & 0x03FF


# --------------------------------------------------------------------------------------- as a user meets all this


USER = {
    "unusable source": ("hf-to-megatron", "many", remove(INDEX), [], 3),
    "unusable run": ("megatron-to-hf", "dense_run", without_key(QKV), [], 3),
    "layout": ("hf-to-megatron", "dense", lambda f: None, ["--tp", "3"], 2),
}


@pytest.mark.parametrize("case", USER.values(), ids=USER.keys())
def test_in_a_process_of_its_own(case: tuple[str, str, Damage, list[str], int], bases: Bases, tmp_path: Path) -> None:
    name, base, damage, arguments, code = case
    source = copied(getattr(bases, base), tmp_path / "source")
    damage(source)
    run = command(name, source, tmp_path / "out" / "target", *arguments, cwd=REPOSITORY)
    assert run.returncode == code
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert not (tmp_path / "out").exists()
