"""Bridges: the settings of a checkpoint in a provider, and its weights in and out of a live model at any layout."""

import filecmp
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.bridge_rank import (
    Case,
    Trip,
    failures,
    from_config_alone,
    half_a_model,
    narrower,
    other_layouts,
    refusals,
    round_trip,
    wider,
    wrapped,
)
from models.parallel import run_ranks
from oracles.megatron_world import differences
from qwen3vl_convert import Dims, ParallelLayout, RunOptions, hf_to_megatron, make_checkpoint
from qwen3vl_convert.errors import ConfigError, UsageError
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.mappings import mapping_registry
from recorded import CONFIGS
from reference import load_huggingface

pytestmark = pytest.mark.megatron

RUN = RunOptions(fsync=False)
# Pipelines: the first stage must have as many text layers as there are deepstack features.
DENSE = replace(SIZES["tiny"], vision_depth=2, deepstack=(1,), vocab=96)
TIED = replace(DENSE, tied=True)
MOE = replace(SIZES["tiny-moe"], layers=2, vision_depth=2, deepstack=(1,), vocab=96, experts=4)
ODD_VOCAB = replace(TIED, vocab=91)
PADDED = {"should_pad_vocab": True, "make_vocab_size_divisible_by": 8}


def made(folder: Path, dims: Dims, *, rows: int | None = None, layout: str = "hub", **settings: Any) -> Case:
    """A checkpoint of these sizes, in several files, and the same as Megatron-Core's loader takes it."""
    make_checkpoint(folder / "hf", dims, experts_layout=layout, max_shard_bytes=500_000)
    (folder / "hf" / "tokenizer_config.json").write_text('{"kept": "as it is"}')
    hf_to_megatron(folder / "hf", folder / "megatron", layout=ParallelLayout(), padded_vocab_size=rows, run=RUN)
    return Case(folder / "hf", folder / "out", folder / "megatron" / "iter_0000000", settings, rows, layout)


def same_folder(case: Case) -> None:
    """Every file of the source is in the folder that was saved, byte for byte, and nothing else but the manifest."""
    names = {path.name for path in case.folder.iterdir()}
    assert {path.name for path in case.work.iterdir()} == names | {"qwen3vl_convert.json"}
    assert filecmp.cmpfiles(case.folder, case.work, names, shallow=False)[0] == sorted(names, key=list(names).index)


WORLDS: dict[str, tuple[ParallelLayout, list[tuple[Dims, dict[str, Any]]]]] = {
    "tp2": (ParallelLayout(tp=2), [(ODD_VOCAB, {"rows": 96, **PADDED}), (DENSE, {})]),
    "pp2": (ParallelLayout(pp=2), [(TIED, {}), (DENSE, {})]),
    "pp2vpp2": (ParallelLayout(pp=2, vpp=2), [(TIED, {})]),
    "ep2": (ParallelLayout(ep=2), [(MOE, {}), (MOE, {"layout": "v5"})]),
    "etp2": (ParallelLayout(etp=2), [(MOE, {}), (MOE, {"layout": "v5"})]),
    "tp2pp2": (ParallelLayout(tp=2, pp=2), [(TIED, {}), (MOE, {})]),
}


@pytest.mark.parametrize("name", WORLDS)
def test_round_trip(tmp_path: Path, name: str) -> None:
    """In as Megatron-Core's own loader reads it, out bit for bit, at every layout; each rank reads its own slices."""
    world, models = WORLDS[name]
    cases = [made(tmp_path / str(number), dims, **options) for number, (dims, options) in enumerate(models)]
    for case in cases:
        trips = run_ranks(world, round_trip, case)
        same_folder(case)
        check_reading(case, world, trips)


