"""Weights of a checkpoint in the model: whatever the format, each in its place, and nothing else accepted.

What must stand where is written out by hand with torch.cat and slices of the published layout, which the safetensors
library reads.
"""

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from broken import DENSE, MOE, TIED, make
from models.planted import lively_checkpoint
from qwen3vl_convert import Dims, ParallelLayout, hf_to_megatron, megatron_to_hf
from qwen3vl_convert.errors import (
    ConvertError,
    DuplicateTensors,
    InputError,
    MisshapenTensor,
    MissingTensors,
    UnknownTensors,
    UnsupportedFormat,
    UsageError,
)
from qwen3vl_convert.inference.loading import checkpoint_weights, load_model, uninitialised
from qwen3vl_convert.inference.model import Qwen3VLForConditionalGeneration
from qwen3vl_convert.inference.quantization import get_quantization_config
from reference import load_huggingface
from rounding import Roundings

Weights = dict[str, Tensor]
Model = Qwen3VLForConditionalGeneration

UNEVEN = replace(DENSE, attention_bias=True, kv_heads=1, heads=3, vocab=99)
WIDE = replace(MOE, hidden=48, expert_ffn=24, experts=6, vision_out=48)
"""Half as many inner features as outer: its fused gate and up are square."""
MODELS = {"dense": DENSE, "tied": TIED, "uneven": UNEVEN, "moe": replace(MOE, expert_ffn=20), "square experts": WIDE}
LAYOUTS = {
    "dense": ParallelLayout(tp=2, pp=2),
    "tied": ParallelLayout(pp=2),
    "uneven": ParallelLayout(),
    "moe": ParallelLayout(tp=2, pp=2, ep=2),
    "square experts": ParallelLayout(tp=2, ep=2, etp=2),
}
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.language_model.layers.1.mlp.down_proj.weight"
NORM = "model.language_model.norm.weight"


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model of a name as a folder in float32, made once."""
    root = tmp_path_factory.mktemp("loading")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else lively_checkpoint(root / name, MODELS[name])

    return folder


@pytest.fixture(scope="module")
def folder(folders: Callable[[str], Path], name: str) -> Path:
    return folders(name)


def one_by_one(hub: Weights) -> Weights:
    """The published layout with its experts apart."""
    apart: Weights = {}
    for name, tensor in hub.items():
        start = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for number, matrix in enumerate(tensor):
                gate, up = matrix.T.chunk(2)
                apart |= {f"{start}.{number}.gate_proj.weight": gate, f"{start}.{number}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            apart |= {f"{start}.{number}.down_proj.weight": matrix.T for number, matrix in enumerate(tensor)}
        else:
            apart[name] = tensor
    return apart


def parameters(hub: Weights) -> Weights:
    """What each parameter of the model must be."""
    found = {}
    for name, tensor in hub.items():
        layer, _, rest = name.removeprefix("model.language_model.").rpartition(".self_attn.q_proj.")
        if layer:
            parts = [hub[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            found[f"model.{layer}.self_attn.qkv_proj.{rest}"] = torch.cat(parts)
        elif name.endswith("mlp.gate_proj.weight"):
            merged = name.replace("gate_proj", "gate_up_proj").replace("model.language_model.", "model.")
            found[merged] = torch.cat([tensor, hub[name.replace("gate_proj", "up_proj")]])
        elif "experts" in name:
            found[name.replace("model.language_model.", "model.")] = tensor.mT
        elif not name.endswith(("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias", "mlp.up_proj.weight")):
            found[renamed(name)] = tensor
    return found


def renamed(name: str) -> str:
    pairs = {"language_model.": "", "model.visual.": "visual.", "attn.qkv.": "attn.qkv_proj."}
    name = name.replace(".attn.proj.", ".attn.out_proj.") if "visual" in name else name
    for old, new in pairs.items():
        name = name.replace(old, new)
    return name


def check_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different


def empty(dims: Dims, dtype: torch.dtype = torch.float32) -> Model:
    """A model in which every parameter is NaN."""
    with uninitialised(torch.device("cpu"), dtype):
        model = Model(dims)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    return model


def built(dims: Dims, weights: Weights) -> Model:
    model = empty(dims)
    model.load_weights(weights.items())
    return model


# ------------------------------------------------------------------------------------------------ out of a checkpoint


def test_a_folder_is_its_tensors(folder: Path) -> None:
    found = checkpoint_weights(folder)
    check_equal(dict(found), one_by_one(load_huggingface(folder)))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("layout", ["v5", "per-expert", "scrambled"])
def test_experts_of_any_layout_are_the_same(layout: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    hub = folders("moe")
    other = respelled(hub, tmp_path / layout, layout)
    check_equal(dict(checkpoint_weights(other)), one_by_one(load_huggingface(hub)))


def respelled(hub: Path, target: Path, layout: str) -> Path:
    """A folder with its experts laid out otherwise; "scrambled" is what transformers 5.0 made of the published one."""
    weights: Weights = {}
    for name, tensor in load_huggingface(hub).items():
        start = name.rpartition(".")[0]
        if "experts" not in name:
            weights[name] = tensor
        elif layout == "v5":
            weights[name] = tensor.mT.contiguous()
        elif name.endswith("gate_up_proj"):
            for number, matrix in enumerate(tensor):
                gate, up = (matrix if layout == "scrambled" else matrix.T).chunk(2)
                both = {"gate_proj": gate, "up_proj": up}
                weights |= {f"{start}.{number}.{part}.weight": half.contiguous() for part, half in both.items()}
        else:
            for number, matrix in enumerate(tensor):
                weights[f"{start}.{number}.down_proj.weight"] = (
                    matrix.clone() if layout == "scrambled" else matrix.T.contiguous()
                )
    shutil.copytree(hub, target)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("vocabulary", [None, 128], ids=["as it is", "padded"])
def test_a_megatron_checkpoint_is_the_folder(name: str, vocabulary: int | None, folder: Path, tmp_path: Path) -> None:
    hf_to_megatron(folder, tmp_path / "run", layout=LAYOUTS[name], padded_vocab_size=vocabulary and vocabulary * 2)
    check_equal(dict(checkpoint_weights(tmp_path / "run")), one_by_one(load_huggingface(folder)))


@pytest.mark.parametrize(
    ("run", "hub"),
    [
        ("dense_tp1pp1", "dense"),
        ("dense_tp1pp2", "dense"),
        ("dense_tp2pp1", "dense"),
        ("dense_tied_tp1pp1", "dense-tied"),
        ("moe_tp1pp1", "moe"),
        ("moe_tp1pp1ep2", "moe"),
        ("moe_tp2pp1ep1etp2", "moe"),
    ],
)
def test_what_megatron_bridge_wrote_is_the_folder(
    run: str, hub: str, golden_megatron: Path, golden_huggingface: Path
) -> None:
    found = checkpoint_weights(golden_megatron / run, config=golden_huggingface / hub)
    check_equal(dict(found), one_by_one(load_huggingface(golden_huggingface / hub)))


def test_the_names_of_a_base_model_are_read(folders: Callable[[str], Path], tmp_path: Path) -> None:
    weights = load_huggingface(folders("tied"))
    shutil.copytree(folders("tied"), tmp_path / "base")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in weights.items()},
        tmp_path / "base" / "model.safetensors",
        {"format": "pt"},
    )
    check_equal(dict(checkpoint_weights(tmp_path / "base")), weights)


def test_a_tensor_is_its_readers(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Writing to one reaches no file, though it lies in one; a file may begin its tensors at an odd byte."""
    shutil.copytree(folders("dense"), tmp_path / "odd")
    file = tmp_path / "odd" / "model.safetensors"
    before = load_huggingface(folders("dense"))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes((length + 3).to_bytes(8, "little") + content[8 : 8 + length] + b"   " + content[8 + length :])
    for folder in (folders("dense"), tmp_path / "odd"):
        for _, tensor in checkpoint_weights(folder):
            tensor.zero_()
        check_equal(dict(checkpoint_weights(folder)), before)


