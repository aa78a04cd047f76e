"""Qwen3-VL as one module: vision tower, text decoder, output layer. Start here.

Axes: T tokens of all sequences of a batch, B sequences, h features, n deepstack layers; N visual tokens.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.inference.forward_batch import ForwardBatch, ForwardMode
from qwen3vl_convert.inference.layers import Linear, Slots
from qwen3vl_convert.inference.moe import Experts
from qwen3vl_convert.inference.positions import get_rope_index, packed_rope_index
from qwen3vl_convert.inference.quantization import QuantizationConfig, product
from qwen3vl_convert.inference.strict import load_into
from qwen3vl_convert.inference.text import Qwen3VLTextModel
from qwen3vl_convert.inference.vision import Qwen3VLVisionModel

logger = logging.getLogger(__name__)


class Qwen3VLForConditionalGeneration(nn.Module):
    """Dense or with experts, as `config` says: a config.json in any spelling, an object of transformers, or Dims.

    Its parameters are made on the default device in the default dtype, uninitialised where they can be: load weights
    next. Raises ConfigError for a config that is no Qwen3-VL.
    """

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None) -> None:
        super().__init__()
        self.config = dims = dims_of(config)
        self.quant_config = quant_config
        self.image_token_id, self.video_token_id = dims.image_token_id, dims.video_token_id
        self.vision_start_token_id = dims.vision_start_token_id
        self.spatial_merge_size = dims.spatial_merge
        self.num_deepstack_embeddings = len(dims.deepstack)
        self.visual = vision_model(dims)
        self.model = text_model(dims, quant_config)
        self.lm_head = None if dims.tied else Linear(dims.hidden, dims.vocab)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a step of decoding: not where the host has to know which experts are chosen."""
        experts = [module for module in self.modules() if isinstance(module, Experts)]
        return all(one.on_device(self.device, self.dtype) for one in experts)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens, which a tied model has for an output layer too."""
        return self.model.embed_tokens

    def rope_index(
        self, input_ids: Tensor, image_grid_thw: Tensor | None = None, video_grid_thw: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """(positions [3, T], delta) of one whole prompt: see `get_rope_index`."""
        images = (image_grid_thw, self.image_token_id, self.vision_start_token_id, self.spatial_merge_size)
        return get_rope_index(input_ids, *images, video_grid_thw, self.video_token_id)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch) -> Tensor:
        """input_ids [T] to logits [T, vocab], or of the batch's `logits_indices` only.

        `positions` [T]: the number of each token in its sequence. The model replaces them by M-RoPE's: those of the
        batch, or its own (see `ForwardBatch.mrope_positions`). Visual tokens take the batch's features, or those of its
        pixels. Raises ValueError where tokens and pixels do not match, or positions cannot be known.
        """
        if forward_batch.forward_mode is ForwardMode.IDLE:
            return self.get_input_embeddings().weight.new_empty(0, self.config.vocab)
        at = self._mrope_positions(input_ids, positions, forward_batch)
        embeds, deepstack = self._embeds(input_ids, forward_batch)
        hidden_states = self.model(input_ids, at, forward_batch, embeds, deepstack)
        if forward_batch.logits_indices is not None:
            hidden_states = hidden_states[forward_batch.logits_indices]
        if self.lm_head is None:
            return product(hidden_states, self.get_input_embeddings().weight)
        return self.lm_head(hidden_states)  # type: ignore[no-any-return]

    def _mrope_positions(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        if batch.mrope_positions is not None:
            return batch.mrope_positions
        if batch.forward_mode is ForwardMode.EXTEND and not any(batch.extend_prefix_lens):
            found, batch.mrope_position_deltas = packed_rope_index(
                input_ids,
                batch.extend_seq_lens,
                batch.image_grid_thw,
                batch.video_grid_thw,
                image_token_id=self.image_token_id,
                video_token_id=self.video_token_id,
                spatial_merge_size=self.spatial_merge_size,
            )
            return found
        decodes = batch.forward_mode.is_decode()
        if batch.mrope_position_deltas is None or (not decodes and self._visual(input_ids).any()):
            raise ValueError(
                "The positions of tokens that follow on cached ones cannot be known from them alone: pass "
                "mrope_positions in the ForwardBatch, or for text mrope_position_deltas as the first forward set them."
            )
        deltas = batch.mrope_position_deltas.to(input_ids.device)
        if not decodes:
            lengths = torch.tensor(batch.extend_seq_lens, device=input_ids.device)
            deltas = deltas.repeat_interleave(lengths, output_size=len(input_ids))
        return positions + deltas

    def _visual(self, input_ids: Tensor) -> Tensor:
        """Which tokens stand for pixels [T]."""
        return (input_ids == self.image_token_id) | (input_ids == self.video_token_id)

    def _embeds(self, input_ids: Tensor, batch: ForwardBatch) -> tuple[Tensor, Tensor | None]:
        """(embeddings [T, h] with features in the place of visual tokens, deepstack features [T, n * h] or None)."""
        embeds = self.get_input_embeddings()(input_ids)
        if batch.forward_mode.is_decode():
            return embeds, None
        parts = self._features(input_ids, batch)
        if not parts:
            return embeds, None
        hidden = self.config.hidden
        deepstack = embeds.new_zeros(len(embeds), self.num_deepstack_embeddings * hidden)
        for what, where, features in parts:
            if len(where) != len(features):
                raise ValueError(
                    f"Image features and image tokens do not match: {len(where)} {what} tokens, {len(features)} "
                    "features. Pass ids and pixels that the processor made together, whole images in each forward, or "
                    "visual_embeds for exactly the tokens of this one."
                )
            embeds[where] = features[:, :hidden].to(embeds.dtype)
            deepstack[where] = features[:, hidden:].to(embeds.dtype)
        return embeds, deepstack if self.num_deepstack_embeddings else None

    def _features(self, input_ids: Tensor, batch: ForwardBatch) -> list[tuple[str, Tensor, Tensor]]:
        """(kind, where [N], features [N, h * (1 + n)]) of this forward's visual tokens."""
        if batch.visual_embeds is not None:
            return [("visual", _where(self._visual(input_ids)), batch.visual_embeds.to(input_ids.device))]
        kinds = (
            ("image", self.image_token_id, batch.pixel_values, batch.image_grid_thw),
            ("video", self.video_token_id, batch.pixel_values_videos, batch.video_grid_thw),
        )
        found = []
        for kind, token, pixels, grid in kinds:
            where = _where(input_ids == token)
            if pixels is not None and grid is not None and len(grid):
                found.append((kind, where, self.visual(pixels, grid)))
            elif len(where):
                found.append((kind, where, input_ids.new_empty(0)))
        return found

    def slots(self) -> Slots:
        """Where each tensor of a checkpoint goes, by its name on the Hub; experts are by themselves."""
        yield from self.model.slots("model.language_model")
        yield from self.visual.slots("model.visual")
        if self.lm_head is not None:
            yield from self.lm_head.slots("lm_head")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take every weight, by its name on the Hugging Face Hub; `loading.checkpoint_weights` streams those of a
        checkpoint of either format.

        Raises MissingTensors, UnknownTensors or MisshapenTensor unless each is there exactly once in its shape.
        """
        load_into(self, weights)
        logger.info("All weights of the %d layers are loaded.", self.config.layers)


def vision_model(dims: Dims) -> Qwen3VLVisionModel:
    """The tower of a config."""
    return Qwen3VLVisionModel(
        depth=dims.vision_depth,
        hidden_size=dims.vision_hidden,
        intermediate_size=dims.vision_ffn,
        num_heads=dims.vision_heads,
        in_channels=dims.channels,
        patch_size=dims.patch,
        spatial_merge_size=dims.spatial_merge,
        temporal_patch_size=dims.temporal_patch,
        out_hidden_size=dims.vision_out,
        num_position_embeddings=dims.position_embeddings,
        deepstack_visual_indexes=dims.deepstack,
    )


def text_model(dims: Dims, quant_config: QuantizationConfig | None = None) -> Qwen3VLTextModel:
    """The decoder of a config. M-RoPE is interleaved in every Qwen3-VL, whatever its config says of it."""
    return Qwen3VLTextModel(
        vocab_size=dims.vocab,
        hidden_size=dims.hidden,
        intermediate_size=dims.ffn,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        num_key_value_heads=dims.kv_heads,
        head_dim=dims.head_dim,
        rope_theta=dims.rope_theta,
        rms_norm_eps=dims.rms_eps,
        mrope_section=dims.mrope_section,
        max_position_embeddings=dims.max_positions,
        quant_config=quant_config,
        attention_bias=dims.attention_bias,
        num_experts=dims.experts,
        num_experts_per_tok=dims.top_k,
        moe_intermediate_size=dims.expert_ffn,
    )


def dims_of(config: Any) -> Dims:
    """The sizes in a config of any form."""
    if isinstance(config, Dims):
        return config
    return Dims.from_config(config if isinstance(config, Mapping) else config.to_dict())


def _where(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]
