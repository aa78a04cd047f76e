"""`run_config.yaml` against those that Megatron-Bridge wrote for the same models: every key it knows, every value it
has.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen3vl_convert import RunOptions, hf_to_megatron, make_checkpoint
from qwen3vl_convert.dims import Dims, read_config
from qwen3vl_convert.megatron.run_config import config_of_run, read_run_config, run_config_yaml
from qwen3vl_convert.parallel import ParallelLayout

CASES = {
    "dense_tp2pp1": ("dense", ParallelLayout(tp=2)),
    "dense_tied_tp1pp1": ("dense-tied", ParallelLayout()),
    "moe_tp1pp1ep2": ("moe", ParallelLayout(ep=2)),
    "dense_tp1pp2": ("dense", ParallelLayout(pp=2, first_stage_layers=3)),
}
ON_PURPOSE = {
    "pipeline_dtype": "Bridge sets it for PP > 1 only; the same for every layout here",
    "freeze_language_model": "the MoE provider's class default would freeze what is to be trained",
    "freeze_vision_model": "the same",
    "hf_text_config.tie_word_embeddings": "transformers writes a wrong `true` for MoE",
}


def flat(model: dict[str, Any]) -> dict[str, Any]:
    """A provider's fields, those of its two HF configs with a prefix."""
    nested = ("vision_config", "hf_text_config")
    out = {key: value for key, value in model.items() if key not in nested}
    return out | {f"{name}.{key}": value for name in nested for key, value in model[name].items()}


@pytest.mark.parametrize("name", CASES)
def test_keys_and_values_are_megatron_bridges(name: str, golden_huggingface: Path, golden_megatron: Path) -> None:
    source, layout = CASES[name]
    theirs = read_run_config(golden_megatron / name / "iter_0000000" / "run_config.yaml")
    assert theirs is not None
    dims = Dims.from_config(read_config(golden_huggingface / source))
    ours = yaml.safe_load(run_config_yaml(dims, dims.sizes(), layout, "bfloat16"))
    known = flat(theirs["model"])
    for key, value in flat(ours["model"]).items():
        assert key in known, f"Megatron-Bridge's provider has no {key}"
        assert known[key] == value or key in ON_PURPOSE, key
    assert Dims.from_config(config_of_run(ours, "ours")) == Dims.from_config(config_of_run(theirs, "theirs"))


def test_a_hub_source_is_named(golden_huggingface: Path) -> None:
    """Megatron-Bridge looks for the tokenizer there; a local folder is nobody else's business."""
    dims = Dims.from_config(read_config(golden_huggingface / "dense"))
    for origin, expected in ((("org/name", "abc"), ("org/name", "abc")), ((None, None), (None, None))):
        model = yaml.safe_load(run_config_yaml(dims, dims.sizes(), ParallelLayout(), "bfloat16", origin))["model"]
        assert (model.get("hf_model_id"), model.get("hf_model_revision")) == expected


@pytest.mark.parametrize(("iteration", "expected"), [(0, True), (7, True), ("release", False)])
def test_the_train_state_does_not_lead_a_trainer_astray(iteration: int | str, expected: bool, tmp_path: Path) -> None:
    """Megatron-Bridge opens iter_<step of latest_train_state.pt>, which a release does not have."""
    make_checkpoint(tmp_path / "hf", "tiny", layers=1)
    hf_to_megatron(tmp_path / "hf", tmp_path / "m", iteration=iteration, run=RunOptions(fsync=False))
    assert (tmp_path / "m" / "latest_train_state.pt").exists() is expected
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text() == str(iteration)


def test_sizes_survive(golden_huggingface: Path) -> None:
    """The sizes that a run_config records are those of the config.json that it was made from."""
    for source in ("dense", "dense-tied", "moe"):
        dims = Dims.from_config(read_config(golden_huggingface / source))
        recorded = config_of_run(yaml.safe_load(run_config_yaml(dims, dims.sizes(), ParallelLayout(), "bfloat16")), "x")
        assert Dims.from_config(recorded) == dims