def test_a_pipeline_s_chunk_alone_is_no_model(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", DENSE)
    ranks = run_ranks(ParallelLayout(pp=2, vpp=2), half_a_model, Case(tmp_path / "hf", tmp_path))
    for kind, text in (said for found in ranks for said in found):
        assert kind == "MissingTensors"
        assert "language_model.decoder.layers" in text
        assert "Are all pipeline chunks of every rank passed?" in text


def check_reading(case: Case, world: ParallelLayout, ranks: list[Trip]) -> None:
    """As many bytes as a rank holds. Where the parts of no tensor lie interleaved, no others are even mapped."""
    tensors = load_huggingface(case.folder)
    interleaved = case.layout == "hub" and any(".experts." in name for name in tensors)
    for trip in ranks:
        assert trip.read_bytes == trip.own_bytes < sum(tensor.nbytes for tensor in tensors.values())
        assert trip.names == ranks[0].names
        if world.tp == world.etp == 1 and not interleaved:
            assert trip.mapped_bytes == trip.own_bytes
            assert sum(nbytes for _, _, nbytes in trip.windows) < trip.own_bytes + 4096 * len(trip.windows)


SINGLE: dict[str, tuple[Dims, dict[str, Any]]] = {
    "dense": (DENSE, {}),
    "tied, padded": (ODD_VOCAB, {"rows": 96, **PADDED}),
    "moe": (MOE, {}),
    "moe, v5": (MOE, {"layout": "v5"}),
}


def alone(job: Callable[..., Any], case: Case) -> Any:
    """As `run_ranks`, in this process."""
    from qwen3vl_convert.models import single_process

    with single_process() as world:
        return job(world, case)


class TestInOneProcess:
    @pytest.mark.filterwarnings("ignore")  # what Megatron-Core's own loader, the judge, uses of torch
    @pytest.mark.parametrize("name", SINGLE)
    def test_round_trip(self, tmp_path: Path, name: str) -> None:
        dims, options = SINGLE[name]
        case = made(tmp_path, dims, **options)
        trip = alone(round_trip, case)
        same_folder(case)
        assert trip.read_bytes == sum(tensor.nbytes for tensor in load_huggingface(case.folder).values())

    def test_folders_and_models_that_are_not_the_same_tensors(self, tmp_path: Path) -> None:
        case = made(tmp_path, replace(DENSE, layers=1), hidden_dropout=0.0)
        case.work.mkdir()
        broken(case, "missing", lambda tensors: tensors.pop("model.language_model.norm.weight"))
        broken(case, "unknown", lambda tensors: tensors.update({"model.reward.weight": torch.zeros(2).bfloat16()}))
        make_checkpoint(case.work / "shape", replace(DENSE, layers=1, ffn=96))
        make_checkpoint(case.work / "tied", replace(TIED, layers=1))
        make_checkpoint(case.work / "layers", replace(DENSE, layers=2))
        found = alone(refusals, case)
        assert found["missing"][0] == "MissingTensors"
        assert "model.language_model.norm.weight" in found["missing"][1]
        assert found["unknown"][0] == "UnknownTensors"
        assert "model.reward.weight" in found["unknown"][1]
        assert found["shape"][0] == "MisshapenTensor"
        assert "linear_fc1.weight" in found["shape"][1]
        assert found["layers"][0] == "MisshapenTensor"
        assert found["tied"][0] == "UsageError"
        assert "share_embeddings_and_output_weights=True" in found["tied"][1]
        assert found["hidden parameter"][0] == "MissingTensors"
        assert "language_model.decoder.final_layernorm.weight" in found["hidden parameter"][1]
        assert found["copy"][0] == "UnsupportedFormat"
        assert found["adapter"][0] == "UnknownTensors"
        assert "language_model.adapter.weight" in found["adapter"][1]
        assert found["no model"] == (
            "UsageError", "Linear: expected a Megatron model, or a list of its pipeline chunks."
        )  # fmt: skip
        assert found["no weights"][0] == "UsageError"

    def test_process_groups_that_are_gone(self, tmp_path: Path) -> None:
        from qwen3vl_convert.models import AutoBridge, single_process

        make_checkpoint(tmp_path / "hf", replace(DENSE, layers=1))
        bridge = AutoBridge.from_hf_pretrained(tmp_path / "hf")
        with single_process():
            model = bridge.to_megatron_provider().provide()
        with pytest.raises(UsageError, match="within the same single_process"):
            bridge.load_hf_weights(model)
        with pytest.raises(UsageError, match="within the same single_process"):
            bridge.save_hf_pretrained(model, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    def test_wider_parameters_take_and_give_the_same_bits(self, tmp_path: Path) -> None:
        full: dict[str, Any] = {"bf16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32}
        case = made(tmp_path, DENSE, **full)
        found = alone(wider, case)
        assert {tensor.dtype for tensor in load_huggingface(case.work / "kept").values()} == {torch.float32}
        assert json.loads((case.work / "kept" / "config.json").read_text())["text_config"]["dtype"] == "float32"
        assert found["overflow"][0] == "InputError"
        assert "model.language_model.norm.weight" in found["overflow"][1]

    def test_rounding_is_refused_unless_asked_for(self, tmp_path: Path) -> None:
        make_checkpoint(tmp_path / "hf", DENSE, dtype="float32")
        for file in (tmp_path / "hf").glob("*.safetensors"):  # values that bfloat16 has not
            save_file({name: tensor * 1.001 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        half: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
        found = alone(narrower, Case(tmp_path / "hf", tmp_path, settings=half))
        assert found["refused"][0] == "UsageError"
        assert "allow_dtype_cast=True" in found["refused"][1]

    def test_experts_in_every_layout(self, tmp_path: Path) -> None:
        alone(other_layouts, made(tmp_path, MOE))

    def test_models_in_wrappers(self, tmp_path: Path) -> None:
        alone(wrapped, made(tmp_path, DENSE, gradient_accumulation_fusion=False))

    @pytest.mark.transformers
    @pytest.mark.parametrize("dims", [TIED, MOE], ids=["tied", "moe"])
    def test_transformers_loads_what_a_config_alone_gives(self, tmp_path: Path, dims: Dims) -> None:
        import transformers

        case = made(tmp_path, dims)
        alone(from_config_alone, case)
        kind = "Qwen3VLMoeForConditionalGeneration" if dims.moe else "Qwen3VLForConditionalGeneration"
        model, report = getattr(transformers, kind).from_pretrained(
            case.work / "saved", torch_dtype="auto", output_loading_info=True
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        theirs = {name: tensor for name, tensor in model.state_dict().items() if ".experts." not in name}
        written = load_huggingface(case.work / "saved")
        ours = {name: tensor for name, tensor in written.items() if ".experts." not in name}
        assert not differences({name: theirs[name] for name in ours}, ours)


def broken(case: Case, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """A copy of the folder, in one file, with something wrong."""
    tensors = load_huggingface(case.folder)
    change(tensors)
    (case.work / name).mkdir()
    save_file(tensors, case.work / name / "model.safetensors", {"format": "pt"})
    (case.work / name / "config.json").write_bytes((case.folder / "config.json").read_bytes())


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    case = made(tmp_path, DENSE)
    case.work.mkdir()
    first, second = run_ranks(ParallelLayout(tp=2), failures, case)
    for found in (first, second):
        assert found["unknown parameter"][0] == "UnknownTensors"
        assert "language_model.extra" in found["unknown parameter"][1]
        assert found["unknown replica"][0] == "MissingTensors"
        assert "language_model.extra" in found["unknown replica"][1]
        assert found["hidden replica"][0] == "MissingTensors"
        assert "k_layernorm.weight: 0 of its 16 elements" in found["hidden replica"][1]
    assert second["unknown replica"][1] in first["unknown replica"][1]
    assert first["disk full"] == ("OutputError", "disk full")
    assert second["disk full"] == ("OutputError", "rank 0: disk full")
    assert second["second rank"] == ("RuntimeError", "no memory left")
    assert first["second rank"] == ("ConvertError", "rank 1: RuntimeError('no memory left')")
    for found in (first, second):
        assert found["replica"][0] == "InputError"
        assert "language_model.decoder.final_layernorm.weight at (0,)" in found["replica"][1]
        assert found["exists"][0] == "OutputError"
        assert found["nothing"] == ("", "")
    tensors = len(load_huggingface(case.folder))
    assert (first["only rank 0"][1], second["only rank 0"][1]) == (str(tensors), "0")
    assert [path.name for path in case.work.iterdir()] == ["good"]
    assert not differences(load_huggingface(case.work / "good"), load_huggingface(case.folder))


# ---- settings --------------------------------------------------------------------------------------------------------

PUBLISHED = ("2b", "4b", "8b", "32b", "30b", "235b")
VISION = (
    "depth", "hidden_size", "num_heads", "intermediate_size", "out_hidden_size", "patch_size", "temporal_patch_size",
    "spatial_merge_size", "in_channels", "num_position_embeddings", "deepstack_visual_indexes", "hidden_act",
)  # fmt: skip


def expected_settings(config: dict[str, Any]) -> dict[str, Any]:
    """A provider's settings, read by hand from a published config.json."""
    text, moe = config["text_config"], config["model_type"] == "qwen3_vl_moe"
    experts = {
        "num_moe_experts": text["num_experts"],
        "moe_ffn_hidden_size": text["moe_intermediate_size"],
        "moe_router_topk": text["num_experts_per_tok"],
    } if moe else {"num_moe_experts": None}  # fmt: skip
    return {
        "num_layers": text["num_hidden_layers"],
        "hidden_size": text["hidden_size"],
        "ffn_hidden_size": text["intermediate_size"],
        "num_attention_heads": text["num_attention_heads"],
        "num_query_groups": text["num_key_value_heads"],
        "kv_channels": text["head_dim"],
        "head_dim": text["head_dim"],
        "vocab_size": text["vocab_size"],
        "should_pad_vocab": False,
        "seq_length": text["max_position_embeddings"],
        "layernorm_epsilon": text["rms_norm_eps"],
        "rotary_base": text["rope_theta"],
        "mrope_section": text["rope_scaling"]["mrope_section"],
        "init_method_std": text["initializer_range"],
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        "add_qkv_bias": text["attention_bias"],
        "qk_layernorm": True,
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "fp16": False,
        "deepstack_visual_indexes": config["vision_config"]["deepstack_visual_indexes"],
        "patch_size": config["vision_config"]["patch_size"],
        **{name: config[name] for name in ("image_token_id", "video_token_id")},
        **{name: config[name] for name in ("vision_start_token_id", "vision_end_token_id")},
        **{name: text[name] for name in ("bos_token_id", "eos_token_id")},
        **experts,
    }


def check_settings(provider: Any, config: dict[str, Any]) -> None:
    expected = expected_settings(config)
    assert {name: getattr(provider, name) for name in expected} == expected
    vision = {name: getattr(provider.vision_config, name) for name in VISION}
    assert vision == {name: config["vision_config"][name] for name in VISION}
    assert provider.hf_text_config.num_hidden_layers == config["text_config"]["num_hidden_layers"]
    moe = config["model_type"] == "qwen3_vl_moe"
    assert type(provider).__name__ == ("Qwen3VLMoEModelProvider" if moe else "Qwen3VLModelProvider")


@pytest.mark.transformers
@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("given", ["folder", "dict", "config object", "model", "wrapper"])
def test_settings_of_the_published_models(tmp_path: Path, size: str, given: str) -> None:
    """In whatever form the config comes, as a folder or as transformers' object of the installed generation."""
    import transformers

    from qwen3vl_convert.models import AutoBridge, Qwen3VLBridge, Qwen3VLMoEBridge

    config = json.loads((CONFIGS / f"{size}.config.json").read_text())
    moe = config["model_type"] == "qwen3_vl_moe"
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind = transformers.Qwen3VLMoeConfig if moe else transformers.Qwen3VLConfig
    parsed = kind.from_pretrained(tmp_path)
    forms: dict[str, Any] = {
        "folder": str(tmp_path),
        "dict": config,
        "config object": parsed,
        "model": SimpleNamespace(config=parsed),
        "wrapper": SimpleNamespace(config=parsed, model_name_or_path=tmp_path),
    }
    bridge, other = (Qwen3VLMoEBridge, Qwen3VLBridge) if moe else (Qwen3VLBridge, Qwen3VLMoEBridge)
    check_settings(bridge().provider_bridge(forms[given]), config)
    check_settings(AutoBridge(forms[given]).to_megatron_provider(), config)
    with pytest.raises(UsageError, match=f"Use {bridge.__name__}, or AutoBridge"):
        other().provider_bridge(forms[given])


@pytest.mark.parametrize("generation", ["4.57.6", "5.3.0", "5.17.0", "5.23.0"])
@pytest.mark.parametrize("kind", ["dense_tied", "dense_untied", "moe"])
def test_every_spelling_gives_the_same_settings(kind: str, generation: str) -> None:
    """The same model, written by four generations of transformers."""
    from qwen3vl_convert.models import AutoBridge

    def provider(generation: str) -> Any:
        path = CONFIGS / "variants" / f"cfg_{kind}_{generation}.json"
        found = vars(AutoBridge.from_hf_config(json.loads(path.read_text())).to_megatron_provider())
        return {name: value for name, value in found.items() if name not in ("vision_config", "hf_text_config")}

    assert provider(generation) == provider("4.57.6")
    assert provider(generation)["share_embeddings_and_output_weights"] is (kind == "dense_tied")


@pytest.mark.parametrize("size", PUBLISHED)
def test_settings_without_transformers(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from qwen3vl_convert.models import AutoBridge

    config = json.loads((CONFIGS / f"{size}.config.json").read_text())
    monkeypatch.setitem(sys.modules, "transformers", None)
    provider = AutoBridge.from_hf_config(config).to_megatron_provider()
    assert "transformers" not in type(provider.vision_config).__module__
    check_settings(provider, config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_that_of_the_tensors(tmp_path: Path, dtype: str) -> None:
    from qwen3vl_convert.models import AutoBridge

    make_checkpoint(tmp_path / "hf", DENSE, dtype=dtype)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["text_config"]["dtype"] = "float64"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    provider = AutoBridge.from_hf_pretrained(tmp_path / "hf").to_megatron_provider()
    assert provider.params_dtype == provider.pipeline_dtype == provider.autocast_dtype == getattr(torch, dtype)
    assert (provider.bf16, provider.fp16) == (dtype == "bfloat16", dtype == "float16")
    with pytest.raises(ConfigError, match="dtype: expected one of bfloat16, float16, float32, found float64"):
        AutoBridge.from_hf_config(config).to_megatron_provider()


@pytest.mark.transformers
@pytest.mark.parametrize("name", ["Qwen3VLConfig", "Qwen3VLMoeConfig"])
def test_what_equals_a_class_default_is_a_fact_too(name: str) -> None:
    """transformers leaves it out of the files that it writes; the installed generation's defaults count here."""
    import transformers

    from qwen3vl_convert.models import AutoBridge

    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    older = transformers.__version__ < "5"
    theta = 5000000.0 if older else 500000.0
    spelled = {"rope_scaling": rope} if older else {"rope_parameters": {"rope_theta": theta, **rope}}
    config = getattr(transformers, name)(text_config=spelled)
    provider = AutoBridge.from_hf_config(config).to_megatron_provider()
    assert provider.rotary_base == theta
    assert provider.mrope_section == [12, 10, 10]
    assert provider.kv_channels == (config.text_config.head_dim or 128)


@pytest.mark.parametrize(("dims", "thawed"), [(DENSE, set()), (MOE, {"freeze_language_model", "freeze_vision_model"})])
def test_what_no_config_decides_is_the_class_default_but_nothing_is_frozen(
    tmp_path: Path, dims: Dims, thawed: set[str]
) -> None:
    from dataclasses import fields

    from qwen3vl_convert.models import AutoBridge

    make_checkpoint(tmp_path / "hf", dims)
    made = AutoBridge.from_hf_pretrained(tmp_path / "hf").to_megatron_provider()
    plain = type(made)()
    decided = {
        *expected_settings(json.loads((tmp_path / "hf" / "config.json").read_text())),
        *VISION, "language_max_sequence_length", "vision_config", "hf_text_config", "autocast_dtype", "pipeline_dtype",
    }  # fmt: skip
    differing = {f.name for f in fields(made) if getattr(made, f.name) != getattr(plain, f.name)}
    assert differing - decided == thawed
    parts = ("language_model", "vision_model", "vision_projection")
    assert [getattr(made, f"freeze_{part}") for part in parts] == [False] * 3


def test_the_registry_is_that_of_the_conversion() -> None:
    from qwen3vl_convert.models.bridge import Qwen3VLBridge, Qwen3VLMoEBridge

    assert Qwen3VLBridge().mapping_registry() == mapping_registry("qwen3_vl")
    assert Qwen3VLMoEBridge().mapping_registry() == mapping_registry("qwen3_vl_moe")


def test_what_is_supported(tmp_path: Path) -> None:
    from qwen3vl_convert.models import AutoBridge, Qwen3VLBridge

    make_checkpoint(tmp_path / "hf", DENSE)
    config = AutoBridge.from_hf_pretrained(tmp_path / "hf").hf_config
    assert AutoBridge.supports(config)
    assert AutoBridge.supports(SimpleNamespace(**config))
    assert not AutoBridge.supports({"model_type": "qwen2_vl"})
    assert AutoBridge.can_handle(tmp_path / "hf")
    assert not AutoBridge.can_handle(tmp_path)
    with pytest.raises(UsageError, match="expected a model folder, a Hub id, a config of transformers"):
        AutoBridge(3)
    with pytest.raises(UsageError, match=r"make it of one, Qwen3VLBridge\(folder\)"):
        Qwen3VLBridge().load_hf_weights(None)
    provider = AutoBridge(config).to_megatron_provider(load_weights=True)
    provider.pipeline_model_parallel_size = provider.virtual_pipeline_model_parallel_size = 2
    with pytest.raises(UsageError, match="pass the list to load_hf_weights"):
        provider.provide()
