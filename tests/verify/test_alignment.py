"""Which module is which, and whose outputs are put into order."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from broken import QUICK
from qwen3vl_convert import hf_to_megatron, make_checkpoint
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.model import open_megatron
from reference import load_huggingface

pytestmark = [pytest.mark.megatron, pytest.mark.filterwarnings("ignore")]

SMALL = replace(SIZES["tiny"], layers=3, vision_depth=3, deepstack=(0, 2))
SMALL_MOE = replace(SMALL, model_type="qwen3_vl_moe", experts=4, top_k=2, expert_ffn=48)


@pytest.fixture(scope="module")
def process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("megatron.core")
        from qwen3vl_convert.models import single_process

    with single_process():
        yield


@pytest.fixture(params=[SMALL, SMALL_MOE], ids=["dense", "moe"])
def aligned(request: pytest.FixtureRequest, tmp_path: Path, process: None) -> tuple[Any, Any, Path]:
    """(aligned modules by name, the plan of the weights, the folder)."""
    from qwen3vl_convert.models.restore import plan_restoring
    from qwen3vl_convert.verify.logits.alignment import align
    from qwen3vl_convert.verify.logits.programs import build_ours

    dims = request.param
    make_checkpoint(tmp_path / "hf", dims, dtype="float32")
    hf_to_megatron(tmp_path / "hf", tmp_path / "run", run=QUICK)
    restoring = plan_restoring(build_ours(dims, dims.vocab, torch.float32), open_megatron(tmp_path / "run"))
    return {one.module: one for one in align(restoring)}, restoring, tmp_path / "hf"


def test_every_tensor_of_the_folder_belongs_to_a_module(aligned: tuple[Any, Any, Path]) -> None:
    modules, _, folder = aligned
    named = {name for one in modules.values() for name in one.parameters}
    assert named == load_huggingface(folder).keys()


def test_places(aligned: tuple[Any, Any, Path]) -> None:
    modules, _, _ = aligned
    qkv = modules["language_model.decoder.layers.2.self_attention.linear_qkv"]
    assert (qkv.tower, qkv.layer) == ("text", 2)
    attention = "model.language_model.layers.2.self_attn."
    assert qkv.hf_modules == tuple(f"{attention}{name}_proj" for name in "qkv")
    norm = modules["vision_model.decoder.layers.1.input_layernorm"]
    assert (norm.hf_modules, norm.tower, norm.layer) == (("model.visual.blocks.1.norm1",), "vision", 1)
    merger = modules["vision_model.decoder.deepstack_merger_list.1.linear_fc1"]
    assert (merger.hf_modules, merger.layer) == (("model.visual.deepstack_merger_list.1.linear_fc1",), None)
    assert modules["language_model.output_layer"].hf_modules == ("lm_head",)


def test_outputs_are_put_into_megatron_s_order(aligned: tuple[Any, Any, Path]) -> None:
    """What transformers' linear layers give, rearranged, is what one layer with Megatron's weight gives."""
    modules, restoring, folder = aligned
    weights = load_huggingface(folder)
    sizes = restoring.opened.model.sizes
    rearranged = [one for one in modules.values() if one.arranged is not None]
    kinds = {one.module.rpartition(".")[2] for one in rearranged}
    assert kinds == ({"linear_qkv"} if "e" in sizes else {"linear_qkv", "linear_fc1"})
    for one in rearranged:
        ours = restoring.parameter(f"{one.module}.weight")
        x = torch.randn(5, ours.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        theirs = [x @ weights[f"{name}.weight"].double().T for name in one.hf_modules]
        assert torch.allclose(one.outputs(theirs, sizes), x @ ours.double().T, atol=1e-12), one.module