def test_memory_is_one_tensor(tmp_path: Path) -> None:
    """Not a stack of experts, of which one is a small part."""
    dims = replace(MOE, hidden=64, expert_ffn=64, experts=64, layers=1)
    stack = dims.experts * 2 * dims.expert_ffn * dims.hidden * 2
    hf_to_megatron(make(tmp_path / "hub", dims), tmp_path / "run", layout=ParallelLayout(tp=2))
    for path in (tmp_path / "hub", tmp_path / "run"):
        weights = iter(checkpoint_weights(path))
        next(weights)  # what is known of all tensors is made now
        tracemalloc.start()
        count = sum(1 for _ in weights)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count > 3 * dims.experts
        assert peak < stack / 4


def test_a_quantised_folder_is_refused_by_name(folders: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folders("dense"), tmp_path / "awq")
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    for method in ("awq", "gptq", "fp8"):
        (tmp_path / "awq" / "config.json").write_text(
            json.dumps(config | {"quantization_config": {"quant_method": method}})
        )
        with pytest.raises(UnsupportedFormat, match=f"quantised: {method}"):
            load_model(tmp_path / "awq")


def test_a_model_without_output_layer_is_read_if_that_is_said(folders: Callable[[str], Path], tmp_path: Path) -> None:
    weights = load_huggingface(folders("dense"))
    del weights[HEAD]
    shutil.copytree(folders("dense"), tmp_path / "headless")
    save_file(weights, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MissingTensors, match=HEAD):
        checkpoint_weights(tmp_path / "headless")
    check_equal(dict(checkpoint_weights(tmp_path / "headless", headless=True)), weights)


