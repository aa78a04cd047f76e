"""Weights in eight bits: as near as eight bits allow, the same by every kernel, and only where they belong."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from broken import DENSE, MOE
from models.planted import lively_checkpoint
from qwen3vl_convert import Dims
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.inference import quantization
from qwen3vl_convert.inference.loading import load_model
from qwen3vl_convert.inference.quantization import (
    SCALE,
    Int8Config,
    Int8LinearMethod,
    LinearMethod,
    QuantizationConfig,
    UnquantizedLinearMethod,
    get_quantization_config,
    quantized,
    register_quantization,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
"""Of the largest output: what computing in a dtype costs."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several to a weight."""
    monkeypatch.setattr(quantization, "_BLOCK", 400)


@pytest.fixture(autouse=True)
def no_onednn() -> Iterator[None]:
    """Its bfloat16 ends in an illegal instruction on machines that offer AMX and refuse it."""
    used = torch.backends.mkldnn.set_flags(False)[0]
    yield
    torch.backends.mkldnn.set_flags(used)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: Tensor, method: LinearMethod | None = None) -> tuple[nn.Module, LinearMethod]:
    """A layer that has taken a weight [N, K], or a stack of them."""
    method = method or Int8LinearMethod()
    layer = nn.Module()
    method.create_weights(layer, "weight", tuple(weight.shape))
    for at, matrix in enumerate(weight) if weight.dim() == 3 else [(None, weight)]:
        method.load(layer, "weight", (0,) if at is None else (at, 0), matrix)
    return layer, method


