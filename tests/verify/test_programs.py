"""What transformers' model is filled with is what its own loader fills it with, whatever layout the folder has."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.planted import lively_checkpoint
from models.sides import load_theirs
from qwen3vl_convert import hf_to_megatron, megatron_to_hf
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.model import open_huggingface, open_megatron
from rounding import Roundings

pytest.importorskip("transformers")
pytest.importorskip("megatron.core")

pytestmark = [pytest.mark.megatron, pytest.mark.transformers, pytest.mark.filterwarnings("ignore")]

SMALL = replace(SIZES["tiny"], layers=3, vision_depth=3, deepstack=(0, 2))
MODELS = {
    "dense": SMALL,
    "tied": replace(SMALL, tied=True),
    "moe": replace(SMALL, model_type="qwen3_vl_moe", experts=4, top_k=2, expert_ffn=48),
}


@pytest.mark.parametrize("name", MODELS)
def test_as_transformers_own_loader_fills_it(name: str, tmp_path: Path) -> None:
    """Every parameter, and the frequencies that are in no file."""
    from qwen3vl_convert.verify.logits.hollow import hollow_out
    from qwen3vl_convert.verify.logits.programs import build_theirs, fill, folder_weights

    folder = lively_checkpoint(tmp_path / "model", MODELS[name])
    expected = load_theirs(folder)
    model = build_theirs(folder, torch.float32)
    weights = folder_weights(open_huggingface(folder), model)
    hollow_out(model, torch.device("cpu"))
    fill(model, weights, (torch.float32,), torch.device("cpu"))
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(one, kind)()) for one in (model, expected))
        if kind == "named_parameters" and name == "tied":
            ours.pop("lm_head.weight", None)  # two of them here, one there
        assert ours.keys() == theirs.keys()
        assert [key for key, tensor in theirs.items() if not torch.equal(ours[key], tensor)] == []


@pytest.mark.parametrize("layout", ["v5", "per-expert"])
def test_whatever_layout_the_folder_has(layout: str, tmp_path: Path) -> None:
    from qwen3vl_convert.verify.logits.programs import build_theirs, folder_weights

    folder = lively_checkpoint(tmp_path / "model", MODELS["moe"])
    hf_to_megatron(folder, tmp_path / "run")
    megatron_to_hf(tmp_path / "run", tmp_path / layout, experts_layout=layout)
    model = build_theirs(folder, torch.float32)
    hub, other = (folder_weights(open_huggingface(one), model) for one in (folder, tmp_path / layout))
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            for number in range(4):
                expert = hub.expert(name, number)
                assert expert.shape == parameter.shape[1:]
                assert torch.equal(expert, other.expert(name, number))


@pytest.mark.parametrize("name", MODELS)
def test_a_device_gets_what_is_stored_and_rounds_it_there(name: str, tmp_path: Path) -> None:
    """Stacks of experts too. The host would take longer to round than to read."""
    from qwen3vl_convert.verify.logits.hollow import hollow_out
    from qwen3vl_convert.verify.logits.programs import build_theirs, fill, folder_weights

    folder = lively_checkpoint(tmp_path / "model", MODELS[name])
    model = build_theirs(folder, torch.bfloat16)
    weights = folder_weights(open_huggingface(folder), model)
    hollow_out(model, torch.device("cpu"))
    with Roundings() as seen:
        fill(model, weights, (torch.bfloat16,), torch.device("meta"))
    assert set(seen.devices) == {"meta"}
    assert len(seen.devices) >= len(list(model.parameters()))


def test_so_does_the_inference_model_in_the_place_of_megatrons(tmp_path: Path) -> None:
    from qwen3vl_convert.verify.logits.third import weights_of

    folder = lively_checkpoint(tmp_path / "model", MODELS["tied"])
    hf_to_megatron(folder, tmp_path / "run")
    ours = open_megatron(tmp_path / "run")
    with Roundings() as seen:
        names = [name for name, _ in weights_of(ours, (torch.bfloat16,), torch.device("meta"))]
    assert seen.devices == ["meta"] * len(names)
