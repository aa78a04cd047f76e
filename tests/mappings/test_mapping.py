"""The named equations, against the sums that Megatron's and transformers' sources spell out, on odd and on square
sizes.
"""

import pytest
import torch
from torch import Tensor

from qwen3vl_convert.errors import MisshapenTensor, UsageError
from qwen3vl_convert.mappings import (
    AutoMapping,
    ConcatenatedQKVMapping,
    ExpertMLPDownProjMapping,
    ExpertMLPGateUpProjMapping,
    GatedMLPMapping,
    Mapping,
    QKVMapping,
    ReplicatedMapping,
)

HEADS = [(1, 1, 1, 1), (2, 1, 3, 5), (2, 3, 4, 5), (3, 2, 2, 12), (4, 4, 1, 16)]
QKV = QKVMapping("a.linear_qkv.weight", q="a.q.weight", k="a.k.weight", v="a.v.weight")
QKV_BIAS = QKVMapping("a.linear_qkv.bias", q="a.q.bias", k="a.k.bias", v="a.v.bias")
GATED = GatedMLPMapping("a.linear_fc1.weight", gate="a.gate.weight", up="a.up.weight")
VISION = ConcatenatedQKVMapping("a.linear_qkv.weight", "a.qkv.weight")
GATE_UP = ExpertMLPGateUpProjMapping("x.experts.linear_fc1.weight{e}", "x.experts.gate_up_proj")
DOWN = ExpertMLPDownProjMapping("x.experts.linear_fc2.weight{e}", "x.experts.down_proj")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def there_and_back(
    mapping: Mapping, hf: Tensor | dict[str, Tensor], sizes: dict[str, int], expected: Tensor, **place: int
) -> None:
    """HF to Megatron is what the oracle says, and Megatron to HF undoes it."""
    megatron = mapping.hf_to_megatron(hf, sizes, **place)
    assert torch.equal(megatron, expected)
    assert megatron.is_contiguous()
    back = mapping.megatron_to_hf(megatron, sizes)
    if isinstance(hf, dict):
        assert isinstance(back, dict)
        assert all(torch.equal(back[part], hf[part]) for part in hf)
    else:
        assert isinstance(back, Tensor)
        assert torch.equal(back, hf[place["e"]] if place else hf)


@pytest.mark.parametrize(("kv", "g", "d", "h"), HEADS)
def test_qkv(kv: int, g: int, d: int, h: int) -> None:
    """Per group: its query heads, its key, its value (Megatron-LM's convention since checkpoint version 2)."""
    hf = {"q": random(kv * g * d, h), "k": random(kv * d, h), "v": random(kv * d, h)}
    groups = [hf["q"].view(kv, g * d, h), hf["k"].view(kv, d, h), hf["v"].view(kv, d, h)]
    there_and_back(QKV, hf, {"kv": kv, "g": g, "d": d}, torch.cat(groups, 1).reshape(-1, h))


@pytest.mark.parametrize(("kv", "g", "d", "h"), HEADS)
def test_qkv_bias(kv: int, g: int, d: int, h: int) -> None:
    hf = {"q": random(kv * g * d), "k": random(kv * d), "v": random(kv * d)}
    groups = [hf["q"].view(kv, g * d), hf["k"].view(kv, d), hf["v"].view(kv, d)]
    there_and_back(QKV_BIAS, hf, {"kv": kv, "g": g, "d": d}, torch.cat(groups, 1).reshape(-1))


@pytest.mark.parametrize(("f", "h"), [(1, 1), (6, 5), (7, 7), (3, 6)])
def test_gated(f: int, h: int) -> None:
    hf = {"gate": random(f, h), "up": random(f, h)}
    there_and_back(GATED, hf, {}, torch.cat([hf["gate"], hf["up"]]))


@pytest.mark.parametrize(("n", "c"), [(1, 1), (2, 3), (3, 3), (4, 18)])
def test_vision_qkv(n: int, c: int) -> None:
    """HF has all q, all k, all v; Megatron q0 k0 v0 q1 k1 v1 ..."""
    hf = random(3 * n * c, n * c)
    heads = [part[i * c : (i + 1) * c] for i in range(n) for part in hf.chunk(3)]
    there_and_back(VISION, hf, {"n": n}, torch.cat(heads))


@pytest.mark.parametrize(("e", "h", "i"), [(1, 2, 1), (3, 4, 5), (2, 6, 3), (2, 4, 4), (2, 4, 2)])
def test_experts(e: int, h: int, i: int) -> None:
    """The published layout is [in, out] and must be transposed, also where a matrix is square."""
    gate_up, down = random(e, h, 2 * i), random(e, i, h)
    for expert in range(e):
        there_and_back(GATE_UP, gate_up, {}, gate_up[expert].t(), e=expert)
        there_and_back(DOWN, down, {}, down[expert].t(), e=expert)