# ------------------------------------------------------------------------------------------------------ into the model


def test_every_parameter_has_its_weight(folder: Path, name: str) -> None:
    expected = parameters(load_huggingface(folder))
    model = empty(MODELS[name])
    model.load_weights(checkpoint_weights(folder))
    check_equal(dict(model.named_parameters()), expected)
    check_equal(dict(load_model(folder).named_parameters()), expected)


def test_from_megatron_the_model_is_the_same(folder: Path, name: str, tmp_path: Path) -> None:
    hf_to_megatron(folder, tmp_path / "run", layout=LAYOUTS[name], padded_vocab_size=256)
    ours, theirs = (dict(load_model(path).named_parameters()) for path in (tmp_path / "run", folder))
    check_equal(ours, theirs)


def test_an_iteration_can_be_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    hf_to_megatron(folders("dense"), tmp_path / "run", iteration=1)
    hf_to_megatron(folders("tied"), tmp_path / "other", iteration=2)
    shutil.move(tmp_path / "other" / "iter_0000002", tmp_path / "run")
    assert load_model(tmp_path / "run", iteration=1).lm_head is not None
    assert load_model(tmp_path / "run", iteration=2).lm_head is None


def test_the_config_of_a_run_can_be_another_folders(folders: Callable[[str], Path], tmp_path: Path) -> None:
    hf_to_megatron(folders("dense"), tmp_path / "run")
    changed = Path(shutil.copytree(folders("dense"), tmp_path / "config"))
    config = json.loads((changed / "config.json").read_text())
    config["text_config"]["vocab_size"] = 90
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="not padding"):
        load_model(tmp_path / "run", config=changed)
    assert load_model(tmp_path / "run", config=folders("dense")).config.vocab == DENSE.vocab


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16), (torch.float64, torch.float64)],
    ids=str,
)
def test_the_dtype_is_the_checkpoints_or_the_one_asked_for(
    given: str | torch.dtype | None, expected: torch.dtype, folders: Callable[[str], Path]
) -> None:
    model = load_model(folders("moe"), dtype=given)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    wanted = parameters(load_huggingface(folders("moe")))
    check_equal(dict(model.named_parameters()), {name: tensor.to(expected) for name, tensor in wanted.items()})


