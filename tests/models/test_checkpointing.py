"""Megatron checkpoints of live models: what they hold, who reads them, and models that are loaded from them."""

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models.bridge_rank import Case
from models.checkpoint_rank import converted_by_one, in_processes_of_the_script, loaded, refused, saved
from models.parallel import run_ranks
from oracles.megatron_rank import results_in_this_process
from qwen3vl_convert import Dims, ParallelLayout, RunOptions, hf_to_megatron, make_checkpoint, megatron_to_hf
from qwen3vl_convert.errors import ConfigError, MisshapenTensor, OutputError, UsageError
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.megatron.metadata import read_metadata
from reference import assert_same_bits, expected_megatron, load_huggingface, load_megatron

pytestmark = [pytest.mark.megatron, pytest.mark.filterwarnings("ignore")]

RUN = RunOptions(fsync=False)
DENSE = replace(SIZES["tiny"], vision_depth=2, deepstack=(1,), vocab=96)
TIED = replace(DENSE, tied=True, vocab=91)
MOE = replace(SIZES["tiny-moe"], layers=2, vision_depth=2, deepstack=(1,), vocab=96, experts=4)
SINGLE = ParallelLayout()
PADDED: dict[str, Any] = {"should_pad_vocab": True, "make_vocab_size_divisible_by": 8}

WORLDS: dict[str, tuple[Dims, dict[str, Any], ParallelLayout, ParallelLayout]] = {
    "dense": (DENSE, {}, SINGLE, ParallelLayout(tp=2)),
    "dense tp2": (DENSE, {}, ParallelLayout(tp=2), SINGLE),
    "tied, padded, tp2": (TIED, PADDED, ParallelLayout(tp=2), SINGLE),
    "tied pp2 vpp2": (replace(TIED, vocab=96), {}, ParallelLayout(pp=2, vpp=2), ParallelLayout(pp=2)),
    "moe ep2": (MOE, {}, ParallelLayout(ep=2), SINGLE),
    "moe etp2": (MOE, {}, ParallelLayout(etp=2), ParallelLayout(pp=2)),
}


@pytest.mark.parametrize("name", WORLDS)
def test_saved_at_one_layout_and_loaded_at_another(name: str, tmp_path: Path) -> None:
    """Judged by torch's own reader and a mapping by hand, by the objects of a conversion, by the bits of the source."""
    dims, settings, world, other = WORLDS[name]
    make_checkpoint(tmp_path / "hf", dims)
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"kept": "as it is"}')
    case = Case(tmp_path / "hf", tmp_path / "m", settings=settings)
    run_ranks(world, saved, case)
    rows = 96 if settings else None
    source = load_huggingface(tmp_path / "hf")
    found = load_megatron(tmp_path / "m")
    if rows:  # padding is whatever the parameter holds there
        embedding = found["language_model.embedding.word_embeddings.weight"]
        assert embedding.shape[0] == rows
        embedding[dims.vocab :] = 0
    assert_same_bits(found, expected_megatron(source, dims, rows))
    check_beside(tmp_path, world, rows)
    for layout in (world, other):
        fits = settings if layout.tp == world.tp else {}
        if not settings or fits:
            assert run_ranks(layout, loaded, replace(case, settings=fits)) == [[]] * layout.world
    megatron_to_hf(tmp_path / "m", tmp_path / "back", run=RUN)
    assert_same_bits(load_huggingface(tmp_path / "back"), source)
    assert (tmp_path / "back" / "tokenizer_config.json").read_text() == '{"kept": "as it is"}'
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


