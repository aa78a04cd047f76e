"""Megatron-Core's own modules, on what the equations give them, compute what the Hugging Face weights say.

A wrong equation that is invertible passes every round trip. Here it cannot: real `SelfAttention` and `MLP` modules hold
the weights, and what they compute is compared with the Hugging Face formula in float64. Each test has its control: a
wrong equation that the same comparison must refuse.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from oracles.megatron_rank import cpu_for_cuda, parallel
from oracles.megatron_world import World
from qwen3vl_convert import (
    ConcatenatedQKVMapping,
    ExpertMLPDownProjMapping,
    ExpertMLPGateUpProjMapping,
    GatedMLPMapping,
    ParallelLayout,
    QKVMapping,
)
from qwen3vl_convert.mappings import Mapping
from qwen3vl_convert.megatron.placement import shards
from qwen3vl_convert.megatron.stored import stored

pytestmark = [
    pytest.mark.megatron,
    # Megatron-Core, of a default and of calls that are its own.
    pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning:megatron"),
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning:megatron"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning:megatron"),
]

QKV = "language_model.decoder.layers.{l}.self_attention.linear_qkv.weight"
Q, K, V = (f"model.language_model.layers.{{l}}.self_attn.{x}_proj.weight" for x in "qkv")
FC1 = "language_model.decoder.layers.{l}.mlp.linear_fc1.weight"
GATE, UP = (f"model.language_model.layers.{{l}}.mlp.{x}_proj.weight" for x in ("gate", "up"))
EXPERT_FC1 = "language_model.decoder.layers.*.mlp.experts.linear_fc1.weight*"
EXPERT_FC2 = "language_model.decoder.layers.*.mlp.experts.linear_fc2.weight*"
GATE_UP, DOWN = (f"model.language_model.layers.*.mlp.experts.{x}_proj" for x in ("gate_up", "down"))
VISION_QKV = "vision_model.decoder.layers.*.self_attention.linear_qkv"
THEIR_VISION_QKV = "model.visual.blocks.*.attn.qkv"

QKV_MAPPING = QKVMapping(QKV, q=Q, k=K, v=V)
FC1_MAPPING = GatedMLPMapping(FC1, gate=GATE, up=UP)

Weights = dict[str, Tensor]
Box = tuple[slice, ...]


@pytest.fixture(scope="module", autouse=True)
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron-Core in this very process, alone in its world."""
    with warnings.catch_warnings():
        # At import: "Transformer Engine / Apex is not installed", and old spellings of torch's in Megatron-Core.
        warnings.simplefilter("ignore")
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.transformer.mlp  # noqa: F401

    with cpu_for_cuda(), parallel(World(), 0, tmp_path_factory.mktemp("store") / "store"):
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layer_of(**sizes: Any) -> Any:
    """A decoder layer of Megatron-Core's local spec: no Transformer Engine, and norms apart from what follows them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        normalization="RMSNorm",
        add_bias_linear=False,
        **sizes,
    )
    return build_module(get_gpt_layer_local_spec(normalization="RMSNorm"), config=config, layer_number=1)


def made_of(mapping: Mapping, weights: Weights, sizes: dict[str, int] | None = None) -> Tensor:
    """The Megatron parameter; each HF tensor is found by the name that the equation itself has for it."""
    parts = zip(mapping.parts, mapping.equation.hf, strict=True)
    return mapping.hf_to_megatron({part: weights[term.name] for part, term in parts}, sizes=sizes)


def close(one: Tensor, other: Tensor) -> bool:
    """Equal but for the order of sums, in float64; wrong rows of random weights are far from that."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-10, atol=1e-10)


# ---- attention -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Key-value heads, query heads of each, head and hidden size."""

    kv: int
    g: int
    d: int
    h: int

    def __str__(self) -> str:
        return f"kv{self.kv}-g{self.g}-d{self.d}-h{self.h}"


SQUARE = Heads(kv=2, g=2, d=4, h=16)
"""Every axis that could be taken for another has its size: kv = g, and q_proj is square."""
ODD = Heads(kv=3, g=5, d=7, h=11)
HEADS = [Heads(2, 2, 16, 64), SQUARE, ODD, Heads(1, 6, 4, 10), Heads(6, 1, 2, 12), Heads(4, 2, 8, 24)]


