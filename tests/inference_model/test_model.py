"""The inference model against transformers: one forward of whole prompts, of ragged batches, and over a cache."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from inference_model.worlds import KINDS, NEAR, ROWS, World, make_world, visual
from qwen3vl_convert.errors import UnsupportedFormat
from qwen3vl_convert.huggingface.config import rebuild_config
from qwen3vl_convert.inference import (
    ForwardBatch,
    ForwardMode,
    Qwen3VLAttention,
    Qwen3VLForConditionalGeneration,
    Qwen3VLVisionModel,
    get_rope_index,
)
from qwen3vl_convert.inference.attention.flash import FlashBackend
from qwen3vl_convert.inference.attention.segments import attend_within
from qwen3vl_convert.inference.engine.kv_pool import KVPool, ReqToTokenPool
from qwen3vl_convert.inference.loading import uninitialised
from qwen3vl_convert.inference.moe import Experts
from qwen3vl_convert.verify.logits.pieces import Text
from qwen3vl_convert.verify.logits.prompts import Prompt, prompt_of

pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("dense", tmp_path_factory.mktemp("dense"))


def forward(model: Any, prompt: Prompt) -> Tensor:
    ids = prompt.input_ids[0]
    logits: Tensor = model(ids, torch.arange(len(ids)), ForwardBatch.whole([ids], **visual(prompt)))
    return logits


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= NEAR


@pytest.mark.parametrize("name", ROWS)
def test_whole_prompts(world: World, name: str) -> None:
    prompt = world.prompt(ROWS[name])
    close(forward(world.ours, prompt), world.expected(prompt))


def test_a_ragged_batch_is_its_prompts_one_by_one(world: World) -> None:
    prompts = [world.prompt(ROWS[name], seed) for seed, name in enumerate(ROWS)]
    ids = [one.input_ids[0] for one in prompts]
    inputs = {key: [part for one in prompts if (part := visual(one)[key]) is not None] for key in visual(prompts[0])}
    batch = ForwardBatch.whole(ids, **{key: torch.cat(parts) for key, parts in inputs.items()})
    found = world.ours(batch.input_ids, torch.cat([torch.arange(len(one)) for one in ids]), batch)
    close(found, torch.cat([world.expected(one) for one in prompts]))
    deltas = [get_delta(world, one) for one in prompts]
    assert batch.mrope_position_deltas is not None
    assert batch.mrope_position_deltas.tolist() == deltas


def get_delta(world: World, prompt: Prompt) -> int:
    return int(world.ours.rope_index(prompt.input_ids[0], prompt.image_grid_thw, prompt.video_grid_thw)[1])


def test_only_the_logits_that_are_wanted(dense: World) -> None:
    prompt = dense.prompt(ROWS["image"])
    batch = ForwardBatch.whole([prompt.input_ids[0]], **visual(prompt), logits_indices=torch.tensor([-1, 2]))
    found = dense.ours(batch.input_ids, torch.arange(len(batch.input_ids)), batch)
    close(found, dense.expected(prompt)[[-1, 2]])


class Paged:
    """Sequences over a pool, by hand: what an engine does, in a few lines."""

    def __init__(self, world: World, sequences: int, page_size: int) -> None:
        self.model, dims = world.ours, world.dims
        pages = -(-128 // page_size)
        sizes = (dims.layers, dims.kv_heads, dims.head_dim)
        self.pool = KVPool(1 + sequences * pages, page_size, *sizes, torch.float32, "cpu")
        self.table = ReqToTokenPool(sequences, 128, page_size, "cpu")
        self.rows = [self.table.alloc() for _ in range(sequences)]
        order = torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(3)).tolist()
        self.table.write({(row, at): 1 + order.pop() for row in self.rows if row for at in range(pages)})
        self.lengths = [0] * sequences

    def slots(self, which: int, first: int, stop: int) -> Tensor:
        at, size = torch.arange(first, stop), self.table.page_size
        return self.table.page_table[self.rows[which], at // size] * size + at % size

    def run(self, tokens: dict[int, Tensor], mode: ForwardMode, **fields: Any) -> tuple[Tensor, ForwardBatch]:
        """Logits of new tokens by sequence."""
        ids = torch.cat(list(tokens.values()))
        spans = [(which, self.lengths[which], self.lengths[which] + len(new)) for which, new in tokens.items()]
        for which, _, stop in spans:
            self.lengths[which] = stop
        batch = ForwardBatch(
            forward_mode=mode,
            input_ids=ids,
            seq_lens=[stop for _, _, stop in spans],
            extend_seq_lens=[stop - first for _, first, stop in spans],
            token_to_kv_pool=self.pool,
            req_to_token_pool=self.table,
            req_pool_indices=torch.tensor([self.rows[which] for which in tokens]),
            out_cache_loc=torch.cat([self.slots(*span) for span in spans]),
            **fields,
        )
        positions = torch.cat([torch.arange(first, stop) for _, first, stop in spans])
        return self.model(ids, positions, batch), batch


@pytest.mark.parametrize("page_size", [1, 16])
def test_decoding_step_by_step(world: World, page_size: int) -> None:
    prompts = [world.prompt(ROWS[name], seed=7) for name in ("mixed", "text", "video")]
    paged = Paged(world, len(prompts), page_size)
    deltas, chosen = [], []
    for which, prompt in enumerate(prompts):
        logits, batch = paged.run({which: prompt.input_ids[0]}, ForwardMode.EXTEND, **visual(prompt))
        close(logits, world.expected(prompt))
        assert batch.mrope_position_deltas is not None
        deltas.append(batch.mrope_position_deltas)
        chosen.append([int(logits[-1].argmax())])
    for _ in range(5):
        new = {which: torch.tensor(tokens[-1:]) for which, tokens in enumerate(chosen)}
        logits, _ = paged.run(new, ForwardMode.DECODE, mrope_position_deltas=torch.cat(deltas))
        for which, prompt in enumerate(prompts):
            close(logits[which], world.expected(prompt, chosen[which])[-1])
            chosen[which].append(int(logits[which].argmax()))


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_chunks_that_cut_images(world: World, chunk: int) -> None:
    prompt = world.prompt(ROWS["mixed"])
    ids = prompt.input_ids[0]
    positions, _ = world.ours.rope_index(ids, prompt.image_grid_thw, prompt.video_grid_thw)
    features = all_features(world, prompt)
    is_visual = (ids == world.dims.image_token_id) | (ids == world.dims.video_token_id)
    paged, found = Paged(world, 1, 4), []
    for first in range(0, len(ids), chunk):
        part = slice(first, first + chunk)
        before = int(is_visual[:first].sum())
        rows = features[before : before + int(is_visual[part].sum())]
        logits, _ = paged.run(
            {0: ids[part]}, ForwardMode.EXTEND, mrope_positions=positions[:, part], visual_embeds=rows
        )
        found.append(logits)
    close(torch.cat(found), world.expected(prompt))


def all_features(world: World, prompt: Prompt) -> Tensor:
    """Of the visual tokens of a prompt, in their order."""
    ids = prompt.input_ids[0]
    found = torch.empty(len(ids), world.dims.hidden * (1 + len(world.dims.deepstack)))
    for token, pixels, grid in (
        (world.dims.image_token_id, prompt.pixel_values, prompt.image_grid_thw),
        (world.dims.video_token_id, prompt.pixel_values_videos, prompt.video_grid_thw),
    ):
        found[ids == token] = world.ours.visual(pixels, grid)
    return found[(ids == world.dims.image_token_id) | (ids == world.dims.video_token_id)]


def test_some_decode_while_others_extend(dense: World) -> None:
    text, image = dense.prompt(ROWS["text"]), dense.prompt(ROWS["image"])
    paged = Paged(dense, 2, 4)
    paged.run({0: text.input_ids[0]}, ForwardMode.EXTEND)
    positions, _ = dense.ours.rope_index(image.input_ids[0], image.image_grid_thw)
    both = torch.cat((torch.full((3, 1), text.input_ids.shape[1]), positions), dim=1)
    logits, _ = paged.run(
        {0: torch.tensor([9]), 1: image.input_ids[0]},
        ForwardMode.MIXED,
        num_decodes=1,
        mrope_positions=both,
        **visual(image),
    )
    close(logits[:1], dense.expected(text, [9])[-1:])
    close(logits[1:], dense.expected(image))


def test_text_that_follows_on_a_cached_prefix_stands_after_it(dense: World) -> None:
    """The original restarted at 0."""
    prompt = dense.prompt(ROWS["text"])
    ids, paged = prompt.input_ids[0], Paged(dense, 1, 16)
    _, batch = paged.run({0: ids[:6]}, ForwardMode.EXTEND)
    logits, _ = paged.run({0: ids[6:]}, ForwardMode.EXTEND, mrope_position_deltas=batch.mrope_position_deltas)
    close(logits, dense.expected(prompt)[6:])


def test_positions_that_cannot_be_known_are_an_error(dense: World) -> None:
    ids, paged = dense.prompt(ROWS["text"]).input_ids[0], Paged(dense, 1, 16)
    paged.run({0: ids[:6]}, ForwardMode.EXTEND)
    with pytest.raises(ValueError, match="mrope_positions"):
        paged.run({0: ids[6:]}, ForwardMode.EXTEND)
    with pytest.raises(ValueError, match="no token_to_kv_pool"):
        dense.ours(
            ids[6:],
            torch.arange(6, len(ids)),
            replace(
                ForwardBatch.whole([ids[6:]]),
                seq_lens=[len(ids)],
                mrope_positions=torch.arange(6, len(ids)).expand(3, -1),
            ),
        )


@pytest.mark.parametrize("name", ["image", "video"])
def test_pixels_that_do_not_match_the_tokens(dense: World, name: str) -> None:
    prompt = dense.prompt(ROWS[name])
    ids = prompt.input_ids[0]
    with pytest.raises(ValueError, match=f"{name} tokens"):
        dense.ours(ids, torch.arange(len(ids)), ForwardBatch.whole([ids]))
    positions, _ = dense.ours.rope_index(ids, prompt.image_grid_thw, prompt.video_grid_thw)
    batch = ForwardBatch.whole([ids], mrope_positions=positions, visual_embeds=all_zero(dense, 3))
    with pytest.raises(ValueError, match="do not match"):
        dense.ours(ids, torch.arange(len(ids)), batch)
    with pytest.raises(ValueError, match="do not match"):
        dense.ours(ids, torch.arange(len(ids)), ForwardBatch.whole([ids], mrope_positions=positions))


def test_a_batch_that_decodes_without_a_pool(dense: World) -> None:
    ids = torch.tensor([5])
    batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        input_ids=ids,
        seq_lens=[3],
        extend_seq_lens=[1],
        mrope_positions=ids.expand(3, 1),
    )
    with pytest.raises(ValueError, match="no token_to_kv_pool"):
        dense.ours(ids, torch.tensor([2]), batch)
    with pytest.raises(TypeError, match="pixel_value"):
        ForwardBatch.whole([ids], pixel_value=1)


def all_zero(world: World, rows: int) -> Tensor:
    return torch.zeros(rows, world.dims.hidden * (1 + len(world.dims.deepstack)))


def test_pixels_that_do_not_match_the_grid(dense: World) -> None:
    prompt = dense.prompt(ROWS["image"])
    assert prompt.pixel_values is not None
    assert prompt.image_grid_thw is not None
    with pytest.raises(ValueError, match="need 24 patches, found 23"):
        dense.ours.visual(prompt.pixel_values[1:], prompt.image_grid_thw)
    with pytest.raises(ValueError, match=r"expected \[patches, 1536\]"):
        dense.ours.visual(prompt.pixel_values[:, 1:], prompt.image_grid_thw)
    with pytest.raises(ValueError, match="multiples of 2"):
        dense.ours.visual(prompt.pixel_values, torch.tensor([[1, 3, 8]]))


def test_idle(dense: World) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    batch = ForwardBatch(forward_mode=ForwardMode.IDLE, input_ids=nothing, seq_lens=[], extend_seq_lens=[])
    assert dense.ours(nothing, nothing, batch).shape == (0, dense.dims.vocab)


# ---- positions -------------------------------------------------------------------------------------------------------

IDS = (500, 502, 2)
"""Image token, vision start, merge size."""


def ids_of(name: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    prompt = prompt_of(KINDS["dense"], [ROWS[name]])
    return prompt.input_ids[0], prompt.image_grid_thw, prompt.video_grid_thw


def test_golden_positions() -> None:
    """As transformers 4.57.6, 5.17 and 5.23 have them."""
    ids, grid, _ = ids_of("image")
    positions, delta = get_rope_index(ids, grid, *IDS)
    assert positions.tolist() == [
        [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 7, 8, 9, 10, 11, 12],
        [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8, 9, 10, 11, 12],
        [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    ]
    assert delta == -3
    ids, _, frames = ids_of("video")
    positions, delta = get_rope_index(ids, None, *IDS, frames, 501)
    assert positions[0].tolist() == [
        *range(6), 6, 6, 6, 6, 8, 9, 10, 11, 12, 12, 12, 12, 14, 15, 16, 17, 18, 18, 18, 18, 20, 21, 22, 23, 24,
    ]  # fmt: skip
    assert positions[2].tolist()[6:10] == [6, 7, 6, 7]
    assert delta == -6
    positions, delta = get_rope_index(torch.arange(5), None, *IDS)
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert delta == 0


def test_positions_of_torn_images_are_an_error() -> None:
    ids, grid, _ = ids_of("image")
    with pytest.raises(ValueError, match="image_grid_thw"):
        get_rope_index(ids[:-8], grid, *IDS)


# ---- configs ---------------------------------------------------------------------------------------------------------


def test_every_spelling_of_a_config_is_the_same_model(dense: World) -> None:
    """The original took 5000000 for rope_theta wherever it stood as transformers 5 writes it."""
    hub, _ = rebuild_config(replace(dense.dims, rope_theta=500000.0))
    newer = {**hub, "text_config": dict(hub["text_config"])}
    text = newer["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    models = [empty_model(hub), empty_model(newer), empty_model(Configured(newer)), empty_model(dense.dims)]
    thetas = [model.model.layers[0].self_attn.rope_theta for model in models]
    assert thetas == [500000.0, 500000.0, 500000.0, 5e6]
    for model in models[:3]:
        model.load_state_dict(dense.ours.state_dict())
    prompt = dense.prompt([Text(24)])
    found = [forward(model, prompt) for model in models[:3]]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert float((found[0] - dense.expected(prompt)).abs().max()) > 0.01


class Configured:
    """As an object of transformers."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def to_dict(self) -> dict[str, Any]:
        return self.config


