"""In which of the four ways a folder stores its experts, decided once from shapes.

One tensor does not decide: `[E, H, 2I]` and `[E, 2I, H]` are equal if H = 2I. All tensors of an expert together always
do, since that would need H = 2I for the one and H = I for the other.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import islice

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import (
    InputError,
    MisshapenTensor,
    MissingTensors,
    UnknownTensors,
    UnsupportedFormat,
    UsageError,
    listing,
)
from qwen3vl_convert.storage import StoredTensor

Shapes = dict[str, tuple[int, ...]]
LAYOUTS = ("hub", "v5", "per-expert", "scrambled")
_FUSED, _SPLIT = LAYOUTS[:2], LAYOUTS[2:]
_EXPERTS = re.compile(r"(model\.language_model\.layers\.\d+\.mlp\.experts\.(?:(\d+)\.)?)(.+)")


def experts_layout(tensors: Mapping[str, StoredTensor], dims: Dims, override: str = "auto") -> str:
    """`hub`, `v5`, `per-expert` or `scrambled`; `none` for a dense model. `tensors` by canonical hub name.

    `override` must agree with the shapes: it is the user's expectation, not a permission. Raises TensorError's kinds.
    """
    if override not in ("auto", *LAYOUTS):
        raise UsageError(f"--experts-layout: expected auto or one of {', '.join(LAYOUTS)}, found {override!r}.")
    if not dims.moe:
        if override != "auto":
            raise UsageError(f"--experts-layout {override}: the model is dense. Leave the option out.")
        return "none"
    groups = _groups(tensors)
    expected = _expected_shapes(dims)
    layouts = _family(groups)
    _check_complete(groups, dims, layouts)
    layout = _agreed({group: _layout(group, shapes, layouts, expected) for group, shapes in groups.items()})
    if override not in ("auto", layout):
        group = next(iter(groups))
        found = _shown(group, groups[group])
        wanted = _shown(group, expected[override])
        raise MisshapenTensor(
            f'expected the "{override}" layout, {wanted}, found {found}. That is the "{layout}" layout; '
            f"pass --experts-layout {layout}, or auto."
        )
    return layout


def _expected_shapes(dims: Dims) -> dict[str, Shapes]:
    """Shapes of one layer's experts (fused) or of one expert, by layout and name below `experts.` or `experts.N.`."""
    e, h, i = dims.experts, dims.hidden, dims.expert_ffn
    gate, up, down = "gate_proj.weight", "up_proj.weight", "down_proj.weight"
    return {
        "hub": {"gate_up_proj": (e, h, 2 * i), "down_proj": (e, i, h)},
        "v5": {"gate_up_proj": (e, 2 * i, h), "down_proj": (e, h, i)},
        "per-expert": {gate: (i, h), up: (i, h), down: (h, i)},
        # transformers 5.0 and 5.1 cut gate_up [H, 2I] along H, as torch.chunk does: the first half is the larger one.
        "scrambled": {gate: (h - h // 2, 2 * i), up: (h // 2, 2 * i), down: (i, h)},
    }


def _groups(tensors: Mapping[str, StoredTensor]) -> dict[str, Shapes]:
    """Shapes by `...experts.` (fused) or `...experts.N.` (one expert), then by the rest of the name."""
    groups: dict[str, Shapes] = {}
    for name, tensor in tensors.items():
        if match := _EXPERTS.fullmatch(name):
            groups.setdefault(match[1], {})[match[3]] = tensor.shape
    return groups


def _family(groups: Mapping[str, Shapes]) -> tuple[str, ...]:
    """The two layouts whose names these are."""
    fused = [group for group in groups if group.endswith(".experts.")]
    split = [group for group in groups if not group.endswith(".experts.")]
    if fused and split:
        raise InputError(
            f"experts are stored both together ({_example(groups, fused)}) and one by one ({_example(groups, split)}): "
            "expected one way. The folder holds two checkpoints; keep the files of one."
        )
    strange = [group + rest for group in split for rest in groups[group] if rest.startswith("gate_up_proj")]
    if strange:
        raise UnsupportedFormat(
            f"{strange[0]}: gate and up are fused for each expert on its own (mbridge keep_stacked_experts=False). "
            f"Save the experts stacked, or as {', '.join(LAYOUTS)}."
        )
    return _FUSED if fused else _SPLIT


def _example(groups: Mapping[str, Shapes], chosen: list[str]) -> str:
    return chosen[0] + next(iter(groups[chosen[0]]))


def _check_complete(groups: Mapping[str, Shapes], dims: Dims, layouts: tuple[str, ...]) -> None:
    present = {group + name for group, shapes in groups.items() for name in shapes}
    if not present:
        raise MissingTensors(
            f"expected the experts of {dims.layers} layers, found none (no ...mlp.experts.* tensor). "
            "Check that all weight files are there, and that config.json is this model's."
        )
    # Lazily: how many are wanted is config.json's word, how many there are is a fact.
    missing = [*islice((name for name in _wanted(dims, layouts) if name not in present), 8)]
    if missing:
        raise MissingTensors(
            f"expected among the experts of {dims.layers} layers also {listing(missing)}. "
            "Check that all weight files are there, and that config.json is this model's."
        )
    if unknown := present.difference(_wanted(dims, layouts)):
        count = f"{dims.layers} layers" + (f" with {dims.experts} experts" if layouts == _SPLIT else "")
        raise UnknownTensors(f"{listing(unknown)}: expected {count}. Check that config.json is this model's.")


def _wanted(dims: Dims, layouts: tuple[str, ...]) -> Iterator[str]:
    for layer in range(dims.layers):
        experts = f"model.language_model.layers.{layer}.mlp.experts."
        if layouts == _FUSED:
            yield from (experts + name for name in ("gate_up_proj", "down_proj"))
        else:
            names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
            yield from (f"{experts}{expert}.{name}" for expert in range(dims.experts) for name in names)


def _layout(group: str, shapes: Shapes, layouts: tuple[str, ...], expected: Mapping[str, Shapes]) -> str:
    fitting = [layout for layout in layouts if shapes == expected[layout]]
    if len(fitting) != 1:  # two cannot fit, see above
        choices = "; ".join(f'{_shown(group, expected[layout])} (the "{layout}" layout)' for layout in layouts)
        raise MisshapenTensor(
            f"expected by config.json {choices}; found {_shown(group, shapes)}. "
            "No --experts-layout reads this: correct hidden_size, moe_intermediate_size or num_experts."
        )
    return fitting[0]


def _agreed(layouts: Mapping[str, str]) -> str:
    """The layout of all groups. Raises MisshapenTensor, naming one group of each."""
    first = {layout: group for group, layout in reversed(list(layouts.items()))}
    if len(first) > 1:
        shown = ", ".join(f'{group}* is "{layout}"' for layout, group in sorted(first.items()))
        raise MisshapenTensor(
            f"expected one layout of experts in all layers, found several: {shown}. --experts-layout reads one of them "
            "for the whole model: save the model again with one version of the program that wrote it."
        )
    return next(iter(first))


def _shown(group: str, shapes: Shapes) -> str:
    return ", ".join(f"{group}{name} {shape}" for name, shape in sorted(shapes.items(), reverse=True))
