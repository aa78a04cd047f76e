"""What is recognised and refused: each by its own name, in a folder that is otherwise a good one."""

from pathlib import Path
from typing import Any

import pytest

from huggingface.samples import make_folder, model_shapes, tiny_config, with_changes
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import InputError, UnknownTensors, UnsupportedFormat
from qwen3vl_convert.huggingface.folder import read_folder

CONFIG = tiny_config()
SHAPES = model_shapes(Dims.from_config(CONFIG))
LAYER = "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (f"{LAYER}.weight_scale_inv", r"block FP8 \(scale_inv\)"),
        ("model.language_model.layers.0.mlp.experts.gate_up_proj_scale_inv", r"block FP8 \(scale_inv\)"),
        (f"{LAYER}.weight_packed", "compressed-tensors"),
        (f"{LAYER}.weight_zero_point", "compressed-tensors"),
        (f"{LAYER}.weight_scale", "compressed-tensors or FP8 with weight_scale"),
        (f"{LAYER}.qweight", "AWQ or GPTQ"),
        (f"{LAYER}.qzeros", "AWQ or GPTQ"),
        (f"{LAYER}.weight.absmax", "bitsandbytes"),
        (f"{LAYER}.SCB", "bitsandbytes"),
        (f"{LAYER}.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        (f"{LAYER}.weight_scale_2", "NVFP4"),
        (f"{LAYER}.weight_quantizer.scale", "Quark or ModelOpt"),
        (f"{LAYER}.scale_weight", "ComfyUI scaled FP8"),
        ("scaled_fp8", "ComfyUI scaled FP8"),
        (f"{LAYER}.scales", "MLX"),
        (f"{LAYER}.biases", "MLX"),
    ],
)
def test_quantised_by_name(tmp_path: Path, extra: str, name: str) -> None:
    with pytest.raises(UnsupportedFormat, match=f"{extra}: the checkpoint is quantised: {name}"):
        read_folder(make_folder(tmp_path, CONFIG, SHAPES | {extra: (2, 2)}))


def test_the_telling_name_counts(tmp_path: Path) -> None:
    nvfp4 = {f"{LAYER}.weight_scale": (1,), f"{LAYER}.weight_scale_2": (1,), f"{LAYER}.input_scale": (1,)}
    with pytest.raises(UnsupportedFormat, match="NVFP4"):
        read_folder(make_folder(tmp_path / "a", CONFIG, SHAPES | nvfp4))
    awq = {f"{LAYER}.scales": (1,), f"{LAYER}.qweight": (1,)}
    with pytest.raises(UnsupportedFormat, match="AWQ or GPTQ"):
        read_folder(make_folder(tmp_path / "b", CONFIG, SHAPES | awq))


def test_biases_and_scales_of_plain_weights_are_none(tmp_path: Path) -> None:
    plain = {f"{LAYER}.bias": (1,), "logit_scale": (1,), "scales.weight": (1,)}
    assert set(read_folder(make_folder(tmp_path, CONFIG, SHAPES | plain)).tensors) == {*SHAPES, *plain}


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_quantised_by_dtype(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(UnsupportedFormat, match=f"{LAYER}.weight: the checkpoint is quantised: {dtype} without scales"):
        read_folder(make_folder(tmp_path, CONFIG, dtype={f"{LAYER}.weight": dtype}))


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "uint32", "bool", "float64"])
def test_dtypes_that_are_no_weights(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(UnsupportedFormat, match=f"expected bfloat16, float16, float32; {LAYER}.weight is {dtype}"):
        read_folder(make_folder(tmp_path, CONFIG, dtype={f"{LAYER}.weight": dtype}))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, "quantization_config: .*: fp8 e4m3"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            "compressed-tensors pack-quantized",
        ),
        ({"text_config__quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization: .*: MLX"),
        ({"quantization_config": "nf4"}, "nf4"),
    ],
)
def test_quantised_by_config(tmp_path: Path, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedFormat, match=f"config.json: .*is quantised.*{name}|config.json: {name}"):
        read_folder(make_folder(tmp_path, with_changes(CONFIG, **changes)))


def renamed(old: str, new: str) -> dict[str, tuple[int, ...]]:
    return {new + name.removeprefix(old) if name.startswith(old) else name: shape for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        (renamed("model.language_model.", "language_model.model."), "vLLM or MLX"),
        ({"language_model.lm_head.weight": (1,), **renamed("model.", "")}, "vLLM or MLX"),
        (renamed("model.visual.", "vision_tower."), "MLX"),
        (renamed("model.language_model.", "model."), "ComfyUI or of a text-only Qwen3"),
        (renamed("model.", "module.model."), "DistributedDataParallel"),
        (renamed("model.", "base_model.model.model."), "PEFT"),
        (renamed("model.", "_orig_mod.model."), "torch.compile"),
        (renamed("model.", "_fsdp_wrapped_module.model."), "FSDP"),
    ],
)
def test_names_of_others(tmp_path: Path, shapes: dict[str, tuple[int, ...]], what: str) -> None:
    with pytest.raises(UnsupportedFormat, match=rf"names in .*\* are those of .*{what}"):
        read_folder(make_folder(tmp_path, CONFIG, shapes))


def test_two_ways_of_naming(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found two: model.language_model.* and visual\."):
        read_folder(make_folder(tmp_path, CONFIG, renamed("model.visual.", "visual.")))


def test_names_of_nobody(tmp_path: Path) -> None:
    with pytest.raises(UnknownTensors, match=r"found a, lm_head.weight. These are not the weights of a Qwen3-VL"):
        read_folder(make_folder(tmp_path, CONFIG, {"a": (1,), "lm_head.weight": (1,)}))


def test_mlx_says_so_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match=r"model.safetensors: the file is MLX's"):
        read_folder(make_folder(tmp_path, CONFIG, format="mlx"))
