"""Parameters of a live model read from a Megatron checkpoint, without its loader: the same bits as with it.

The judge is Megatron-Core's own `dist_checkpointing.load` into the same model; checkpoints in the three ways that it
names what it stores are its own `dist_checkpointing.save`.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.planted import lively_checkpoint
from qwen3vl_convert import ParallelLayout, hf_to_megatron, make_checkpoint
from qwen3vl_convert.errors import MissingTensors
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.model import open_megatron

pytestmark = [pytest.mark.megatron, pytest.mark.filterwarnings("ignore")]

MODELS = {"dense": SIZES["tiny"], "tied": replace(SIZES["tiny"], tied=True), "moe": SIZES["tiny-moe"]}
WRITTEN = {
    "dense": ParallelLayout(tp=2, pp=2),
    "tied": ParallelLayout(pp=2, vpp=2),
    "moe": ParallelLayout(tp=2, ep=2, etp=2),
}
STYLES = {
    "stacked": {"singleton_local_shards": False},
    "per layer": {"non_homogeneous_layers": True},
    "singleton": {"singleton_local_shards": True},
}


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("megatron.core")
        from qwen3vl_convert.models import single_process

    with single_process():
        yield


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    return lively_checkpoint(tmp_path_factory.mktemp("restore") / name, MODELS[name])


def provider_of(folder: Path, **settings: Any) -> Any:
    from qwen3vl_convert.models import AutoBridge

    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    for setting, value in {"perform_initialization": False, **settings}.items():
        setattr(provider, setting, value)
    provider.finalize()
    return provider


def loaded(provider: Any, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The parameters as Megatron-Core's own loader fills them."""
    from megatron.core import dist_checkpointing

    model = provider.provide()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    state = model.sharded_state_dict(prefix="", metadata=dict(STYLES["stacked"]))
    model.load_state_dict(dist_checkpointing.load(state, str(checkpoint)), strict=False)
    return {key: parameter.detach() for key, parameter in model.named_parameters()}


def restored(provider: Any, checkpoint: Path) -> dict[str, torch.Tensor]:
    from qwen3vl_convert.models.restore import plan_restoring

    with torch.device("meta"):
        model = provider.provide()
    restoring = plan_restoring(model, open_megatron(checkpoint))
    return {key: restoring.parameter(key) for key, _ in model.named_parameters()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)] == []


def test_as_megatron_core_loads_it(folder: Path, name: str, tmp_path: Path) -> None:
    hf_to_megatron(folder, tmp_path / "run", layout=WRITTEN[name])
    provider = provider_of(folder)
    (iteration,) = (path.parent for path in (tmp_path / "run").rglob(".metadata"))
    same(restored(provider, tmp_path / "run"), loaded(provider, iteration))


@pytest.mark.parametrize("style", STYLES)
def test_in_every_way_of_naming(folder: Path, style: str, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    from qwen3vl_convert.models import AutoBridge

    provider = provider_of(folder)
    model = provider.provide()
    AutoBridge.from_hf_pretrained(folder).load_hf_weights(model)
    saved = tmp_path / "iter_0000001"
    saved.mkdir()
    dist_checkpointing.save(model.sharded_state_dict(prefix="", metadata=dict(STYLES[style])), str(saved))
    with torch.device("meta"):
        hollow = provider.provide()
    from qwen3vl_convert.dims import Dims, read_config
    from qwen3vl_convert.models.restore import plan_restoring

    restoring = plan_restoring(hollow, open_megatron(saved, dims=Dims.from_config(read_config(folder))))
    found = {key: restoring.parameter(key) for key, _ in hollow.named_parameters()}
    same(found, {key: parameter.detach() for key, parameter in model.named_parameters()})


def test_padding_is_read_as_it_is(tmp_path: Path) -> None:
    dims = replace(SIZES["tiny"], vocab=500)
    make_checkpoint(tmp_path / "hf", dims)
    hf_to_megatron(tmp_path / "hf", tmp_path / "run", padded_vocab_size=512)
    provider = provider_of(tmp_path / "hf", vocab_size=512, should_pad_vocab=False)
    found = restored(provider, tmp_path / "run")["language_model.output_layer.weight"]
    assert found.shape == (512, dims.hidden)
    assert found[:500].float().abs().sum() > 0
    assert not found[500:].any()


def test_a_model_of_other_sizes_is_refused(folder: Path, name: str, tmp_path: Path) -> None:
    hf_to_megatron(folder, tmp_path / "run")
    provider = provider_of(folder, num_layers=MODELS[name].layers - 1)
    with pytest.raises(Exception, match="language_model.decoder.layers") as refused:
        restored(provider, tmp_path / "run")
    assert type(refused.value).__module__ == MissingTensors.__module__