def eights(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight")


def as_numbers(layer: nn.Module) -> Tensor:
    return eights(layer).double() * layer.get_parameter("weight" + SCALE).double().unsqueeze(-1)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


# ---------------------------------------------------------------------------------------------------------- the numbers


def test_a_weight_is_off_by_half_a_step_at_most() -> None:
    """A step being 1/127 of the largest magnitude of the row, or at most 1/128 more than that."""
    weight = random(37, 41) * torch.logspace(-4, 4, 37).unsqueeze(-1)
    layer, _ = layer_of(weight)
    step = weight.double().abs().amax(-1) / 127 * (1 + 2**-7)
    assert ((as_numbers(layer) - weight).abs() <= step.unsqueeze(-1) / 2).all()
    assert eights(layer).dtype == torch.int8
    assert eights(layer).min() >= -127
    assert (eights(layer).abs().amax(-1) >= 126).all()


def test_every_row_has_its_own_scale() -> None:
    """One large row must not coarsen the others."""
    weight = random(8, 16)
    large = weight.clone()
    large[3] *= 1000
    rows = [row for row in range(8) if row != 3]
    assert torch.equal(eights(layer_of(weight)[0])[rows], eights(layer_of(large)[0])[rows])


def test_scales_are_numbers_of_every_dtype() -> None:
    _, scale = quantized(random(64, 32))
    assert scale.dtype == torch.float32
    assert torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize(
    ("row", "expected"),
    [([0.0, 0.0], [0, 0]), ([127.0, -127.0], [127, -127]), ([127.0, 0.5], [127, 0]), ([127.0, -1.5], [127, -2])],
    ids=["zeros", "ends", "half to even", "half to even, negative"],
)
def test_rounding(row: list[float], expected: list[int]) -> None:
    assert quantized(torch.tensor([row]))[0].tolist() == [expected]


@pytest.mark.parametrize("size", [1e-40, 1e-45, 3e38])
def test_extremes_stay_finite(size: float) -> None:
    layer, method = layer_of(torch.tensor([[size, -size, 0.0]]))
    assert as_numbers(layer).isfinite().all()
    assert method.apply(layer, "weight", torch.zeros(1, 3)).tolist() == [[0.0]]


def test_what_is_loaded_in_parts_is_what_is_loaded_whole() -> None:
    weight = random(30, 24)
    whole, method = layer_of(weight)
    parts = nn.Module()
    method.create_weights(parts, "weight", (30, 24))
    for first, stop in ((17, 30), (0, 5), (5, 17)):
        method.load(parts, "weight", (first,), weight[first:stop])
    for name in method.parameters_of("weight"):
        assert torch.equal(parts.get_parameter(name), whole.get_parameter(name))


# --------------------------------------------------------------------------------------------------------- the product


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(), (1,), (16,), (17,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_kernel_multiplies_by_the_same_numbers(
    dtype: torch.dtype, rows: tuple[int, ...], mode: type[torch.no_grad]
) -> None:
    layer, method = layer_of(random(29, 64))
    x, bias = random(*rows, 64, seed=1).to(dtype), random(29, seed=2).to(dtype)
    with mode():
        found = method.apply(layer, "weight", x, bias)
    assert (found.dtype, found.shape) == (dtype, (*rows, 29))
    if found.numel():
        assert off(found, x.double() @ as_numbers(layer).T + bias.double()) < ROUNDING[dtype]
        assert off(method.apply(layer, "weight", x), x.double() @ as_numbers(layer).T) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_of_a_stack(dtype: torch.dtype) -> None:
    stack = random(5, 12, 32)
    layer, method = layer_of(stack)
    x = random(3, 32, seed=1).to(dtype)
    for index in range(5):
        assert off(method.apply(layer, "weight", x, index=index), x.double() @ as_numbers(layer)[index].T) < 2**-6
        alone = layer_of(stack[index])[0]
        assert torch.equal(eights(alone), eights(layer)[index])


def test_large_sums_fit_float16() -> None:
    """127 * 4000 * 1 does not, the product does."""
    layer, method = layer_of(torch.full((2, 4000), 1e-3))
    x = torch.ones(1, 4000, dtype=torch.float16)
    assert method.apply(layer, "weight", x).tolist() == [pytest.approx([4.0, 4.0], rel=1e-2)]


def test_strided_activations() -> None:
    layer, method = layer_of(random(8, 32))
    x = random(32, 4, seed=1).bfloat16().T
    assert torch.equal(method.apply(layer, "weight", x), method.apply(layer, "weight", x.contiguous()))


def test_memory_is_shared_by_modes_but_not_by_threads() -> None:
    """What inference mode made may not be written outside of it; what another thread writes is not ours."""
    layers = [layer_of(random(40, 64, seed=seed)) for seed in range(2)]
    x = random(20, 64, seed=9)
    expected = [x.double() @ as_numbers(layer).T for layer, _ in layers]
    worst: list[float] = []

    def work(which: int) -> None:
        layer, method = layers[which]
        for turn in range(60):
            with torch.inference_mode(turn % 2 == 0):
                worst.append(off(method.apply(layer, "weight", x), expected[which]))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 120
    assert max(worst) < ROUNDING[torch.float32]


@pytest.mark.parametrize("method", [Int8LinearMethod(), UnquantizedLinearMethod()], ids=["int8", "plain"])
@pytest.mark.parametrize("index", [None, 2, torch.tensor([4, 0, 4])], ids=["all", "one", "several"])
def test_the_weight_as_numbers(method: LinearMethod, index: int | Tensor | None) -> None:
    stack = random(5, 12, 32)
    layer, _ = layer_of(stack, method)
    expected = as_numbers(layer) if isinstance(method, Int8LinearMethod) else stack.double()
    found = method.weight(layer, "weight", torch.float32, index)
    assert off(found, expected if index is None else expected[index]) < 1e-6


def test_the_plain_method_is_a_linear_layer() -> None:
    weight, x, bias = random(12, 32), random(3, 32, seed=1), random(12, seed=2)
    layer, method = layer_of(weight, UnquantizedLinearMethod())
    assert torch.equal(method.apply(layer, "weight", x, bias), functional.linear(x, weight, bias))
    assert method.parameters_of("weight") == ("weight",)
    assert not eights(layer).requires_grad


# ------------------------------------------------------------------------------------------------------------ the names


def test_int8_is_for_the_layers_of_the_text_model() -> None:
    layer = "model.layers.3."
    rounded = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "mlp.experts"]
    plain = ["mlp.gate", "input_layernorm", "self_attn.q_norm"]
    config = get_quantization_config("int8")
    assert isinstance(config, Int8Config)
    assert config.get_name() == "int8"
    assert all(isinstance(config.get_quant_method(None, layer + name), Int8LinearMethod) for name in rounded)
    others = [*(layer + name for name in plain), "model.embed_tokens", "lm_head", "visual.blocks.0.attn.qkv_proj", ""]
    assert not any(config.get_quant_method(None, name) for name in others)


@pytest.mark.parametrize("name", ["awq", "gptq", "fp8", "int4", ""])
def test_other_names_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is not supported; int8 is"):
        get_quantization_config(name)


@pytest.fixture
def registered() -> Iterator[type[QuantizationConfig]]:
    @register_quantization("Mine")
    class Mine(QuantizationConfig):
        def get_name(self) -> str:
            return "mine"

        def get_quant_method(self, layer: nn.Module | None, prefix: str) -> LinearMethod | None:
            return None

    yield Mine
    del quantization._REGISTERED["mine"]


def test_a_method_can_be_added(registered: type[QuantizationConfig]) -> None:
    assert isinstance(get_quantization_config("mine"), registered)
    with pytest.raises(UsageError, match="int8, mine are"):
        get_quantization_config("other")


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("dims", [DENSE, MOE], ids=["dense", "moe"])
def test_a_model_is_rounded_as_it_is_loaded(dims: Dims, tmp_path: Path) -> None:
    folder = lively_checkpoint(tmp_path / "model", dims)
    plain, rounded = load_model(folder), load_model(folder, quantization="int8")
    whole = dict(plain.named_parameters())
    names = {name for name, parameter in rounded.named_parameters() if parameter.dtype == torch.int8}
    merged = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert names == {name for name in whole if name.startswith("model.layers") and any(part in name for part in merged)}
    for name, parameter in rounded.named_parameters():
        if name in names:
            numbers, scales = quantized(whole[name])
            assert torch.equal(parameter, numbers)
            assert torch.equal(rounded.get_parameter(name + SCALE), scales)
        elif not name.endswith(SCALE):
            assert torch.equal(parameter, whole[name])


def test_rounding_takes_the_memory_of_a_block() -> None:
    """However large the weight: torch is watched for what it makes beside the weight and its parts."""
    weight = random(1000, 40).bfloat16()
    layer, method = nn.Module(), Int8LinearMethod()
    method.create_weights(layer, "weight", (1000, 40))
    known = {tensor.untyped_storage().data_ptr() for tensor in (weight, *layer.parameters())}
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in known:
                made.append(found.untyped_storage().nbytes())
            return found

    with Watch():
        method.load(layer, "weight", (0,), weight)
    assert made
    assert max(made) <= 400 * 4
