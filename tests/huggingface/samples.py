"""Tiny models for the tests of this room: configs in both generations' spelling, names and shapes of tensors, folders.

The list of tensors is written out here, apart from the program's own tables, and compared with the published headers.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

from broken import write_header
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.storage import DTYPES
from recorded import CONFIGS

SIZES = ("2b", "4b", "8b", "32b", "30b", "235b")
VARIANTS = tuple(
    f"cfg_{kind}_{version}"
    for kind in ("dense_tied", "dense_untied", "moe")
    for version in ("4.57.6", "5.3.0", "5.17.0", "5.23.0")
)

Shapes = dict[str, tuple[int, ...]]


def published(size: str) -> dict[str, Any]:
    return dict(json.loads((CONFIGS / f"{size}.config.json").read_text()))


def variant(name: str) -> dict[str, Any]:
    return dict(json.loads((CONFIGS / "variants" / f"{name}.json").read_text()))


def tiny_config(moe: bool = False, **text: Any) -> dict[str, Any]:
    """A config in the hub's form; `text` replaces keys of text_config."""
    kind = "qwen3_vl_moe" if moe else "qwen3_vl"
    experts = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 6,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    sizes = {
        "attention_bias": False,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 16,
        "intermediate_size": 20,
        "max_position_embeddings": 1024,
        "model_type": f"{kind}_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default"},
        "rope_theta": 5000000,
        "vocab_size": 32,
    }
    vision = {
        "deepstack_visual_indexes": [0, 1],
        "depth": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 8,
        "in_channels": 3,
        "intermediate_size": 12,
        "model_type": kind,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": 16,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"],
        "image_token_id": 20,
        "model_type": kind,
        "text_config": sizes | (experts if moe else {}) | text,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 21,
        "vision_config": vision,
        "vision_end_token_id": 23,
        "vision_start_token_id": 22,
    }


