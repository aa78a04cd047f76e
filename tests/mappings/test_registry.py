"""The registry: every tensor of the six published models is claimed once, and nothing is claimed twice."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import UnknownTensors, UsageError
from qwen3vl_convert.mappings import (
    AutoMapping,
    ExpertMLPGateUpProjMapping,
    MegatronMappingRegistry,
    QKVMapping,
    ReplicatedMapping,
    mapping_registry,
    register_mapping,
    unregister_mapping,
)
from qwen3vl_convert.mappings.qwen3_vl import DENSE, MOE, TABLES, TEXT, VISION
from recorded import CONFIGS, HEADERS

PUBLISHED = ["2b", "4b", "8b", "32b", "30b", "235b"]


def header(name: str) -> tuple[dict[str, tuple[int, ...]], Dims]:
    """Names and shapes of a published model's tensors, as its repository lists them, and its sizes."""
    listed = json.loads((HEADERS / f"{name}.json").read_text())
    tensors = next(value for value in listed.values() if isinstance(value, dict))
    dims = Dims.from_config(json.loads((CONFIGS / f"{name}.config.json").read_text()), name)
    return {key: tuple(shape) for key, shape in tensors.items()}, dims


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_covered_exactly(name: str) -> None:
    tensors, dims = header(name)
    registry = mapping_registry(dims.model_type, attention_bias=dims.attention_bias, head=not dims.tied)
    assert registry.hf_names(dims.sizes()) == tensors
    for tensor in tensors:
        claim = registry.hf_to_megatron_lookup(tensor)
        assert claim.term.at(claim.place) == tensor


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_sides_have_as_many_elements(name: str) -> None:
    tensors, dims = header(name)
    registry = mapping_registry(dims.model_type, attention_bias=dims.attention_bias, head=not dims.tied)
    sizes = dims.sizes()
    ours = sum(
        math.prod(e.megatron.layout.shape(e.full(sizes))) * math.prod(sizes[a] for a in e.megatron.name_axes)
        for e in registry.equations
    )
    assert ours == sum(math.prod(shape) for shape in tensors.values())


def test_dense_and_moe_share_what_they_share() -> None:
    dense, moe = set(TABLES["qwen3_vl"]), set(TABLES["qwen3_vl_moe"])
    assert dense - moe == set(DENSE)
    assert moe - dense == set(MOE)
    assert {*TEXT, *VISION} <= dense & moe


def test_lookup_from_either_side() -> None:
    registry = mapping_registry("qwen3_vl_moe")
    ours = "language_model.decoder.layers.3.mlp.experts.linear_fc1.weight17"
    claim = registry.megatron_to_hf_lookup(ours)
    assert isinstance(claim.mapping, ExpertMLPGateUpProjMapping)
    assert claim.place == {"l": 3, "e": 17}
    theirs = registry.hf_to_megatron_lookup("model.language_model.layers.3.mlp.experts.gate_up_proj")
    assert theirs.mapping == claim.mapping
    assert theirs.place == {"l": 3}


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(UnknownTensors, match=r"Did you mean .*linear_qkv\.weight"):
        mapping_registry("qwen3_vl").lookup("language_model.decoder.layers.3.self_attention.linear_qvk.weight")


@pytest.mark.parametrize(
    ("megatron", "hf"),
    [
        ("language_model.output_layer.weight : vocab h", "other.weight : vocab h"),
        ("other.weight : vocab h", "lm_head.weight : vocab h"),
        ("language_model.decoder.layers.0.self_attention.q_layernorm.weight : d", "other.weight : d"),
        ("other.weight : d", "model.language_model.layers.5.self_attn.q_norm.weight : d"),
    ],
)
def test_a_name_claimed_twice_is_an_error(megatron: str, hf: str) -> None:
    with pytest.raises(UsageError, match="is claimed twice"):
        register_mapping("qwen3_vl", AutoMapping(megatron, hf))


def test_order_does_not_decide() -> None:
    one, other = ReplicatedMapping("a.*.w", "b.*.w"), ReplicatedMapping("a.0.w", "c.w")
    for order in ((one, other), (other, one)):
        with pytest.raises(UsageError, match="is claimed twice"):
            MegatronMappingRegistry(*order)


@pytest.fixture
def registered() -> Iterator[list[AutoMapping | QKVMapping]]:
    """Mappings to register in a test, taken back afterwards."""
    added: list[AutoMapping | QKVMapping] = []
    yield added
    for mapping in added:
        unregister_mapping("qwen3_vl", mapping)


def test_registered_mappings_are_found(registered: list[AutoMapping | QKVMapping]) -> None:
    probe = QKVMapping("probe.{l}.qkv.weight", q="probe.{l}.q.weight", k="probe.{l}.k.weight", v="probe.{l}.v.weight")
    registered.append(probe)
    assert register_mapping("qwen3_vl", probe) is probe
    assert mapping_registry("qwen3_vl").lookup("probe.2.k.weight").mapping is probe
    with pytest.raises(UnknownTensors):
        mapping_registry("qwen3_vl_moe").lookup("probe.2.k.weight")


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UsageError, match="expected one of qwen3_vl, qwen3_vl_moe"):
        register_mapping("llama", AutoMapping("a : h", "b : h"))


def test_a_distribution_ships_mappings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real distribution on the path, found by its entry point."""
    (tmp_path / "extra_heads.py").write_text(
        "from qwen3vl_convert.mappings import AutoMapping\n"
        "def mappings(model):\n"
        "    return [AutoMapping('score.weight : c h', 'score.weight : c h')] if model == 'qwen3_vl' else []\n"
    )
    info = tmp_path / "extra_heads-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-heads\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qwen3vl_convert.mappings]\nheads = extra_heads:mappings\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert str(mapping_registry("qwen3_vl").lookup("score.weight").term) == "score.weight : c h"
    with pytest.raises(UnknownTensors):
        mapping_registry("qwen3_vl_moe").lookup("score.weight")
