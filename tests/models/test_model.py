"""The model as a whole, in one process: what it stores, what its arguments do, what it refuses."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.build import lone_process, provider, text_settings
from qwen3vl_convert.errors import ConfigError
from qwen3vl_convert.make import SIZES

pytestmark = pytest.mark.megatron

DENSE, MOE = SIZES["tiny"], SIZES["tiny-moe"]
TIED = replace(DENSE, tied=True)
IMAGE, VIDEO, START, END = 500, 501, 502, 503
BOTH = pytest.mark.parametrize("model", ["dense", "moe"], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    with lone_process():
        yield


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Random weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(0)
    made = {"dense": DENSE, "moe": MOE}
    return {name: provider(dims, init_method_std=0.15).provide().eval() for name, dims in made.items()}


@pytest.fixture
def model(models: dict[str, Any], request: pytest.FixtureRequest) -> Any:
    return models[getattr(request, "param", "dense")].requires_grad_(False)


def batch() -> dict[str, Tensor]:
    """One row: text, two images, a video of two frames; 12 image and 8 video tokens."""
    frame = [START, *[VIDEO] * 4, END]
    row = [5, 6, START, *[IMAGE] * 6, END, 7, START, *[IMAGE] * 6, END, 8, *frame, 9, *frame, 10, 11]
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": torch.tensor([row]),
        "pixel_values": torch.randn(48, 1536, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 6, 4]]),
        "pixel_values_videos": torch.randn(32, 1536, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }


def text(length: int = 12, rows: int = 1, seed: int = 3) -> Tensor:
    return torch.randint(10, 490, (rows, length), generator=torch.Generator().manual_seed(seed))


def same(one: Tensor, other: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

GOLDEN = {
    "dense_tp1pp1": DENSE, "dense_tp2pp1": DENSE, "dense_tied_tp1pp1": TIED, "moe_tp1pp1": MOE, "moe_tp1pp1ep2": MOE,
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_keys_and_shapes_are_those_that_megatron_bridge_wrote(name: str, golden_megatron: Path) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = FileSystemReader(golden_megatron / name / "iter_0000000").read_metadata().state_dict_metadata
    model = provider(GOLDEN[name], dtype=torch.bfloat16).provide()
    found: dict[str, Any] = {}
    for part in sharded_parts(model):
        if isinstance(part, ShardedTensor):
            found[part.key] = (torch.Size(part.global_shape), part.dtype)
        else:
            assert isinstance(part, ShardedObject)
            found[part.unique_key] = "object"
    expected = {
        key: (value.size, value.properties.dtype) if isinstance(value, TensorStorageMetadata) else "object"
        for key, value in stored.items()
        if not key.startswith("common_state")
    }
    assert found == expected


def sharded_parts(model: Any) -> list[Any]:
    """Every ShardedTensor and ShardedObject of a model, gated layers already split as they are stored."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    return list(nested_values(state))


@pytest.mark.parametrize("metadata", [{"singleton_local_shards": True}, {"non_homogeneous_layers": True}], ids=str)
def test_layers_and_mergers_can_be_stored_one_by_one(models: dict[str, Any], metadata: dict[str, bool]) -> None:
    model = models["dense"]
    found = {part.key: part for part in model.sharded_state_dict(metadata=metadata).values()}
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    for number in range(3):
        name = f"vision_model.decoder.deepstack_merger_list.{number}.linear_fc1.weight"
        assert found[name].global_shape == shapes[name]
    for number in range(4):
        for name in (
            "vision_model.decoder.layers.{}.mlp.linear_fc2",
            "language_model.decoder.layers.{}.mlp.linear_fc2",
        ):
            name = f"{name.format(number)}.weight"
            assert found[name].global_shape == shapes[name]


@BOTH
def test_a_plain_state_dict_without_extra_states_loads(model: Any) -> None:
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    tensors = {name: value for name, value in tensors.items() if not name.endswith("_extra_state")}
    assert tensors.keys() == dict(model.named_parameters()).keys(), "buffers would be parameters that nobody converts"
    assert not model.load_state_dict(tensors, strict=True).missing_keys


# ---- arguments of forward --------------------------------------------------------------------------------------------


@BOTH
def test_labels_give_the_cross_entropy_of_each_token(model: Any) -> None:
    ids, labels = text(rows=2), text(rows=2, seed=4)
    loss = model(ids, labels=labels)
    assert loss.shape == labels.shape
    expected = torch.nn.functional.cross_entropy(model(ids).transpose(1, 2), labels, reduction="none")
    same(loss, expected)


