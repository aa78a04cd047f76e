"""The mappings of experts with a module in hand, against slices that are cut by hand: both published layouts, any part
of an expert tensor parallel group, any expert.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.bridge_rank import Case, expert_mappings
from models.parallel import run_ranks
from qwen3vl_convert import ParallelLayout, make_checkpoint
from qwen3vl_convert.errors import MisshapenTensor, UsageError
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.mappings import ExpertMLPDownProjMapping, ExpertMLPGateUpProjMapping, mapping_registry

E, H, I = 3, 10, 4  # noqa: E741
MLP, EXPERTS = "language_model.decoder.layers.1.mlp.experts.", "model.language_model.layers.1.mlp.experts."


@dataclass
class Group:
    """One rank's view of a process group."""

    place: int
    ranks: int

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return self.ranks


def module(place: int = 0, ranks: int = 1, h: int = H, i: int = I) -> torch.nn.Module:
    """What the mappings look at in a module of Megatron-Core's."""
    found: Any = torch.nn.Module()
    found.config = SimpleNamespace(hidden_size=h, moe_ffn_hidden_size=i, num_moe_experts=E)
    found.tp_group = Group(place, ranks)
    return found  # type: ignore[no-any-return]


def gate_up(expert: int, layout: str = "hub") -> ExpertMLPGateUpProjMapping:
    names = f"{MLP}linear_fc1.weight{expert}", f"{EXPERTS}gate_up_proj"
    return ExpertMLPGateUpProjMapping(*names, experts_layout=layout)


def down(expert: int, layout: str = "hub") -> ExpertMLPDownProjMapping:
    return ExpertMLPDownProjMapping(f"{MLP}linear_fc2.weight{expert}", f"{EXPERTS}down_proj", experts_layout=layout)


def rows(place: int, ranks: int, i: int = I) -> slice:
    return slice(place * (i // ranks), (place + 1) * (i // ranks))


@pytest.mark.parametrize("layout", ["hub", "v5"])
@pytest.mark.parametrize(("place", "ranks"), [(0, 1), (0, 2), (1, 2), (3, 4)])
@pytest.mark.parametrize("expert", range(E))
def test_gate_up(layout: str, place: int, ranks: int, expert: int) -> None:
    """Of each half this rank's rows: gate above up, each [I / ranks, H]."""
    hub_EHJ = torch.randn(E, H, 2 * I)
    gate_IH, up_IH = hub_EHJ[expert][:, :I].T, hub_EHJ[expert][:, I:].T
    expected = torch.cat([gate_IH[rows(place, ranks)], up_IH[rows(place, ranks)]])
    given = hub_EHJ if layout == "hub" else hub_EHJ.mT.contiguous()
    mapping = gate_up(expert, layout)
    assert torch.equal(mapping.hf_to_megatron(given, module(place, ranks)), expected)
    assert torch.equal(mapping.hf_to_megatron(hf_weights=given, megatron_module=module(place, ranks)), expected)
    own = {"gate": gate_IH, "up": up_IH}
    assert torch.equal(mapping.hf_to_megatron(own, module(place, ranks)), expected)


@pytest.mark.parametrize("layout", ["hub", "v5"])
@pytest.mark.parametrize(("place", "ranks"), [(0, 1), (0, 2), (1, 2), (3, 4)])
@pytest.mark.parametrize("expert", range(E))
def test_down(layout: str, place: int, ranks: int, expert: int) -> None:
    """This rank's columns: [H, I / ranks]."""
    hub_EIH = torch.randn(E, I, H)
    expected = hub_EIH[expert].T[:, rows(place, ranks)]
    given = hub_EIH if layout == "hub" else hub_EIH.mT.contiguous()
    assert torch.equal(down(expert, layout).hf_to_megatron(given, module(place, ranks)), expected)


@pytest.mark.parametrize("layout", ["hub", "v5"])
def test_the_whole_of_one_rank_comes_back(layout: str) -> None:
    fused = torch.randn(E, H, 2 * I) if layout == "hub" else torch.randn(E, 2 * I, H)
    mine = gate_up(2, layout).hf_to_megatron(fused, module())
    assert torch.equal(back(gate_up(2, layout), mine), fused[2])
    fused = torch.randn(E, I, H) if layout == "hub" else torch.randn(E, H, I)
    mine = down(1, layout).hf_to_megatron(fused, module())
    assert torch.equal(back(down(1, layout), mine), fused[1])


def back(mapping: Any, weights: Tensor) -> Tensor:
    found = mapping.megatron_to_hf(weights, module())
    assert isinstance(found, Tensor)
    return found


def test_the_expert_is_the_name_s_or_the_call_s() -> None:
    fused = torch.randn(E, H, 2 * I)
    every = ExpertMLPGateUpProjMapping(f"{MLP}linear_fc1.weight{{e}}", f"{EXPERTS}gate_up_proj")
    assert (every.expert, gate_up(2).expert, gate_up(12).expert) == (None, 2, 12)
    assert torch.equal(every.hf_to_megatron(fused, module(), e=2), gate_up(2).hf_to_megatron(fused, module()))
    assert torch.equal(every.hf_to_megatron(fused, {"e": E}, e=1), gate_up(1).hf_to_megatron(fused))
    with pytest.raises(UsageError, match="say which entry: e="):
        every.hf_to_megatron(fused, module())


def test_the_equation_of_one_expert_s_name_is_that_of_all() -> None:
    (table,) = (m for m in mapping_registry("qwen3_vl_moe") if isinstance(m, ExpertMLPDownProjMapping))
    one = ExpertMLPDownProjMapping("language_model.decoder.layers.*.mlp.experts.linear_fc2.weight7", table.hf_param)
    assert one.equation == table.equation
    for mapping in (table, one):
        mapping._validate_patterns()
        mapping._validate_patterns("whatever", strict=True)


def test_the_other_layout_is_named_not_guessed() -> None:
    with pytest.raises(MisshapenTensor, match=r'gate_up_proj.*That is the "v5" layout: use mapping.laid_out\("v5"\)'):
        gate_up(0).hf_to_megatron(torch.randn(E, 2 * I, H), module())
    with pytest.raises(MisshapenTensor, match='That is the "hub" layout'):
        down(0, "v5").hf_to_megatron(torch.randn(E, I, H), module())
    with pytest.raises(MisshapenTensor, match="gate_up_proj") as wrong:
        gate_up(0).hf_to_megatron(torch.randn(E, H + 1, 2 * I), module())
    assert "layout:" not in str(wrong.value)


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="expert tensor parallel size 3 does not divide i = 4"):
        gate_up(0).hf_to_megatron(torch.randn(E, H, 2 * I), module(0, 3))


@pytest.mark.megatron
@pytest.mark.parametrize("world", [ParallelLayout(etp=2), ParallelLayout(ep=2)], ids=str)
def test_modules_of_a_live_model(tmp_path: Path, world: ParallelLayout) -> None:
    """Every expert of Megatron-Core's own modules, in and out, gathered from the ranks that share it."""
    dims = replace(SIZES["tiny-moe"], layers=2, vision_depth=2, deepstack=(1,), experts=4)
    make_checkpoint(tmp_path / "hub", dims)
    make_checkpoint(tmp_path / "v5", dims, experts_layout="v5")
    for layout in ("hub", "v5"):
        found = run_ranks(world, expert_mappings, Case(tmp_path / layout, tmp_path))
        assert found == [dims.layers * dims.experts // world.ep * 2] * 2
