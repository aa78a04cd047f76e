"""Weights with which every fault shows, and the faults: each a mistake that was made in some port of Qwen3-VL.

`make_checkpoint` draws weights as training starts with them: attention is nearly uniform, and what enters an activation
nearly 0, where GELU and its approximation are the same and M-RoPE is hardly seen. Here every layer changes what it is
given by about as much as it is given, heads look at few tokens, mergers reach well into the bend of GELU, and patches
are embedded so faintly that the eps of the norms after them is a part of the variance.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from qwen3vl_convert import Dims, make_checkpoint
from reference import load_huggingface

SCALES = {
    "patch_embed": 0.05,
    "pos_embed": 0.05,
    "embed_tokens": 0.1,  # tied, it is the head too
    "lm_head": 0.5,
    "merger": 2.0,
    "mlp.gate.weight": 2.0,
}
"""By a part of the name, what comes out of a layer beside what goes in; 1 for the rest."""


def lively_checkpoint(folder: Path, dims: Dims) -> Path:
    """A Hugging Face folder of these sizes in float32, in the published layout; the same bits in every run."""
    make_checkpoint(folder, dims, dtype="float32")
    weights = {name: lively(name, tensor) for name, tensor in load_huggingface(folder).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def lively(name: str, like: Tensor) -> Tensor:
    """Random values in the shape of a tensor of that name."""
    values = torch.randn(like.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if "norm" in name:
        return values * 0.2 + (1.0 if name.endswith("weight") else 0.0)
    if name.endswith("bias"):
        return values * 0.1
    scale = next((scale for part, scale in SCALES.items() if part in name), 1.0)
    return values * scale / math.sqrt(1 if "embed_tokens" in name or "pos_embed" in name else inputs(name, like))


def inputs(name: str, like: Tensor) -> int:
    """How many values each output is a sum of. Experts of the published layout are stored inputs first."""
    return like.shape[1] if "experts" in name else like[0].numel()


# ---- faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A mistake, made in a live model of ours; `prompt` is one that must show it, in each of `models`."""

    plant: Callable[[Any, pytest.MonkeyPatch], None]
    prompt: str = "mixed"
    models: tuple[str, ...] = ("dense", "tied", "moe")


def no_deepstack(model: Any, patch: pytest.MonkeyPatch) -> None:
    change_features(model, patch, lambda features: features * (torch.arange(len(features)) == 0)[:, None, None])


def deepstack_late(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Each feature enters one layer after its own: the first layer gets zeros."""
    change_features(model, patch, lambda features: torch.cat([features[:1], features[:1] * 0, features[1:]]))


def change_features(model: Any, patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """[1 + deepstack, tokens, h]: the embeddings of visual tokens, then what is added after the first layers."""
    original = model._features
    patch.setattr(model, "_features", lambda visual: change(original(visual)))


def sectioned_mrope(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Time, height and width one after the other, as Qwen2-VL has them."""
    rope = model.language_model.rotary_pos_emb
    patch.setattr(rope, "axis_of_frequency", lambda section: torch.arange(3).repeat_interleave(torch.tensor(section)))


def rounded_frequencies(model: Any, patch: pytest.MonkeyPatch) -> None:
    """What `model.bfloat16()` does to them where they are a buffer."""
    rope = model.language_model.rotary_pos_emb
    patch.setattr(rope, "inv_freq", rope.inv_freq.bfloat16().float())


def text_positions(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Every token one further, images too."""
    patch.setattr(model, "_positions", lambda ids, *_: torch.arange(ids.shape[1]).expand(3, *ids.shape))


def tanh_in_mergers(model: Any, patch: pytest.MonkeyPatch) -> None:
    """The approximation that is right in the layers of the tower."""
    from qwen3vl_convert.models import vision_layers

    gelu = partial(functional.gelu, approximate="tanh")
    patch.setattr(vision_layers, "functional", SimpleNamespace(**{**vars(functional), "gelu": gelu}))


def default_eps(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Megatron-Core's and torch's, in the tower's norms."""
    from qwen3vl_convert.models.norms import LayerNorm

    norms = [module for module in model.vision_model.modules() if isinstance(module, LayerNorm)]
    assert norms
    for norm in norms:
        patch.setattr(norm, "eps", 1e-5)


def frames_together(model: Any, patch: pytest.MonkeyPatch) -> None:
    """The frames of a video see each other."""
    tower, original = model.vision_model, model.vision_model.build_packed_seq_params
    video = torch.tensor([1, 1, 1])

    def build(grid_thw: Tensor) -> Any:
        grid = grid_thw * video
        grid[:, 1], grid[:, 0] = grid[:, 0] * grid[:, 1], 1
        return original(grid)

    patch.setattr(tower, "build_packed_seq_params", build)


def padding_is_seen(model: Any, patch: pytest.MonkeyPatch) -> None:
    from qwen3vl_convert.models import model as module

    patch.setattr(module, "_megatron_mask", lambda *_: None)


def sequences_together(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Packed sequences see those before them."""
    text, original = model.language_model, model.language_model.forward
    patch.setattr(text, "forward", lambda **inputs: original(**inputs | {"packed_seq_params": None}))


def shares_as_they_are(model: Any, patch: pytest.MonkeyPatch) -> None:
    """The shares of the chosen experts do not sum to one: softmax over all experts, and that is it."""
    for layer in model.language_model.decoder.layers:
        patch.setattr(layer.mlp.router.config, "moe_router_pre_softmax", True)


FAULTS = {
    "no deepstack": Fault(no_deepstack),
    "deepstack one layer late": Fault(deepstack_late),
    "sectioned M-RoPE": Fault(sectioned_mrope),
    "positions of text": Fault(text_positions),
    "tanh GELU in the mergers": Fault(tanh_in_mergers),
    "LayerNorm eps 1e-5": Fault(default_eps),
    "frames see each other": Fault(frames_together, "video"),
    "frequencies in bfloat16": Fault(rounded_frequencies, "far apart"),
    "padding is seen": Fault(padding_is_seen, "padded left"),
    "packed sequences see each other": Fault(sequences_together, "packed text"),
    "top-k not renormalised": Fault(shares_as_they_are, "text", ("moe",)),
}
