"""The golden checkpoints are what Megatron-Core loads, at any layout, and hold what their Hugging Face sources hold.

This is the ground that the other tests stand on: it uses none of our code, so what it finds equal is equal.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import ProcessRaisedException

from oracles.megatron_world import DENSE, MOE, Keys, Load, Sizes, World, assemble, differences, run_world

pytestmark = pytest.mark.megatron

Tensors = dict[str, torch.Tensor]

TIED = Sizes(tied=True)
GOLDEN_DENSE = {
    "dense_tp1pp1": ("dense", DENSE),
    "dense_tp2pp1": ("dense", DENSE),
    "dense_tp1pp2": ("dense", DENSE),
    "dense_tied_tp1pp1": ("dense-tied", TIED),
}
GOLDEN_MOE = {
    "moe_tp1pp1": ("moe", MOE),
    "moe_tp1pp1ep2": ("moe", MOE),
    "moe_tp2pp1ep1etp2": ("moe", MOE),
}


def megatron_text(hf: Tensors, model: Sizes) -> Tensors:
    """The text decoder as a torch_dist checkpoint holds it, in plain torch and without the project's notation."""

    def layer(i: int) -> Tensors:
        source = {
            key.split(f"layers.{i}.")[1]: value for key, value in hf.items() if f"language_model.layers.{i}." in key
        }
        q, k, v = (source[f"self_attn.{x}_proj.weight"].chunk(model.groups) for x in "qkv")
        return {
            "self_attention.linear_qkv.weight": torch.cat([torch.cat(group) for group in zip(q, k, v, strict=True)]),
            "self_attention.linear_qkv.layer_norm_weight": source["input_layernorm.weight"],
            "self_attention.linear_proj.weight": source["self_attn.o_proj.weight"],
            "self_attention.q_layernorm.weight": source["self_attn.q_norm.weight"],
            "self_attention.k_layernorm.weight": source["self_attn.k_norm.weight"],
            **(moe_mlp(source) if model.experts else dense_mlp(source)),
        }

    layers = [layer(i) for i in range(model.layers)]
    tensors = {f"decoder.layers.{name}": torch.stack([part[name] for part in layers]) for name in layers[0]}
    tensors["embedding.word_embeddings.weight"] = hf["model.language_model.embed_tokens.weight"]
    tensors["decoder.final_layernorm.weight"] = hf["model.language_model.norm.weight"]
    if not model.tied:
        tensors["output_layer.weight"] = hf["lm_head.weight"]
    return {f"language_model.{name}": tensor for name, tensor in tensors.items()}


def dense_mlp(source: Tensors) -> Tensors:
    """Gate above up."""
    return {
        "mlp.linear_fc1.weight": torch.cat([source["mlp.gate_proj.weight"], source["mlp.up_proj.weight"]]),
        "mlp.linear_fc1.layer_norm_weight": source["post_attention_layernorm.weight"],
        "mlp.linear_fc2.weight": source["mlp.down_proj.weight"],
    }


def moe_mlp(source: Tensors) -> Tensors:
    """Experts lie transposed on the hub."""
    return {
        "mlp.router.weight": source["mlp.gate.weight"],
        "mlp.experts.experts.linear_fc1.weight": source["mlp.experts.gate_up_proj"].transpose(1, 2),
        "mlp.experts.experts.linear_fc2.weight": source["mlp.experts.down_proj"].transpose(1, 2),
        "pre_mlp_layernorm.weight": source["post_attention_layernorm.weight"],
    }


def huggingface_tensors(folder: Path) -> Tensors:
    """All shards of a safetensors folder together."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def readable(source: Path, target: Path) -> Path:
    """A copy with the file that Megatron-Core before 0.19 insists on; newer ones accept it empty."""
    shutil.copytree(source / "iter_0000000", target)
    torch.save({}, target / "common.pt")
    return target


def check(
    world: World, golden: dict[str, tuple[str, Sizes]], megatron: Path, huggingface: Path, tmp_path: Path
) -> None:
    """Every golden checkpoint, whatever layout wrote it, loaded in this one, compared with its source."""
    jobs = [Load(readable(megatron / name, tmp_path / name), model) for name, (_, model) in golden.items()]
    for ranks, (name, (source, model)) in zip(run_world(world, jobs), golden.items(), strict=True):
        expected = megatron_text(huggingface_tensors(huggingface / source), model)
        assert differences(assemble(ranks), expected) == [], name


def again(*worlds: World) -> list[Any]:
    """More of what the others show."""
    return [pytest.param(world, marks=pytest.mark.slow) for world in worlds]


@pytest.mark.parametrize(
    "world", [World(), World(tp=2, pp=2, vpp=2), *again(World(tp=2), World(pp=2), World(pp=4), World(tp=4))], ids=str
)
def test_dense(world: World, golden_megatron: Path, golden_huggingface: Path, tmp_path: Path) -> None:
    check(world, GOLDEN_DENSE, golden_megatron, golden_huggingface, tmp_path)


@pytest.mark.parametrize(
    "world",
    [
        World(),
        World(tp=2, etp=2, ep=2),
        World(tp=2, pp=2, vpp=2, etp=4),
        *again(World(ep=2), World(tp=2), World(pp=2, ep=8)),
    ],
    ids=str,
)
def test_moe(world: World, golden_megatron: Path, golden_huggingface: Path, tmp_path: Path) -> None:
    check(world, GOLDEN_MOE, golden_megatron, golden_huggingface, tmp_path)


def test_local_specs_norm_name_is_not_there(golden_megatron: Path, tmp_path: Path) -> None:
    """Why the harness renames: without that, Megatron-Core's local spec cannot load what trainers write."""
    folder = readable(golden_megatron / "moe_tp1pp1ep2", tmp_path / "moe")
    with pytest.raises(ProcessRaisedException, match=r"linear_fc1\.layer_norm_weight"):
        run_world(World(), [Load(folder, MOE, Keys(te_norm=False))])
