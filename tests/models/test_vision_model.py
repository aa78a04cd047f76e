"""The vision tower's parts against plain loops over images, rows and columns."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.build import lone_process, provider
from qwen3vl_convert.make import SIZES

pytestmark = pytest.mark.megatron

GRIDS = {
    "one": [[1, 4, 6]],
    "two sizes": [[1, 2, 2], [1, 8, 4]],
    "video and image": [[3, 4, 4], [1, 6, 2]],
    "wider than the table": [[1, 10, 26], [2, 2, 18]],
}
each_grid = pytest.mark.parametrize("grid", [torch.tensor(grid) for grid in GRIDS.values()], ids=list(GRIDS))


@pytest.fixture(scope="module")
def tower() -> Iterator[Any]:
    with lone_process():
        torch.manual_seed(0)
        model = provider(replace(SIZES["tiny"], vision_heads=2), init_method_std=0.2).provide().vision_model
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() == 1 else None
        yield model.eval().requires_grad_(False)


def places(grid: Tensor, merge: int = 2) -> Iterator[tuple[int, int, int, int]]:
    """Row, column, rows, columns of each patch in the processor's order."""
    for frames, rows, columns in grid.tolist():
        for _ in range(frames):
            for block_row in range(0, rows, merge):
                for block_column in range(0, columns, merge):
                    for row in range(block_row, block_row + merge):
                        for column in range(block_column, block_column + merge):
                            yield row, column, rows, columns


