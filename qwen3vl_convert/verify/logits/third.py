"""The inference model in the place of Megatron-Core's: a third opinion, which shares no code with the other two.

It is held whole, with the weights of the Megatron checkpoint: it merges what is computed at once, so that a layer's
weights are not there to be read again by their names.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from qwen3vl_convert.assembled import assemble_megatron
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.inference import ForwardBatch, Qwen3VLForConditionalGeneration
from qwen3vl_convert.inference.loading import uninitialised
from qwen3vl_convert.model import EMBEDDING, OUTPUT, MegatronModel, open_megatron
from qwen3vl_convert.verify.logits.alignment import Aligned
from qwen3vl_convert.verify.logits.programs import rounded
from qwen3vl_convert.verify.logits.prompts import Prompt
from qwen3vl_convert.verify.logits.trace import HF, MEGATRON
from qwen3vl_convert.verify.logits.traffic import Traffic

_IN_BLOCK = ("norm1", "attn", "norm2", "mlp")
_IN_LAYER: dict[str, tuple[str, ...]] = {
    "input_layernorm": (),
    "self_attn.q_norm": ("self_attn.q_proj",),
    "self_attn.k_norm": ("self_attn.k_proj",),
    "self_attn.o_proj": ("self_attn.v_proj",),
    "post_attention_layernorm": (),
    "mlp": (),
}
"""Modules that both have, in the order in which they run, and those of transformers whose weights show in what goes in.
"""


class ThirdTraffic(Traffic):
    """transformers and the inference model side by side. Only whole: `Mode.stream` must be False."""

    revisiting = frozenset({HF, MEGATRON})

    def _build(self, dtype: torch.dtype) -> nn.Module:
        """Its output layer is its own even if the model's is tied: a layer takes only its own weights."""
        with uninitialised(torch.device("meta"), dtype):
            model: nn.Module = Qwen3VLForConditionalGeneration(replace(self.ours.model.dims, tied=False))
        return model.eval()

    def _open(self, experts_layout: str) -> tuple[tuple[Aligned, ...], dict[str, int]]:
        dims = self.ours.model.dims
        return aligned(dims, self.theirs.tensors), dims.sizes()

    def _fill(self, program: str, passed: Callable[[int], None]) -> None:
        if program == HF:
            return super()._fill(program, passed)
        model = self.models[program, False]
        assert isinstance(model, Qwen3VLForConditionalGeneration)
        model.to_empty(device=self.mode.device)
        model.load_weights(weights_of(self.ours, self.mode.dtypes(False), self.mode.device, passed))

    def _logits(self, model: nn.Module, prompt: Prompt) -> Tensor:
        ids = prompt.input_ids[0]
        batch = ForwardBatch.whole(
            [ids],
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            pixel_values_videos=prompt.pixel_values_videos,
            video_grid_thw=prompt.video_grid_thw,
        )
        logits: Tensor = model(ids, torch.arange(len(ids), device=ids.device), batch)
        return logits


def weights_of(
    ours: MegatronModel,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    passed: Callable[[int], None] = lambda nbytes: None,
) -> Iterator[tuple[str, Tensor]]:
    """All weights of a Megatron checkpoint by their names on the Hub, rounded on the device to these dtypes one after
    another. `passed` is told of the bytes of each when it was taken.
    """
    assembled = assemble_megatron(open_megatron(ours.checkpoint.folder, None, ours.model.dims, "per-expert"))
    for name in assembled.links:
        tensor = rounded(assembled.tensor(name).to(device), dtypes)
        yield name, tensor
        passed(tensor.nbytes)
    if OUTPUT[1] not in assembled.links:
        yield OUTPUT[1], rounded(assembled.tensor(EMBEDDING[1]).to(device), dtypes)


def aligned(dims: Dims, parameters: Iterable[str]) -> tuple[Aligned, ...]:
    """Modules that do what one of transformers' does, in the order in which they run. `parameters`: HF names."""
    names = tuple(parameters)

    def held(module: str) -> tuple[str, ...]:
        return tuple(name for name in names if name.startswith(f"{_theirs(module)}."))

    def one(module: str, tower: str, layer: int | None = None, *before: str) -> Aligned:
        shown = tuple(name for other in before for name in held(other))
        return Aligned(module, (_theirs(module),), held(module), tower, layer, None, shown)

    found = [one("model.embed_tokens", "text"), one("visual.patch_embed", "vision"), one("visual.pos_embed", "vision")]
    for block in range(dims.vision_depth):
        found += [one(f"visual.blocks.{block}.{part}", "vision", block) for part in _IN_BLOCK]
        if block in dims.deepstack:
            found.append(one(f"visual.deepstack_merger_list.{dims.deepstack.index(block)}", "vision"))
    found.append(one("visual.merger", "vision"))
    for layer in range(dims.layers):
        prefix = f"model.layers.{layer}"
        found += [
            one(f"{prefix}.{part}", "text", layer, *(f"{prefix}.{name}" for name in also))
            for part, also in _IN_LAYER.items()
        ]
    return (*found, one("model.norm", "text"), one("lm_head", "text"))


def _theirs(module: str) -> str:
    """The name of transformers' module."""
    return f"model.{module}" if module.startswith("visual.") else module.replace("model.", "model.language_model.", 1)