def test_a_model_is_ready_to_run(folders: Callable[[str], Path]) -> None:
    model = load_model(folders("dense"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_nothing_is_drawn_for_weights_that_are_loaded(folders: Callable[[str], Path]) -> None:
    before = torch.get_rng_state()
    load_model(folders("dense"))
    assert torch.equal(before, torch.get_rng_state())
    with uninitialised(torch.device("meta"), torch.float16):
        layer = torch.nn.Linear(2, 2)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.float16)


def test_the_default_dtype_survives_an_error(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: object, dims: Dims, method: object) -> None:
        assert torch.get_default_dtype() == torch.bfloat16
        raise ZeroDivisionError

    monkeypatch.setattr(Model, "__init__", fail)
    with pytest.raises(ZeroDivisionError):
        load_model(folders("dense"), dtype="bf16")
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "tpu"}, "expected cpu, cuda"),
        ({"dtype": "int8"}, "expected bf16, fp16 or fp32"),
        ({"dtype": torch.int8}, "expected bf16, fp16 or fp32"),
        ({"dtype": torch.float8_e4m3fn}, "expected bf16, fp16 or fp32"),
        ({"quantization": "awq"}, "awq.*int8 is"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, str], says: str, folders: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=says):
        load_model(folders("dense"), **options)


def test_a_gpu_that_is_not_there(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="finds no GPU"):
        load_model(folders("dense"), device="cuda:1")


# --------------------------------------------------------------------------------------------------------- strictness


@pytest.fixture(scope="module")
def dense(folders: Callable[[str], Path]) -> Weights:
    return load_huggingface(folders("dense"))


def refused(error: type[ConvertError], says: str, dims: Dims, weights: Iterator[tuple[str, Tensor]]) -> None:
    with pytest.raises(error, match=says):
        empty(dims).load_weights(weights)


def test_missing_tensors_are_named(dense: Weights) -> None:
    kept = {name: tensor for name, tensor in dense.items() if name not in (DOWN, NORM)}
    refused(MissingTensors, f"2 weights of the model were not given: {DOWN}, {NORM}", DENSE, iter(kept.items()))


def test_unknown_tensors_are_named(dense: Weights) -> None:
    more = {**dense, "model.visual.extra": torch.zeros(1), "score.weight": torch.zeros(1)}
    refused(UnknownTensors, "2 tensors .*: model.visual.extra, score.weight", DENSE, iter(more.items()))
    del more[NORM]
    refused(MissingTensors, f"{NORM} .and 2 that it has no place for", DENSE, iter(more.items()))


def test_every_tensor_that_is_left_out_is_missed(dense: Weights) -> None:
    for name in dense:
        rest = ((other, tensor) for other, tensor in dense.items() if other != name)
        refused(MissingTensors, f": {name}[.]", DENSE, rest)


def test_misshapen_tensors_are_named(dense: Weights) -> None:
    turned = {**dense, DOWN: dense[DOWN].T}
    refused(MisshapenTensor, rf"{DOWN}: expected \(32, 48\), found \(48, 32\)", DENSE, iter(turned.items()))
    flat = {**dense, NORM: dense[NORM][:1]}  # would be copied to every place
    refused(MisshapenTensor, rf"{NORM}: expected \(32,\), found \(1,\)", DENSE, iter(flat.items()))


def test_a_tensor_given_twice_is_refused(dense: Weights) -> None:
    twice = [*dense.items(), (DOWN.removeprefix("model."), dense[DOWN])]
    refused(DuplicateTensors, DOWN, DENSE, iter(twice))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_tensors_are_refused(dtype: torch.dtype, dense: Weights) -> None:
    refused(
        UnsupportedFormat, f"{DOWN} is {str(dtype)[6:]}", DENSE, iter({**dense, DOWN: dense[DOWN].to(dtype)}.items())
    )


def test_frequencies_are_passed_over(dense: Weights) -> None:
    names = ("model.language_model.rotary_emb.inv_freq", "model.visual.rotary_pos_emb.inv_freq")
    check_equal(
        dict(built(DENSE, {**dense, **{name: torch.zeros(4) for name in names}}).named_parameters()), parameters(dense)
    )


def test_names_without_their_prefix_are_taken(dense: Weights) -> None:
    plain = {name.removeprefix("model."): tensor for name, tensor in dense.items()}
    check_equal(dict(built(DENSE, plain).named_parameters()), parameters(dense))


