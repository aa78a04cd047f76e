"""transformers itself loads what we write, every key of it, and computes the very logits that the source gives.

The same file runs on 4.57 and on 5.x. In float32 on a CPU equal weights give equal bits, so logits are compared as
bits. What the way through Megatron alone could not show, a wrong equation that its way back undoes, shows in the
checkpoints that Megatron-Bridge wrote and in experts that are written another way than they were read.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from oracles.megatron_world import same_bits
from qwen3vl_convert import (
    Dims,
    InputError,
    ParallelLayout,
    RunOptions,
    hf_to_megatron,
    make_checkpoint,
    megatron_to_hf,
)
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.verify import verify
from recorded import CONFIGS
from reference import load_huggingface

transformers: Any = pytest.importorskip("transformers")

GENERATION = tuple(int(number) for number in transformers.__version__.split(".")[:2])
NEEDS_V5 = pytest.mark.skipif(GENERATION < (5, 2), reason="transformers reads experts as v5 has them from 5.2 on")

pytestmark = pytest.mark.transformers

RUN = RunOptions(fsync=False)
DENSE, MOE = SIZES["tiny"], SIZES["tiny-moe"]
MODELS = {"dense": DENSE, "tied": replace(DENSE, tied=True), "moe": MOE}
# gate_up_proj of an expert is 64 x 64: transposed it has the same shape, and no reader can tell.
SQUARE = replace(MOE, expert_ffn=32)


# ---- transformers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """What transformers makes of a folder: the weights in its modules, and the logits of a text and of an image."""

    weights: dict[str, Tensor]
    text: Tensor
    image: Tensor


def load(folder: Path) -> Loaded:
    """Load in float32. Every key of the folder must have its place, and every place its key."""
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    loaded = Loaded(model.state_dict(), logits(model, text_inputs()), logits(model, image_inputs(model.config)))
    for one in (loaded.text, loaded.image):
        assert one.isfinite().all()
        assert one.std(dim=-1).min() > 0.01, "logits that are all the same compare nothing"
    return loaded


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model.eval()(**inputs).logits
    assert isinstance(found, Tensor)
    return found


def text_inputs() -> dict[str, Tensor]:
    ids = torch.arange(10, 490, 20)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_inputs(config: Any) -> dict[str, Tensor]:
    """Three words, an image of 4 x 6 patches (as 2 x 3 tokens), and five words."""
    image = [config.vision_start_token_id, *[config.image_token_id] * 6, config.vision_end_token_id]
    ids = torch.tensor([[11, 12, 13, *image, 21, 22, 23, 24, 25]])
    vision = config.vision_config
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(4 * 6, values, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 6]])}
    if GENERATION >= (5, 0):
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    return inputs | {"attention_mask": torch.ones_like(ids)}


def assert_same_model(found: Loaded, expected: Loaded) -> None:
    """The same function, bit for bit, of the same weights."""
    assert found.weights.keys() == expected.weights.keys()
    assert [name for name in expected.weights if not same_bits(found.weights[name], expected.weights[name])] == []
    assert same_bits(found.text, expected.text)
    assert same_bits(found.image, expected.image)


def fresh(dims: Dims, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of transformers' own making, as its `save_pretrained` leaves it."""
    make_checkpoint(folder / "config-of", dims)
    config = transformers.AutoConfig.from_pretrained(folder / "config-of")
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # what starts as zeros or ones too
            parameter.normal_(std=0.05) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder / "saved")
    return folder / "saved"


# ---- there and back --------------------------------------------------------------------------------------------------


def layout_of(dims: Dims) -> ParallelLayout:
    return ParallelLayout(tp=2, pp=2, ep=2 if dims.moe else 1)