def megatron_qkv(heads: Heads, weight: Tensor, bias: Tensor | None, x_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [s, b, heads, d] as a SelfAttention of Megatron-Core's makes them, without norms of q and k."""
    attention = layer_of(
        hidden_size=heads.h,
        num_attention_heads=heads.kv * heads.g,
        num_query_groups=heads.kv,
        kv_channels=heads.d,
        add_qkv_bias=bias is not None,
    ).self_attention
    state = {"weight": weight} | ({} if bias is None else {"bias": bias})
    attention.linear_qkv.load_state_dict(state, strict=False)  # not there: _extra_state
    assert not any("layernorm" in name for name in attention.state_dict()), "q and k are to come as they are"
    q, k, v = attention.get_query_key_value_tensors(x_SBH, None)
    return q, k, v


def per_head(x_SBH: Tensor, projection: Tensor, d: int) -> Tensor:
    """transformers' Qwen3VLTextAttention: `q_proj(x).view(*shape, -1, head_dim)`."""
    return (x_SBH @ projection.T).view(*x_SBH.shape[:2], -1, d)


def separate(heads: Heads) -> Weights:
    rows = heads.kv * heads.d
    return {Q: random(heads.g * rows, heads.h), K: random(rows, heads.h), V: random(rows, heads.h)}


def sizes_of(heads: Heads) -> dict[str, int]:
    return {"kv": heads.kv, "g": heads.g, "d": heads.d, "h": heads.h}


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_self_attention(heads: Heads) -> None:
    """Query head i attends with key and value head i // g, and all are those of Hugging Face, in their order."""
    weights, x_SBH = separate(heads), random(5, 2, heads.h)
    fused = made_of(QKV_MAPPING, weights, sizes_of(heads))
    found = megatron_qkv(heads, fused, None, x_SBH)
    for name, ours in zip((Q, K, V), found, strict=True):
        assert close(ours, per_head(x_SBH, weights[name], heads.d)), name


WRONG_QKV = {
    "(g kv d)": QKVMapping(QKV, q=f"{Q} : (g kv d) h", k=K, v=V),
    "(kv d g)": QKVMapping(QKV, q=f"{Q} : (kv d g) h", k=K, v=V),
    "(* kv d)": QKVMapping(f"{QKV} : (* kv d) h", q=Q, k=K, v=V),
    "k for v": QKVMapping(QKV, q=Q, k=V, v=K),
}
"""Bijections all of them: there and back is bit for bit, and not what Megatron-Core means."""


@pytest.mark.parametrize("wrong", WRONG_QKV)
@pytest.mark.parametrize("heads", [SQUARE, ODD], ids=str)
def test_a_wrong_attention_is_seen(wrong: str, heads: Heads) -> None:
    weights, x_SBH = separate(heads), random(5, 2, heads.h)
    fused = made_of(WRONG_QKV[wrong], weights, sizes_of(heads))
    found = megatron_qkv(heads, fused, None, x_SBH)
    assert not all(close(ours, per_head(x_SBH, weights[n], heads.d)) for n, ours in zip((Q, K, V), found, strict=True))


@pytest.mark.parametrize("tp", [2, 3])
def test_attention_of_a_tensor_parallel_rank(tp: int) -> None:
    """The rows that are stored for a rank are whole groups: those whose query heads it computes."""
    heads = Heads(kv=6, g=2, d=5, h=8)
    weights, x_SBH = separate(heads), random(3, 1, heads.h)
    fused = made_of(QKV_MAPPING, weights, sizes_of(heads))
    local = Heads(heads.kv // tp, heads.g, heads.d, heads.h)
    for rank, box in enumerate(boxes(QKV_MAPPING, sizes_of(heads), ParallelLayout(tp=tp))):
        found = megatron_qkv(local, fused[box], None, x_SBH)
        for name, ours in zip((Q, K, V), found, strict=True):
            whole = per_head(x_SBH, weights[name], heads.d)
            assert close(ours, whole.chunk(tp, dim=2)[rank]), (name, rank)


def vision_qkv(weight: Tensor, bias: Tensor, x_SBH: Tensor, heads: int) -> tuple[Tensor, ...]:
    """transformers' Qwen3VLVisionAttention: `qkv(x).reshape(seq, 3, heads, -1).unbind`."""
    return (x_SBH @ weight.T + bias).view(*x_SBH.shape[:2], 3, heads, -1).unbind(2)


@pytest.mark.parametrize("heads", [Heads(4, 1, 16, 64), Heads(3, 1, 5, 15), Heads(3, 1, 3, 9)], ids=str)
def test_vision_attention(heads: Heads) -> None:
    """All q, all k, all v on Hugging Face's side, of weight and bias; the control leaves them as they are."""
    x_SBH = random(5, 1, heads.h)
    weight, bias = random(3 * heads.h, heads.h), random(3 * heads.h)
    expected = vision_qkv(weight, bias, x_SBH, heads.kv)
    sizes = {"n": heads.kv, "vd": heads.d, "v": heads.h}
    ours = {
        kind: ConcatenatedQKVMapping(f"{VISION_QKV}.{kind}", f"{THEIR_VISION_QKV}.{kind}").hf_to_megatron(
            t, sizes=sizes
        )
        for kind, t in (("weight", weight), ("bias", bias))
    }
    found = megatron_qkv(heads, ours["weight"], ours["bias"], x_SBH)
    assert all(close(*pair) for pair in zip(found, expected, strict=True))
    for wrong in ((weight, ours["bias"]), (ours["weight"], bias), (weight, bias)):
        found = megatron_qkv(heads, *wrong, x_SBH)
        assert not all(close(*pair) for pair in zip(found, expected, strict=True))


# ---- gated MLP -----------------------------------------------------------------------------------------------------

MLPS = [(64, 160), (16, 16), (8, 4), (4, 8), (11, 7), (6, 1)]
"""(hidden, ffn): gate square, gate and up together square, down square, odd, and a single row each."""


def megatron_mlp(fc1: Tensor, fc2: Tensor, x_SBH: Tensor) -> Tensor:
    """What a gated MLP of Megatron-Core's makes of x."""
    mlp = layer_of(
        hidden_size=fc1.shape[1],
        ffn_hidden_size=fc2.shape[1],
        num_attention_heads=1,
        gated_linear_unit=True,
        activation_func=silu,
    ).mlp
    mlp.load_state_dict({"linear_fc1.weight": fc1, "linear_fc2.weight": fc2}, strict=False)  # no _extra_state
    out, bias = mlp(x_SBH)
    assert bias is None
    assert isinstance(out, Tensor)
    return out


def huggingface_mlp(gate: Tensor, up: Tensor, down: Tensor, x_SBH: Tensor) -> Tensor:
    """transformers' Qwen3VLTextMLP: `down_proj(act_fn(gate_proj(x)) * up_proj(x))`."""
    return (silu(x_SBH @ gate.T) * (x_SBH @ up.T)) @ down.T


@pytest.mark.parametrize(("h", "f"), MLPS)
def test_gated_mlp(h: int, f: int) -> None:
    """The control swaps gate and up, and weaves their rows."""
    gate, up, down, x_SBH = random(f, h), random(f, h), random(h, f), random(3, 2, h)
    expected = huggingface_mlp(gate, up, down, x_SBH)
    weights = {GATE: gate, UP: up}
    assert close(megatron_mlp(made_of(FC1_MAPPING, weights), down, x_SBH), expected)

    swapped = made_of(GatedMLPMapping(FC1, gate=UP, up=GATE), weights)
    assert not close(megatron_mlp(swapped, down, x_SBH), expected)
    if f > 1:
        woven = made_of(GatedMLPMapping(f"{FC1} : (f *) h", gate=GATE, up=UP), weights)
        assert not close(megatron_mlp(woven, down, x_SBH), expected)


@pytest.mark.parametrize("tp", [2, 4])
def test_gated_mlp_of_tensor_parallel_ranks(tp: int) -> None:
    """A rank's linear_fc1 is its gate rows above its up rows: so chunks lie, and so the ranks add up to the whole."""
    h, f = 6, 8
    gate, up, down, x_SBH = random(f, h), random(f, h), random(h, f), random(3, 2, h)
    fused = made_of(FC1_MAPPING, {GATE: gate, UP: up})
    stored_boxes = boxes(FC1_MAPPING, {"f": f, "h": h}, ParallelLayout(tp=tp))
    assert len(stored_boxes) == 2 * tp
    locals_, down_columns = [], down.chunk(tp, dim=1)
    for rank in range(tp):
        local = torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
        halves = swiglu_shards(local, rank, tp)
        ours = [box for box in stored_boxes if starts(box) in {starts(half) for half, _ in halves}]
        assert ours == [half for half, _ in halves], "Megatron-Core stores this rank's halves where we do"
        assert all(torch.equal(fused[box], data) for box, data in halves)
        locals_.append(torch.cat([fused[box] for box in ours]))
    total = sum(megatron_mlp(fc1, fc2, x_SBH) for fc1, fc2 in zip(locals_, down_columns, strict=True))
    assert isinstance(total, Tensor)
    assert close(total, huggingface_mlp(gate, up, down, x_SBH))

    plain = sum(megatron_mlp(fc1, fc2, x_SBH) for fc1, fc2 in zip(fused.chunk(tp), down_columns, strict=True))
    assert isinstance(plain, Tensor)
    assert not close(plain, huggingface_mlp(gate, up, down, x_SBH))


def swiglu_shards(local: Tensor, rank: int, tp: int) -> list[tuple[Box, Tensor]]:
    """Where Megatron-Core stores the halves of a rank's linear_fc1, by its own `apply_swiglu_sharded_factory`."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    whole = ShardedTensor.from_rank_offsets("linear_fc1.weight", local, (0, rank, tp))
    built = apply_swiglu_sharded_factory(whole, ()).build()
    return [
        (tuple(slice(o, o + s) for o, s in zip(one.global_offset, one.local_shape, strict=True)), one.data)
        for one in built
    ]


# ---- experts -------------------------------------------------------------------------------------------------------


def expert_weights(layout: str, gate_EIH: Tensor, up_EIH: Tensor, down_EHI: Tensor, e: int) -> tuple[Any, Any]:
    """What a folder holds of expert `e` (a stack holds all): what goes into the mappings of gate_up and of down."""
    gate_up_EJH = torch.cat([gate_EIH, up_EIH], dim=1)
    if layout == "per-expert":
        return {"gate": gate_EIH[e], "up": up_EIH[e]}, down_EHI[e]
    if layout == "scrambled":
        first, second = gate_up_EJH[e].T.chunk(2)
        return {"gate": first, "up": second}, down_EHI[e].T
    return (gate_up_EJH.mT, down_EHI.mT) if layout == "hub" else (gate_up_EJH, down_EHI)


def megatron_expert(layout: str, given: tuple[Any, Any], e: int) -> tuple[Tensor, Tensor]:
    """linear_fc1 and linear_fc2 of an expert, which computes with them as a dense MLP does."""
    return (
        ExpertMLPGateUpProjMapping(EXPERT_FC1, GATE_UP, layout).hf_to_megatron(given[0], e=e),
        ExpertMLPDownProjMapping(EXPERT_FC2, DOWN, layout).hf_to_megatron(given[1], e=e),
    )


@pytest.mark.parametrize("layout", ["hub", "v5", "per-expert", "scrambled"])
@pytest.mark.parametrize(("h", "i"), [(64, 48), (16, 8), (8, 8), (10, 7)])
def test_expert(layout: str, h: int, i: int) -> None:
    gate, up, down, x_SBH = random(3, i, h), random(3, i, h), random(3, h, i), random(4, 1, h)
    given = [expert_weights(layout, gate, up, down, e) for e in range(3)]
    for e in range(3):
        found = megatron_mlp(*megatron_expert(layout, given[e], e), x_SBH)
        assert close(found, huggingface_mlp(gate[e], up[e], down[e], x_SBH)), e
        assert not close(found, huggingface_mlp(gate[e - 1], up[e - 1], down[e - 1], x_SBH)), "another expert"


@pytest.mark.parametrize(("h", "i", "which"), [(16, 8, 0), (8, 8, 1)])
def test_a_transposed_square_expert_is_seen(h: int, i: int, which: int) -> None:
    """gate_up_proj or down_proj is square: read the other way round its shape is the same and its values are not."""
    gate, up, down, x_SBH = random(3, i, h), random(3, i, h), random(3, h, i), random(4, 1, h)
    given = list(expert_weights("hub", gate, up, down, 1))
    assert given[which].shape == given[which].mT.shape
    given[which] = given[which].mT
    found = megatron_mlp(*megatron_expert("hub", (given[0], given[1]), 1), x_SBH)
    assert not close(found, huggingface_mlp(gate[1], up[1], down[1], x_SBH))


# ---- what is stored ------------------------------------------------------------------------------------------------


def boxes(mapping: Mapping, sizes: dict[str, int], layout: ParallelLayout) -> list[Box]:
    """The boxes of a one-layer model's parameter that ranks store, in order, without the axis of layers."""
    [one] = stored(mapping.equation)
    assert one.stack == ("l",)
    return [
        tuple(slice(o, o + s) for o, s in zip(shard.offsets[1:], shard.sizes[1:], strict=True))
        for shard in shards(one, {"l": 1, **sizes}, 1, layout)
    ]


def starts(box: Box) -> tuple[int, ...]:
    return tuple(dim.start for dim in box)
