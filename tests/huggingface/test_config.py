"""config.json as written: the hub's bytes, and one meaning in both generations of transformers."""

import copy
import json
from typing import Any

import pytest

from huggingface.samples import (
    SIZES,
    VARIANTS,
    as_5,
    published,
    tiny_config,
    variant,
    with_changes,
)
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.huggingface.config import config_json, portable_config, rebuild_config
from recorded import CONFIGS

SOURCES = [(published, size) for size in SIZES] + [(variant, name) for name in VARIANTS]


def portable(config: dict[str, Any], dtype: str = "bfloat16", layout: str = "hub") -> dict[str, Any]:
    return portable_config(config, Dims.from_config(config), dtype, layout)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {key: leaf for name, item in value.items() for key, leaf in leaves(item, f"{path}.{name}").items()}


@pytest.mark.parametrize("size", SIZES)
def test_published_bytes(size: str) -> None:
    text = (CONFIGS / f"{size}.config.json").read_text()
    config = json.loads(text)
    assert config_json(config) == text
    assert portable(config) == config
    rebuilt, filled = rebuild_config(Dims.from_config(config))
    assert config_json(rebuilt) == text
    assert "text_config.hidden_act = 'silu'" in filled


@pytest.mark.parametrize("name", VARIANTS)
def test_every_version_comes_out_in_the_hubs_form(name: str) -> None:
    config = variant(name)
    before = copy.deepcopy(config)
    result = portable(config)
    assert config == before
    assert Dims.from_config(result) == Dims.from_config(config)
    assert portable(result) == result
    if name.endswith("4.57.6"):
        assert result == config
    text = result["text_config"]
    hub = variant(name.rpartition("_")[0] + "_4.57.6")
    assert (text["rope_scaling"], text["rope_theta"]) == (hub["text_config"]["rope_scaling"], 5000000)
    assert result["vision_config"] == hub["vision_config"]
    assert "rope_parameters" not in text
    assert "num_local_experts" not in text
    assert bool(text.get("tie_word_embeddings")) == result["tie_word_embeddings"] == ("_tied_" in name)
    # nothing is lost but the spellings
    respelled = ("rope", "num_local_experts", "transformers_version", "model_type")
    lost = {
        path for path in leaves(config).keys() - leaves(result).keys() if not any(word in path for word in respelled)
    }
    assert lost == set()


def test_other_keys_stay() -> None:
    quirks = {
        "hidden_size": 16,
        "eos_token_id": [2, 3],
        "text_config__use_cache": False,
        "vision_config__note": {"a": []},
    }
    config = with_changes(as_5(tiny_config()), **quirks)
    result = portable(config)
    assert (result["hidden_size"], result["eos_token_id"], result["text_config"]["use_cache"]) == (16, [2, 3], False)
    assert result["vision_config"]["note"] == {"a": []}
    assert result["transformers_version"] == "5.23.0"


def test_a_long_context_rope_stays() -> None:
    yarn = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 262144, "mrope_section": [2, 1, 1]}
    config = with_changes(tiny_config(), text_config__rope_scaling=yarn)
    assert portable(config) == config
    assert portable(as_5(config))["text_config"]["rope_scaling"] == yarn
    older = with_changes(tiny_config(), text_config__rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]})
    assert portable(older)["text_config"]["rope_scaling"] == {"rope_type": "default", "mrope_section": [2, 1, 1]}


def test_a_vision_rope_of_its_own_stays() -> None:
    own = {"rope_theta": 20000.0, "rope_type": "axial"}
    config = with_changes(as_5(tiny_config()), vision_config__rope_parameters=own)
    assert portable(config)["vision_config"]["rope_parameters"] == own


def test_flat_config_is_nested() -> None:
    for moe in (False, True):
        config = tiny_config(moe)
        text = config.pop("text_config")
        flat = {**text, **config}
        assert portable(flat) == with_changes(tiny_config(moe), dtype="bfloat16")  # a flat claim stays at the top


def test_vision_spellings_of_5() -> None:
    changes = {"depth": None, "num_heads": None, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": [4, 4]}
    config = with_changes(tiny_config(), **{f"vision_config__{key}": value for key, value in changes.items()})
    assert portable(config) == tiny_config()


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({}, {".text_config.dtype"}),
        ({"text_config__dtype": None}, {".text_config.dtype"}),
        (
            {"dtype": "bfloat16", "vision_config__dtype": "bfloat16"},
            {".dtype", ".text_config.dtype", ".vision_config.dtype"},
        ),
        ({"torch_dtype": "bfloat16", "text_config__dtype": None}, {".dtype", ".text_config.dtype"}),
    ],
)
def test_dtype_is_true_wherever_it_stands(changes: dict[str, Any], places: set[str]) -> None:
    result = leaves(portable(with_changes(tiny_config(), **changes), "float32"))
    assert {path: value for path, value in result.items() if "dtype" in path} == dict.fromkeys(places, "float32")