def empty_model(config: Any) -> Any:
    with uninitialised(torch.device("cpu"), torch.float32):
        return Qwen3VLForConditionalGeneration(config)


def test_what_is_no_config_or_no_activation_is_an_error() -> None:
    with pytest.raises(UnsupportedFormat):
        Qwen3VLForConditionalGeneration({"model_type": "llama"})
    with pytest.raises(ValueError, match="gelu_new"):
        Qwen3VLVisionModel(depth=1, hidden_act="gelu_new", deepstack_visual_indexes=())
    with pytest.raises(ValueError, match="deepstack_visual_indexes"):
        Qwen3VLVisionModel(depth=2, hidden_size=16, intermediate_size=16, num_heads=2, deepstack_visual_indexes=(1, 0))


def test_sections_that_are_not_interleaved() -> None:
    """Time, height and width one after the other, as Qwen2-VL has them."""
    sectioned = rotary_axes((2, 1, 1), interleaved=False)
    assert sectioned == [0, 0, 1, 2]
    assert rotary_axes((4, 2, 2), interleaved=True) == [0, 1, 2, 0, 1, 2, 0, 0]
    with pytest.raises(ValueError, match="expected 8 frequencies in all, found 4"):
        rotary_axes((2, 1, 1), interleaved=False, head_dim=16)


