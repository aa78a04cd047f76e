"""Qwen3-VL on Megatron-Core: the vision tower, the text model, and how features of the one enter the other.

Axes: B batch, S sequence (of this rank after the cuts), h hidden size, V features (merged patches) of all images and
videos, K deepstack features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from qwen3vl_convert.models.context_parallel import SequenceCut
from qwen3vl_convert.models.positions import check_visual_tokens, decode_positions, get_rope_index
from qwen3vl_convert.models.specs import patch_merger_spec, uses_transformer_engine, vision_layer_spec
from qwen3vl_convert.models.text_model import Qwen3VLGPTModel
from qwen3vl_convert.models.transformer_config import (
    Qwen3VLTransformerConfig,
    get_vision_model_config,
    vision_config_of,
)
from qwen3vl_convert.models.vision_model import Qwen3VLVisionModel


@dataclass(frozen=True)
class VisualInput:
    """Images and videos of a batch as the processor gives them: patches [S, values] and grids [count, 3], or None."""

    pixel_values: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    image_grid_thw: Tensor | None = None
    video_grid_thw: Tensor | None = None

    def joined(self) -> tuple[Tensor, Tensor] | None:
        """(patches, grids): images first, videos after them. None if there is neither."""
        kinds = {
            ("pixel_values", "image_grid_thw"): (self.pixel_values, self.image_grid_thw),
            ("pixel_values_videos", "video_grid_thw"): (self.pixel_values_videos, self.video_grid_thw),
        }
        for names, (pixels, grid) in kinds.items():
            if (pixels is None) != (grid is None):
                missing, given = names if pixels is None else names[::-1]
                raise ValueError(f"{missing}: expected it with {given}, found None. Pass both, or neither.")
        patches = [pixels for pixels, _ in kinds.values() if pixels is not None]
        grids = [grid.cpu() for _, grid in kinds.values() if grid is not None]
        return (torch.cat(patches), torch.cat(grids)) if patches else None

    def image_features(self, merge_unit: int) -> int:
        """How many of the features, in the order of `joined`, are of images."""
        if self.image_grid_thw is None:
            return 0
        return int(self.image_grid_thw.cpu().prod(1).sum()) // merge_unit


class Qwen3VLModel(MegatronModule):  # type: ignore[misc]
    """Qwen3-VL, dense or MoE, or one pipeline stage of it.

    Parameters
    - `language_transformer_config`, `language_transformer_layer_spec` (`language_layer_spec`): of the text model.
    - `vision_transformer_config`: transformers' `Qwen3VLConfig` or the `vision_config` in it, or an object with its
      attributes. The attribute of this name is the vision configuration, whichever was given.
    - `parallel_output`: leave logits cut over tensor parallel ranks (training); False gathers them.
    - `pre_process`, `post_process`: this stage has the embedding; the final norm and output layer.
    - `add_encoder`: this stage has the vision tower, if it also has `pre_process`. Without it the features come through
      `set_input_tensor`, as `add_decoder=False` returns them.
    - `add_decoder`: this stage has text layers. Without them `forward` returns the features of the vision tower.
    - `pg_collection`, `vp_stage`: process groups (Megatron-Core's by default); the virtual stage, under interleaving.

    Raises ValueError where the stage cannot work: too few layers for deepstack beside the vision tower, context
    parallelism without Transformer Engine.
    """

    def __init__(
        self,
        language_transformer_config: Qwen3VLTransformerConfig,
        language_transformer_layer_spec: ModuleSpec,
        vision_transformer_config: Any,
        parallel_output: bool = True,
        pre_process: bool = True,
        post_process: bool = True,
        add_encoder: bool = True,
        add_decoder: bool = True,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        config = language_transformer_config
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.vision_transformer_config = vision = vision_config_of(vision_transformer_config)
        self.pre_process, self.post_process = pre_process, post_process
        self.add_encoder, self.add_decoder = add_encoder, add_decoder
        self.vp_stage = vp_stage
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = self.pg_collection.tp
        self.image_token_id = config.image_token_id
        self.video_token_id = config.video_token_id
        self.vision_start_token_id = config.vision_start_token_id
        self.square_merge_size = vision.spatial_merge_size**2
        self.deepstack_features = len(vision.deepstack_visual_indexes)
        self.encoder_hidden_state: Tensor | None = None
        self.share_embeddings_and_output_weights = config.share_embeddings_and_output_weights
        _check_context_parallel(config)

        self.vision_model = self._vision_model() if pre_process and add_encoder else None
        self.language_model: Any = None
        if add_decoder:
            self.language_model = self._language_model(language_transformer_layer_spec, parallel_output)
            if pre_process:
                self._check_deepstack()

    def _vision_model(self) -> Qwen3VLVisionModel:
        config = get_vision_model_config(self.vision_transformer_config, self.config)
        return Qwen3VLVisionModel(
            config, vision_layer_spec(config), patch_merger_spec(config), pg_collection=self.pg_collection
        )

    def _language_model(self, layer_spec: ModuleSpec, parallel_output: bool) -> Qwen3VLGPTModel:
        config = self.config
        return Qwen3VLGPTModel(
            config,
            layer_spec,
            vocab_size=padded_vocab_size(config),
            max_sequence_length=config.language_max_sequence_length,
            pre_process=self.pre_process,
            post_process=self.post_process,
            parallel_output=parallel_output,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            # Features are put in before the sequence is cut, so the embedding must leave it whole.
            scatter_embedding_sequence_parallel=False,
            vp_stage=self.vp_stage,
            pg_collection=self.pg_collection,
        )

    def _check_deepstack(self) -> None:
        layers = len(self.language_model.decoder.layers)
        if layers < self.deepstack_features:
            raise ValueError(
                f"The first pipeline stage has {layers} text layers, and {self.deepstack_features} deepstack features "
                "enter after as many layers; later stages do not get them. Use fewer pipeline stages, real or virtual, "
                f"or set num_layers_in_first_pipeline_stage to {self.deepstack_features} or more."
            )

    @property
    def decoder(self) -> Any:
        """The text model's transformer block, where tools for Megatron-Core look for it."""
        return None if self.language_model is None else self.language_model.decoder

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The word embeddings [vocab, h] that first and last stage share; for Megatron-Core's gradient reduction."""
        return None if self.language_model is None else self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """What the stage before sent: hidden states [S, B, h], or on a first stage without tower the features."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        if len(tensors) != 1:
            raise ValueError(f"set_input_tensor: expected one tensor, found {len(tensors)}.")
        if self.pre_process:
            self.encoder_hidden_state = tensors[0]
        elif self.language_model is not None:
            self.language_model.set_input_tensor(tensors[0])

    def freeze(self, freeze_language_model: bool, freeze_vision_model: bool, freeze_vision_projection: bool) -> None:
        """Take parts out of training: the text model; patch embedding, positions and blocks of the tower; its mergers.

        What is not named keeps its state. Parts that are on other stages are skipped.
        """
        frozen: list[torch.nn.Parameter] = []
        if freeze_language_model and self.language_model is not None:
            frozen += self.language_model.parameters()
        if self.vision_model is not None:
            tower = self.vision_model
            if freeze_vision_model:
                frozen += [
                    p for part in (tower.patch_embed, tower.pos_embed, tower.decoder.layers) for p in part.parameters()
                ]
            if freeze_vision_projection:
                frozen += [p for part in (tower.merger, tower.decoder.deepstack_merger_list) for p in part.parameters()]
        for parameter in frozen:
            parameter.requires_grad = False

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inference_params: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        image_input_mask: Tensor | None = None,
        *,
        video_input_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        inference_context: Any = None,
        runtime_gather_output: bool | None = None,
        mm_token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Loss [B, S] of each token if `labels` [B, S] are given, else logits [B, S, vocab].

        A negative label, Hugging Face's -100, costs nothing: its loss is 0 and has no gradient.

        A stage that is not the last returns its hidden states [S, B, h].

        All stages take the same arguments (positions follow from ids and grids); pixels are read on the first alone.

        - `input_ids` [B, S]: one placeholder token per feature, as the processor writes them. With `packed_seq_params`
          (thd) [1, tokens of all sequences].
        - `position_ids`: [3, B, S]; computed where None. Positions [B, S] stand for all three axes in a batch without
          images and videos, and are ignored in one that has some.
        - `attention_mask`: [B, S] with 1 for tokens and 0 for padding (Hugging Face), or [B, 1, S, S] with True where
          a key must not be seen (Megatron). Causal where None.
        - `pixel_values`, `pixel_values_videos` [patches, values] with `image_grid_thw`, `video_grid_thw` [count, 3].
        - `image_input_mask`, `video_input_mask` [B, S]: where features go; found by token id where None.
        - `inference_params` (or `inference_context`): a static inference context of Megatron-Core, with its key-value
          cache; the prompt first, then tokens that continue it.
        - `extra_block_kwargs`: for the text model's transformer block. `loss_mask`: handed on.
          `mm_token_type_ids`: transformers 5's; the ids say the same.

        Raises ValueError where placeholders, grids and pixels do not fit together.
        """
        context = inference_context if inference_context is not None else inference_params
        visual = VisualInput(pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw)
        if self.language_model is None:
            return self._encode(visual)
        position_ids = self._positions(input_ids, position_ids, attention_mask, packed_seq_params, visual, context)
        embeddings, deepstack = None, None
        if self.pre_process:
            masks = self._given_places(visual, input_ids, image_input_mask, video_input_mask)
            if masks is None:
                masks = self._placeholders(input_ids, visual, attention_mask, packed_seq_params, context)
            embeddings, deepstack = self._embed(input_ids, visual, masks)
        cut = SequenceCut.of(self.pg_collection.cp, input_ids.shape[1], packed_seq_params, input_ids.device)
        embeddings, deepstack = cut.along(embeddings, 0), cut.along(deepstack, 0)
        labels, loss_mask = cut.along(labels, 1), cut.along(loss_mask, 1)
        block_kwargs = dict(extra_block_kwargs or {})
        if deepstack is not None:
            block_kwargs["context"] = self._scattered(deepstack).transpose(0, 1)
        output: Tensor = self.language_model(
            input_ids=cut.along(input_ids, 1),
            position_ids=cut.along(position_ids, 2),
            attention_mask=_megatron_mask(attention_mask, packed_seq_params, context),
            decoder_input=None if embeddings is None else self._scattered(embeddings),
            labels=None if labels is None else labels.clamp(min=0),
            loss_mask=loss_mask,
            inference_context=context,
            packed_seq_params=packed_seq_params,
            extra_block_kwargs=block_kwargs,
            runtime_gather_output=runtime_gather_output if context is None else True,
        )
        return output.masked_fill(labels < 0, 0.0) if labels is not None and self.post_process else output

    # ---- positions ---------------------------------------------------------------------------------------------------

    def _tokens(self, visual: VisualInput) -> dict[str, Any]:
        """What the functions of `positions` want to know of this model and batch."""
        return {
            "image_grid_thw": visual.image_grid_thw,
            "video_grid_thw": visual.video_grid_thw,
            "spatial_merge_size": self.vision_transformer_config.spatial_merge_size,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
        }

    def _sequences(self, attention_mask: Tensor | None, packed: PackedSeqParams | None) -> dict[str, Any]:
        """What they want to know of padding and of packed sequences."""
        return {
            "attention_mask_BS": attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None,
            "cu_seqlens": None if packed is None else _cu_seqlens(packed),
        }

    def _positions(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        packed: PackedSeqParams | None,
        visual: VisualInput,
        context: Any,
    ) -> Tensor:
        """[3, B, S]: as given, as they continue a prompt, or computed."""
        if position_ids is not None and position_ids.dim() == 3:
            return position_ids
        if context is not None and context.sequence_len_offset > 0:
            deltas = context.mrope_position_deltas
            return decode_positions(context.sequence_len_offset, input_ids.shape[1], deltas)
        if position_ids is not None and visual.image_grid_thw is None and visual.video_grid_thw is None:
            return position_ids.expand(3, *position_ids.shape)
        positions, deltas = get_rope_index(
            input_ids,
            vision_start_token_id=self.vision_start_token_id,
            **self._sequences(attention_mask, packed),
            **self._tokens(visual),
        )
        if context is not None:
            context.mrope_position_deltas = deltas  # tokens that continue this prompt are counted on from here
        return positions

    # ---- features into embeddings ------------------------------------------------------------------------------------

    def _placeholders(
        self,
        input_ids: Tensor,
        visual: VisualInput,
        attention_mask: Tensor | None,
        packed: PackedSeqParams | None,
        context: Any,
    ) -> tuple[Tensor, Tensor]:
        """Where features of images and of videos go [B, S], found by token id and checked against the grids."""
        continues = context is not None and context.sequence_len_offset > 0  # tokens that were just sampled
        if not continues:
            check_visual_tokens(input_ids, **self._sequences(attention_mask, packed), **self._tokens(visual))
        return input_ids == self.image_token_id, input_ids == self.video_token_id

    def _given_places(
        self, visual: VisualInput, input_ids: Tensor, image_mask: Tensor | None, video_mask: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The same from masks of the caller's, of which there must be as many places as features; None without any."""
        if image_mask is None and video_mask is None:
            return None
        kinds = (
            ("image", image_mask, self.image_token_id, visual.image_grid_thw),
            ("video", video_mask, self.video_token_id, visual.video_grid_thw),
        )
        places = []
        for name, mask, token, grid in kinds:
            places.append(input_ids == token if mask is None else mask.bool())
            needed = 0 if grid is None else int(grid.cpu().prod(1).sum()) // self.square_merge_size
            if int(places[-1].sum()) != needed:
                raise ValueError(
                    f"{name}_input_mask: {name}_grid_thw makes {needed} features, and {int(places[-1].sum())} places "
                    "are marked; expected as many. Mark the tokens that the processor wrote for them, and no others."
                )
        return places[0], places[1]

    def _embed(
        self, input_ids: Tensor, visual: VisualInput, masks: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings [S, B, h] with features at their places, and deepstack features [S, K, B, h], zero elsewhere."""
        embeddings_BSH = self.language_model.embedding(input_ids=input_ids, position_ids=None).transpose(0, 1)
        features = self._features(visual)
        if features is None:
            return embeddings_BSH.transpose(0, 1), None
        features = features.to(embeddings_BSH.dtype)
        deepstack_KBSH = features.new_zeros(len(features) - 1, *embeddings_BSH.shape)
        images = visual.image_features(self.square_merge_size)
        for mask_BS, part in zip(masks, (features[:, :images], features[:, images:]), strict=True):
            mask_BS1 = mask_BS[..., None]
            embeddings_BSH = embeddings_BSH.masked_scatter(mask_BS1, part[0])
            deepstack_KBSH = deepstack_KBSH.masked_scatter(mask_BS1, part[1:])
        return embeddings_BSH.transpose(0, 1).contiguous(), deepstack_KBSH.permute(2, 0, 1, 3)

    def _features(self, visual: VisualInput) -> Tensor | None:
        """[1 + K, V, h]: the features of the merger, and those of the deepstack mergers. None for a batch of text."""
        if self.vision_model is None and self.encoder_hidden_state is not None:
            return torch.stack(self.encoder_hidden_state[:, 0].chunk(1 + self.deepstack_features, dim=-1))
        joined = visual.joined()
        if joined is None:
            return None
        if self.vision_model is None:
            raise ValueError(
                "This stage was built with add_encoder=False: expected its vision features through set_input_tensor, "
                "found pixels alone."
            )
        features, deepstack = self.vision_model(*joined)
        return torch.stack([features, *deepstack])

    def _encode(self, visual: VisualInput) -> Tensor:
        """What a stage without text layers sends on: [V, 1, (1 + K) * h]."""
        features = self._features(visual)
        if features is None:
            raise ValueError("This stage was built with add_decoder=False, and the batch has no images or videos.")
        return torch.cat(tuple(features), dim=-1)[:, None]

    def _scattered(self, whole: Tensor) -> Tensor:
        """This rank's part of axis 0 under sequence parallelism; all of it without."""
        if not self.config.sequence_parallel:
            return whole
        ranks = self.tp_group.size()
        if len(whole) % ranks:
            raise ValueError(
                f"Sequence parallelism over {ranks} ranks: expected a multiple of {ranks} tokens, found {len(whole)}. "
                "Pad the batch."
            )
        return tensor_parallel.scatter_to_sequence_parallel_region(whole.contiguous(), group=self.tp_group)  # type: ignore[no-any-return]


def padded_vocab_size(config: Qwen3VLTransformerConfig) -> int:
    """Rows of the embedding: `vocab_size`, rounded up to what divides over the ranks if `should_pad_vocab`."""
    if not config.should_pad_vocab:
        return config.vocab_size
    unit = config.make_vocab_size_divisible_by * config.tensor_model_parallel_size
    return int(-(-config.vocab_size // unit) * unit)


def _cu_seqlens(packed: PackedSeqParams) -> Tensor:
    """Where sequences begin in memory."""
    return packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded  # type: ignore[no-any-return]


def _megatron_mask(attention_mask: Tensor | None, packed: PackedSeqParams | None, context: Any) -> Tensor | None:
    """[B, 1, S, S], True where a key must not be seen; None for a plain causal attention."""
    if attention_mask is None or attention_mask.dim() == 4:
        return attention_mask
    if packed is not None or context is not None:
        raise ValueError(
            "attention_mask [B, S]: expected None with packed sequences, which have no padding, and with an inference "
            "context, whose cache has no room for it. Leave it out, and give sequences of equal length."
        )
    length = attention_mask.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).triu(1)
    hidden = later | ~attention_mask.bool()[:, None, None]
    # A padding token that sees nothing would be 0 / 0; seeing itself it is a number that nobody reads.
    return hidden & ~torch.eye(length, dtype=torch.bool, device=attention_mask.device)


def _check_context_parallel(config: Qwen3VLTransformerConfig) -> None:
    if config.context_parallel_size > 1 and not uses_transformer_engine(config):
        raise ValueError(
            f"context_parallel_size={config.context_parallel_size}: context parallelism is done by the attention of "
            "Transformer Engine, which is not in use here. Install transformer_engine on a GPU machine, or set it to 1."
        )
