"""The tables that Megatron-Bridge 0.6.2 has for Qwen3-VL, line by line as they stand there, are ours.

The names are those of its file `qwen3_vl_bridge.py`; the classes are those of this package. No line has an axis.
"""

from collections.abc import Iterator

import pytest
import torch

from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.mappings import (
    AutoMapping,
    ConcatenatedQKVMapping,
    FusedExpertMapping,
    FusedGatedExpertMapping,
    GatedMLPMapping,
    Mapping,
    MegatronMappingRegistry,
    QKVMapping,
    ReplicatedMapping,
    mapping_registry,
)
from qwen3vl_convert.megatron.placement import cut_dimension
from qwen3vl_convert.megatron.stored import stored

MODELS = ("qwen3_vl", "qwen3_vl_moe")

BOTH = {
    "language_model.embedding.word_embeddings.weight": "model.language_model.embed_tokens.weight",
    "language_model.output_layer.weight": "lm_head.weight",
    "language_model.decoder.final_layernorm.weight": "model.language_model.norm.weight",
    "language_model.decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": (
        "model.language_model.layers.*.input_layernorm.weight"
    ),
    "language_model.decoder.layers.*.self_attention.linear_proj.weight": (
        "model.language_model.layers.*.self_attn.o_proj.weight"
    ),
    "language_model.decoder.layers.*.self_attention.q_layernorm.weight": (
        "model.language_model.layers.*.self_attn.q_norm.weight"
    ),
    "language_model.decoder.layers.*.self_attention.k_layernorm.weight": (
        "model.language_model.layers.*.self_attn.k_norm.weight"
    ),
    "vision_model.decoder.layers.*.self_attention.linear_proj.weight": "model.visual.blocks.*.attn.proj.weight",
    "vision_model.decoder.layers.*.self_attention.linear_proj.bias": "model.visual.blocks.*.attn.proj.bias",
    "vision_model.decoder.layers.*.mlp.linear_fc1.weight": "model.visual.blocks.*.mlp.linear_fc1.weight",
    "vision_model.decoder.layers.*.mlp.linear_fc1.bias": "model.visual.blocks.*.mlp.linear_fc1.bias",
    "vision_model.decoder.layers.*.mlp.linear_fc2.weight": "model.visual.blocks.*.mlp.linear_fc2.weight",
    "vision_model.decoder.layers.*.mlp.linear_fc2.bias": "model.visual.blocks.*.mlp.linear_fc2.bias",
    "vision_model.decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": "model.visual.blocks.*.norm1.weight",
    "vision_model.decoder.layers.*.self_attention.linear_qkv.layer_norm_bias": "model.visual.blocks.*.norm1.bias",
    "vision_model.decoder.layers.*.mlp.linear_fc1.layer_norm_weight": "model.visual.blocks.*.norm2.weight",
    "vision_model.decoder.layers.*.mlp.linear_fc1.layer_norm_bias": "model.visual.blocks.*.norm2.bias",
    "vision_model.decoder.deepstack_merger_list.*.patch_norm.weight": (
        "model.visual.deepstack_merger_list.*.norm.weight"
    ),
    "vision_model.decoder.deepstack_merger_list.*.patch_norm.bias": "model.visual.deepstack_merger_list.*.norm.bias",
    "vision_model.decoder.deepstack_merger_list.*.linear_fc1.weight": (
        "model.visual.deepstack_merger_list.*.linear_fc1.weight"
    ),
    "vision_model.decoder.deepstack_merger_list.*.linear_fc1.bias": (
        "model.visual.deepstack_merger_list.*.linear_fc1.bias"
    ),
    "vision_model.decoder.deepstack_merger_list.*.linear_fc2.weight": (
        "model.visual.deepstack_merger_list.*.linear_fc2.weight"
    ),
    "vision_model.decoder.deepstack_merger_list.*.linear_fc2.bias": (
        "model.visual.deepstack_merger_list.*.linear_fc2.bias"
    ),
    "vision_model.merger.patch_norm.**": "model.visual.merger.norm.**",
    "vision_model.merger.linear_fc1.weight": "model.visual.merger.linear_fc1.weight",
    "vision_model.merger.linear_fc1.bias": "model.visual.merger.linear_fc1.bias",
    "vision_model.merger.linear_fc2.weight": "model.visual.merger.linear_fc2.weight",
    "vision_model.merger.linear_fc2.bias": "model.visual.merger.linear_fc2.bias",
}
DENSE = {
    "language_model.decoder.layers.*.mlp.linear_fc1.layer_norm_weight": (
        "model.language_model.layers.*.post_attention_layernorm.weight"
    ),
    "language_model.decoder.layers.*.mlp.linear_fc2.weight": "model.language_model.layers.*.mlp.down_proj.weight",
}
MOE = {
    "language_model.decoder.layers.*.pre_mlp_layernorm.weight": (
        "model.language_model.layers.*.post_attention_layernorm.weight"
    ),
    "language_model.decoder.layers.*.mlp.router.weight": "model.language_model.layers.*.mlp.gate.weight",
}