def there_and_back(source: Path, work: Path, dims: Dims, **back: Any) -> Path:
    """Through a Megatron checkpoint of several ranks; everything else of the folder comes along."""
    hf_to_megatron(source, work / "megatron", layout=layout_of(dims), run=RUN)
    megatron_to_hf(work / "megatron", work / "back", run=RUN, **back)
    return work / "back"


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_the_same_model(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", MODELS[name])
    back = there_and_back(tmp_path / "source", tmp_path, MODELS[name], max_shard_bytes=400_000)
    assert len(list(back.glob("*.safetensors"))) > 1
    assert_same_model(load(back), load(tmp_path / "source"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("v5", "hub"),
        ("per-expert", "hub"),
        pytest.param("hub", "v5", marks=NEEDS_V5),
        pytest.param("per-expert", "v5", marks=NEEDS_V5),
        pytest.param("v5", "v5", marks=NEEDS_V5),
    ],
)
def test_expert_layouts_are_one_model(first: str, second: str, tmp_path: Path) -> None:
    """The same bits for the same seed in the published layout, loaded by transformers, are the judge."""
    make_checkpoint(tmp_path / "source", MOE)
    hf_to_megatron(tmp_path / "source", tmp_path / "first", layout=ParallelLayout(etp=2), run=RUN)
    megatron_to_hf(tmp_path / "first", tmp_path / "as-first", experts_layout=first, run=RUN)
    back = there_and_back(tmp_path / "as-first", tmp_path, MOE, experts_layout=second)
    assert_same_model(load(back), load(tmp_path / "source"))


@pytest.mark.parametrize(
    ("name", "experts_layout", "judge"),
    [
        ("dense", "hub", "dense"),
        ("dense-tied", "hub", "dense-tied"),
        ("moe", "match", "moe"),
        ("moe-v5", "hub", "moe"),
        pytest.param("moe-v5", "match", "moe-v5", marks=NEEDS_V5),
    ],
)
def test_golden_folders(name: str, experts_layout: str, judge: str, golden_huggingface: Path, tmp_path: Path) -> None:
    """Folders that were not made here; moe-v5 is moe as transformers 5 saved it, and `match` is as the source is."""
    dims = MOE if name.startswith("moe") else DENSE
    back = there_and_back(golden_huggingface / name, tmp_path, dims, experts_layout=experts_layout)
    assert_same_model(load(back), load(golden_huggingface / judge))


@pytest.mark.parametrize(("name", "made_of"), [("dense_tp2pp1", "dense"), ("moe_tp1pp1ep2", "moe")])
def test_what_megatron_bridge_made_of_a_model_is_that_model(
    name: str, made_of: str, golden_megatron: Path, golden_huggingface: Path, tmp_path: Path
) -> None:
    """config.json is rebuilt from run_config.yaml: a folder that transformers takes for the same model."""
    megatron_to_hf(golden_megatron / name, tmp_path / "hf", run=RUN)
    assert_same_model(load(tmp_path / "hf"), load(golden_huggingface / made_of))


# ---- configs and folders as transformers saves them ------------------------------------------------------------------


@pytest.mark.parametrize("saved_by", ["4.57.6", "5.3.0", "5.17.0", "5.23.0"])
@pytest.mark.parametrize("name", ["dense_untied", "dense_tied", "moe"])
def test_configs_of_both_generations(name: str, saved_by: str, tmp_path: Path) -> None:
    """Whichever release saved the config, this one loads what we write; the judge has a config that both can read."""
    dims = MODELS[{"dense_untied": "dense", "dense_tied": "tied"}.get(name, name)]
    make_checkpoint(tmp_path / "judge", dims)
    shutil.copytree(tmp_path / "judge", tmp_path / "source")
    variant = CONFIGS / "variants" / f"cfg_{name}_{saved_by}.json"
    shutil.copyfile(variant, tmp_path / "source" / "config.json")
    back = there_and_back(tmp_path / "source", tmp_path, dims)
    assert_same_model(load(back), load(tmp_path / "judge"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_what_save_pretrained_leaves(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A model saved by this very release: the same logits after the way through Megatron, and `verify` agrees."""
    dims = MODELS[name]
    saved = fresh(dims, tmp_path, dtype)
    if dims.moe:
        stack = load_huggingface(saved)["model.language_model.layers.0.mlp.experts.gate_up_proj"]
        e, h, i = dims.experts, dims.hidden, dims.expert_ffn
        assert stack.shape == ((e, 2 * i, h) if GENERATION >= (5, 2) else (e, h, 2 * i))
    back = there_and_back(saved, tmp_path, dims)
    expected = load(saved)
    assert_same_model(load(back), expected)
    assert verify(saved, tmp_path / "megatron").equal
    assert verify(back, tmp_path / "megatron").equal
    if dims.moe and GENERATION >= (5, 2):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "match", experts_layout="match", run=RUN)
        assert load_huggingface(tmp_path / "match").keys() == load_huggingface(saved).keys()
        assert_same_model(load(tmp_path / "match"), expected)


# ---- controls: what is wrong is seen ---------------------------------------------------------------------------------


def transposed(stack: Tensor) -> Tensor:
    return torch.cat([stack[:1].mT, stack[1:]])


def halves_swapped(stack: Tensor) -> Tensor:
    return torch.cat([stack[:1].roll(stack.shape[2] // 2, dims=2), stack[1:]])


def experts_swapped(stack: Tensor) -> Tensor:
    return torch.cat([stack[:2].flip(0), stack[2:]])


@pytest.mark.parametrize("wrong", [transposed, halves_swapped, experts_swapped])
def test_a_wrong_expert_is_seen(wrong: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """One expert of one layer wrong, in a shape that fits: it loads without a word, and the logits say so."""
    make_checkpoint(tmp_path / "source", SQUARE)
    back = there_and_back(tmp_path / "source", tmp_path, SQUARE)
    expected = load(tmp_path / "source")
    assert_same_model(load(back), expected)

    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    weights = load_huggingface(back)
    weights[name] = wrong(weights[name]).contiguous()
    save_file(weights, back / "model.safetensors", {"format": "pt"})
    found = load(back)
    assert not same_bits(found.text, expected.text)
    assert not same_bits(found.image, expected.image)


def test_a_wrong_layout_flag_is_refused(tmp_path: Path) -> None:
    """gate_up_proj is square and could be either; down_proj tells."""
    make_checkpoint(tmp_path / "source", SQUARE)
    with pytest.raises(InputError, match="down_proj"):
        hf_to_megatron(tmp_path / "source", tmp_path / "megatron", experts_layout="v5", run=RUN)


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_row_is_seen(name: str, tmp_path: Path) -> None:
    """Two query heads of one layer changed places, and two heads of the vision tower."""
    make_checkpoint(tmp_path / "source", MODELS[name])
    expected = load(tmp_path / "source")
    for key, rows, both in (
        ("model.language_model.layers.0.self_attn.q_proj.weight", 16, True),
        ("model.visual.blocks.0.attn.qkv.weight", 16, False),
    ):
        weights = load_huggingface(tmp_path / "source")
        weights[key][: 2 * rows] = weights[key][: 2 * rows].roll(rows, dims=0)
        shutil.copytree(tmp_path / "source", tmp_path / key)
        save_file(weights, tmp_path / key / "model.safetensors", {"format": "pt"})
        found = load(tmp_path / key)
        assert same_bits(found.text, expected.text) is not both
        assert not same_bits(found.image, expected.image)
