"""Mistakes that converters, loaders and models of Qwen3-VL have made, and how each gets into a real converted
checkpoint: what the verifier must find, with the place that it must name.

    fault = FAULTS["gate and up swapped"]
    folder, run = fault.planted(bases, tmp_path)      # a right folder, a wrong checkpoint
    with fault.at_work():                             # or a right one, and a wrong model
        found = verify(folder, run, logits=LogitsOptions())
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from broken import QUICK, edit_config
from models import planted
from qwen3vl_convert import ParallelLayout, hf_to_megatron
from verify.planting import Change, Fault, Site, each, exchanged, settings, stored, weights
from verify.weight_faults import HF, changed_folder


def text(layer: int | str, name: str) -> str:
    return f"model.language_model.layers.{layer}.{name}"


def vision(block: int | str, name: str) -> str:
    return f"model.visual.blocks.{block}.{name}"


Q, K, V, OUT = (f"self_attn.{name}_proj.weight" for name in "qkvo")
GATE, UP, DOWN = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
EXPERTS_UP, EXPERTS_DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"
EMBEDDING, NORM, HEAD = "model.language_model.embed_tokens.weight", "model.language_model.norm.weight", "lm_head.weight"
PATCHES, POSITIONS = "model.visual.patch_embed.proj.weight", "model.visual.pos_embed.weight"
DEEPSTACK = "model.visual.deepstack_merger_list."
MERGER = "model.visual.merger.linear_fc1.weight"
LAYERS = "language_model.decoder.layers."
TABLES = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")
OUR_QKV, OUR_FC1 = f"{LAYERS}self_attention.linear_qkv.weight", f"{LAYERS}mlp.linear_fc1.weight"
VISION_QKV = "vision_model.decoder.layers.self_attention.linear_qkv."

QKV_1 = "text layer 1, self_attention.linear_qkv, output"
FC1_1 = "text layer 1, mlp.linear_fc1, output"
EXPERTS_1 = "text layer 1, mlp, output"
ATTENTION_0 = "text layer 0, self_attention.linear_proj, input"


def read_as(change: Callable[[Tensor], Tensor]) -> Change:
    """The same memory, arranged otherwise."""
    return lambda weight: change(weight).reshape(weight.shape)


def by_expert(change: Callable[[Tensor], Any], *experts: int) -> Change:
    def work(stack: Tensor) -> Tensor:
        return torch.stack([change(one) if number in experts else one for number, one in enumerate(stack)])

    return work


def in_order(*order: int) -> Change:
    return lambda weight: weight[list(order)]


def concatenated(weight: Tensor) -> Tensor:
    """q, k, v of two groups, two query heads each, end to end."""
    q, k, v = weight.unflatten(0, (2, 4, -1)).split([2, 1, 1], 1)
    return torch.cat([part.flatten(0, 2) for part in (q, k, v)])


def bit_flipped(weight: Tensor) -> Tensor:
    """The lowest bit of one bfloat16."""
    weight.view(torch.int16)[3, 5] ^= 1
    return weight


def with_nan(weight: Tensor) -> Tensor:
    weight[3, 5] = torch.nan
    return weight


def initialised(weight: Tensor) -> Tensor:
    values: Tensor = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02
    return values.to(weight.dtype)


def padded_by_shard(table: Tensor) -> Tensor:
    """Two shards of the vocabulary, each with its own padding behind it: what of the second is pushed out is lost."""
    half, padding = 256, (len(table) - 512) // 2
    return torch.cat([table[:half], table[512 : 512 + padding], table[half:512], table[512 : 512 + padding]])


def first_half_twice(weight: Tensor) -> Tensor:
    return torch.cat([weight[:, : weight.shape[1] // 2]] * 2, 1)


def untied(site: Site) -> Path:
    """An output layer of its own, as training without tying leaves it."""
    folder = changed_folder(site.folder, site.target / "untied", _with_head)
    edit_config(lambda config: _tie(config, False))(folder)
    hf_to_megatron(folder, site.target / "run", run=QUICK)
    return site.target / "run"


def tied(site: Site) -> Path:
    """The embedding as output layer."""
    folder = changed_folder(site.folder, site.target / "tied", lambda found: found.pop(HEAD))
    edit_config(lambda config: _tie(config, True))(folder)
    hf_to_megatron(folder, site.target / "run", run=QUICK)
    return site.target / "run"


def _with_head(found: HF) -> None:
    found[HEAD] = found[EMBEDDING] * 1.01


def _tie(config: dict[str, Any], value: bool) -> None:
    config["tie_word_embeddings"] = value
    config["text_config"].pop("tie_word_embeddings", None)


IN_WEIGHTS = {
    # -- experts
    "hub experts read as v5": Fault(
        each([text(layer, EXPERTS_UP) for layer in range(2)], lambda w: w.transpose(1, 2)),
        "text layer 0, mlp, output",
        (text("*", EXPERTS_UP),),
        guess="transposed",
        model="square up",
    ),
    "square expert transposed": Fault(
        each([text(1, EXPERTS_DOWN)], by_expert(lambda w: w.T, 3)),
        EXPERTS_1,
        (text(1, EXPERTS_DOWN),),
        guess="expert 3: transposed",
        model="square down",
    ),
    "expert pair exchanged": Fault(
        each([text(1, EXPERTS_UP), text(1, EXPERTS_DOWN)], in_order(0, 1, 5, 3, 4, 2, 6, 7)),
        EXPERTS_1,
        (text(1, EXPERTS_UP), text(1, EXPERTS_DOWN)),
        guess="experts 2 and 5 are exchanged",
        model="moe",
    ),
    "one expert for all": Fault(
        each([text(1, EXPERTS_UP), text(1, EXPERTS_DOWN)], in_order(*[0] * 8)),
        EXPERTS_1,
        (text(1, EXPERTS_UP), text(1, EXPERTS_DOWN)),
        guess="expert 1 holds the weights of expert 0",
        model="moe",
    ),
    "experts counted by rank": Fault(
        each([text(1, EXPERTS_UP), text(1, EXPERTS_DOWN)], in_order(0, 1, 2, 3, 0, 1, 2, 3)),
        EXPERTS_1,
        (text(1, EXPERTS_UP), text(1, EXPERTS_DOWN)),
        guess="expert 4 holds the weights of expert 0",
        model="moe",
        options={"layout": ParallelLayout(ep=2, pp=2)},
    ),
    "gate and up of experts swapped": Fault(
        each([text(1, EXPERTS_UP)], lambda w: w.roll(48, 2)),
        EXPERTS_1,
        (text(1, EXPERTS_UP),),
        guess="gate and up are swapped",
        model="moe",
    ),
    "router rows permuted": Fault(
        each([text(1, ROUTER)], in_order(1, 2, 3, 4, 5, 6, 7, 0)),
        EXPERTS_1,
        (text(1, ROUTER),),
        guess="expert 0 holds the weights of expert 1",
        model="moe",
    ),
    # -- attention
    "q heads in group order": Fault(
        each([text(1, Q)], read_as(lambda w: w.unflatten(0, (2, 2, 16)).transpose(0, 1))),
        QKV_1,
        (text(1, Q),),
        guess="(g kv d h) instead of (kv g d h)",
    ),
    "q, k, v concatenated": Fault(
        stored([OUR_QKV], concatenated),
        QKV_1,
        (text(1, Q), text(1, K), text(1, V)),
        guess="q, k, v left concatenated",
        options={"layout": ParallelLayout(tp=2)},
    ),
    "k and v exchanged": Fault(
        exchanged((text(1, K), text(1, V))), QKV_1, (text(1, K), text(1, V)), guess="k and v are exchanged"
    ),
    "rotary pairs": Fault(
        each([text(1, Q), text(1, K)], read_as(lambda w: w.unflatten(0, (-1, 2, 8)).transpose(1, 2))),
        QKV_1,
        (text(1, Q), text(1, K)),
        guess="rotary pairs are neighbours",
    ),
    "norms of q and k exchanged": Fault(
        exchanged((text(1, "self_attn.q_norm"), text(1, "self_attn.k_norm"))),
        "text layer 1, self_attention.q_layernorm, output",
        (text(1, "self_attn.q_norm.weight"), text(1, "self_attn.k_norm.weight")),
        guess="the norms of q and k are exchanged",
    ),
    "o_proj transposed": Fault(
        each([text(1, OUT)], lambda w: w.T),
        "text layer 1, self_attention.linear_proj, output",
        (text(1, OUT),),
        guess="transposed",
    ),
    "one TP shard twice": Fault(
        stored([f"{LAYERS}self_attention.linear_proj.weight"], first_half_twice),
        "text layer 1, self_attention.linear_proj, output",
        (text(1, OUT),),
        guess="kv groups 1 hold 0",
        options={"layout": ParallelLayout(tp=2)},
    ),
    # -- MLP
    "gate and up swapped": Fault(
        exchanged((text(1, GATE), text(1, UP))), FC1_1, (text(1, GATE), text(1, UP)), guess="gate and up are swapped"
    ),
    "gate and up shard by shard": Fault(
        stored([OUR_FC1], read_as(lambda w: w.unflatten(0, (2, 2, -1)).transpose(0, 1))),
        FC1_1,
        (text(1, GATE), text(1, UP)),
        guess="concatenated shard by shard of TP2",
        options={"layout": ParallelLayout(tp=2)},
    ),
    "up scaled": Fault(each([text(1, UP)], lambda w: w * 2), FC1_1, (text(1, UP),), guess="scaled by 2"),
    # -- layers, norms
    "two layers exchanged": Fault(
        exchanged((text(0, ""), text(1, ""))),
        "text layer 0, input_layernorm, output",
        (text(0, "*"), text(1, "*")),
        guess="layers 0 and 1 are exchanged",
        options={"layout": ParallelLayout(pp=2)},
    ),
    "a layer left initialised": Fault(
        each([text(1, name) for name in (Q, K, V, OUT, GATE, UP, DOWN)], initialised),
        QKV_1,
        tuple(text(1, name) for name in (Q, K, V, OUT, GATE, UP, DOWN)),
        guess="still initialised",
    ),
    "norm counted from zero": Fault(
        each([text(1, "input_layernorm.weight")], lambda w: w - 1),
        "text layer 1, input_layernorm, output",
        (text(1, "input_layernorm.weight"),),
        guess="1 subtracted",
    ),
    "final norm missing": Fault(
        each([NORM], torch.ones_like),
        "language_model.decoder.final_layernorm, output",
        (NORM,),
        guess="still initialised",
    ),
    # -- tables of tokens
    "tied head not tied": Fault(
        untied, "language_model.output_layer, output", (HEAD,), ("tied",), guess="tied head not tied", model="tied"
    ),
    "head tied": Fault(tied, "language_model.output_layer, output", (HEAD,), ("tied",), guess="is tied"),
    "lm_head rows permuted": Fault(
        each([HEAD], lambda w: w.roll(7, 0)), "language_model.output_layer, output", (HEAD,), guess="rows"
    ),
    "embeddings off by one": Fault(
        each([EMBEDDING], lambda w: w.roll(1, 0)),
        "language_model.embedding.word_embeddings, output",
        (EMBEDDING,),
        guess="rows",
    ),
    "padding of each shard left in": Fault(
        stored(TABLES, padded_by_shard, None),
        "language_model.embedding.word_embeddings, output",
        (EMBEDDING, HEAD),
        guess="padding not zero",
        options={"layout": ParallelLayout(tp=2), "padded_vocab_size": 640},
    ),
    "padding holds numbers": Fault(
        stored(TABLES, lambda table: torch.cat([table[:512], table[:128]]), None),
        wrong=(EMBEDDING, HEAD),
        guess="padding not zero",
        function=False,
        options={"padded_vocab_size": 640},
    ),
    # -- the vision tower
    "vision q, k, v concatenated": Fault(
        stored(
            [VISION_QKV + "weight", VISION_QKV + "bias"], read_as(lambda w: w.unflatten(0, (4, 3, 16)).transpose(0, 1))
        ),
        "vision layer 1, self_attention.linear_qkv, output",
        (vision(1, "attn.qkv.weight"), vision(1, "attn.qkv.bias")),
        guess="vision q, k, v left concatenated",
    ),
    "vision qkv without bias": Fault(
        each([vision(1, "attn.qkv.bias")], torch.zeros_like),
        "vision layer 1, self_attention.linear_qkv, output",
        (vision(1, "attn.qkv.bias"),),
        guess="all zero",
    ),
    "deepstack mergers in another order": Fault(
        exchanged((f"{DEEPSTACK}0.", f"{DEEPSTACK}1.")),
        "vision_model.decoder.deepstack_merger_list.0.patch_norm, output",
        (f"{DEEPSTACK}*",),
        guess="deepstack mergers 0 and 1 are exchanged",
    ),
    "patches merged by columns": Fault(
        each([MERGER], read_as(lambda w: w.unflatten(1, (2, 2, -1)).transpose(1, 2))),
        "vision_model.merger.linear_fc1, output",
        (MERGER,),
        guess="columns",
    ),
    "position embeddings transposed": Fault(
        each([POSITIONS], read_as(lambda w: w.unflatten(0, (8, 8)).transpose(0, 1))),
        "vision layer 0, input_layernorm, input",
        (POSITIONS,),
        guess="a permutation of the positions",
        blames="position embeddings",
    ),
    "frames of a patch exchanged": Fault(
        each([PATCHES], lambda w: w.flip(2)),
        "vision_model.patch_embed, output",
        (PATCHES,),
        guess="0 and 1 are exchanged",
    ),
    "red and blue exchanged": Fault(
        each([PATCHES], lambda w: w.flip(1)),
        "vision_model.patch_embed, output",
        (PATCHES,),
        guess="channels 0 and 2 are exchanged",
    ),
    "patches transposed": Fault(
        each([PATCHES], lambda w: w.transpose(3, 4)), "vision_model.patch_embed, output", (PATCHES,), guess="x y"
    ),
    # -- numbers
    "one bfloat16 bit flipped": Fault(
        each([text(1, DOWN)], bit_flipped),
        "text layer 1, mlp.linear_fc2, output",
        (text(1, DOWN),),
        guess="one bit flipped at [3, 5]: bit 0",
        model="bfloat16",
    ),
    "overflow of float16": Fault(
        each([text(1, DOWN)], lambda w: w.half().float()),
        "text layer 1, mlp.linear_fc2, output",
        (text(1, DOWN),),
        guess="overflow of float16",
        model="bright",
    ),
    "NaN": Fault(
        each([text(1, DOWN)], with_nan), "text layer 1, mlp.linear_fc2, output", (text(1, DOWN),), guess="NaN: 1 of"
    ),
    "rounded to bfloat16": Fault(
        weights(lambda found: found.update({name: one.bfloat16().float() for name, one in found.items()})),
        "language_model.embedding.word_embeddings, output",
        ("*",),
        guess="rounded to bfloat16",
    ),
}
"""In the weights of the checkpoint."""

IN_SETTINGS = {
    "rope theta 500000": Fault(
        settings(rotary_base=500000), ATTENTION_0, settings=("rope_theta",), blames="Settings that differ: rope_theta"
    ),
    "M-RoPE sections": Fault(
        settings(mrope_section=[6, 1, 1]),
        ATTENTION_0,
        settings=("mrope_section",),
        blames="Settings that differ: mrope_section",
    ),
    "top-k too small": Fault(
        settings(moe_router_topk=2),
        "text layer 0, mlp, output",
        settings=("top_k",),
        blames="Settings that differ: top_k",
        model="moe",
    ),
    "eps 1e-5": Fault(
        settings(layernorm_epsilon=1e-5),
        "text layer 0, input_layernorm, output",
        settings=("rms_eps",),
        blames="Settings that differ: rms_eps",
    ),
    "another image token": Fault(
        settings(image_token_id=499),
        "text layer 0, input_layernorm, input",
        settings=("image_token_id",),
        blames="Settings that differ: image_token_id",
    ),
    "deepstack of another layer": Fault(
        settings(vision_deepstack_visual_indexes=[0, 1]),
        "vision_model.decoder.deepstack_merger_list.1.patch_norm, input",
        settings=("deepstack",),
        blames="Settings that differ: deepstack",
    ),
}
"""In what the checkpoint says of its model."""


def norm_before_shuffle(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Deepstack mergers norm each patch by itself, as the main merger does."""
    for merger in model.vision_model.decoder.deepstack_merger_list:
        patch.setattr(merger.patch_norm, "forward", _patch_by_patch(merger.patch_norm))