def attention_and_patches() -> Iterator[Mapping]:
    """What both tables have with classes of its own."""
    yield QKVMapping(
        megatron_param="language_model.decoder.layers.*.self_attention.linear_qkv.weight",
        q="model.language_model.layers.*.self_attn.q_proj.weight",
        k="model.language_model.layers.*.self_attn.k_proj.weight",
        v="model.language_model.layers.*.self_attn.v_proj.weight",
    )
    yield QKVMapping(
        megatron_param="language_model.decoder.layers.*.self_attention.linear_qkv.bias",
        q="model.language_model.layers.*.self_attn.q_proj.bias",
        k="model.language_model.layers.*.self_attn.k_proj.bias",
        v="model.language_model.layers.*.self_attn.v_proj.bias",
    )
    yield ConcatenatedQKVMapping(
        megatron_param="vision_model.decoder.layers.*.self_attention.linear_qkv.weight",
        hf_param="model.visual.blocks.*.attn.qkv.weight",
    )
    yield ConcatenatedQKVMapping(
        megatron_param="vision_model.decoder.layers.*.self_attention.linear_qkv.bias",
        hf_param="model.visual.blocks.*.attn.qkv.bias",
    )
    yield ReplicatedMapping(
        megatron_param="vision_model.patch_embed.proj.**", hf_param="model.visual.patch_embed.proj.**"
    )
    yield ReplicatedMapping(megatron_param="vision_model.pos_embed.weight", hf_param="model.visual.pos_embed.weight")


FC1, FC2 = (f"language_model.decoder.layers.*.mlp.experts.linear_fc{number}.weight*" for number in (1, 2))
LOCAL_FC1, LOCAL_FC2 = (
    f"language_model.decoder.layers.*.mlp.experts.local_experts.*.linear_fc{number}.weight" for number in (1, 2)
)
THEIRS = "model.language_model.layers.*.mlp.experts."
FUSED, EACH = f"{THEIRS}down_proj", f"{THEIRS}*.down_proj.weight"


def one_by_one(megatron_param: str) -> Mapping:
    return GatedMLPMapping(
        megatron_param=megatron_param, gate=f"{THEIRS}*.gate_proj.weight", up=f"{THEIRS}*.up_proj.weight"
    )


def fused(megatron_param: str) -> Mapping:
    hf_param = f"{THEIRS}gate_up_proj"
    return FusedGatedExpertMapping(megatron_param=megatron_param, hf_param=hf_param, transpose_on_export=True)


EXPERTS = {
    "hub": (fused(FC1), FusedExpertMapping(megatron_param=FC2, hf_param=FUSED, transpose_on_export=True)),
    "v5": (
        FusedGatedExpertMapping(megatron_param=FC1, hf_param=f"{THEIRS}gate_up_proj"),
        FusedExpertMapping(megatron_param=FC2, hf_param=FUSED),
    ),
    "per-expert": (one_by_one(FC1), AutoMapping(megatron_param=FC2, hf_param=EACH)),
}


ONLY_OURS = {"language_model.decoder.layers.{l}.self_attention.linear_proj.bias"}
"""Of models with `attention_bias`, whose output projection has one in transformers."""


