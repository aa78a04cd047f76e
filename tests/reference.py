"""The mapping once more, written out by hand with torch.cat and view: the oracle outside of the notation.

It knows the published (hub) layout and the stacked keys only, and shares no code with the program.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.megatron.checkpoint import read_megatron

HF = dict[str, Tensor]
INTEGERS = {2: torch.int16, 4: torch.int32}


def load_huggingface(folder: Path) -> HF:
    """Every tensor of a folder, by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def load_megatron(folder: Path) -> HF:
    """Whole tensors of a torch_dist checkpoint, chunk by chunk through torch.load's own reader (weights only)."""
    import io

    from qwen3vl_convert.megatron.metadata import read_metadata

    iteration = read_megatron(folder).folder
    whole = {}
    for key, entry in read_metadata(iteration / ".metadata").tensors.items():
        whole[key] = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for chunk in entry.chunks:
            data = (iteration / chunk.relative_path).read_bytes()[chunk.offset : chunk.offset + chunk.length]
            box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[key][box] = torch.load(io.BytesIO(data), weights_only=True)
    return whole


def expected_megatron(hf: HF, dims: Dims, padded_vocab: int | None = None) -> HF:
    """What a Megatron checkpoint of these weights must hold, by stacked key."""
    out = {**_vision(hf, dims), **_attention(hf, dims), **(_moe(hf, dims) if dims.moe else _dense(hf, dims))}
    embedding = hf["model.language_model.embed_tokens.weight"]
    out["language_model.embedding.word_embeddings.weight"] = _pad(embedding, padded_vocab)
    if "lm_head.weight" in hf:
        out["language_model.output_layer.weight"] = _pad(hf["lm_head.weight"], padded_vocab)
    out["language_model.decoder.final_layernorm.weight"] = hf["model.language_model.norm.weight"]
    return out


def _pad(weight: Tensor, rows: int | None) -> Tensor:
    extra = (rows or len(weight)) - len(weight)
    return torch.cat([weight, weight.new_zeros(extra, weight.shape[1])])


def _layers(hf: HF, dims: Dims, name: str) -> list[Tensor]:
    return [hf[f"model.language_model.layers.{i}.{name}"] for i in range(dims.layers)]


def _attention(hf: HF, dims: Dims) -> HF:
    to = "language_model.decoder.layers.self_attention."
    q, k, v = (_layers(hf, dims, f"self_attn.{x}_proj.weight") for x in "qkv")
    return {
        to + "linear_qkv.weight": torch.stack([_interleave(*qkv, dims) for qkv in zip(q, k, v, strict=True)]),
        to + "linear_qkv.layer_norm_weight": torch.stack(_layers(hf, dims, "input_layernorm.weight")),
        to + "linear_proj.weight": torch.stack(_layers(hf, dims, "self_attn.o_proj.weight")),
        to + "q_layernorm.weight": torch.stack(_layers(hf, dims, "self_attn.q_norm.weight")),
        to + "k_layernorm.weight": torch.stack(_layers(hf, dims, "self_attn.k_norm.weight")),
    }


def _interleave(q: Tensor, k: Tensor, v: Tensor, dims: Dims) -> Tensor:
    """Query heads, key and value of the first group, then of the next."""
    rows = []
    per_group = dims.heads // dims.kv_heads * dims.head_dim
    for group in range(dims.kv_heads):
        rows.append(q[group * per_group : (group + 1) * per_group])
        rows.append(k[group * dims.head_dim : (group + 1) * dims.head_dim])
        rows.append(v[group * dims.head_dim : (group + 1) * dims.head_dim])
    return torch.cat(rows)


def _dense(hf: HF, dims: Dims) -> HF:
    to = "language_model.decoder.layers.mlp."
    gate, up = _layers(hf, dims, "mlp.gate_proj.weight"), _layers(hf, dims, "mlp.up_proj.weight")
    return {
        to + "linear_fc1.layer_norm_weight": torch.stack(_layers(hf, dims, "post_attention_layernorm.weight")),
        to + "linear_fc1.weight": torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)]),
        to + "linear_fc2.weight": torch.stack(_layers(hf, dims, "mlp.down_proj.weight")),
    }


def _moe(hf: HF, dims: Dims) -> HF:
    to = "language_model.decoder.layers."
    return {
        to + "pre_mlp_layernorm.weight": torch.stack(_layers(hf, dims, "post_attention_layernorm.weight")),
        to + "mlp.router.weight": torch.stack(_layers(hf, dims, "mlp.gate.weight")),
        to + "mlp.experts.experts.linear_fc1.weight": torch.stack(_layers(hf, dims, "mlp.experts.gate_up_proj")).mT,
        to + "mlp.experts.experts.linear_fc2.weight": torch.stack(_layers(hf, dims, "mlp.experts.down_proj")).mT,
    }


def _vision(hf: HF, dims: Dims) -> HF:
    visual = {name.removeprefix("model.visual."): t for name, t in hf.items() if name.startswith("model.visual.")}
    out = {f"vision_model.{name}": visual[name] for name in visual if name.startswith(("patch_embed", "pos_embed"))}
    for kind in ("weight", "bias"):
        for ours, theirs in (("patch_norm", "norm"), ("linear_fc1", "linear_fc1"), ("linear_fc2", "linear_fc2")):
            out[f"vision_model.merger.{ours}.{kind}"] = visual[f"merger.{theirs}.{kind}"]
            mergers = [visual[f"deepstack_merger_list.{m}.{theirs}.{kind}"] for m in range(len(dims.deepstack))]
            if mergers:
                out[f"vision_model.decoder.deepstack_merger_list.{ours}.{kind}"] = torch.stack(mergers)
        blocks = "vision_model.decoder.layers."
        for ours, theirs in (
            ("self_attention.linear_proj.", "attn.proj."),
            ("self_attention.linear_qkv.layer_norm_", "norm1."),
            ("mlp.linear_fc1.layer_norm_", "norm2."),
            ("mlp.linear_fc1.", "mlp.linear_fc1."),
            ("mlp.linear_fc2.", "mlp.linear_fc2."),
        ):
            each = [visual[f"blocks.{b}.{theirs}{kind}"] for b in range(dims.vision_depth)]
            out[blocks + ours + kind] = torch.stack(each)
        qkv = [visual[f"blocks.{b}.attn.qkv.{kind}"] for b in range(dims.vision_depth)]
        out[blocks + f"self_attention.linear_qkv.{kind}"] = torch.stack([_per_head(w, dims) for w in qkv])
    return out


def _per_head(qkv: Tensor, dims: Dims) -> Tensor:
    """[all q, all k, all v] as q0 k0 v0 q1 k1 v1 ..."""
    size = dims.vision_hidden // dims.vision_heads
    thirds = qkv.chunk(3)
    return torch.cat([third[h * size : (h + 1) * size] for h in range(dims.vision_heads) for third in thirds])


def assert_same_bits(found: HF, expected: HF) -> None:
    """Equal names, dtypes, shapes and bits (NaN payloads count)."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        integer = INTEGERS[tensor.element_size()]
        assert torch.equal(found[name].contiguous().view(integer), tensor.contiguous().view(integer)), name