def _patch_by_patch(norm: Any) -> Callable[[Tensor], Tensor]:
    def forward(merged: Tensor) -> Tensor:
        patches = merged.unflatten(-1, (4, -1))
        normed = functional.layer_norm(patches, patches.shape[-1:], eps=norm.eps).flatten(-2)
        scaled: Tensor = normed * norm.weight + norm.bias
        return scaled

    return forward


def where_visual(change: Callable[[Any, pytest.MonkeyPatch], object]) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """Of a change to the features of visual tokens: only where there are any."""

    def plant(model: Any, patch: pytest.MonkeyPatch) -> None:
        change(model, patch)
        wrong = model._features
        patch.setattr(model, "_features", lambda visual: None if visual.joined() is None else wrong(visual))

    return plant


def in_code(
    change: Callable[[Any, pytest.MonkeyPatch], object], place: str, blames: str, model: str = "dense"
) -> Fault:
    return Fault(place=place, blames=blames, model=model, change=change)


def old(name: str, place: str, blames: str, model: str = "dense") -> Fault:
    """One of those that the tests of the model plant."""
    return in_code(planted.FAULTS[name].plant, place, blames, model)


PATCH_NORM_0 = "vision_model.decoder.deepstack_merger_list.0.patch_norm, output"
MERGER_ACTIVATION = "vision_model.decoder.deepstack_merger_list.0.linear_fc2, input"
VISION_ATTENTION_0 = "vision layer 0, self_attention.linear_proj, input"
NORM_1 = "text layer 1, input_layernorm, input"

IN_CODE = {
    "merger's norm before the shuffle": in_code(norm_before_shuffle, PATCH_NORM_0, "its weights are equal"),
    "no deepstack": in_code(where_visual(planted.no_deepstack), NORM_1, "deepstack"),
    "deepstack one layer late": in_code(where_visual(planted.deepstack_late), NORM_1, "deepstack"),
    "sectioned M-RoPE": old("sectioned M-RoPE", ATTENTION_0, "mrope_section"),
    "positions of text": old("positions of text", ATTENTION_0, "rotary positions"),
    "frequencies in bfloat16": old("frequencies in bfloat16", ATTENTION_0, "rotary positions"),
    "tanh GELU in the mergers": old("tanh GELU in the mergers", MERGER_ACTIVATION, "activation"),
    "LayerNorm eps 1e-5": old("LayerNorm eps 1e-5", "vision layer 0, input_layernorm, output", "eps"),
    "frames see each other": old("frames see each other", VISION_ATTENTION_0, "the mask"),
    "shares not normalised": old("top-k not renormalised", "text layer 0, mlp, output", "how their shares", "moe"),
}
"""In the code that runs a checkpoint that is right."""

FAULTS = IN_WEIGHTS | IN_SETTINGS | IN_CODE