@pytest.mark.parametrize("first", [True, False])
def test_a_tied_model_takes_a_head_that_equals_its_embedding(first: bool, folders: Callable[[str], Path]) -> None:
    weights = load_huggingface(folders("tied"))

    def with_head(head: Tensor) -> Iterator[tuple[str, Tensor]]:
        spare = {HEAD: head}
        return iter(({**spare, **weights} if first else {**weights, **spare}).items())

    empty(TIED).load_weights(with_head(weights[EMBEDDING].clone()))
    other = weights[EMBEDDING].clone()
    other[3, 5] += 1
    refused(InputError, "tied to .*embed_tokens.weight, and they differ", TIED, with_head(other))
    refused(InputError, "they differ", TIED, with_head(weights[EMBEDDING][:-1]))


def test_a_head_is_not_spare_where_nothing_is_tied(folders: Callable[[str], Path]) -> None:
    """Nor does its like make up for a missing one."""
    weights = load_huggingface(folders("tied"))
    refused(MissingTensors, HEAD, replace(TIED, tied=False), iter(weights.items()))


@pytest.mark.parametrize("turned", [False, True], ids=["published", "as transformers 5 has them"])
def test_stacks_of_experts_are_taken(turned: bool, folders: Callable[[str], Path]) -> None:
    hub = load_huggingface(folders("moe"))
    given = {name: tensor.mT if turned and "experts" in name else tensor for name, tensor in hub.items()}
    check_equal(dict(built(MODELS["moe"], given).named_parameters()), parameters(hub))


def test_stacks_that_could_be_either_or_neither_are_refused(folders: Callable[[str], Path]) -> None:
    square = load_huggingface(folders("square experts"))
    refused(MisshapenTensor, "gate_up_proj: .* the shape of two layouts", WIDE, iter(square.items()))
    moe = load_huggingface(folders("moe"))
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    refused(
        MisshapenTensor,
        r"down_proj: expected \(8, 20, 32\), or \(8, 32, 20\).*; found \(7, 20, 32\)",
        MODELS["moe"],
        iter({**moe, name: moe[name][:-1]}.items()),
    )


def test_an_expert_in_a_stack_and_by_itself_is_given_twice(folders: Callable[[str], Path]) -> None:
    moe = load_huggingface(folders("moe"))
    name = "model.language_model.layers.0.mlp.experts.3.down_proj.weight"
    refused(DuplicateTensors, name, MODELS["moe"], iter({**moe, name: torch.zeros(32, 20)}.items()))


# ------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dense", "tied", "moe"])
def test_a_model_of_transformers_gives_its_weights(name: str, folders: Callable[[str], Path]) -> None:
    """Whatever layout its release has in memory, and the head that it lists beside the embedding that it is."""
    pytest.importorskip("transformers")
    from models.sides import load_theirs

    theirs = load_theirs(folders(name)).state_dict()
    assert (HEAD in theirs) or not MODELS[name].tied
    check_equal(dict(built(MODELS[name], theirs).named_parameters()), parameters(load_huggingface(folders(name))))


def test_a_folder_made_from_a_run_is_the_run(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The conversion on disk and the one in memory are one."""
    hf_to_megatron(folders("moe"), tmp_path / "run", layout=ParallelLayout(tp=2, ep=2))
    megatron_to_hf(tmp_path / "run", tmp_path / "back", experts_layout="per-expert")
    check_equal(dict(checkpoint_weights(tmp_path / "run")), load_huggingface(tmp_path / "back"))


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_device_gets_what_is_stored_and_rounds_it_there(quantization: str | None, tmp_path: Path) -> None:
    """A copy to another device and dtype at once is rounded by the host, which takes longer than to read it."""
    folder = lively_checkpoint(tmp_path / "model", MODELS["moe"])
    weights = checkpoint_weights(folder)
    method = None if quantization is None else get_quantization_config(quantization)
    with uninitialised(torch.device("meta"), torch.bfloat16):
        model = Model(weights.dims, method)
    with Roundings() as seen:
        model.load_weights(weights)
    assert set(seen.devices) == {"meta"}
    assert len(seen.devices) >= len(list(model.parameters()))
