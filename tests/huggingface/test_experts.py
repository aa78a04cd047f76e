"""Which experts layout a folder has: odd sizes, square sizes, and everything that contradicts itself."""

import itertools
from typing import Any

import pytest

from huggingface.samples import (
    Shapes,
    expert_shapes,
    model_shapes,
    published,
    tiny_config,
    with_changes,
)
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import (
    InputError,
    MisshapenTensor,
    MissingTensors,
    UnknownTensors,
    UnsupportedFormat,
    UsageError,
)
from qwen3vl_convert.huggingface.experts import LAYOUTS, experts_layout
from qwen3vl_convert.huggingface.folder import read_folder
from qwen3vl_convert.mappings import EXPERT_LAYOUTS
from qwen3vl_convert.storage import StoredTensor
from recorded import HEADERS, HUGGINGFACE

LAYER = "model.language_model.layers."


def moe(hidden: int = 16, expert_ffn: int = 6, **changes: Any) -> Dims:
    sizes = {"text_config__hidden_size": hidden, "text_config__moe_intermediate_size": expert_ffn}
    return Dims.from_config(with_changes(tiny_config(moe=True), **sizes, **changes))


def stored(shapes: Shapes) -> dict[str, StoredTensor]:
    return {name: StoredTensor(name, "bfloat16", shape, ()) for name, shape in shapes.items()}


def test_names_are_those_of_the_mappings() -> None:
    assert LAYOUTS == EXPERT_LAYOUTS


# 16/8: H = 2I, where gate_up alone does not decide; 8/8: H = I, where down does not; 16/16, 7/3, 2/1: around them
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("hidden", "ffn"), [(16, 6), (16, 8), (8, 8), (16, 16), (6, 3), (2, 1), (4, 1)])
def test_shapes_always_decide(layout: str, hidden: int, ffn: int) -> None:
    dims = moe(hidden, ffn)
    tensors = stored(model_shapes(dims, layout))
    assert experts_layout(tensors, dims) == layout
    assert experts_layout(tensors, dims, layout) == layout
    for other in set(LAYOUTS) - {layout}:
        with pytest.raises(MisshapenTensor, match=f'That is the "{layout}" layout; pass --experts-layout {layout}'):
            experts_layout(tensors, dims, other)


def test_no_two_layouts_have_the_same_shapes_in_any_size() -> None:
    for hidden, ffn in itertools.product(range(1, 13), repeat=2):
        dims = moe(hidden, ffn)
        shapes = [expert_shapes(dims, layout) for layout in LAYOUTS]
        assert all(one != other for one, other in itertools.combinations(shapes, 2)), (hidden, ffn)


def test_odd_hidden_size_is_scrambled_with_the_larger_half_first() -> None:
    dims = moe(hidden=7)
    shapes = model_shapes(dims, "scrambled")
    halves = {name: (4, 12) for name in shapes if "experts" in name and "gate_proj" in name}
    assert experts_layout(stored(shapes | halves), dims) == "scrambled"


def test_dense_has_none() -> None:
    dims = Dims.from_config(tiny_config())
    assert experts_layout(stored(model_shapes(dims)), dims) == "none"
    with pytest.raises(UsageError, match="the model is dense"):
        experts_layout({}, dims, "hub")


def test_unknown_override() -> None:
    with pytest.raises(UsageError, match="expected auto or one of hub, v5, per-expert, scrambled, found 'V5'"):
        experts_layout({}, moe(), "V5")


def test_golden_folders() -> None:
    for name, layout in (("moe", "hub"), ("moe-v5", "v5"), ("dense", "none"), ("dense-tied", "none")):
        checkpoint = read_folder(HUGGINGFACE / name)
        assert experts_layout(checkpoint.tensors, checkpoint.dims) == layout


@pytest.mark.parametrize("size", ["30b", "235b"])
def test_published_models(size: str) -> None:
    import json

    header = json.loads((HEADERS / f"{size}.json").read_text())["tensors"]
    tensors = stored({name: tuple(shape) for name, shape in header.items()})
    assert experts_layout(tensors, Dims.from_config(published(size))) == "hub"


def test_config_contradicts_shapes() -> None:
    tensors = stored(model_shapes(moe(expert_ffn=6)))
    with pytest.raises(MisshapenTensor, match=r"gate_up_proj \(4, 16, 10\).*\(the \"hub\".*found .*\(4, 16, 12\)"):
        experts_layout(tensors, moe(expert_ffn=5))


def test_a_pair_that_contradicts_itself() -> None:
    shapes = model_shapes(moe())
    shapes[LAYER + "1.mlp.experts.down_proj"] = (4, 16, 6)  # v5's, beside the hub's gate_up_proj
    with pytest.raises(
        MisshapenTensor, match=r"layers.1.mlp.experts.down_proj \(4, 16, 6\).*No --experts-layout reads"
    ):
        experts_layout(stored(shapes), moe())


def test_square_gate_up_with_the_others_down() -> None:
    """H = 2I: gate_up is the same in both layouts, and one layer's down gives it away."""
    dims = moe(16, 8)
    shapes = model_shapes(dims, "hub")
    shapes[LAYER + "1.mlp.experts.down_proj"] = (4, 16, 8)
    with pytest.raises(MisshapenTensor, match=r'layers.0.mlp.experts.\* is "hub", .*layers.1.mlp.experts.\* is "v5"'):
        experts_layout(stored(shapes), dims)


@pytest.mark.parametrize(("one", "other"), [("hub", "v5"), ("per-expert", "scrambled")])
def test_layers_that_contradict_each_other(one: str, other: str) -> None:
    dims = moe()
    second = {name: shape for name, shape in model_shapes(dims, other).items() if f"{LAYER}1." in name}
    with pytest.raises(MisshapenTensor, match=r"found several: .*layers.0.*layers.1.*--experts-layout"):
        experts_layout(stored(model_shapes(dims, one) | second), dims)


def test_both_fused_and_one_by_one() -> None:
    dims = moe()
    with pytest.raises(InputError, match=r"both together .*gate_up_proj.* and one by one .*0.gate_proj"):
        experts_layout(stored(model_shapes(dims) | model_shapes(dims, "per-expert")), dims)


def test_fused_for_each_expert() -> None:
    one = LAYER + "{}.mlp.experts.{}.gate_up_proj.weight"
    shapes: Shapes = {one.format(layer, expert): (16, 12) for layer in (0, 1) for expert in (0, 1)}
    with pytest.raises(UnsupportedFormat, match="mbridge keep_stacked_experts=False"):
        experts_layout(stored(shapes), moe())


@pytest.mark.parametrize("layout", ["hub", "per-expert"])
def test_missing_and_unknown_experts(layout: str) -> None:
    shapes = model_shapes(moe(), layout)
    gone = next(name for name in shapes if "layers.1.mlp.experts" in name)
    with pytest.raises(MissingTensors, match=gone):
        experts_layout(stored({name: shape for name, shape in shapes.items() if name != gone}), moe())
    with pytest.raises(UnknownTensors, match=r"layers.1.mlp.experts.*: expected 1 layers"):
        experts_layout(stored(shapes), moe(text_config__num_hidden_layers=1))


def test_no_experts_at_all() -> None:
    with pytest.raises(MissingTensors, match="expected the experts of 2 layers, found none"):
        experts_layout({}, moe())


def test_a_config_that_claims_too_much_is_refused_at_once() -> None:
    dims = moe(text_config__num_hidden_layers=4096, text_config__num_experts=65536)
    with pytest.raises(MissingTensors, match=r"layers.0.mlp.experts.4"):
        experts_layout(stored(model_shapes(moe(), "per-expert")), dims)