def check_beside(place: Path, world: ParallelLayout, rows: int | None) -> None:
    """Settings and objects are those of a conversion at the same layout, which are Megatron-Bridge's."""
    hf_to_megatron(place / "hf", place / "converted", layout=world, padded_vocab_size=rows, run=RUN)
    ours, converted = (place / name / "iter_0000000" for name in ("m", "converted"))
    assert yaml.safe_load((ours / "run_config.yaml").read_text()) == yaml.safe_load(
        (converted / "run_config.yaml").read_text()
    )
    found, expected = (read_metadata(folder / ".metadata").objects.keys() for folder in (ours, converted))
    assert {key for key in expected if "_extra_state" in key} <= found
    for file in ("latest_checkpointed_iteration.txt", "latest_train_state.pt", "iter_0000000/train_state.pt"):
        assert (place / "m" / file).read_bytes() == (place / "converted" / file).read_bytes()


def test_what_fails_on_one_rank_fails_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", replace(DENSE, layers=1))
    first, second = run_ranks(ParallelLayout(tp=2), refused, Case(tmp_path / "hf", tmp_path / "m"))
    assert (first[0], second[0]) == (("OutputError", "disk full"), ("OutputError", "rank 0: disk full"))
    assert first[1][0] == second[1][0] == "OutputError"
    assert "exists. Choose another target" in second[1][1]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_under_torchrun_one_rank_converts(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", replace(DENSE, layers=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    first, second = run_ranks(None, converted_by_one, Case(tmp_path / "hf", tmp_path / "m", tmp_path / "port"), size=2)
    assert first == second
    assert first[0] > 30
    assert first[1] == "OutputError"
    assert "iter_0000000" in first[2]


class TestInOneProcess:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        make_checkpoint(tmp_path / "hf", replace(DENSE, layers=1))
        return tmp_path / "hf"

    @pytest.mark.slow  # Megatron-Core starts a process to save with; the other tests do without
    def test_a_script_of_megatron_bridge_s_with_a_live_model(self, folder: Path, tmp_path: Path) -> None:
        """Its loop: provider, chunks with weights, save, load, export; process groups as it finds them."""
        from qwen3vl_convert import AutoBridge
        from qwen3vl_convert.models import single_process

        bridge = AutoBridge.from_hf_pretrained(folder)
        provider = bridge.to_megatron_provider()
        provider.finalize()
        with single_process():
            model = provider.provide_distributed_model(wrap_with_ddp=False)
            with pytest.warns(UserWarning, match="low_memory_save: parameters are written from where they lie"):
                bridge.save_megatron_model(model, tmp_path / "m", hf_tokenizer_path=folder, low_memory_save=True)
            assert sum(parameter.numel() for parameter in model[0].parameters()) > 0
            with pytest.raises(OutputError, match="exists"):
                bridge.save_megatron_model(model, tmp_path / "m")
            again = bridge.to_megatron_model(wrap_with_ddp=False)
            assert_same_bits(dict(bridge.export_hf_weights(again)), load_huggingface(folder))
            empty = bridge.to_megatron_model(load_weights=False, wrap_with_ddp=False)
            assert not torch.equal(next(empty[0].parameters()), next(model[0].parameters()))
        bridge.export_ckpt(tmp_path / "m", tmp_path / "back")
        assert_same_bits(load_huggingface(tmp_path / "back"), load_huggingface(folder))

    def test_without_process_groups_the_model_is_whole(self, folder: Path, tmp_path: Path) -> None:
        from megatron.core import parallel_state

        from qwen3vl_convert import AutoBridge

        AutoBridge.import_ckpt(folder, tmp_path / "m", layout=ParallelLayout(tp=2))
        (model,) = AutoBridge.from_hf_pretrained(folder).load_megatron_model(tmp_path / "m", wrap_with_ddp=False)
        weight = model.language_model.decoder.final_layernorm.weight
        assert torch.equal(weight, load_huggingface(folder)["model.language_model.norm.weight"])
        assert not parallel_state.model_parallel_is_initialized()

    def test_megatron_core_s_own_loader_finds_all_that_it_asks_for(self, folder: Path, tmp_path: Path) -> None:
        from megatron.core import dist_checkpointing

        from qwen3vl_convert import AutoBridge
        from qwen3vl_convert.models import single_process

        bridge = AutoBridge.from_hf_pretrained(folder)
        with single_process():
            model = bridge.to_megatron_model(wrap_with_ddp=False)
            with results_in_this_process():
                bridge.save_megatron_model(model, tmp_path / "m", iteration=7)
            (other,) = bridge.to_megatron_model(load_weights=False, wrap_with_ddp=False)
            state = dist_checkpointing.load({"model": other.sharded_state_dict()}, str(tmp_path / "m" / "iter_0000007"))
            other.load_state_dict(state["model"])
            assert_same_bits(dict(bridge.export_hf_weights(other)), load_huggingface(folder))
        assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text() == "7"

    def test_what_cannot_be(self, folder: Path, tmp_path: Path) -> None:
        from qwen3vl_convert import AutoBridge
        from qwen3vl_convert.models import single_process

        bridge = AutoBridge.from_hf_pretrained(folder)
        AutoBridge.import_ckpt(folder, tmp_path / "m")
        with single_process():
            with pytest.raises(ConfigError, match="tensor_model_parallel_size: expected 1"):
                bridge.load_megatron_model(tmp_path / "m", mp_overrides={"tensor_model_parallel_size": 2})
            with pytest.raises(UsageError, match="mp_overrides: tensor_parallel: the provider has no such setting"):
                bridge.load_megatron_model(tmp_path / "m", mp_overrides={"tensor_parallel": 2})
            with pytest.raises(UsageError, match="wrap_with_ddp=True"):
                bridge.load_megatron_model(tmp_path / "m", wrap_with_ddp=True)
            with pytest.raises(UsageError, match="pass ddp_config, or wrap_with_ddp=False"):
                bridge.to_megatron_model()
            with pytest.raises(UsageError, match="use_torch_fsdp2"):
                bridge.to_megatron_model(wrap_with_ddp=False, use_torch_fsdp2=True)
            make_checkpoint(tmp_path / "wider", replace(DENSE, layers=1, ffn=96))
            with pytest.raises(MisshapenTensor, match="linear_fc1"):
                AutoBridge.from_hf_pretrained(tmp_path / "wider").load_megatron_model(tmp_path / "m")

    def test_experts_are_cut_as_the_process_groups_are(self, tmp_path: Path) -> None:
        from qwen3vl_convert import AutoBridge

        make_checkpoint(tmp_path / "hf", MOE)
        AutoBridge.import_ckpt(tmp_path / "hf", tmp_path / "m")
        bridge = AutoBridge.from_hf_pretrained(tmp_path / "hf")
        with pytest.raises(ConfigError, match="expert_tensor_parallel_size: expected 1, .* found 2"):
            bridge.load_megatron_model(tmp_path / "m", mp_overrides={"expert_tensor_parallel_size": 2})

    def test_in_the_processes_of_the_script(self, folder: Path) -> None:
        """It has set up torch.distributed, and there is no GPU."""
        first, second = run_ranks(None, in_processes_of_the_script, folder, folder.parent / "store", size=2)
        assert_same_bits(first, load_huggingface(folder))
        assert_same_bits(second, first)

    def test_a_model_for_training(self, folder: Path) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        from qwen3vl_convert import AutoBridge
        from qwen3vl_convert.models import single_process

        heard = []
        provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
        provider.register_pre_wrap_hook(lambda chunks: heard.append([type(c).__name__ for c in chunks]))
        with single_process():
            (model,) = provider.provide_distributed_model(DistributedDataParallelConfig())
        assert isinstance(model, DistributedDataParallel)
        assert heard == [["Qwen3VLModel"]]

    def test_the_text_model_s_config(self, folder: Path) -> None:
        from megatron.core.transformer.transformer_config import TransformerConfig

        from qwen3vl_convert import AutoBridge

        config = AutoBridge.from_hf_pretrained(folder).transformer_config
        assert type(config) is TransformerConfig
        text = json.loads((folder / "config.json").read_text())["text_config"]
        assert (config.num_layers, config.hidden_size) == (text["num_hidden_layers"], text["hidden_size"])
        assert config.num_query_groups == text["num_key_value_heads"]