def direct(names: dict[str, str]) -> list[Mapping]:
    return [AutoMapping(megatron_param=megatron, hf_param=hf) for megatron, hf in names.items()]


def ported(model: str, experts: str) -> list[Mapping]:
    if model == "qwen3_vl_moe":
        return [*direct(BOTH | MOE), *attention_and_patches(), *EXPERTS[experts]]
    gated = GatedMLPMapping(
        megatron_param="language_model.decoder.layers.*.mlp.linear_fc1.weight",
        gate="model.language_model.layers.*.mlp.gate_proj.weight",
        up="model.language_model.layers.*.mlp.up_proj.weight",
    )
    return [*direct(BOTH | DENSE), *attention_and_patches(), gated]


def replicated_as_ours(theirs: Mapping, ours: Mapping) -> bool:
    """`...` has no axes of a model's; what it copies, and that no rank has a part, must be the same."""
    dims = SIZES["tiny"]
    sizes = dims.sizes()
    shape = ours.equation.hf[0].layout.shape(sizes)
    weight = torch.randn(shape)
    return (
        theirs.equation.uncut
        and cut_dimension(stored(ours.equation)[0]) is None
        and torch.equal(theirs.hf_to_megatron(weight), ours.hf_to_megatron(weight, sizes))
    )


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_line_is_one_of_ours_and_all_of_ours_are_there(model: str, experts: str) -> None:
    theirs = MegatronMappingRegistry(*ported(model, experts))
    ours = {mapping.equation.megatron.name: mapping for mapping in mapping_registry(model).with_experts(experts)}
    assert {mapping.equation.megatron.name for mapping in theirs} == ours.keys() - ONLY_OURS
    for mapping in theirs:
        own = ours[mapping.equation.megatron.name]
        if isinstance(mapping, ReplicatedMapping):
            assert [part.name for part in mapping.equation.hf] == [part.name for part in own.equation.hf]
            assert replicated_as_ours(mapping, own)
        else:
            assert mapping.equation == own.equation


def test_the_number_of_lines() -> None:
    assert [len(ported(model, "hub")) for model in MODELS] == [37, 38]


def test_experts_as_modules_of_their_own() -> None:
    """SequentialMLP's names for what grouped experts have in one module: other lines of the same tensors."""
    grouped = {
        mapping.equation.megatron.name: mapping.equation
        for layout in EXPERTS
        for mapping in mapping_registry("qwen3_vl_moe").with_experts(layout)
    }
    for line, of in (
        (one_by_one(LOCAL_FC1), one_by_one(FC1)),
        (AutoMapping(megatron_param=LOCAL_FC2, hf_param=EACH), EXPERTS["per-expert"][1]),
        (fused(LOCAL_FC1), fused(FC1)),
        (FusedExpertMapping(megatron_param=LOCAL_FC2, hf_param=FUSED, transpose_on_export=True), EXPERTS["hub"][1]),
    ):
        equation = line.equation
        assert equation.megatron.name.endswith("local_experts.{e}.linear_fc" + of.megatron_param[-9] + ".weight")
        assert equation.megatron.layout == of.equation.megatron.layout
        assert equation.hf == of.equation.hf
        assert of.equation.megatron.name in grouped


def test_a_norm_that_is_a_module_of_its_own() -> None:
    """The line of the MoE table for layers without Transformer Engine: whole on every rank, whatever its size."""
    name = "language_model.decoder.layers.*.input_layernorm.weight"
    line = AutoMapping(megatron_param=name, hf_param="model.language_model.layers.*.input_layernorm.weight")
    assert str(line.equation).splitlines()[0] == name.replace("*", "{l}") + " : ..."
    assert line.equation.uncut
    weight = torch.randn(7)
    assert torch.equal(line.hf_to_megatron(weight), weight)
    with pytest.raises(UsageError, match=r"input_layernorm.weight is claimed twice"):  # beside the fused one's line
        MegatronMappingRegistry(line, *ported("qwen3_vl", "hub"))