def rotary_axes(section: tuple[int, ...], interleaved: bool, head_dim: int = 0) -> list[int]:
    """Which position each frequency turns with, told from what the layer makes of three positions."""
    head_dim = head_dim or 2 * sum(section)
    layer = Qwen3VLAttention(8, 2, 1, head_dim, 0, 10.0, mrope_section=section, mrope_interleaved=interleaved)
    positions = torch.tensor([[0, 1], [0, 2], [0, 3]])
    batch = ForwardBatch.whole([torch.zeros(2, dtype=torch.int64)])
    cos, _ = layer._rotary(positions, torch.float32, batch)
    frequency = 10.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return [
        int((cos[1, i] - (torch.tensor([1, 2, 3]) * frequency[i]).cos()).abs().argmin()) for i in range(len(cos[1]))
    ]


# ---- kernels that need a GPU, by their contract ----------------------------------------------------------------------


def plain_kernel(q: Tensor, k: Tensor, v: Tensor, of_q: Any, of_k: Any, scale: float, causal: bool) -> Tensor:
    """What the documentation of flash attention says that its varlen kernel does, sequence by sequence."""
    groups, out = q.shape[1] // k.shape[1], torch.empty_like(q)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    for one in range(len(of_q[0]) - 1):
        rows, columns = (slice(int(cu[one]), int(cu[one + 1])) for cu, _ in (of_q, of_k))
        assert rows.stop - rows.start <= of_q[1]
        assert columns.stop - columns.start <= of_k[1]
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * scale
        if causal:
            new, all_ = scores.shape[1:]
            scores = scores.masked_fill(~torch.ones(new, all_, dtype=torch.bool).tril(all_ - new), -torch.inf)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[columns])
    return out


