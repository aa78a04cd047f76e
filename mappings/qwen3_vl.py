"""Qwen3-VL, dense and Mixture-of-Experts: the tables. Data only; one line per kind of tensor.

Axes: l layers · kv key-value heads · g query heads per kv head · d head · h hidden · f ffn · vocab · e experts · i
expert ffn · half of h · s gate, up · b vision blocks · n vision heads · t q, k, v · vd vision head · v vision hidden ·
u vision ffn · m deepstack mergers · w merged patch (v of spatial_merge^2 patches) · j merger's inner · o vision out ·
pos positions · rgb, time, y, x a patch
"""

from qwen3vl_convert.mappings.mapping import (
    AutoMapping,
    ConcatenatedQKVMapping,
    ExpertMLPDownProjMapping,
    ExpertMLPGateUpProjMapping,
    GatedMLPMapping,
    Mapping,
    QKVMapping,
)

CUTS = {"kv": "tp", "f": "tp", "vocab": "tp", "n": "tp", "u": "tp", "j": "tp", "i": "etp"}
"""Which axes a parallel size divides. Layers (l) go by pipeline stage and experts (e) by expert parallel rank, whole.
"""

_OURS, _THEIRS = "language_model.decoder.layers.{l}.", "model.language_model.layers.{l}."

TEXT: tuple[Mapping, ...] = (
    AutoMapping(
        "language_model.embedding.word_embeddings.weight : vocab h",
        "model.language_model.embed_tokens.weight : vocab h",
        padded="vocab",
    ),
    AutoMapping(
        _OURS + "self_attention.linear_proj.weight : h (kv g d)", _THEIRS + "self_attn.o_proj.weight : h (kv g d)"
    ),
    AutoMapping(_OURS + "self_attention.linear_qkv.layer_norm_weight : h", _THEIRS + "input_layernorm.weight : h"),
    QKVMapping(
        _OURS + "self_attention.linear_qkv.weight",
        q=_THEIRS + "self_attn.q_proj.weight",
        k=_THEIRS + "self_attn.k_proj.weight",
        v=_THEIRS + "self_attn.v_proj.weight",
    ),
    AutoMapping(_OURS + "self_attention.q_layernorm.weight : d", _THEIRS + "self_attn.q_norm.weight : d"),
    AutoMapping(_OURS + "self_attention.k_layernorm.weight : d", _THEIRS + "self_attn.k_norm.weight : d"),
)
ATTENTION_BIAS: tuple[Mapping, ...] = (
    QKVMapping(
        _OURS + "self_attention.linear_qkv.bias",
        q=_THEIRS + "self_attn.q_proj.bias",
        k=_THEIRS + "self_attn.k_proj.bias",
        v=_THEIRS + "self_attn.v_proj.bias",
    ),
    AutoMapping(_OURS + "self_attention.linear_proj.bias : h", _THEIRS + "self_attn.o_proj.bias : h"),
)
DENSE: tuple[Mapping, ...] = (
    AutoMapping(_OURS + "mlp.linear_fc1.layer_norm_weight : h", _THEIRS + "post_attention_layernorm.weight : h"),
    GatedMLPMapping(
        _OURS + "mlp.linear_fc1.weight", gate=_THEIRS + "mlp.gate_proj.weight", up=_THEIRS + "mlp.up_proj.weight"
    ),
    AutoMapping(_OURS + "mlp.linear_fc2.weight : h f", _THEIRS + "mlp.down_proj.weight : h f"),
)
MOE: tuple[Mapping, ...] = (
    AutoMapping(_OURS + "pre_mlp_layernorm.weight : h", _THEIRS + "post_attention_layernorm.weight : h"),
    AutoMapping(_OURS + "mlp.router.weight : e h", _THEIRS + "mlp.gate.weight : e h"),
    ExpertMLPGateUpProjMapping(_OURS + "mlp.experts.linear_fc1.weight{e}", _THEIRS + "mlp.experts.gate_up_proj"),
    ExpertMLPDownProjMapping(_OURS + "mlp.experts.linear_fc2.weight{e}", _THEIRS + "mlp.experts.down_proj"),
)
NORM: tuple[Mapping, ...] = (
    AutoMapping("language_model.decoder.final_layernorm.weight : h", "model.language_model.norm.weight : h"),
)
OUTPUT: tuple[Mapping, ...] = (
    AutoMapping("language_model.output_layer.weight : vocab h", "lm_head.weight : vocab h", padded="vocab"),
)