@BOTH
def test_a_negative_label_costs_nothing(model: Any) -> None:
    """As Hugging Face has it: -100 is left out. What is lost on the others is the same."""
    ids, labels = text(rows=2), text(rows=2, seed=4)
    labels[0, :3] = labels[1, -1] = -100
    expected = torch.nn.functional.cross_entropy(model(ids).transpose(1, 2), labels, reduction="none")
    assert expected.count_nonzero() == labels.numel() - 4
    same(model(ids, labels=labels), expected)


@BOTH
def test_images_and_videos_change_what_follows_and_nothing_before(model: Any) -> None:
    inputs = batch()
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    difference = (model(**inputs) - model(**other)).abs().amax(-1)[0]
    first = inputs["input_ids"][0].tolist().index(IMAGE)
    assert (difference[:first] < 1e-5).all()
    assert (difference[first:] > 1e-4).all()


@BOTH
def test_explicit_positions_are_those_that_are_computed(model: Any) -> None:
    from qwen3vl_convert.models import get_rope_index

    inputs = batch()
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
    positions, _ = get_rope_index(
        inputs["input_ids"], **grids, spatial_merge_size=2, image_token_id=IMAGE, video_token_id=VIDEO
    )
    computed = model(**inputs)
    assert torch.equal(model(**inputs, position_ids=positions), computed)
    assert not torch.allclose(model(**inputs, position_ids=positions * 3), computed, atol=1e-3)
    # positions [B, S] say nothing of images and are recomputed
    assert torch.equal(model(**inputs, position_ids=positions[0]), computed)


def test_positions_of_one_axis_serve_a_batch_of_text(model: Any) -> None:
    ids = text()
    positions = torch.arange(12)[None] * 2
    assert torch.equal(model(ids, position_ids=positions), model(ids, position_ids=positions.expand(3, 1, 12)))
    assert not torch.allclose(model(ids, position_ids=positions), model(ids), atol=1e-3)


@BOTH
def test_padding_on_either_side_changes_nothing(model: Any) -> None:
    inputs = batch()
    plain = model(**inputs)[0]
    length = plain.shape[0]
    for side in ("left", "right"):
        pad, keep = torch.full((1, 3), 9), torch.zeros(1, 3, dtype=torch.long)
        order = (lambda a, b: (a, b)) if side == "left" else (lambda a, b: (b, a))
        ids = torch.cat(order(pad, inputs["input_ids"]), dim=1)
        mask = torch.cat(order(keep, torch.ones(1, length, dtype=torch.long)), dim=1)
        padded = model(**(inputs | {"input_ids": ids}), attention_mask=mask)[0]
        same(padded[mask[0].bool()], plain)
        assert padded.isfinite().all()


def test_a_mask_of_megatron_is_taken_as_it_is(model: Any) -> None:
    ids = text()
    later = torch.ones(12, 12).triu(1).bool()[None, None]
    same(model(ids, attention_mask=later), model(ids))
    blind = later.clone()
    blind[..., 3:, 1] = True  # from token 3 on, token 1 is not seen
    changed = (model(ids, attention_mask=blind) - model(ids)).abs().amax(-1)[0]
    assert (changed[:3] < 1e-5).all()
    assert (changed[3:] > 1e-5).all()