def test_flash_attention_of_mixed_chunks(dense: World) -> None:
    prompts = [dense.prompt(ROWS["text"], seed) for seed in range(3)]
    ids = [one.input_ids[0] for one in prompts]
    paged, backend = Paged(dense, 3, 4), FlashBackend(plain_kernel)
    paged.run({0: ids[0][:5], 1: ids[1][:20]}, ForwardMode.EXTEND, attn_backend=backend)
    at = [torch.arange(20, 21), torch.arange(5, 21), torch.arange(21)]
    logits, _ = paged.run(
        {1: ids[1][20:], 0: ids[0][5:], 2: ids[2]},
        ForwardMode.MIXED,
        num_decodes=1,
        mrope_positions=torch.cat(at).expand(3, -1),
        attn_backend=backend,
    )
    expected = [dense.expected(one) for one in prompts]
    close(logits, torch.cat((expected[1][20:], expected[0][5:], expected[2])))


def test_vision_attention_in_any_order_of_lengths() -> None:
    lengths = [4, 6, 4, 1, 6, 4, 0, 9]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = torch.randn(3, int(cu[-1]), 2, 8, generator=torch.Generator().manual_seed(1))
    of = (cu, max(lengths))
    assert torch.allclose(attend_within(q, k, v, cu), plain_kernel(q, k, v, of, of, 8**-0.5, False), atol=1e-6)


def test_grouped_experts_are_the_experts_one_by_one() -> None:
    """The way without the host, which a GPU takes, computed on the CPU."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    generator = torch.Generator().manual_seed(1)
    experts = Experts(32, 16, 6, None, "")
    for parameter in experts.parameters():
        parameter.normal_(generator=generator)
    rows = torch.randn(10, 32, generator=generator)
    ends = torch.tensor([0, 3, 0, 5, 2, 0]).cumsum(0).int()
    one_by_one, grouped = experts._one_by_one(rows, ends), experts._grouped(rows, ends)
    assert torch.allclose(one_by_one, grouped, rtol=1e-4, atol=1e-3)
