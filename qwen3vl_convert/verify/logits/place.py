"""Where two models part, and what stands behind it: the first point that is wrong, its parameters, the settings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen3vl_convert.errors import listing
from qwen3vl_convert.verify.logits.trace import Point
from qwen3vl_convert.verify.result import Difference, Place, PointResult, WeightsReport

_BETWEEN = {
    "patch_embed": "the pixels, before any weight: the prompts' patches were cut in another order",
    "input_layernorm": "what the layers before hand on: position embeddings, residual sums, deepstack features",
    "linear_qkv": "the norm before it (its eps), or what enters the layer",
    "q_layernorm": "how queries are taken from linear_qkv: the order of heads",
    "k_layernorm": "how keys are taken from linear_qkv: the order of heads",
    "linear_proj": "attention: rotary positions (rope_theta, mrope_section), the mask, the scale, the order of heads",
    "pre_mlp_layernorm": "the residual sum after attention",
    "o_proj": "attention: rotary positions (rope_theta, mrope_section), the mask, the scale, the order of heads",
    "linear_fc1": "the norm before it (its eps), or the order in which patches are merged",
    "linear_fc2": "the activation, or the order of gate and up",
    "router": "the norm before it",
    "patch_norm": "the order in which patches are merged, before the norm or after it",
    "final_layernorm": "what the last layer hands on",
    "output_layer": "the final norm",
}
"""What lies between the points before and the input of a module, by the module's last name."""

_BEFORE = {"vision_model.decoder.layers.0.input_layernorm": ("model.visual.pos_embed.weight",)}
"""HF parameters that have no point of their own, by the module whose input they go into."""

_ATTENTION = ("rope_theta", "mrope_section", "head_dim", "heads", "kv_heads", "vision_heads")
_SETTINGS = {
    "linear_proj": _ATTENTION,
    "o_proj": _ATTENTION,
    "mlp": ("top_k", "experts"),
    "input_layernorm": ("deepstack", "rms_eps", "spatial_merge", "position_embeddings", "image_token_id"),
    "norm": ("rms_eps",),
}
"""Settings that decide what happens there."""


def find_place(first: tuple[Point, PointResult] | None, weights: WeightsReport) -> Place:
    """`first`: the first point that is wrong, with its figures; None where only the logits are."""
    if first is None:
        return Place(None, "Every module agrees and the logits do not: something is done with them after the model.")
    point, result = first
    before = (*point.aligned.before, *_BEFORE.get(result.module, ()))
    behind = before if point.side == "input" else point.aligned.parameters
    wrong = [one for one in weights.differences if one.name in behind]
    last = point.aligned.module.rpartition(".")[2]
    named = _settings_behind(last, point.side, weights.settings)
    text = f"{result.name}, {point.side}: {_said(point, last, wrong)}"
    return Place(result, text + (f". Settings that differ: {named}." if named else "."), tuple(d.name for d in wrong))


def refused(reason: str, weights: WeightsReport) -> Place:
    """Where our model does not even take the prompts."""
    named = listing(weights.settings, 4)
    text = f"The Megatron model, with the settings that the checkpoint states, refuses the prompts: {reason}"
    return Place(None, text + (f" Settings that differ: {named}." if named else ""))


def _said(point: Point, last: str, wrong: Sequence[Difference]) -> str:
    if wrong:
        return f"{'its' if point.side == 'output' else 'the'} weights differ {_parameters(wrong)}"
    if point.side == "output" and last == "mlp":
        return "its weights are equal: the choice of experts (top_k, how their shares are normalised) is another"
    if point.side == "output":
        return "what enters is the same and its weights are equal: it computes another function (eps, bias, activation)"
    return f"it goes wrong before this module, in {_BETWEEN.get(last, 'what leads to it')}"


def _parameters(wrong: Sequence[Difference]) -> str:
    guesses = list(dict.fromkeys(one.guess for one in wrong if one.guess))
    names = f"({listing([one.name for one in wrong], 3)})"
    return f"{names}: {'; '.join(guesses[:2])}" if guesses else names


def _settings_behind(module: str, side: str, settings: Mapping[str, Any]) -> str:
    kind = "norm" if side == "output" and module.endswith("norm") else module
    known: Iterable[str] = _SETTINGS.get(kind, ())
    found = [name for name in settings if name.partition(" ")[0] in known]
    return listing(found or settings, 4)