_BLOCK, _THEIR_BLOCK = "vision_model.decoder.layers.{b}.", "model.visual.blocks.{b}."


def _both(weight: tuple[str, str], bias: tuple[str, str] | None = None, *, at: tuple[str, str]) -> tuple[Mapping, ...]:
    """A module's weight and bias: (Megatron layout, HF layout) of each, `at` (Megatron name, HF name)."""
    kinds = [("weight", weight)] + ([("bias", bias)] if bias else [])
    return tuple(AutoMapping(f"{at[0]}{kind} : {ours}", f"{at[1]}{kind} : {theirs}") for kind, (ours, theirs) in kinds)


def _same(weight: str, bias: str, ours: str, theirs: str) -> tuple[Mapping, ...]:
    """A module whose weight and bias have the same axes on both sides."""
    return _both((weight, weight), (bias, bias), at=(ours, theirs))


VISION: tuple[Mapping, ...] = (
    *_same("v rgb time y x", "v", "vision_model.patch_embed.proj.", "model.visual.patch_embed.proj."),
    AutoMapping("vision_model.pos_embed.weight : pos v", "model.visual.pos_embed.weight : pos v"),
    *_same("v (n vd)", "v", _BLOCK + "self_attention.linear_proj.", _THEIR_BLOCK + "attn.proj."),
    *_same("v", "v", _BLOCK + "self_attention.linear_qkv.layer_norm_", _THEIR_BLOCK + "norm1."),
    ConcatenatedQKVMapping(_BLOCK + "self_attention.linear_qkv.weight", _THEIR_BLOCK + "attn.qkv.weight"),
    ConcatenatedQKVMapping(_BLOCK + "self_attention.linear_qkv.bias", _THEIR_BLOCK + "attn.qkv.bias"),
    *_same("v", "v", _BLOCK + "mlp.linear_fc1.layer_norm_", _THEIR_BLOCK + "norm2."),
    *_same("u v", "u", _BLOCK + "mlp.linear_fc1.", _THEIR_BLOCK + "mlp.linear_fc1."),
    *_same("v u", "v", _BLOCK + "mlp.linear_fc2.", _THEIR_BLOCK + "mlp.linear_fc2."),
)


def _merger(norm: str, ours: str, theirs: str) -> tuple[Mapping, ...]:
    """A patch merger; `norm` is the axis it normalises: a patch before the merge (v), or the merged patch (w)."""
    return (
        *_same(norm, norm, ours + "patch_norm.", theirs + "norm."),
        *_same("j w", "j", ours + "linear_fc1.", theirs + "linear_fc1."),
        *_same("o j", "o", ours + "linear_fc2.", theirs + "linear_fc2."),
    )


MERGERS: tuple[Mapping, ...] = (
    *_merger("w", "vision_model.decoder.deepstack_merger_list.{m}.", "model.visual.deepstack_merger_list.{m}."),
    *_merger("v", "vision_model.merger.", "model.visual.merger."),
)

TABLES: dict[str, tuple[Mapping, ...]] = {
    "qwen3_vl": (*VISION, *MERGERS, *TEXT, *ATTENTION_BIAS, *DENSE, *NORM, *OUTPUT),
    "qwen3_vl_moe": (*VISION, *MERGERS, *TEXT, *ATTENTION_BIAS, *MOE, *NORM, *OUTPUT),
}