def as_5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 5.23 would save it."""
    config = copy.deepcopy(config)
    text, vision = config["text_config"], config["vision_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    if "num_experts" in text:
        text["num_local_experts"] = text.pop("num_experts")
        text["tie_word_embeddings"] = True  # although the model is not: this is what 5.17 and newer do
    vision["model_type"] += "_vision"
    vision["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "axial"}
    config["dtype"] = vision["dtype"] = text["dtype"]
    config["transformers_version"] = "5.23.0"
    return config


def with_changes(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with `text_config__key=value` (nested) or `key=value` set; `None` removes the key."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *sections, key = path.split("__")
        target = config
        for section in sections:
            target = target[section]
        if value is None:
            target.pop(key, None)
        else:
            target[key] = value
    return config


def model_shapes(dims: Dims, experts: str = "hub", head: bool | None = None) -> Shapes:
    """Every tensor of the published form of a model. `head`: whether lm_head is stored; by default if not tied."""
    shapes = _text_shapes(dims, experts) | _vision_shapes(dims)
    if head if head is not None else not dims.tied:
        shapes["lm_head.weight"] = (dims.vocab, dims.hidden)
    return shapes


def _text_shapes(dims: Dims, experts: str) -> Shapes:
    h, d = dims.hidden, dims.head_dim
    text = "model.language_model."
    shapes: Shapes = {f"{text}embed_tokens.weight": (dims.vocab, h), f"{text}norm.weight": (h,)}
    for layer in range(dims.layers):
        own: Shapes = {
            "self_attn.q_proj.weight": (dims.heads * d, h),
            "self_attn.k_proj.weight": (dims.kv_heads * d, h),
            "self_attn.v_proj.weight": (dims.kv_heads * d, h),
            "self_attn.o_proj.weight": (h, dims.heads * d),
            "self_attn.q_norm.weight": (d,),
            "self_attn.k_norm.weight": (d,),
            "input_layernorm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
        }
        own |= expert_shapes(dims, experts) if dims.moe else gated_shapes("mlp.", dims.ffn, h)
        shapes |= {f"{text}layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


def gated_shapes(prefix: str, ffn: int, hidden: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (ffn, hidden),
        f"{prefix}up_proj.weight": (ffn, hidden),
        f"{prefix}down_proj.weight": (hidden, ffn),
    }


def expert_shapes(dims: Dims, layout: str) -> Shapes:
    e, h, i = dims.experts, dims.hidden, dims.expert_ffn
    shapes: Shapes = {"mlp.gate.weight": (e, h)}
    if layout == "hub":
        shapes |= {"mlp.experts.gate_up_proj": (e, h, 2 * i), "mlp.experts.down_proj": (e, i, h)}
    elif layout == "v5":
        shapes |= {"mlp.experts.gate_up_proj": (e, 2 * i, h), "mlp.experts.down_proj": (e, h, i)}
    for expert in range(e):
        if layout == "per-expert":
            shapes |= gated_shapes(f"mlp.experts.{expert}.", i, h)
        elif layout == "scrambled":
            halves = {
                "gate_proj.weight": (h // 2, 2 * i),
                "up_proj.weight": (h // 2, 2 * i),
                "down_proj.weight": (i, h),
            }
            shapes |= {f"mlp.experts.{expert}.{name}": shape for name, shape in halves.items()}
    return shapes


def _vision_shapes(dims: Dims) -> Shapes:
    v, w, o = dims.vision_hidden, dims.vision_hidden * dims.spatial_merge**2, dims.vision_out
    patch = (v, dims.channels, dims.temporal_patch, dims.patch, dims.patch)
    linear: Shapes = {"patch_embed.proj": patch}
    for block in range(dims.vision_depth):
        own: Shapes = {
            "norm1": (v,),
            "norm2": (v,),
            "attn.qkv": (3 * v, v),
            "attn.proj": (v, v),
            "mlp.linear_fc1": (dims.vision_ffn, v),
            "mlp.linear_fc2": (v, dims.vision_ffn),
        }
        linear |= {f"blocks.{block}.{name}": shape for name, shape in own.items()}
    for merger in ("merger", *(f"deepstack_merger_list.{number}" for number in range(len(dims.deepstack)))):
        norm = (v,) if merger == "merger" else (w,)
        linear |= {f"{merger}.norm": norm, f"{merger}.linear_fc1": (w, w), f"{merger}.linear_fc2": (o, w)}
    shapes: Shapes = {"model.visual.pos_embed.weight": (dims.position_embeddings, v)}
    for name, shape in linear.items():
        shapes |= {f"model.visual.{name}.weight": shape, f"model.visual.{name}.bias": shape[:1]}
    return shapes


def save(path: Path, shapes: Shapes, dtype: str | dict[str, str] = "bfloat16", **metadata: str) -> None:
    """A safetensors file of zeros; `dtype`, as torch calls it, may be per tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    start = 0
    for name, shape in shapes.items():
        kind, itemsize = _stored_as(dtype if isinstance(dtype, str) else dtype.get(name, "bfloat16"))
        stop = start + math.prod(shape) * itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    write_header(path, header, bytes(start))


def _stored_as(dtype: str) -> tuple[str, int]:
    """What the format calls a dtype, and the bytes of an element."""
    return ("U32", 4) if dtype == "uint32" else (DTYPES[dtype].safetensors, DTYPES[dtype].itemsize)


def make_folder(
    folder: Path, config: dict[str, Any], shapes: Shapes | None = None, files: int = 1, **extra: Any
) -> Path:
    """A model folder of zeros; several files get an index. `extra` goes to `save`."""
    shapes = model_shapes(Dims.from_config(config)) if shapes is None else shapes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    names = list(shapes)
    shards = [names[part::files] for part in range(files)]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if files == 1 else f"model-{number:05d}-of-{files:05d}.safetensors"
        save(folder / file, {name: shapes[name] for name in shard}, **extra)
        weight_map |= dict.fromkeys(shard, file)
    if files > 1:
        write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