def test_the_kernel_is_told_when_a_mask_counts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine ignores the mask of an attention that is said to be causal."""
    from megatron.core.transformer.enums import AttnMaskType

    attention = model.language_model.decoder.layers[0].self_attention
    plain, told = attention.core_attention.forward, []

    def telling(*args: Any, **kwargs: Any) -> Any:
        told.append(kwargs["attn_mask_type"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(attention.core_attention, "forward", telling)
    ids = text()
    model(ids)
    model(ids, attention_mask=torch.ones_like(ids))
    model(ids)
    assert told == [AttnMaskType.causal, AttnMaskType.arbitrary, AttnMaskType.causal]


@BOTH
def test_packed_sequences_are_each_alone(model: Any) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    first, rows = batch(), [text(5), text(9, seed=6)]
    ids = torch.cat((rows[0], first["input_ids"], rows[1]), dim=1)
    starts = torch.tensor([0, 5, 5 + first["input_ids"].shape[1], ids.shape[1]], dtype=torch.int32)
    longest = int(starts.diff().max())
    packed = PackedSeqParams("thd", starts, starts, max_seqlen_q=longest, max_seqlen_kv=longest)
    together = model(**(first | {"input_ids": ids}), packed_seq_params=packed)[0]
    apart = torch.cat((model(rows[0])[0], model(**first)[0], model(rows[1])[0]))
    same(together, apart)


def test_an_image_cut_by_the_end_of_a_packed_sequence_is_refused(model: Any) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    inputs = batch()
    starts = torch.tensor([0, 5, inputs["input_ids"].shape[1]], dtype=torch.int32)
    packed = PackedSeqParams("thd", starts, starts, max_seqlen_q=40, max_seqlen_kv=40)
    with pytest.raises(ValueError, match=r"input_ids\[0, "):
        model(**inputs, packed_seq_params=packed)


@BOTH
def test_masks_say_where_features_go(model: Any) -> None:
    inputs = batch()
    ids = inputs["input_ids"]
    found = model(**inputs)
    masks = {"image_input_mask": ids == IMAGE, "video_input_mask": ids == VIDEO}
    assert torch.equal(model(**inputs, **masks), found)
    moved = masks["image_input_mask"].clone()
    moved[0, 0], moved[0, 3] = True, False
    assert not torch.allclose(model(**inputs, image_input_mask=moved), found, atol=1e-3)
    moved[0, 1] = True
    with pytest.raises(
        ValueError, match="image_input_mask: image_grid_thw makes 12 features, and 13 places are marked"
    ):
        model(**inputs, image_input_mask=moved)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pixel_values": None}, "pixel_values: expected it with image_grid_thw"),
        ({"image_grid_thw": torch.tensor([[1, 4, 6]])}, "image"),
        ({"pixel_values": torch.zeros(47, 1536)}, "Patches: the grids"),
        ({"image_grid_thw": None, "pixel_values": None}, "image"),
    ],
    ids=["no pixels", "too few grids", "too few pixels", "no images"],
)
def test_what_does_not_fit_together_is_refused(model: Any, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model(**(batch() | change))


def test_transformers_token_types_are_accepted(model: Any) -> None:
    inputs = batch()
    kinds = (inputs["input_ids"] == IMAGE).long() + 2 * (inputs["input_ids"] == VIDEO)
    assert torch.equal(model(**inputs, mm_token_type_ids=kinds), model(**inputs))


# ---- inference -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("argument", ["inference_params", "inference_context"])
def test_a_cache_gives_what_the_whole_gives(model: Any, argument: str) -> None:
    from megatron.core.inference.contexts import StaticInferenceContext

    inputs, more = batch(), text(4, seed=8)
    prompt = inputs["input_ids"].shape[1]
    whole = model(**(inputs | {"input_ids": torch.cat((inputs["input_ids"], more), dim=1)}))
    context = StaticInferenceContext(1, prompt + 8)
    logits = [model(**inputs, **{argument: context})[:, -1:]]
    context.sequence_len_offset = prompt
    context.enable_decode_mode()
    for token in more.T[..., None]:
        logits.append(model(token, **{argument: context}))
        context.sequence_len_offset += 1
    same(torch.cat(logits, dim=1), whole[:, prompt - 1 :])


def test_a_cache_takes_no_padding(model: Any) -> None:
    from megatron.core.inference.contexts import StaticInferenceContext

    ids = text()
    with pytest.raises(ValueError, match=r"attention_mask \[B, S\]: expected None .* inference context"):
        model(ids, attention_mask=torch.ones_like(ids), inference_context=StaticInferenceContext(1, 16))


# ---- stages ----------------------------------------------------------------------------------------------------------


@BOTH
def test_an_encoder_and_a_decoder_apart_are_the_whole(model: Any, request: pytest.FixtureRequest) -> None:
    dims = MOE if model.config.num_moe_experts else DENSE
    settings = provider(dims)
    settings.add_decoder = False
    encoder = settings.provide().eval()
    settings = provider(dims)
    settings.add_encoder = False
    decoder = settings.provide().eval()
    assert encoder.language_model is None
    assert decoder.vision_model is None
    encoder.vision_model.load_state_dict(model.vision_model.state_dict())
    decoder.language_model.load_state_dict(model.language_model.state_dict())
    inputs = batch()
    decoder.set_input_tensor(encoder(**inputs))
    same(decoder(**inputs), model(**inputs))
    decoder.set_input_tensor([None])
    with pytest.raises(ValueError, match="add_encoder=False: expected its vision features through set_input_tensor"):
        decoder(**inputs)
    with pytest.raises(ValueError, match="add_decoder=False, and the batch has no images"):
        encoder(text())
    with pytest.raises(ValueError, match="expected one tensor, found 2"):
        decoder.set_input_tensor([None, None])


def test_a_later_stage_takes_hidden_states(model: Any) -> None:
    settings = provider(DENSE)
    later = settings.provide(pre_process=False, post_process=True).eval()
    assert later.vision_model is None
    hidden = torch.randn(12, 1, 64)
    later.set_input_tensor([hidden])
    assert later(text()).shape == (1, 12, 512)
    assert later.decoder.input_tensor is hidden


def test_shared_weights_are_the_embedding(model: Any) -> None:
    settings = provider(TIED)
    tied = settings.provide()
    assert tied.share_embeddings_and_output_weights
    assert tied.shared_embedding_or_output_weight() is tied.language_model.embedding.word_embeddings.weight
    last = provider(TIED).provide(pre_process=False, post_process=True)
    assert last.shared_embedding_or_output_weight() is last.language_model.output_layer.weight
    assert model.shared_embedding_or_output_weight() is model.language_model.embedding.word_embeddings.weight


def test_freezing_names_three_parts_that_do_not_overlap() -> None:
    frozen = {}
    for part in ("language_model", "vision_model", "vision_projection"):
        model = provider(DENSE, torch.float32, **{f"freeze_{part}": True}).provide()
        frozen[part] = {name for name, p in model.named_parameters() if not p.requires_grad}
    every = {name for name, _ in model.named_parameters()}
    assert set.union(*frozen.values()) == every
    assert sum(map(len, frozen.values())) == len(every)
    assert all(name.startswith("language_model.") for name in frozen["language_model"])
    assert all("merger" in name for name in frozen["vision_projection"])
    assert any("patch_embed" in name for name in frozen["vision_model"])
    assert any("pos_embed" in name for name in frozen["vision_model"])


def test_the_text_model_can_be_had_alone(model: Any) -> None:
    from megatron.core.models.gpt.gpt_model import GPTModel

    alone = provider(DENSE).provide_language_model().eval()
    assert isinstance(alone, GPTModel)
    alone.load_state_dict(model.language_model.state_dict())
    positions = torch.arange(12).expand(3, 1, 12)
    same(alone(input_ids=text(), position_ids=positions, attention_mask=None), model(text()))


@BOTH
def test_the_text_model_s_own_provider_builds_the_same(model: Any) -> None:
    from qwen3vl_convert.models import Qwen3ModelProvider, Qwen3MoEModelProvider

    dims, kind = (MOE, Qwen3MoEModelProvider) if model.config.num_moe_experts else (DENSE, Qwen3ModelProvider)
    settings = kind(**text_settings(dims))
    assert not hasattr(settings, "vision_config")
    alone = settings.provide().eval()
    alone.load_state_dict(model.language_model.state_dict())
    positions = torch.arange(12).expand(3, 1, 12)
    same(alone(input_ids=text(), position_ids=positions, attention_mask=None), model(text()))


@pytest.mark.transformers
@pytest.mark.parametrize("dims", [DENSE, MOE], ids=["dense", "moe"])
def test_transformers_configurations_say_what_the_tower_is(dims: Any) -> None:
    """The whole model's and the tower's alone, of either family."""
    import transformers

    from qwen3vl_convert.models import Qwen3VLModel
    from qwen3vl_convert.models.specs import language_layer_spec

    settings = provider(dims)
    settings.finalize()
    kind = transformers.Qwen3VLMoeConfig if dims.moe else transformers.Qwen3VLConfig
    whole = kind(vision_config=vars(settings.vision_config))
    expected = {name: tensor.shape for name, tensor in settings.provide().named_parameters()}
    for given in (whole, whole.vision_config, settings.vision_config):
        model = Qwen3VLModel(settings, language_layer_spec(settings), vision_transformer_config=given)
        assert {name: tensor.shape for name, tensor in model.named_parameters()} == expected
        assert model.vision_transformer_config is (whole.vision_config if given is whole else given)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tensor_model_parallel_size": 3}, "tensor_model_parallel_size: expected a divisor of num_attention_h"),
        ({"vocab_size": 513, "tensor_model_parallel_size": 2}, "expected a divisor of vocab_size = 513"),
        ({"mrope_section": [4, 4, 4]}, r"mrope_section: expected three numbers with the sum kv_channels / 2 = 8"),
        ({"sequence_parallel": True}, "sequence_parallel: expected tensor_model_parallel_size of 2 or more"),
        ({"hidden_size": 128}, "vision_config.out_hidden_size: expected hidden_size 128, found 64"),
        ({"vision_config": SimpleNamespace(num_heads=3, out_hidden_size=64), "tensor_model_parallel_size": 2},
         "divisor of vision_config.num_heads = 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_by_name(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        provider(DENSE, **settings).finalize()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"expert_model_parallel_size": 3}, "expert_model_parallel_size: expected a divisor of num_moe_experts = 8"),
        ({"expert_tensor_parallel_size": 5}, "expert_tensor_parallel_size: expected a divisor of moe_ffn_hidden_size"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2: expected"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_of_experts_that_cannot_be_are_refused_by_name(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        provider(MOE, **settings).finalize()


def test_experts_and_tensor_parallelism_turn_sequence_parallelism_on() -> None:
    settings = provider(MOE, tensor_model_parallel_size=2)
    settings.finalize()
    assert settings.sequence_parallel


@pytest.mark.parametrize("setting", ["tensor", "pipeline", "expert"])
def test_settings_must_agree_with_the_process_groups(setting: str) -> None:
    name = f"{setting}_model_parallel_size"
    with pytest.raises(ConfigError, match=f"{name}: expected 1, which the process groups were set up with, found 2"):
        provider(MOE, torch.float32, **{name: 2}).provide()


def test_process_groups_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="expected process groups, found none. Build the model within single_process"):
        provider(DENSE).provide()


def test_context_parallelism_without_transformer_engine_is_refused_at_construction() -> None:
    from qwen3vl_convert.models import Qwen3VLModel
    from qwen3vl_convert.models.specs import language_layer_spec

    settings = provider(DENSE, context_parallel_size=2)
    settings.finalize()
    assert settings.calculate_per_token_loss
    with pytest.raises(ValueError, match="context_parallel_size=2: context parallelism is done by the attention of Tr"):
        Qwen3VLModel(settings, language_layer_spec(settings), settings.vision_config)


def test_an_unknown_activation_is_refused() -> None:
    settings = provider(DENSE)
    settings.vision_config.hidden_act = "relu6"
    with pytest.raises(ConfigError, match="hidden_act: expected one of gelu_pytorch_tanh, gelu, silu; found 'relu6'"):
        settings.provide()


def test_a_stage_without_the_layers_for_deepstack_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="has 2 text layers, and 3 deepstack features"):
        provider(replace(DENSE, layers=2)).provide()


@pytest.mark.parametrize(("vocab", "rows"), [(512, 512), (500, 512)])
def test_the_vocabulary_is_padded_when_asked(vocab: int, rows: int) -> None:
    model = provider(replace(DENSE, vocab=vocab), should_pad_vocab=True).provide()
    assert model.language_model.embedding.word_embeddings.weight.shape == (rows, 64)


# ---- context parallelism's cut ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "size", "expected"),
    [
        ([0, 8], 2, [[0, 1, 6, 7], [2, 3, 4, 5]]),
        ([0, 4, 12], 2, [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]),
        ([0, 12], 3, [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]),
    ],
    ids=str,
)
def test_context_parallel_ranks_have_a_piece_from_each_end(
    starts: list[int], size: int, expected: list[list[int]]
) -> None:
    from qwen3vl_convert.models.context_parallel import cut_index

    assert [cut_index(torch.tensor(starts), starts[-1], size, rank).tolist() for rank in range(size)] == expected


def test_the_cut_is_megatrons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    from qwen3vl_convert.models.context_parallel import SequenceCut

    pinned = torch.tensor  # which needs a GPU
    monkeypatch.setattr(torch, "tensor", lambda *args, pin_memory=False, **kwargs: pinned(*args, **kwargs))
    whole = torch.arange(24.0)[:, None, None, None]
    for rank in range(3):
        group = SimpleNamespace(size=lambda: 3, rank=lambda rank=rank: rank)
        cut = SequenceCut.of(group, 24, None, whole.device)
        part = cut.along(whole, 0)
        assert part is not None
        assert torch.equal(part, get_pos_emb_on_this_cp_rank(whole, 0, group))
    assert SequenceCut.of(None, 24, None, whole.device).along(whole, 0) is whole


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    from qwen3vl_convert.models.context_parallel import cut_index

    with pytest.raises(ValueError, match=r"over 2 ranks: expected sequences of multiples of 4 tokens, found \[4, 6\]"):
        cut_index(torch.tensor([0, 4, 10]), 10, 2, 0)