# ---- what implies axes, and what does not ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("megatron", "hf", "axes"),
    [
        ("decoder.layers.*.self_attention.linear_proj.weight", "model.layers.*.self_attn.o_proj.weight", "h (kv g d)"),
        ("decoder.layers.3.mlp.linear_fc2.weight", "w.weight", "h f"),
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight", "vocab h"),
        ("output_layer.weight", "head.weight", "vocab h"),
        ("language_model.decoder.layers.*.mlp.linear_fc2.weight", "other.*.down.weight", "h f"),
        ("language_model.decoder.layers.*.mlp.experts.linear_fc2.weight7", "other.*.down.weight", "h i"),
        ("vision_model.decoder.layers.*.mlp.linear_fc1.weight", "tower.*.fc1.weight", "u v"),
        ("probe.*.q_layernorm.weight", "probe.*.norm.weight", "..."),
        ("probe.linear.layer_norm_bias", "probe.bias", "..."),
    ],
)
def test_what_implies_axes(megatron: str, hf: str, axes: str) -> None:
    equation = AutoMapping(megatron, hf).equation
    assert equation.megatron.layout.text == equation.hf[0].layout.text == axes
    assert equation.megatron.name_axes == equation.hf[0].name_axes
    assert (equation.padded == "vocab") is axes.startswith("vocab")


@pytest.mark.parametrize(
    ("megatron", "hf", "reason"),
    [
        ("score.weight", "score.weight", r"nothing implies its axes.*Write them, as in `score.weight : c h`"),
        ("mixer.norm.weight", "norm.weight", "nothing implies its axes"),  # Mamba's, which tensor parallelism cuts
        ("a.decoder.layers.*.mlp.linear_fc2.weight", "b.*.weight", "nothing implies its axes"),
        ("score.weight : c h", "score.weight", "nothing implies its axes beside written ones"),
        (
            "language_model.decoder.layers.*.mlp.linear_fc1.weight",
            "model.language_model.layers.*.mlp.up_proj.weight",
            r"Use GatedMLPMapping\.$",
        ),
        (
            "language_model.decoder.layers.*.mlp.linear_fc1.weight",
            "model.language_model.layers.*.mlp.gate_proj.weight",
            r"Use GatedMLPMapping\.$",
        ),
        (
            "language_model.decoder.layers.*.self_attention.linear_qkv.weight",
            "model.language_model.layers.*.self_attn.q_proj.weight",
            r"Use QKVMapping\.$",
        ),
        ("a.router.expert_bias", "b.bias", r"Write them, as in `a.router.expert_bias : c`\.$"),
        ("a.bias : c", "b.bias", r"write them, as in `b.bias : c`\.$"),
        (FC1, FUSED, "Use ExpertMLPGateUpProjMapping"),
        (FC2, FUSED, "Use ExpertMLPDownProjMapping"),
        (
            "language_model.decoder.layers.*.self_attention.linear_proj.weight",
            "model.language_model.layers.*.mlp.down_proj.weight",
            r"Pair it with its own\.$",
        ),
        ("vision_model.patch_embed.other.**", "model.visual.patch_embed.proj.**", r"no model's table says what `\*\*`"),
        ("vision_model.merger.patch_norm.**", "other.**", r"as in `vision_model.merger.patch_norm.weight`"),
    ],
)
def test_what_is_not_guessed(megatron: str, hf: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){reason}"):
        AutoMapping(megatron, hf)


def test_a_line_for_several_tensors_has_no_equation_of_its_own() -> None:
    line = AutoMapping("vision_model.merger.patch_norm.**", "model.visual.merger.norm.**")
    assert [one.megatron_param.rpartition(".")[2] for one in line.each()] == ["weight", "bias"]
    with pytest.raises(UsageError, match=r"several tensors, which have an equation each: see each\(\)"):
        _ = line.equation


@pytest.mark.parametrize("kind", [AutoMapping, ReplicatedMapping])
def test_a_line_for_several_tensors_shows_them_all(kind: type[Mapping]) -> None:
    line = kind("vision_model.patch_embed.proj.**", "model.visual.patch_embed.proj.**")  # type: ignore[call-arg]
    weight, bias = line.each()
    assert str(line) == f"{kind.__name__}\n{weight.equation}\n{bias.equation}"
    assert "vision_model.patch_embed.proj.bias" in str(line)
