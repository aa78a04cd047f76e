"""How a Megatron parameter is called and shaped on disk, in the ways that Megatron-Core writes it.

    stacked     language_model.decoder.layers.mlp.linear_fc1.weight    : l (* f) h      the default per-layer
    language_model.decoder.layers.3.mlp.linear_fc1.weight  : (* f) h        non_homogeneous_layers, moe_layer_freq
    singleton   language_model.decoder.layers.3.mlp.linear_fc1.weight_w, _v : f h       singleton_local_shards (0.14
    dev builds)

Each style is a rewriting of the equation: an axis moves from the name into memory, or back. Nothing else changes.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from qwen3vl_convert.errors import UnsupportedFormat
from qwen3vl_convert.mappings import Equation, Layout, Term

STACKS = {
    "l": "language_model.decoder.layers.",
    "b": "vision_model.decoder.layers.",
    "m": "vision_model.decoder.deepstack_merger_list.",
}
"""Module lists that Megatron-Core stores as one tensor per kind, and the axis that then comes first in memory."""

STYLES = ("stacked", "per-layer", "singleton")
_EXPERT = re.compile(r"\.experts\.(linear_fc\d\.(?:weight|bias)){e}$")
_LOCAL_SPEC = {
    "language_model.decoder.layers.{l}.pre_mlp_layernorm.weight": (
        "language_model.decoder.layers.{l}.mlp.linear_fc1.layer_norm_weight"
    )
}
"""Names that Megatron-Core's local layer spec stores where Transformer Engine's has others (MoE norm)."""


@dataclass(frozen=True)
class Stored:
    """An equation against the tensors on disk; `stack` are the axes that came from the name, first in memory."""

    equation: Equation
    stack: tuple[str, ...]


def stored(equation: Equation, style: str = "stacked", local_spec: bool = False) -> tuple[Stored, ...]:
    """The equations of a parameter against the tensors that hold it on disk."""
    term = equation.megatron
    if local_spec:
        term = Term(_LOCAL_SPEC.get(term.name, term.name), term.layout)
    if style == "singleton" and equation.megatron.name.startswith(STACKS["l"]):
        return _singletons(replace(equation, megatron=term))
    stack: list[str] = []
    name = term.name
    if _EXPERT.search(name):
        name, stack = _EXPERT.sub(r".experts.experts.\1", name), ["e"]
    for axis, prefix in STACKS.items():
        if style == "stacked" and name.startswith(f"{prefix}{{{axis}}}."):
            name, stack = name.replace(f"{{{axis}}}.", "", 1), [axis, *stack]
    layout = Layout(" ".join((*stack, term.layout.text)))
    return (Stored(replace(equation, megatron=Term(name, layout)), tuple(stack)),)


def _singletons(equation: Equation) -> tuple[Stored, ...]:
    """One tensor per layer and expert, the halves of a SwiGLU as `_w` and `_v`."""
    term = equation.megatron
    name = _EXPERT.sub(r".experts.experts.{e}.\1", term.name)
    if equation.apart is None:
        return (Stored(replace(equation, megatron=Term(name, term.layout)), ()),)
    layout = term.layout.without(equation.apart)
    if equation.apart == "*":
        halves = zip("wv", equation.hf, strict=True)
        return tuple(Stored(Equation(Term(f"{name}_{half}", layout), (part,)), ()) for half, part in halves)
    return (Stored(replace(equation, megatron=Term(f"{name}_{{s}}", layout), apart=None), ()),)


def style_of(keys: Iterable[str], axis: str) -> str:
    """The style in which a checkpoint stores a module list, told by its keys."""
    prefix = STACKS[axis]
    numbered = re.compile(re.escape(prefix) + r"\d+\.")
    under = [key for key in keys if key.startswith(prefix)]
    if any(re.search(r"\.weight_[wv]$|\.experts\.experts\.\d+\.", key) for key in under):
        return "singleton"
    counted = sum(bool(numbered.match(key)) for key in under)
    if 0 < counted < len(under):
        raise UnsupportedFormat(
            f"{prefix}*: some keys are stacked and some are numbered by layer; expected one style per module list."
        )
    return "per-layer" if counted else "stacked"


def local_spec_of(keys: Iterable[str]) -> bool:
    """Whether the MoE norm lies under the name that Megatron-Core's local layer spec gives it."""
    known = list(keys)
    moe = any(".mlp.router." in key for key in known)
    return moe and any(key.endswith("mlp.linear_fc1.layer_norm_weight") for key in known if key.startswith(STACKS["l"]))


def on_disk(equations: Iterable[Equation], keys: Iterable[str]) -> tuple[Stored, ...]:
    """All equations against the tensors of a checkpoint with these keys."""
    known = list(keys)
    styles = {axis: style_of(known, axis) for axis in STACKS}
    local_spec = local_spec_of(known)
    return tuple(one for equation in equations for one in stored(equation, _style(equation, styles), local_spec))


def _style(equation: Equation, styles: dict[str, str]) -> str:
    return next((styles[a] for a, prefix in STACKS.items() if equation.megatron.name.startswith(prefix)), "stacked")