@pytest.mark.parametrize(
    ("version", "layout", "expected"),
    [
        ("4.57.0.dev0", "hub", "4.57.0.dev0"),
        ("4.57.6", "per-expert", "4.57.6"),
        ("5.23.0", "hub", "4.57.0.dev0"),
        ("5.23.0", "v5", "5.23.0"),
        ("4.57.0.dev0", "v5", "5.2.0"),
        (None, "v5", "5.2.0"),
        ("5.0.0", "v5", "5.2.0"),
        (None, "hub", None),
    ],
)
def test_version_does_not_contradict_the_experts(version: str | None, layout: str, expected: str | None) -> None:
    config = with_changes(tiny_config(moe=True), transformers_version=version)
    assert portable(config, layout=layout).get("transformers_version") == expected


@pytest.mark.parametrize("version", ["4.57.0.dev0", "5.23.0"])
def test_version_of_a_dense_model_stays(version: str) -> None:
    config = with_changes(tiny_config(), transformers_version=version)
    assert portable(config, layout="none")["transformers_version"] == version


def test_ties_are_made_equal() -> None:
    both = {"tie_word_embeddings": True, "text_config__tie_word_embeddings": True}
    tied = with_changes(tiny_config(), **both)
    assert portable(tied) == tied
    for one in both:
        assert portable(with_changes(tied, **{one: None})) == tied
    untied = with_changes(as_5(tiny_config()), tie_word_embeddings=False, text_config__tie_word_embeddings=True)
    assert portable(untied)["text_config"]["tie_word_embeddings"] is False


def test_rebuilt_config_says_what_it_filled() -> None:
    config = with_changes(tiny_config(moe=True), text_config__dtype=None)
    dims = Dims.from_config(config)
    rebuilt, filled = rebuild_config(dims)
    assert Dims.from_config(rebuilt) == Dims.from_config(tiny_config(moe=True))
    assert "text_config.dtype = 'bfloat16'" in filled
    assert "text_config.norm_topk_prob = True" in filled


# --- transformers itself, the installed version of it

CLASSES = {"qwen3_vl": "Qwen3VLConfig", "qwen3_vl_moe": "Qwen3VLMoeConfig"}


def meaning(config: dict[str, Any]) -> dict[str, Any]:
    """What the installed transformers makes of a config; the same keys in both generations."""
    transformers = pytest.importorskip("transformers")
    loaded = getattr(transformers, CLASSES[config["model_type"]]).from_dict(json.loads(json.dumps(config)))
    text, vision = loaded.text_config, loaded.vision_config
    newer = int(transformers.__version__.partition(".")[0]) >= 5
    rope = dict(text.rope_parameters) if newer else {**text.rope_scaling, "rope_theta": text.rope_theta}
    keys = ("hidden_size", "num_hidden_layers", "head_dim", "rms_norm_eps", "vocab_size", "hidden_act")
    return {
        "rope": rope,
        "tied": loaded.tie_word_embeddings if newer else text.tie_word_embeddings,
        "experts": getattr(text, "num_experts", None),
        "text": {key: getattr(text, key) for key in keys},
        "vision": {key: getattr(vision, key) for key in ("depth", "hidden_size", "num_heads", "out_hidden_size")},
        "dtype": str(text.dtype).removeprefix("torch."),
    }


@pytest.mark.transformers
@pytest.mark.parametrize(("source", "name"), SOURCES, ids=[name for _, name in SOURCES])
def test_both_generations_read_it_with_one_meaning(source: Any, name: str) -> None:
    config = source(name)
    dims = Dims.from_config(config)
    for layout in ("hub", "v5", "per-expert") if dims.moe else ("none",):
        found = meaning(portable_config(config, dims, "float16", layout))
        rope = {"mrope_interleaved": True, "mrope_section": list(dims.mrope_section), "rope_type": "default"}
        assert found["rope"] == {**rope, "rope_theta": 5000000}
        assert found["tied"] == dims.tied
        assert found["experts"] == (dims.experts or None)
        assert found["dtype"] == "float16"
        assert found["text"]["head_dim"] == dims.head_dim
        assert found["vision"]["depth"] == dims.vision_depth


@pytest.mark.transformers
@pytest.mark.parametrize("name", VARIANTS)
def test_it_means_what_the_source_meant(name: str) -> None:
    config = variant(name)
    newer = int(pytest.importorskip("transformers").__version__.partition(".")[0]) >= 5
    if not newer and not name.endswith("4.57.6"):
        pytest.skip("transformers 4.57 does not read what 5.x saves")
    assert meaning(portable(config)) == meaning(config)


@pytest.mark.transformers
@pytest.mark.parametrize("moe", [False, True])
def test_models_can_be_built_from_it(moe: bool) -> None:
    """4.57 crashes on 5.x's own form only when it builds the model."""
    transformers = pytest.importorskip("transformers")
    import torch

    config = portable(as_5(tiny_config(moe)))
    loaded = getattr(transformers, CLASSES[config["model_type"]]).from_dict(config)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(loaded)
    from huggingface.samples import model_shapes

    newer = int(transformers.__version__.partition(".")[0]) >= 5
    expected = model_shapes(Dims.from_config(config), "v5" if newer else "hub")
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