@pytest.mark.parametrize(("e", "h", "i"), [(3, 4, 5), (2, 4, 4), (2, 4, 2)])
def test_experts_as_transformers_5_saves_them(e: int, h: int, i: int) -> None:
    gate_up, down = random(e, 2 * i, h), random(e, h, i)
    for expert in range(e):
        there_and_back(GATE_UP.laid_out("v5"), gate_up, {}, gate_up[expert], e=expert)
        there_and_back(DOWN.laid_out("v5"), down, {}, down[expert], e=expert)


def test_experts_one_by_one() -> None:
    hf = {"gate": random(5, 4), "up": random(5, 4)}
    there_and_back(GATE_UP.laid_out("per-expert"), hf, {}, torch.cat([hf["gate"], hf["up"]]))
    down = random(4, 5)
    there_and_back(DOWN.laid_out("per-expert"), down, {}, down)


def test_scrambled_experts_are_put_together_again() -> None:
    """transformers 5.0 saved the halves of the published [h, 2i] matrix as gate and up."""
    published = random(4, 10)
    hf = {"gate": published[:2].clone(), "up": published[2:].clone()}
    there_and_back(GATE_UP.laid_out("scrambled"), hf, {"i": 5}, published.t())


def test_replicated_takes_any_shape() -> None:
    mapping = ReplicatedMapping("vision_model.x.weight", "model.visual.x.weight")
    for shape in ((3,), (2, 3), (4, 3, 2, 5, 5)):
        there_and_back(mapping, weight := random(*shape), {}, weight)


def test_bits_survive() -> None:
    """NaN payloads and negative zeros are copied, not computed with."""
    bits = torch.tensor([[0x7FC1, 0x8000], [0xFF81, 0x0001]], dtype=torch.int32).to(torch.int16)
    hf = {"gate": bits.view(torch.bfloat16), "up": bits.flip(0).view(torch.bfloat16)}
    back = GATED.megatron_to_hf(GATED.hf_to_megatron(hf))
    assert isinstance(back, dict)
    assert all(torch.equal(back[k].view(torch.int16), hf[k].view(torch.int16)) for k in hf)


@pytest.mark.parametrize(
    ("ported", "written"),
    [
        (
            QKVMapping(
                "language_model.decoder.layers.*.a.weight",
                q="model.language_model.layers.*.q.weight",
                k="model.language_model.layers.*.k.weight",
                v="model.language_model.layers.*.v.weight",
            ),
            QKVMapping(
                "language_model.decoder.layers.{l}.a.weight",
                q="model.language_model.layers.{l}.q.weight",
                k="model.language_model.layers.{l}.k.weight",
                v="model.language_model.layers.{l}.v.weight",
            ),
        ),
        (
            ExpertMLPDownProjMapping(
                "language_model.decoder.layers.*.mlp.experts.linear_fc2.weight*",
                "model.language_model.layers.*.mlp.experts.down_proj",
            ),
            ExpertMLPDownProjMapping(
                "language_model.decoder.layers.{l}.mlp.experts.linear_fc2.weight{e}",
                "model.language_model.layers.{l}.mlp.experts.down_proj",
            ),
        ),
        (
            ReplicatedMapping("vision_model.decoder.layers.*.norm.weight", "model.visual.blocks.*.norm.weight"),
            ReplicatedMapping("vision_model.decoder.layers.{b}.norm.weight", "model.visual.blocks.{b}.norm.weight"),
        ),
        (
            ReplicatedMapping("probe.*.weight", "probe.*.weight"),
            ReplicatedMapping("probe.{index0}.weight", "probe.{index0}.weight"),
        ),
    ],
)
def test_names_of_megatron_bridge_port_line_by_line(ported: Mapping, written: Mapping) -> None:
    assert ported.equation == written.equation


@pytest.mark.parametrize(
    ("declare", "reason"),
    [
        (lambda: AutoMapping("a.weight", "b.weight"), "nothing implies its axes"),
        (lambda: AutoMapping("a.weight : c h", "b.weight"), "nothing implies its axes"),
        (lambda: AutoMapping("a.weight : c h", "b.weight : h"), "lacks the axis c"),
        (lambda: ExpertMLPDownProjMapping("x.experts.w{e}", "y.w", experts_layout="guess"), "expected one of hub"),
    ],
)
def test_a_wrong_mapping_is_refused_when_declared(declare: object, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        declare()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (
            lambda: QKV.hf_to_megatron({"q": random(4, 2), "k": random(2, 2), "v": random(2, 2)}),
            UsageError,
            "needs the size of",
        ),
        (lambda: QKV.hf_to_megatron({"q": random(4, 2)}), UsageError, "expected the tensors q, k, v"),
        (lambda: GATED.hf_to_megatron({"gate": random(4, 2), "up": random(4, 3)}), MisshapenTensor, "a.up.weight"),
        (lambda: GATED.megatron_to_hf(random(5, 2)), MisshapenTensor, "a.linear_fc1.weight"),
        (lambda: DOWN.hf_to_megatron(random(2, 3, 4)), UsageError, "say which entry: e="),
    ],
)
def test_wrong_tensors_are_refused(call: object, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        call()  # type: ignore[operator]
