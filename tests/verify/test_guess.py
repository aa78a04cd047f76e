"""Each of the usual things, planted in a real converted checkpoint, is called by its name, with its place."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from verify.weight_faults import (
    HF,
    OUR_TEXT,
    OUR_VISION,
    TEXT,
    Bases,
    changed_run,
    compared,
    guesses,
    run_of_changed,
)

BLOCK = "model.visual.blocks."
EXPERTS = "mlp.experts."
Q, K, V, PROJECTION = (f"self_attn.{name}_proj.weight" for name in "qkvo")
GATE, UP, DOWN = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Fault:
    """A mistake in the weights that were converted; which tensors differ then, and what is said of each."""

    model: str
    plant: Callable[[HF], object]
    says: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)


def in_place(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[HF], object]:
    return lambda weights: weights.update({name: change(weights[name])})


def exchange(one: str, other: str) -> Callable[[HF], object]:
    """Two tensors, or all of two modules that differ in a part of the name."""

    def plant(weights: HF) -> None:
        before = dict(weights)
        for name in before:
            if name.startswith(one) and (twin := other + name.removeprefix(one)) in before:
                weights[name], weights[twin] = before[twin], before[name]

    return plant


def heads(weight: Tensor, *sizes: int) -> Tensor:
    """The rows read as if the first two axes of `sizes` lay the other way round."""
    return weight.reshape(sizes[1], sizes[0], *sizes[2:]).transpose(0, 1).reshape(weight.shape)


def flip(weight: Tensor, index: tuple[int, ...], bit: int) -> Tensor:
    bits = weight.view(torch.int16)
    bits[index] ^= 1 << bit
    return weight


def put_value(index: Any, value: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight[index] = value
        return weight

    return change


def swapped(weight: Tensor, dim: int, one: int, other: int) -> Tensor:
    order = torch.arange(weight.shape[dim])
    order[[one, other]] = torch.tensor([other, one])
    return weight.index_select(dim, order)


def normal(weight: Tensor) -> Tensor:
    return (torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(weight.dtype)


def shuffled(weight: Tensor, dim: int) -> Tensor:
    return weight.index_select(dim, torch.randperm(weight.shape[dim], generator=torch.Generator().manual_seed(2)))


L1, L2 = f"{TEXT}1.", f"{TEXT}2."
FAULTS = {
    "transposed": Fault("square", in_place(L1 + DOWN, lambda w: w.T), {L1 + DOWN: "transposed"}),
    "transposed, read in the other shape": Fault(
        "dense",
        in_place(L1 + DOWN, lambda w: w.T.reshape(w.shape)),
        {L1 + DOWN: "transposed, and read with the shape of the other: (f h) instead of (h f)"},
    ),
    "q heads in group order": Fault(
        "dense",
        in_place(L1 + Q, lambda w: heads(w, 3, 2, 8, 32)),
        {L1 + Q: "q heads are in another order: (g kv d h) instead of (kv g d h)"},
    ),
    "columns of the output in group order": Fault(
        "dense",
        in_place(L1 + PROJECTION, lambda w: heads(w.T, 3, 2, 8, 32).T),
        {L1 + PROJECTION: "q heads are in another order: (h g kv d) instead of (h kv g d)"},
    ),
    "rotary pairs": Fault(
        "dense",
        in_place(L1 + K, lambda w: w.reshape(3, 2, 4, 32).transpose(1, 2).reshape(w.shape)),
        {
            L1 + K: (
                "rotary pairs are neighbours on one side and halves on the other: "
                "(kv d halves h) instead of (kv halves d h)"
            )
        },
    ),
    "gate and up swapped": Fault(
        "dense",
        exchange(L1 + GATE, L1 + UP),
        {L1 + GATE: "layer 1: gate and up are swapped", L1 + UP: "layer 1: gate and up are swapped"},
    ),
    "up twice": Fault(
        "dense",
        lambda weights: weights.update({L1 + GATE: weights[L1 + UP]}),
        {L1 + GATE: f"layer 1: holds the weights of {L1 + UP}"},
    ),
    "k and v exchanged": Fault(
        "dense",
        exchange(L1 + K, L1 + V),
        {L1 + K: "layer 1: k and v are exchanged", L1 + V: "layer 1: k and v are exchanged"},
    ),
    "another layer": Fault(
        "dense",
        lambda weights: weights.update({L1 + Q: weights[L2 + Q]}),
        {L1 + Q: "layer 1 holds the weights of layer 2"},
    ),
    "two layers exchanged": Fault(
        "moe",
        exchange(f"{TEXT}0.mlp", f"{L1}mlp"),
        {
            f"{layer}mlp.{name}": "layers 0 and 1 are exchanged"
            for layer in (f"{TEXT}0.", L1)
            for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        },
    ),
    "deepstack mergers in another order": Fault(
        "dense",
        exchange("model.visual.deepstack_merger_list.0.", "model.visual.deepstack_merger_list.1."),
        {
            f"model.visual.deepstack_merger_list.{merger}.{module}.{kind}": "deepstack mergers 0 and 1 are exchanged"
            for merger in (0, 1)
            for module in ("norm", "linear_fc1", "linear_fc2")
            for kind in ("weight", "bias")
        },
    ),
    "a merger's weights in a deepstack merger": Fault(
        "dense",
        lambda weights: weights.update(
            {"model.visual.deepstack_merger_list.1.linear_fc1.weight": weights["model.visual.merger.linear_fc1.weight"]}
        ),
        {
            "model.visual.deepstack_merger_list.1.linear_fc1.weight": (
                "deepstack merger 1: holds the weights of model.visual.merger.linear_fc1.weight"
            )
        },
    ),
    "experts exchanged": Fault(
        "moe",
        in_place(L1 + EXPERTS + "down_proj", lambda w: swapped(w, 0, 3, 5)),
        {L1 + EXPERTS + "down_proj": "layer 1, experts 3 and 5 are exchanged"},
    ),
    "an expert twice": Fault(
        "moe",
        in_place(L1 + EXPERTS + "down_proj", lambda w: torch.cat([w[:3], w[4:5], w[4:]])),
        {L1 + EXPERTS + "down_proj": "layer 1, expert 3 holds the weights of expert 4"},
    ),
    "an expert of another layer": Fault(
        "moe",
        lambda weights: weights[L1 + EXPERTS + "down_proj"][3].copy_(weights[f"{TEXT}0.{EXPERTS}down_proj"][3]),
        {L1 + EXPERTS + "down_proj": "expert 3: layer 1 holds the weights of layer 0"},
    ),
    "two experts transposed": Fault(
        "square moe",
        in_place(
            L1 + EXPERTS + "down_proj", lambda w: torch.stack([x.T if i in (2, 5) else x for i, x in enumerate(w)])
        ),
        {L1 + EXPERTS + "down_proj": "experts 2, 5: transposed"},
    ),
    "hub experts read as v5": Fault(
        "moe",
        in_place(L1 + EXPERTS + "gate_up_proj", lambda w: w.reshape(6, 48, 32).transpose(1, 2)),
        {
            L1 + EXPERTS + "gate_up_proj": (
                "transposed, and read with the shape of the other: (s i h) instead of (h s i)"
            )
        },
    ),
    "gate and up of experts swapped": Fault(
        "moe",
        in_place(L1 + EXPERTS + "gate_up_proj", lambda w: w.roll(24, 2)),
        {L1 + EXPERTS + "gate_up_proj": "gate and up are swapped"},
    ),
    "gate and up of one expert interleaved": Fault(
        "moe",
        in_place(
            L1 + EXPERTS + "gate_up_proj",
            lambda w: torch.cat([w[:1].reshape(1, 32, 24, 2).transpose(2, 3).reshape(1, 32, 48), w[1:]]),
        ),
        {L1 + EXPERTS + "gate_up_proj": "expert 0: gate and up are interleaved: (h i s) instead of (h s i)"},
    ),
    "rounded to float16": Fault(
        "faint", in_place(L1 + DOWN, lambda w: w.half().to(w.dtype)), {L1 + DOWN: "rounded to float16"}
    ),
    "rounded to bfloat16": Fault(
        "float32", in_place(L1 + DOWN, lambda w: w.bfloat16().float()), {L1 + DOWN: "rounded to bfloat16"}
    ),
    "overflow of float16": Fault(
        "bright",
        in_place(L1 + DOWN, lambda w: w.half().to(w.dtype)),
        {L1 + DOWN: "overflow of float16: 2 infinities, the first at [0, 7]"},
    ),
    "scaled": Fault("dense", in_place(L1 + DOWN, lambda w: w * 2), {L1 + DOWN: "scaled by 2"}),
    "scaled by a root": Fault(
        "dense",
        in_place(L1 + Q, lambda w: (w.double() * 8**-0.5).to(w.dtype)),
        {L1 + Q: "scaled by 0.353553"},
    ),
    "negated": Fault("dense", in_place(L1 + DOWN, torch.neg), {L1 + DOWN: "of the other sign"}),
    "layernorm_1p": Fault(
        "dense",
        in_place(f"{L1}input_layernorm.weight", lambda w: w - 1),
        {f"{L1}input_layernorm.weight": "1 subtracted: a norm of Megatron's layernorm_1p keeps its weight minus 1"},
    ),
    "zeros": Fault("dense", in_place(L1 + DOWN, torch.zeros_like), {L1 + DOWN: "all zero"}),
    "final norm missing": Fault(
        "dense",
        in_place("model.language_model.norm.weight", torch.ones_like),
        {"model.language_model.norm.weight": "constant (1): still initialised"},
    ),
    "a shard missing": Fault(
        "dense",
        in_place(L1 + UP, put_value(slice(24, None), 0.0)),
        {L1 + UP: "zeros in place of 768 weights, only rows 24:48"},
    ),
    "still initialised": Fault(
        "dense",
        in_place("model.visual.merger.linear_fc1.weight", normal),
        {
            "model.visual.merger.linear_fc1.weight": (
                "looks still initialised: normal with std 0.02 (the weights' is 0.0275), and has nothing in common "
                "with the weights"
            )
        },
    ),
    "one shard twice": Fault(
        "dense",
        in_place(L1 + UP, lambda w: torch.cat([w[:24], w[:24]])),
        {L1 + UP: "one TP shard twice: rows 24:48 hold 0:24"},
    ),
    "one shard of columns twice": Fault(
        "dense",
        in_place(L1 + DOWN, lambda w: torch.cat([w[:, :12], w[:, :12], w[:, 24:]], 1)),
        {L1 + DOWN: "one TP shard twice: columns 12:24 hold 0:12"},
    ),
    "kv groups exchanged": Fault(
        "dense",
        in_place(L1 + V, lambda w: swapped(w.reshape(3, 8, 32), 0, 0, 2).reshape(w.shape)),
        {L1 + V: "kv groups 0 and 2 are exchanged"},
    ),
    "rows in another order": Fault(
        "dense", in_place(L1 + DOWN, lambda w: shuffled(w, 0)), {L1 + DOWN: "a permutation of the rows"}
    ),
    "columns in another order": Fault(
        "dense", in_place(L1 + DOWN, lambda w: shuffled(w, 1)), {L1 + DOWN: "a permutation of the columns"}
    ),
    "a vector in another order": Fault(
        "dense",
        in_place(f"{L1}input_layernorm.weight", lambda w: shuffled(w, 0)),
        {f"{L1}input_layernorm.weight": "a permutation of the elements"},
    ),
    "half of a bias twice": Fault(
        "dense",
        in_place(f"{BLOCK}1.mlp.linear_fc2.bias", lambda w: torch.cat([w[:16], w[:16]])),
        {f"{BLOCK}1.mlp.linear_fc2.bias": "one TP shard twice: shards of 2 1 hold 0"},
    ),
    "one bit": Fault(
        "dense",
        in_place(L1 + DOWN, lambda w: flip(w, (7, 11), 14)),
        {L1 + DOWN: "one bit flipped at [7, 11]: bit 14 (of the exponent)"},
    ),
    "one bit of an expert": Fault(
        "moe",
        in_place(L1 + EXPERTS + "down_proj", lambda w: flip(w, (4, 7, 11), 3)),
        {L1 + EXPERTS + "down_proj": "expert 4: one bit flipped at [4, 7, 11]: bit 3 (of the mantissa)"},
    ),
    "NaN": Fault(
        "dense",
        in_place(L1 + DOWN, put_value((slice(3, 4), slice(5, 7)), float("nan"))),
        {L1 + DOWN: "NaN: 2 of them, the first at [3, 5]"},
    ),
    "NaN and more": Fault(
        "dense",
        in_place(L1 + DOWN, lambda w: put_value((3, 5), float("nan"))(w * 2)),
        {L1 + DOWN: "NaN: 1 of them, the first at [3, 5]; and of the others: scaled by 2"},
    ),
    "trained": Fault(
        "dense",
        in_place(L1 + K, lambda w: torch.cat([w[:8], w[8:16] * 1.1 + 0.001, w[16:]])),
        {L1 + K: "only kv group 1"},
    ),
    "some experts trained": Fault(
        "moe",
        in_place(L1 + EXPERTS + "down_proj", lambda w: torch.cat([w[:2], w[2:4] * 1.1 + 0.001, w[4:]])),
        {L1 + EXPERTS + "down_proj": "only experts 2, 3"},
    ),
    "everything trained": Fault("dense", in_place(L1 + DOWN, lambda w: w * 1.1 + 0.001), {L1 + DOWN: ""}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_faults_of_the_weights(fault: Fault, bases: Bases, tmp_path: Path) -> None:
    folder = bases.huggingface(fault.model)
    run = run_of_changed(folder, tmp_path, fault.plant, **fault.options)
    assert guesses(compared(folder, run)) == fault.says


@dataclass(frozen=True)
class StoredFault:
    """A mistake in how a Megatron parameter was put together, in layer 1."""

    model: str
    key: str
    plant: Callable[[Tensor], Tensor]
    says: dict[str, str]


def concatenated(qkv: Tensor, groups: int, dim: int) -> Tensor:
    """(kv g+2 d) -> all of q, all of k, all of v."""
    by_group = qkv.reshape(groups, -1, dim, qkv.shape[-1])
    parts = by_group[:, :-2], by_group[:, -2:-1], by_group[:, -1:]
    return torch.cat([part.reshape(-1, qkv.shape[-1]) for part in parts])


def by_rank(fc1: Tensor, ranks: int) -> Tensor:
    """All gate, all up -> per rank its gate, its up."""
    return fc1.reshape(2, ranks, -1, fc1.shape[-1]).transpose(0, 1).reshape(fc1.shape)


QKV, FC1 = f"{OUR_TEXT}self_attention.linear_qkv.weight", f"{OUR_TEXT}mlp.linear_fc1.weight"
VISION_QKV = f"{OUR_VISION}self_attention.linear_qkv."
THEIR_QKV = f"{BLOCK}1.attn.qkv."


def of_each(names: tuple[str, ...], text: str) -> dict[str, str]:
    return dict.fromkeys((L1 + name for name in names), text)


STORED_FAULTS = {
    "q, k, v concatenated": StoredFault(
        "dense",
        QKV,
        lambda w: concatenated(w, 3, 8),
        of_each((Q, K, V), "q, k, v left concatenated (not cut by kv group): * instead of (kv * d)"),
    ),
    "q, k, v concatenated by rank": StoredFault(
        "wide",
        QKV,
        lambda w: torch.cat([concatenated(shard, 2, 8) for shard in w.chunk(2)]),
        of_each((Q, K, V), "q, k, v concatenated within each shard of TP2: (r *) instead of (kv * d)"),
    ),
    "gate and up row by row": StoredFault(
        "dense",
        FC1,
        lambda w: w.reshape(2, 48, 32).transpose(0, 1).reshape(96, 32),
        of_each((GATE, UP), "gate and up are interleaved, row by row: (f *) instead of (* f)"),
    ),
    "gate and up rank by rank": StoredFault(
        "dense",
        FC1,
        lambda w: by_rank(w, 4),
        of_each(
            (GATE, UP),
            "gate and up concatenated shard by shard of TP4, as if they were one matrix: (r *) instead of (* f)",
        ),
    ),
    "vision q, k, v concatenated": StoredFault(
        "dense",
        VISION_QKV + "weight",
        lambda w: w.reshape(4, 3, 8, 32).transpose(0, 1).reshape(w.shape),
        {THEIR_QKV + "weight": "vision q, k, v left concatenated (not cut by head): (n t vd v) instead of (t n vd v)"},
    ),
    "vision biases concatenated": StoredFault(
        "dense",
        VISION_QKV + "bias",
        lambda w: w.reshape(4, 3, 8).transpose(0, 1).reshape(w.shape),
        {THEIR_QKV + "bias": "vision q, k, v left concatenated (not cut by head): (n t vd) instead of (t n vd)"},
    ),
    "vision q, k, v cut by head twice": StoredFault(
        "dense",
        VISION_QKV + "weight",
        lambda w: w.reshape(3, 4, 8, 32).transpose(0, 1).reshape(w.shape),
        {THEIR_QKV + "weight": ("vision q, k, v are cut by head in another order: (n t vd v) instead of (t n vd v)")},
    ),
    "one shard twice": StoredFault(
        "tied",
        QKV,
        lambda w: torch.cat([w[:32], w[:32]]),
        of_each((Q, K, V), "one TP shard twice: kv groups 1 hold 0"),
    ),
}


@pytest.mark.parametrize("fault", STORED_FAULTS.values(), ids=STORED_FAULTS.keys())
def test_faults_of_megatron_parameters(fault: StoredFault, bases: Bases, tmp_path: Path) -> None:
    def plant(stack: Tensor) -> None:
        stack[1] = fault.plant(stack[1].clone())

    run = changed_run(bases.megatron(fault.model), tmp_path / "run", fault.key, plant)
    assert guesses(compared(bases.huggingface(fault.model), run)) == fault.says
