"""Random checkpoints of real shapes, for trials: streamed to disk, the same bits for the same seed on every machine."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.fill import Progress
from qwen3vl_convert.huggingface.config import config_json, portable_config, rebuild_config
from qwen3vl_convert.huggingface.target import huggingface_target
from qwen3vl_convert.huggingface.writer import hub_order
from qwen3vl_convert.mappings import MegatronMappingRegistry, mapping_registry
from qwen3vl_convert.mappings.qwen3_vl import TABLES
from qwen3vl_convert.plan import pieces
from qwen3vl_convert.rounding import cast
from qwen3vl_convert.seal import check_space, publishing
from qwen3vl_convert.storage import DTYPES, StoredTensor
from qwen3vl_convert.strided import Array

_TEXT_8B = Dims(
    model_type="qwen3_vl", layers=36, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=12288, vocab=151936,
    experts=0, expert_ffn=0, top_k=0, attention_bias=False, tied=False, rms_eps=1e-6, rope_theta=5e6,
    mrope_section=(24, 20, 20), max_positions=262144,
    vision_depth=27, vision_hidden=1152, vision_heads=16, vision_ffn=4304, vision_out=4096,
    patch=16, temporal_patch=2, channels=3, spatial_merge=2, position_embeddings=2304, deepstack=(8, 16, 24),
    dtype="bfloat16", image_token_id=151655, video_token_id=151656,
    vision_start_token_id=151652, vision_end_token_id=151653, bos_token_id=151643, eos_token_id=151645,
)  # fmt: skip
_SMALL_VISION = {"vision_depth": 24, "vision_hidden": 1024, "vision_ffn": 4096, "deepstack": (5, 11, 17)}
_MOE = {"model_type": "qwen3_vl_moe", "kv_heads": 4, "experts": 128, "top_k": 8}
_TINY = replace(
    _TEXT_8B, layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=160, vocab=512, mrope_section=(4, 2, 2),
    max_positions=1024, vision_depth=4, vision_hidden=64, vision_heads=4, vision_ffn=96, vision_out=64,
    position_embeddings=64, deepstack=(0, 1, 2), image_token_id=500, video_token_id=501, vision_start_token_id=502,
    vision_end_token_id=503, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

SIZES: dict[str, Dims] = {
    "tiny": _TINY,
    "tiny-moe": replace(_TINY, model_type="qwen3_vl_moe", experts=8, expert_ffn=48, top_k=2),
    "2b": replace(_TEXT_8B, layers=28, hidden=2048, heads=16, ffn=6144, tied=True, vision_out=2048, **_SMALL_VISION),  # type: ignore[arg-type]
    "4b": replace(_TEXT_8B, hidden=2560, ffn=9728, tied=True, vision_out=2560, **_SMALL_VISION),  # type: ignore[arg-type]
    "8b": _TEXT_8B,
    "32b": replace(_TEXT_8B, layers=64, hidden=5120, heads=64, ffn=25600, vision_out=5120),
    "30b-a3b": replace(_TEXT_8B, layers=48, hidden=2048, ffn=6144, expert_ffn=768, vision_out=2048, **_MOE),  # type: ignore[arg-type]
    "235b-a22b": replace(_TEXT_8B, layers=94, heads=64, expert_ffn=1536, **_MOE),  # type: ignore[arg-type]
}
"""The published models, and two tiny ones of the same architecture."""

_BLOCK = 16 << 20


def make_checkpoint(
    target: str | Path,
    size: str | Dims = "tiny",
    *,
    layers: int | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    experts_layout: str = "hub",
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Dims:
    """Write a Hugging Face folder with random weights; returns its sizes.

    `size`: a name of `SIZES`, or sizes of your own. `layers` cuts the depth of the text model. Memory is a few blocks.
    """
    dims = _chosen(size, layers, dtype)
    layout = experts_layout if dims.moe else "hub"
    known = mapping_registry(dims.model_type, attention_bias=dims.attention_bias, head=not dims.tied)
    registry = MegatronMappingRegistry(*(m for m in known if m in TABLES[dims.model_type])).with_experts(layout)
    shapes = registry.hf_names(dims.sizes())
    entries = [(name, dtype, shapes[name] or ()) for name in hub_order(shapes, dims)]
    config, _ = rebuild_config(dims)
    text = config_json(portable_config(config, dims, dtype, layout)).encode()
    output = huggingface_target(entries, text, (), max_shard_bytes)
    check_space(Path(target), output.nbytes)
    with publishing(Path(target), "", overwrite=overwrite) as staging:
        staging.lay_out(output)
        for tensor in output.tensors.values():
            _write(tensor, staging.content, seed, progress or (lambda nbytes: None))
        staging.publish(fsync=False)
    return dims


def _chosen(size: str | Dims, layers: int | None, dtype: str) -> Dims:
    if isinstance(size, str) and size.lower() not in SIZES:
        raise UsageError(f"--size {size}: expected one of {', '.join(SIZES)}.")
    if layers is not None and layers < 1:
        raise UsageError(f"--layers {layers}: expected 1 or more.")
    dims = SIZES[size.lower()] if isinstance(size, str) else size
    return replace(dims, layers=layers or dims.layers, dtype=dtype)


def _write(tensor: StoredTensor, folder: Path, seed: int, progress: Progress) -> None:
    """Fill one tensor, block by block, from a generator seeded by its name."""
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(tensor.name.encode())]))
    chunk = tensor.chunks[0]
    with (folder / chunk.file).open("r+b") as file:
        file.seek(chunk.start)
        for _, sizes in pieces(chunk, 2, _BLOCK):
            block = _values(generator, int(np.prod(sizes)), tensor.name)
            if tensor.dtype != "bfloat16":
                block = cast(block, "bfloat16", tensor.dtype, tensor.name)
            file.write(block.tobytes())
            progress(block.size * DTYPES[tensor.dtype].itemsize)


def _values(generator: np.random.Generator, count: int, name: str) -> Array:
    """bfloat16 bit patterns: magnitudes of 0.0039 to 0.06 of either sign; norms lie around one."""
    bits = np.frombuffer(generator.bytes(2 * count), dtype="<u2").astype(np.uint16)
    if "norm" in name and name.endswith(".weight"):
        return np.uint16(0x3F40) + (bits & np.uint16(0x7F))
    exponent = np.uint16(119) + (bits >> np.uint16(13) & np.uint16(3))
    return (bits & np.uint16(0x807F)) | (exponent << np.uint16(7))