def patches(grid: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(int(grid.prod(1).sum()), 1536, generator=torch.Generator().manual_seed(seed))


@each_grid
def test_position_embeddings_are_the_table_stretched_bilinearly(tower: Any, grid: Tensor) -> None:
    side = tower.num_grid_per_side
    table = tower.pos_embed.weight.double().view(side, side, -1)
    for ours, (row, column, rows, columns) in zip(tower.fast_pos_embed_interpolate(grid), places(grid), strict=True):
        y, x = row * (side - 1) / (rows - 1), column * (side - 1) / (columns - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
        upper = table[top, left] * (1 - x + left) + table[top, right] * (x - left)
        lower = table[bottom, left] * (1 - x + left) + table[bottom, right] * (x - left)
        torch.testing.assert_close(ours.double(), upper * (1 - y + top) + lower * (y - top), rtol=0, atol=2e-6)


@each_grid
def test_angles_are_rows_then_columns(tower: Any, grid: Tensor) -> None:
    quarter = tower.config.kv_channels // 4
    frequency = [10000 ** (-2 * i / (2 * quarter)) for i in range(quarter)]
    expected = [[row * f for f in frequency] + [column * f for f in frequency] for row, column, *_ in places(grid)]
    torch.testing.assert_close(tower.rot_pos_emb(grid), torch.tensor(expected), rtol=1e-6, atol=0)


def test_each_frame_attends_to_itself(tower: Any) -> None:
    packed = tower.build_packed_seq_params(torch.tensor([[2, 4, 6], [1, 2, 2]]))
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 24, 48, 52]
    assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (24, 24)


def test_packed_parameters_want_a_grid(tower: Any) -> None:
    with pytest.raises(ValueError, match="grid_thw: expected the grids"):
        tower.build_packed_seq_params(None)


def test_an_image_does_not_see_the_others(tower: Any) -> None:
    grid = torch.tensor([[1, 4, 6], [2, 4, 4], [1, 2, 2]])
    together, deepstack = tower(patches(grid), grid)
    at = 0
    for image, pixels in zip(grid, patches(grid).split(grid.prod(1).tolist()), strict=True):
        alone, alone_deep = tower(pixels, image[None])
        span = slice(at, at := at + len(alone))
        torch.testing.assert_close(together[span], alone, rtol=0, atol=2e-5)
        for both, one in zip(deepstack, alone_deep, strict=True):
            torch.testing.assert_close(both[span], one, rtol=0, atol=2e-5)
    assert at == len(together)


def test_shapes_and_order_of_what_comes_out(tower: Any) -> None:
    grid = torch.tensor([[1, 4, 6], [2, 4, 4]])
    features, deepstack = tower(patches(grid), grid)
    assert features.shape == (14, tower.config.out_hidden_size)
    assert [feature.shape for feature in deepstack] == [features.shape] * 3
    # the last vision layer is not a deepstack one: no feature is the output of the main merger
    assert not any(torch.allclose(feature, features) for feature in deepstack)


@pytest.mark.parametrize(
    "wrong", [lambda p: p[:-1], lambda p: p[:, :-1], lambda p: None], ids=["rows", "values", "none"]
)
def test_pixels_that_do_not_fit_their_grid_are_refused(tower: Any, wrong: Any) -> None:
    grid = torch.tensor([[1, 4, 6]])
    with pytest.raises(ValueError, match=r"the grids \[\[1, 4, 6\]\] need \(24, 1536\); found"):
        tower(wrong(patches(grid)), grid)


# ---- CUDA graphs: fixed lengths --------------------------------------------------------------------------------------


@pytest.fixture
def captured(tower: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The tower with the fixed length that vision CUDA graphs have, without the capture."""
    monkeypatch.setattr(tower, "_uses_vision_cuda_graph", lambda: tower.training)
    monkeypatch.setattr(tower.config, "max_vision_cuda_graph_seq_length", 72)
    yield tower.train()
    tower.eval()


@pytest.mark.parametrize(
    "grid", [[[1, 4, 6]], [[1, 4, 6], [1, 8, 4]], [[3, 4, 6]], [[1, 8, 9 - 1]], [[2, 6, 6]], [[1, 6, 12]]], ids=str
)
def test_padded_equals_unpadded(captured: Any, grid: list[list[int]]) -> None:
    grids = torch.tensor(grid)
    padded, padded_deep = captured(patches(grids), grids)
    plain, plain_deep = captured.eval()(patches(grids), grids)
    torch.testing.assert_close(padded, plain, rtol=0, atol=2e-5)
    for ours, theirs in zip(padded_deep, plain_deep, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_graphs_are_for_training_with_transformer_engine(tower: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tower.train()._uses_vision_cuda_graph()
    monkeypatch.setattr(tower.config, "cuda_graph_impl", "transformer_engine")
    assert tower._uses_vision_cuda_graph()
    assert not tower.eval()._uses_vision_cuda_graph()


def test_length_of_a_graph(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert captured._get_max_vision_seq_length() == 72
    monkeypatch.setattr(captured.config, "max_vision_cuda_graph_seq_length", None)
    assert captured._get_max_vision_seq_length() == captured.config.num_position_embeddings // 4


@pytest.mark.parametrize(
    ("settings", "length"),
    [({}, 576), ({"length": None}, 576), ({"length": 0}, 576), ({"length": 100}, 100), ({"merge": 3}, 256)],
    ids=str,
)
def test_length_of_a_graph_is_known_from_the_config_alone(settings: dict[str, Any], length: int) -> None:
    """Of any object with the attributes, the length's own left out or not."""
    from qwen3vl_convert.models.vision_model import Qwen3VLVisionModel

    config = SimpleNamespace(num_position_embeddings=2304, spatial_merge_size=settings.get("merge", 2))
    if "length" in settings:
        config.max_vision_cuda_graph_seq_length = settings["length"]
    tower: Any = SimpleNamespace(config=config)
    assert Qwen3VLVisionModel._get_max_vision_seq_length(tower) == length


def test_a_graph_holds_whole_features(tower: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3vl_convert.models.specs import patch_merger_spec, vision_layer_spec
    from qwen3vl_convert.models.vision_model import Qwen3VLVisionModel

    config = tower.config
    monkeypatch.setattr(config, "max_vision_cuda_graph_seq_length", 71)
    with pytest.raises(ValueError, match="expected a multiple of 4 patches.*found 71"):
        Qwen3VLVisionModel(config, vision_layer_spec(config), patch_merger_spec(config))


def test_padding_adds_zeros_at_the_end() -> None:
    from qwen3vl_convert.models.vision_model import _maybe_pad_vision_sequence_for_cuda_graph as pad

    hidden, angles = torch.ones(5, 8), torch.ones(5, 1, 1, 4)
    hidden_states, rotary_pos_emb, length = pad(hidden, angles, 5, 7)
    assert length == 7
    assert (hidden_states.shape, rotary_pos_emb.shape) == ((7, 8), (7, 1, 1, 4))
    assert (hidden_states[:5] == 1).all()
    assert (hidden_states[5:] == 0).all()
    assert (rotary_pos_emb[5:] == 0).all()
    assert pad(hidden, angles, 5, 5)[0] is hidden


def test_a_sequence_too_long_for_its_graph_is_refused(captured: Any) -> None:
    grid = torch.tensor([[1, 8, 10]])
    with pytest.raises(ValueError, match=r"\(80\) exceeds max_vision_cuda_graph_seq_length \(72\).*set that field"):
        captured(patches(grid), grid)


def test_attention_setup_without_graphs_is_packed(tower: Any) -> None:
    from qwen3vl_convert.models.vision_model import _vision_forward_packed_attention_setup as setup

    grid = torch.tensor([[2, 2, 2]])
    packed, mask = setup(False, torch.zeros(8, 1, 4), 8, 8, grid, tower.build_packed_seq_params)
    assert mask is None
    assert packed is not None
    assert packed.cu_seqlens_q.tolist() == [0, 4, 8]


def not_to_be_called(*_: Any) -> Any:
    raise AssertionError("a captured graph takes no packed sequences")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_setup_with_graphs_hides_padding_and_nothing_else(dtype: torch.dtype) -> None:
    """Whatever the grid says: nobody asks it, nor the callback."""
    from qwen3vl_convert.models.vision_model import _vision_forward_packed_attention_setup as setup

    grid: Any = None
    packed, mask = setup(True, torch.zeros(9, 1, 4, dtype=dtype), 7, 9, grid, not_to_be_called)
    assert packed is None
    assert mask is not None
    assert (mask.dtype, mask.shape) == (dtype, (1, 1, 9, 9))
    expected = torch.full((9, 9), torch.finfo(dtype).min, dtype=dtype)
    expected[:7, :7] = 0
    assert torch.equal(mask[0, 0], expected)
    assert setup(True, torch.zeros(9, 1, 4, dtype=dtype), 9, 9, grid, not_to_be_called) == (None, None)


@pytest.mark.parametrize("grid", [[[2, 2, 2]], [[1, 2, 2]], [[1, 2, 2], [1, 4, 2]]], ids=str)
@pytest.mark.parametrize("padding", [0, 4])
def test_the_layers_keep_frames_apart_and_no_row_sees_nothing(
    captured: Any, monkeypatch: pytest.MonkeyPatch, grid: list[list[int]], padding: int
) -> None:
    """A row that sees nothing would be NaN in kernels that take powers of 2."""
    grids = torch.tensor(grid)
    lengths = [rows * columns for frames, rows, columns in grid for _ in range(frames)]
    monkeypatch.setattr(captured.config, "max_vision_cuda_graph_seq_length", sum(lengths) + padding)
    given: list[Any] = []
    decode = captured.decoder.forward

    def noted(*args: Any, attention_bias: Tensor | None, **kwargs: Any) -> Any:
        given.append(attention_bias)
        return decode(*args, attention_bias=attention_bias, **kwargs)

    monkeypatch.setattr(captured.decoder, "forward", noted)
    captured(patches(grids), grids)
    (bias,) = given
    if len(lengths) == 1 and not padding:
        assert bias is None
        return
    assert bias.shape == (1, 1, sum(lengths) + padding, sum(lengths) + padding)
    groups = [*lengths, padding] if padding else lengths
    seen = torch.block_diag(*(torch.ones(length, length) for length in groups)).bool()
    assert torch.equal(bias[0, 0] == 0, seen)
    assert (bias[0, 0][~seen] == torch.finfo(bias.dtype).min).all()
    assert torch.softmax(bias[0, 0] * math.log2(math.e), dim=-1).isfinite().all()


def test_gradients_padded_are_those_unpadded(captured: Any) -> None:
    grids = torch.tensor([[1, 4, 6], [1, 8, 4]])
    weights = list(captured.parameters())
    found = []
    for tower in (captured, captured.eval()):
        features, deepstack = tower.requires_grad_()(patches(grids), grids)
        found.append(torch.autograd.grad(sum(map(torch.sum, (features, *deepstack))), weights))  # type: ignore[arg-type]
    captured.requires_grad_(False)
    for padded, plain in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-4)


def test_the_tower_is_not_cut(tower: Any) -> None:
    from qwen3vl_convert.models.specs import patch_merger_spec, vision_layer_spec
    from qwen3vl_convert.models.vision_model import Qwen3VLVisionModel

    config = tower.config
    with pytest.raises(ValueError, match="not cut into pipeline stages"):
        Qwen3VLVisionModel(config, vision_layer_spec(config), patch_merger_spec(config), post_process=False)
    config.context_parallel_size = 2
    try:
        with pytest.raises(ValueError, match="context_parallel_size=2 in the vision configuration: expected 1"):
            Qwen3VLVisionModel(config, vision_layer_spec(config), patch_merger_spec(config))
    finally:
        config.context_parallel_size = 1


# ---- the attention beneath -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 7, 2]], ids=str)
def test_packed_attention_is_each_sequence_alone_padded_or_not(tower: Any, lengths: list[int], causal: bool) -> None:
    """On a GPU all sequences are one padded batch, on a CPU one after another: both against the formula."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    from qwen3vl_convert.models.attention import TorchAttention

    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(sum(lengths), heads, 8, generator=generator) for heads in (4, 2, 2))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    attention = TorchAttention(tower.config, 1, AttnMaskType.causal)
    packed = PackedSeqParams("thd", starts, starts, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
    kind = AttnMaskType.causal if causal else AttnMaskType.no_mask
    one_by_one = attention(query, key, value, None, attn_mask_type=kind, packed_seq_params=packed)
    padded = attention._padded(query, key, value, starts, max(lengths), causal).flatten(1)

    at = 0
    for length in lengths:
        span = slice(at, at := at + length)
        q, k, v = query[span].transpose(0, 1), key[span].transpose(0, 1), value[span].transpose(0, 1)
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)  # query heads 0, 1 share the first key head
        scores = q @ k.transpose(1, 2) / 8**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        expected = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        torch.testing.assert_close(one_by_one[span], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(padded[span], expected, rtol=0, atol=1e-6)
