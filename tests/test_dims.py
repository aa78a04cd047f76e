"""Dims against the published configs, headers and parameter counts, and against transformers' own config classes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from huggingface.samples import (
    SIZES,
    VARIANTS,
    as_5,
    model_shapes,
    published,
    tiny_config,
    variant,
    with_changes,
)
from qwen3vl_convert.config_fields import MROPE_SECTION, TEXT_DEFAULTS, TOKEN_DEFAULTS, VISION_DEFAULTS
from qwen3vl_convert.dims import Dims, read_config
from qwen3vl_convert.errors import ConfigError, UnsupportedFormat
from recorded import HEADERS

PARAMETERS = {
    "2b": (2_127_532_032, 406_957_056),
    "4b": (4_437_815_808, 415_347_712),
    "8b": (8_767_123_696, 576_388_336),
    "32b": (33_357_390_064, 595_266_800),
    "30b": (31_070_754_032, 538_631_408),
    "235b": (235_670_022_896, 576_388_336),
}


@pytest.mark.parametrize("size", SIZES)
def test_published_models(size: str) -> None:
    dims = Dims.from_config(published(size), size)
    shapes = model_shapes(dims)
    header = json.loads((HEADERS / f"{size}.json").read_text())["tensors"]
    assert shapes == {name: tuple(shape) for name, shape in header.items()}
    vision = sum(math.prod(shape) for name, shape in shapes.items() if ".visual." in name)
    assert (sum(map(math.prod, shapes.values())), vision) == PARAMETERS[size]
    assert dims.moe == (size in ("30b", "235b"))
    assert dims.tied == (size in ("2b", "4b"))
    assert (dims.rope_theta, dims.mrope_section, dims.dtype) == (5e6, (24, 20, 20), "bfloat16")


@pytest.mark.parametrize("name", VARIANTS)
def test_all_versions_of_transformers_save_the_same_sizes(name: str) -> None:
    oldest = name.rpartition("_")[0] + "_4.57.6"
    dims = Dims.from_config(variant(name), name)
    assert dims == Dims.from_config(variant(oldest), oldest)
    assert dims.tied == ("_tied_" in name)
    assert (dims.experts, dims.expert_ffn, dims.top_k) == ((8, 48, 2) if "moe" in name else (0, 0, 0))


@pytest.mark.parametrize("moe", [False, True])
def test_spellings(moe: bool) -> None:
    config = tiny_config(moe)
    dims = Dims.from_config(config)
    assert Dims.from_config(as_5(config)) == dims
    flat = {**config.pop("text_config"), **config}
    assert Dims.from_config(flat) == dims
    both = with_changes(as_5(tiny_config(moe)), text_config__rope_theta=5000000.0, hidden_size=16)
    assert Dims.from_config(both) == dims
    if moe:
        assert Dims.from_config(with_changes(as_5(tiny_config(moe)), text_config__num_experts=4)) == dims


def test_names_of_axes_and_their_sizes() -> None:
    dims = Dims.from_config(tiny_config(moe=True))
    text = {"l": 2, "kv": 2, "g": 2, "d": 8, "h": 16, "f": 20, "vocab": 32, "e": 4, "i": 6, "half": 8, "s": 2}
    vision = {"b": 2, "n": 2, "t": 3, "vd": 4, "v": 8, "u": 12, "m": 2, "w": 32, "j": 32, "o": 16}
    assert dims.sizes() == text | vision | {"pos": 16, "rgb": 3, "time": 2, "y": 4, "x": 4}
    assert not {"e", "i", "half"} & set(Dims.from_config(tiny_config()).sizes())


@pytest.mark.parametrize(
    ("changes", "claimed"),
    [
        ({}, "bfloat16"),
        ({"text_config__dtype": None}, None),
        ({"text_config__dtype": None, "dtype": "float16"}, "float16"),
        ({"text_config__dtype": None, "torch_dtype": "torch.float32"}, "float32"),
        ({"text_config__dtype": None, "vision_config__dtype": "float16"}, "float16"),
        ({"text_config__dtype": None, "text_config__torch_dtype": "float16", "dtype": "float32"}, "float16"),
    ],
)
def test_claimed_dtype(changes: dict[str, Any], claimed: str | None) -> None:
    assert Dims.from_config(with_changes(tiny_config(), **changes)).dtype == claimed


@pytest.mark.parametrize(
    ("moe", "version", "top", "inner", "tied"),
    [
        (False, "4.57.6", None, None, False),
        (False, "4.57.6", True, True, True),
        (False, "4.57.6", None, True, True),
        (False, "4.57.6", True, None, True),
        (False, "5.23.0", False, True, False),
        (False, "5.23.0", True, False, True),
        (False, "5.23.0", None, True, True),
        (True, "4.57.6", False, True, False),
        (True, "4.57.6", None, True, True),
        (True, "5.17.0", False, True, False),
        (True, "5.17.0", None, True, False),
        (True, "5.17.0", True, True, True),
    ],
)
def test_tie_flag(moe: bool, version: str, top: bool | None, inner: bool | None, tied: bool) -> None:
    changes = {"tie_word_embeddings": top, "text_config__tie_word_embeddings": inner, "transformers_version": version}
    assert Dims.from_config(with_changes(tiny_config(moe), **changes)).tied is tied


def test_tie_flag_of_a_config_without_version_goes_by_its_form() -> None:
    changes = {"tie_word_embeddings": True, "text_config__tie_word_embeddings": False, "transformers_version": None}
    assert Dims.from_config(with_changes(as_5(tiny_config()), **changes)).tied is True
    with pytest.raises(ConfigError, match="top level says True, text_config says False"):
        Dims.from_config(with_changes(tiny_config(), **changes))


def test_head_dim_is_never_derived_when_given_and_defaults_as_in_transformers() -> None:
    assert Dims.from_config(tiny_config(head_dim=10)).head_dim == 10
    assert Dims.from_config(with_changes(tiny_config(), text_config__head_dim=None)).head_dim == 128
    assert Dims.from_config(with_changes(tiny_config(True), text_config__head_dim=None)).head_dim == 4
    assert Dims.from_config(tiny_config(moe=True, head_dim=None)).head_dim == 4


def test_small_print() -> None:
    config = tiny_config(num_key_value_heads=None, eos_token_id=[2, 3], bos_token_id=None)
    dims = Dims.from_config(with_changes(config, vision_config__patch_size=[4, 4]))
    assert (dims.kv_heads, dims.eos_token_id, dims.bos_token_id, dims.patch) == (4, (2, 3), None, 4)
    lacking = with_changes(tiny_config(), image_token_id=None, text_config__vocab_size=None, vision_config__depth=None)
    dims = Dims.from_config(lacking)
    assert (dims.image_token_id, dims.vocab, dims.vision_depth) == (151655, 151936, 27)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "expected model_type"),
        ({"text_config": None}, "text_config: expected a JSON object, found nothing"),
        ({"text_config": []}, "text_config: expected a JSON object, found \\[\\]"),
        ({"vision_config": None}, "vision_config: expected a JSON object, found nothing"),
        ({"text_config__rope_theta": None}, "expected rope_theta, found n"),
        ({"text_config__rope_scaling": None}, "expected rope_scaling .transformers 4.57. or rope_parameters"),
        ({"text_config__rope_scaling": 3}, "rope_scaling: expected a JSON object, found 3"),
        (
            {"text_config__rope_parameters": {"rope_theta": 1e4}},
            "rope_theta says 5000000, rope_parameters says 10000.0",
        ),
        ({"text_config__rope_parameters": {"mrope_section": [4]}}, r"says \[2, 1, 1\], rope_parameters says \[4\]"),
        ({"text_config__rope_theta": -1.0}, "rope_theta: expected a finite number above 0, found -1.0"),
        ({"text_config__rope_theta": math.inf}, "rope_theta: expected a finite number"),
        ({"text_config__rms_norm_eps": True}, "rms_norm_eps: expected a finite number above 0, found True"),
        ({"text_config__hidden_size": "16"}, "hidden_size: expected a whole number of at least 1, found '16'"),
        ({"text_config__hidden_size": True}, "hidden_size: expected a whole number of at least 1, found True"),
        ({"text_config__hidden_size": 0}, "hidden_size: expected a whole number of at least 1, found 0"),
        ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers: .*at most 4096"),
        ({"text_config__num_attention_heads": 3}, "expected a multiple of num_key_value_heads = 2, found 3"),
        ({"text_config__attention_bias": 1}, "attention_bias: expected true or false, found 1"),
        ({"text_config__eos_token_id": "x"}, "eos_token_id: expected a list of whole numbers, found 'x'"),
        ({"text_config__torch_dtype": "float16"}, "dtype says 'bfloat16', torch_dtype says 'float16'"),
        ({"vision_config__num_heads": 3}, "expected a multiple of vision_config.num_heads = 3, found 8"),
        ({"vision_config__num_attention_heads": 4}, "num_heads says 2, num_attention_heads says 4"),
        ({"vision_config__patch_size": [4, 8]}, r"patch_size: expected a whole number .* found \[4, 8\]"),
        ({"vision_config__deepstack_visual_indexes": [0, -1]}, "expected a list of whole numbers"),
        ({"vocab_size": 33}, "vocab_size: text_config says 32 .*the top level says 33"),
        ({"vocab_size": 33, "text_config__vocab_size": None}, "vocab_size: text_config says 151936 .*or nothing"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, found 'no'"),
        (
            {"tie_word_embeddings": True, "text_config__tie_word_embeddings": False},
            "the top level says True, text_config says False",
        ),
    ],
)
def test_unusable(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^(?s:here/config.json.*{message})"):
        Dims.from_config(with_changes(tiny_config(), **changes), "here/config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config__num_local_experts": 5}, "num_experts says 4, num_local_experts says 5"),
        ({"text_config__num_experts_per_tok": 5}, "expected at most num_experts = 4, found 5"),
        ({"text_config__num_experts": 10**9}, "num_experts: .*at most 65536"),
    ],
)
def test_unusable_experts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Dims.from_config(with_changes(tiny_config(moe=True), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "the model is a 'qwen2_5_vl'"),
        ({"text_config__mlp_only_layers": [0]}, r"mlp_only_layers: expected \[\], found \[0\]"),
        ({"text_config__decoder_sparse_step": 2}, "decoder_sparse_step: expected 1, found 2"),
    ],
)
def test_unsupported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedFormat, match=message):
        Dims.from_config(with_changes(tiny_config(moe=True), **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .No such file"),
        (b"[]", "expected a JSON object, found list"),
        (b"{", "expected a JSON object in UTF-8"),
        (b"\xff{}", "expected a JSON object in UTF-8"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        (b"[" * 100_000, "expected a JSON object in UTF-8"),
    ],
)
def test_unreadable_config(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        read_config(tmp_path)


def test_read_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert read_config(tmp_path) == tiny_config()


# --- transformers itself, the installed version of it

CLASSES = {"qwen3_vl": "Qwen3VLConfig", "qwen3_vl_moe": "Qwen3VLMoeConfig"}


def load(config: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, CLASSES[config["model_type"]]).from_dict(json.loads(json.dumps(config)))


def is_5() -> bool:
    return int(pytest.importorskip("transformers").__version__.partition(".")[0]) >= 5


@pytest.mark.transformers
@pytest.mark.parametrize("model_type", list(CLASSES))
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    ours = load({"model_type": model_type})
    for key, value in TEXT_DEFAULTS[model_type].items():
        assert getattr(ours.text_config, key) == value, key
    for key, value in VISION_DEFAULTS.items():
        found = getattr(ours.vision_config, key)
        assert (list(found) if isinstance(value, list) else found) == value, key
    for key, value in TOKEN_DEFAULTS.items():
        assert getattr(ours, key) == value, key


def theirs(config: Any) -> dict[str, Any]:
    """What transformers makes of a config, by our names."""
    text, vision = config.text_config, config.vision_config
    rope = text.rope_parameters if is_5() else {**text.rope_scaling, "rope_theta": text.rope_theta}
    return {
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "ffn": text.intermediate_size,
        "vocab": text.vocab_size,
        "experts": getattr(text, "num_experts", 0),
        "expert_ffn": getattr(text, "moe_intermediate_size", 0),
        "attention_bias": text.attention_bias,
        "tied": config.tie_word_embeddings if is_5() else text.tie_word_embeddings,
        "rms_eps": text.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "mrope_section": tuple(rope.get("mrope_section", MROPE_SECTION)),
        "max_positions": text.max_position_embeddings,
        "vision_depth": vision.depth,
        "vision_hidden": vision.hidden_size,
        "vision_heads": vision.num_heads,
        "vision_ffn": vision.intermediate_size,
        "vision_out": vision.out_hidden_size,
        "patch": vision.patch_size,
        "deepstack": tuple(vision.deepstack_visual_indexes),
        "position_embeddings": vision.num_position_embeddings,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "image_token_id": config.image_token_id,
    }


def readable_here() -> list[Any]:
    """Published configs, and the variants; of these 4.57 reads only its own."""
    configs = [pytest.param(published, size, id=size) for size in SIZES]
    return configs + [pytest.param(variant, name, id=name) for name in VARIANTS]


@pytest.mark.transformers
@pytest.mark.parametrize(("source", "name"), readable_here())
def test_transformers_reads_the_same_sizes(source: Any, name: str) -> None:
    if name.startswith("cfg_") and not name.endswith("4.57.6") and not is_5():
        pytest.skip("transformers 4.57 does not read what 5.x saves")
    config = source(name)
    dims = Dims.from_config(config, name)
    expected = theirs(load(config))
    assert {key: getattr(dims, key) for key in expected} == expected
