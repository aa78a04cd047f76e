"""What a Megatron checkpoint says of its model, in all places where it can say it, against the folder's config."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from broken import QUICK, copied, edit_json
from qwen3vl_convert import hf_to_megatron, make_checkpoint
from qwen3vl_convert.errors import ConfigError
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.megatron import run_config
from qwen3vl_convert.verify import verify
from qwen3vl_convert.verify.settings import RUN_CONFIG

SMALL = replace(SIZES["tiny"], layers=3, vision_depth=3, deepstack=(0, 2))
MODELS = {"dense": SMALL, "moe": replace(SMALL, model_type="qwen3_vl_moe", experts=4, top_k=2, expert_ffn=32)}
MODEL, ARGUMENTS, OWN = "run_config.yaml: model", "the arguments of Megatron-LM", "hf/config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("made")
    for name, dims in MODELS.items():
        make_checkpoint(at / name, dims)
        hf_to_megatron(at / name, at / f"{name}-run", run=QUICK)
    return at


def edited(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The model section of the run_config.yaml changed."""
    (path,) = run.rglob(RUN_CONFIG)
    config = yaml.safe_load(path.read_text())
    change(config["model"])
    path.write_text(yaml.safe_dump(config))
    return run


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_checkpoint_says_what_the_folder_says(made: Path, name: str) -> None:
    assert verify(made / name, made / f"{name}-run").weights.settings == {}


PROVIDER = [
    ("dense", "rotary_base", 500000, "rope_theta", (5000000.0, 500000.0)),
    ("dense", "mrope_section", [2, 2, 4], "mrope_section", ((4, 2, 2), (2, 2, 4))),
    ("dense", "layernorm_epsilon", 1e-5, "rms_eps", (1e-6, 1e-5)),
    ("dense", "image_token_id", 7, "image_token_id", (500, 7)),
    ("moe", "moe_router_topk", 1, "top_k", (2, 1)),
]


@pytest.mark.parametrize(("name", "field", "value", "said", "pair"), PROVIDER, ids=[case[1] for case in PROVIDER])
def test_what_the_provider_is_told(
    made: Path, tmp_path: Path, name: str, field: str, value: object, said: str, pair: tuple[object, object]
) -> None:
    run = edited(copied(made / f"{name}-run", tmp_path / "run"), lambda model: model.update({field: value}))
    found = verify(made / name, run)
    assert found.weights.differences == ()
    assert found.weights.settings == {f"{said} ({MODEL})": pair}
    assert not found.equal


def test_the_tower_s_config_inside(made: Path, tmp_path: Path) -> None:
    def change(model: dict[str, Any]) -> None:
        model["vision_config"]["deepstack_visual_indexes"] = [0, 1]

    run = edited(copied(made / "dense-run", tmp_path / "run"), change)
    assert verify(made / "dense", run).weights.settings == {f"deepstack ({MODEL})": ((0, 2), (0, 1))}


def test_the_config_that_travelled_along(made: Path, tmp_path: Path) -> None:
    run = copied(made / "dense-run", tmp_path / "run")
    (own,) = run.rglob("hf/config.json")
    edit_json("config.json", lambda config: config["text_config"].update(rms_norm_eps=1e-5))(own.parent)
    assert verify(made / "dense", run).weights.settings == {f"rms_eps ({OWN})": (1e-6, 1e-5)}


def test_the_arguments_of_megatron_lm(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = run_config._arguments
    monkeypatch.setattr(
        run_config, "_arguments", lambda *sizes: {**written(*sizes), "rotary_base": 10000, "moe_router_topk": 1}
    )
    for name in MODELS:
        hf_to_megatron(made / name, tmp_path / name, run=QUICK)
        expected = {f"rope_theta ({ARGUMENTS})": (5000000.0, 10000.0)}
        if name == "moe":
            expected[f"top_k ({ARGUMENTS})"] = (2, 1)
        assert verify(made / name, tmp_path / name).weights.settings == expected


def test_a_checkpoint_without_any_is_compared_by_weights(made: Path, tmp_path: Path) -> None:
    run = copied(made / "dense-run", tmp_path / "run")
    for path in (*run.rglob(RUN_CONFIG), *run.rglob("hf/config.json")):
        path.unlink()
    assert verify(made / "dense", run).equal


@pytest.mark.parametrize("value", ["much", [1], {"a": 1}], ids=str)
def test_what_is_no_number_is_an_error(made: Path, tmp_path: Path, value: object) -> None:
    run = edited(copied(made / "dense-run", tmp_path / "run"), lambda model: model.update(rotary_base=value))
    with pytest.raises(ConfigError, match="rotary_base"):
        verify(made / "dense", run)
