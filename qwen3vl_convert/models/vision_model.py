"""The vision tower: patches of images and video frames to features of the text model's width.

Axes: S patches (in the processor's order: merge block by merge block), m spatial_merge_size, v hidden size. A grid
[images, 3] has frames, rows and columns of patches. Nothing here loops over images, or waits for the GPU but once, to
learn three numbers of the grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn
from torch.nn import functional

from qwen3vl_convert.models.rope import VisionRotaryEmbedding
from qwen3vl_convert.models.specs import vision_block_spec
from qwen3vl_convert.models.transformer_config import Qwen3VLTransformerConfig, parameter_device
from qwen3vl_convert.models.vision_layers import Qwen3VLVisionPatchEmbed, Qwen3VLVisionTransformerBlock


@dataclass(frozen=True)
class GridNumbers:
    """What the host must know of a grid."""

    patches: int
    frames: int
    longest_frame: int

    @classmethod
    def of(cls, grid_thw: Tensor) -> "GridNumbers":
        """grid_thw [images, 3] on any device."""
        grid = grid_thw.to("cpu", torch.long)
        frame = grid[:, 1] * grid[:, 2]
        return cls(int(grid.prod(1).sum()), int(grid[:, 0].sum()), int(frame.max()) if len(grid) else 0)


def _maybe_pad_vision_sequence_for_cuda_graph(
    hidden_states: Tensor, rotary_pos_emb: Tensor, seq_len: int, max_seq_len: int
) -> tuple[Tensor, Tensor, int]:
    """Pad to the fixed length that a captured CUDA graph has.

    hidden_states [seq_len, v] and rotary_pos_emb [seq_len, 1, 1, D] come back [max_seq_len, ...] with zeros at the end,
    with the new length. Raises ValueError where seq_len exceeds max_seq_len.
    """
    if seq_len > max_seq_len:
        raise ValueError(
            f"Vision input sequence length ({seq_len}) exceeds max_vision_cuda_graph_seq_length ({max_seq_len}): "
            "set that field of the provider to at least the patches of the largest batch, or turn vision CUDA graphs "
            'off (vision_cuda_graph_impl="none").'
        )
    missing = max_seq_len - seq_len
    if missing:
        hidden_states = functional.pad(hidden_states, (0, 0, 0, missing))
        rotary_pos_emb = functional.pad(rotary_pos_emb, (0, 0, 0, 0, 0, 0, 0, missing))
    return hidden_states, rotary_pos_emb, max_seq_len


def _vision_forward_packed_attention_setup(
    use_cuda_graph_padding: bool,
    hidden_states: Tensor,
    original_seq_len: int,
    seq_len: int,
    grid_thw: Tensor,
    build_packed_seq_params: Callable[[Tensor], PackedSeqParams],
) -> tuple[PackedSeqParams | None, Tensor | None]:
    """(packed_seq_params, attention_mask) for the layers of the tower: at most one of them is not None.

    A captured graph takes tensors only. So where one is used (`use_cuda_graph_padding`) `grid_thw` and
    `build_packed_seq_params` are not touched: attention is over all of the padded sequence, and an additive mask
    [1, 1, seq_len, seq_len] of hidden_states' dtype and device hides padding from everything, and everything from it:
    0 between patches and the dtype's lowest number elsewhere. Without padding, `original_seq_len == seq_len`, there is
    no mask. What more the layers need, frames apart among it, `forward` adds (`_bias_of_layers`).
    """
    if not use_cuda_graph_padding:
        return build_packed_seq_params(grid_thw), None
    if original_seq_len == seq_len:
        return None, None
    patch = torch.arange(seq_len, device=hidden_states.device) < original_seq_len
    return None, _hiding(~(patch[:, None] & patch), hidden_states.dtype)


def _hiding(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask [1, 1, S, S] from pairs [S, S] that must not see each other."""
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[None, None]


def _bias_of_layers(mask: Tensor | None, cu_seqlens: Tensor, hidden_states: Tensor) -> Tensor | None:
    """What the layers add to their scores in place of a packed sequence: `mask`, and frames apart (cu_seqlens
    [frames + 1]).

    Padding, which follows the last frame, is one more: nobody sees it, and it sees itself. A row that sees nothing, as
    in `mask`, is a number in torch's CPU kernels, and not in those of GPUs that take powers of 2: the lowest number
    times log2(e) is -inf, so the row is NaN, and in the next layer 0 * NaN reaches every patch.
    """
    if mask is None and len(cu_seqlens) == 2:
        return None
    at = torch.arange(len(hidden_states), device=hidden_states.device)
    frame = torch.bucketize(at, cu_seqlens[1:], right=True)
    return _hiding(frame[:, None] != frame, hidden_states.dtype)


class Qwen3VLVisionModel(VisionModule):  # type: ignore[misc]
    """The ViT of Qwen3-VL.

    Parameters: the vision `transformer_config` (`get_vision_model_config`), the spec of one layer
    (`vision_layer_spec`), the spec of a merger (`patch_merger_spec`), process groups (Megatron-Core's by default).

    Two things differ from what Megatron-Bridge's API reference says, and not from what it does:
    - `pre_process` and `post_process` must be True. The tower is not cut into pipeline stages: deepstack mergers are
      fed from its middle. ValueError otherwise, for context parallelism, and for a graph that holds no whole features.
    - `forward` returns a pair, features and deepstack features, and not one tensor [b, s, h]: see there.
    """

    def __init__(
        self,
        transformer_config: Qwen3VLTransformerConfig,
        transformer_layer_spec: ModuleSpec,
        patch_merger_spec: ModuleSpec,
        pre_process: bool = True,
        post_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=transformer_config)
        config = transformer_config
        _check(config, pre_process, post_process)
        self.pre_process, self.post_process = pre_process, post_process
        self.model_type = ModelType.encoder_or_decoder
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = self.pg_collection.tp
        self.spatial_merge_size = config.spatial_merge_size
        self.spatial_merge_unit = config.spatial_merge_size**2
        self.patch_size = config.patch_size
        self.num_grid_per_side = int(config.num_position_embeddings**0.5)
        self.input_tensor: Tensor | None = None

        self.patch_embed = Qwen3VLVisionPatchEmbed(config)
        self.pos_embed = nn.Embedding(
            config.num_position_embeddings,
            config.hidden_size,
            dtype=config.params_dtype,
            device=parameter_device(config),
        )
        if config.perform_initialization:  # torch's own are for other models
            for weight in (self.patch_embed.proj.weight, self.pos_embed.weight):
                config.init_method(weight)
            if self.patch_embed.proj.bias is not None:
                nn.init.zeros_(self.patch_embed.proj.bias)
        self.rotary_pos_emb = VisionRotaryEmbedding(config.kv_channels)
        self.decoder = Qwen3VLVisionTransformerBlock(
            config,
            vision_block_spec(config, transformer_layer_spec),
            patch_merger_spec,
            pg_collection=self.pg_collection,
        )
        self.merger = build_module(patch_merger_spec, config, use_postshuffle_norm=False, tp_group=self.tp_group)

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """What a pipeline schedule hands over: nothing that is used, since the tower begins at the pixels."""
        self.input_tensor = input_tensor

    def rot_pos_emb(self, grid_thw: Tensor) -> Tensor:
        """Angles [S, head_dim / 2] in float32: those of the row, then those of the column, of each patch."""
        return self.rotary_pos_emb(self._coordinates(grid_thw, GridNumbers.of(grid_thw))[0])  # type: ignore[no-any-return]

    def fast_pos_embed_interpolate(self, grid_thw: Tensor) -> Tensor:
        """Position embeddings [S, v]: the learned square table, stretched bilinearly over each image, corner on corner.

        Weights and sum are float32 and rounded once to the table's dtype, as transformers 5 does it (4.57 rounds the
        weights).
        """
        side = self.num_grid_per_side
        at, size = self._coordinates(grid_thw, GridNumbers.of(grid_thw))
        where = at.float() * (side - 1) / (size - 1).clamp(min=1)
        low = where.long()
        high = (low + 1).clamp(max=side - 1)
        share = where - low
        embeddings = torch.zeros((), device=at.device)
        for row, row_share in ((low, 1 - share), (high, share)):
            for column, column_share in ((low, 1 - share), (high, share)):
                corner = self.pos_embed(row[:, 0] * side + column[:, 1]).float()
                embeddings = embeddings + corner * (row_share[:, :1] * column_share[:, 1:])
        return embeddings.to(self.pos_embed.weight.dtype)

    def _coordinates(self, grid_thw: Tensor, numbers: GridNumbers) -> tuple[Tensor, Tensor]:
        """Row and column [S, 2] of each patch in its frame, and rows and columns [S, 2] of that frame."""
        grid = grid_thw.to(self.pos_embed.weight.device, torch.long)
        m = self.spatial_merge_size
        patches = grid.prod(1)
        image = torch.repeat_interleave(patches, output_size=numbers.patches)
        first = (patches.cumsum(0) - patches)[image]
        size = grid[image, 1:]
        in_frame = (torch.arange(numbers.patches, device=grid.device) - first) % size.prod(1)
        # merge blocks in rows, and in each its rows
        block, inside = in_frame // (m * m), in_frame % (m * m)
        blocks_per_row = size[:, 1] // m
        row = block // blocks_per_row * m + inside // m
        column = block % blocks_per_row * m + inside % m
        return torch.stack((row, column), dim=1), size

    def _get_max_vision_seq_length(self) -> int:
        """Patches of a CUDA graph: the config's `max_vision_cuda_graph_seq_length`; where it has none, None or 0, the
        position table over the merge unit.
        """
        config = self.config
        length = getattr(config, "max_vision_cuda_graph_seq_length", None)
        return length or config.num_position_embeddings // config.spatial_merge_size**2  # type: ignore[no-any-return]

    def _uses_vision_cuda_graph(self) -> bool:
        """Whether the layers are captured: Transformer Engine's graphs, which Megatron-Core uses in training only."""
        return getattr(self.config, "cuda_graph_impl", "none") == "transformer_engine" and self.training

    def forward(
        self,
        hidden_states: Tensor | None,
        grid_thw: Tensor,
        inference_params: Any = None,
        extra_block_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """hidden_states: patches [S, channels * frames * patch * patch]; grid_thw [images, 3].

        Returns (features [S / m^2, h] of the text model's width, one such tensor for each deepstack merger). There is
        no batch axis: the patches of all images are one sequence, and `grid_thw` says where each begins. ValueError
        where pixels and grid disagree. `inference_params` is there for the interface: the tower keeps nothing between
        calls. `extra_block_kwargs`: for the transformer block.
        """
        grid_thw = grid_thw.cpu()  # the one wait for the GPU, if the grids are there
        numbers = GridNumbers.of(grid_thw)
        patches = self._check_patches(hidden_states, grid_thw, numbers)
        hidden_states = self.patch_embed(patches) + self.fast_pos_embed_interpolate(grid_thw)
        angles = self.rot_pos_emb(grid_thw)[:, None, None].repeat(1, 1, 1, 2)
        length = numbers.patches
        padded = self._uses_vision_cuda_graph()
        if padded:
            hidden_states, angles, length = _maybe_pad_vision_sequence_for_cuda_graph(
                hidden_states, angles, length, self._get_max_vision_seq_length()
            )
        packed_seq_params, mask = _vision_forward_packed_attention_setup(
            padded, hidden_states[:, None], numbers.patches, length, grid_thw, self.build_packed_seq_params
        )
        if padded:
            mask = _bias_of_layers(mask, self.build_packed_seq_params(grid_thw).cu_seqlens_q, hidden_states)
        hidden_states, deepstack = self.decoder(
            hidden_states=hidden_states[:, None],
            attention_mask=None,
            attention_bias=mask,  # Transformer Engine has no attention mask beside `no_mask`, but a bias
            rotary_pos_emb=angles,
            packed_seq_params=packed_seq_params,
            **(extra_block_kwargs or {}),
        )
        features = self.merger(hidden_states[: numbers.patches])
        return features, [feature[: len(features)] for feature in deepstack]

    def _check_patches(self, patches: Tensor | None, grid_thw: Tensor, numbers: GridNumbers) -> Tensor:
        config = self.config
        values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        if patches is None or tuple(patches.shape) != (numbers.patches, values):
            raise ValueError(
                f"Patches: the grids {grid_thw.tolist()} need ({numbers.patches}, {values}); found "
                f"{None if patches is None else tuple(patches.shape)}. Both come from one call of the processor: "
                "check that neither was cut or joined."
            )
        return patches

    def build_packed_seq_params(self, grid_thw: Tensor | None) -> PackedSeqParams:
        """Attention within each frame: cumulative lengths int32 [frames + 1], and the longest."""
        if grid_thw is None:
            raise ValueError("grid_thw: expected the grids [images, 3] of the patches, found None.")
        numbers = GridNumbers.of(grid_thw)
        grid = grid_thw.to(self.pos_embed.weight.device, torch.long)
        lengths = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0], output_size=numbers.frames)
        cu_seqlens = functional.pad(lengths.cumsum(0), (1, 0)).int()
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=numbers.longest_frame,
            max_seqlen_kv=numbers.longest_frame,
        )


def _check(config: Qwen3VLTransformerConfig, pre_process: bool, post_process: bool) -> None:
    if not (pre_process and post_process):
        raise ValueError(
            "Qwen3VLVisionModel is not cut into pipeline stages: pre_process and post_process must be True."
        )
    if config.context_parallel_size > 1:
        raise ValueError(
            f"context_parallel_size={config.context_parallel_size} in the vision configuration: expected 1. The tower "
            "is not cut along its sequence; get_vision_model_config makes a configuration that says so."
        )
    unit, length = config.spatial_merge_size**2, config.max_vision_cuda_graph_seq_length
    if length and length % unit:
        raise ValueError(
            f"max_vision_cuda_graph_seq_length: expected a multiple of {unit} patches, which make one feature, found "
            f"{length}. Round it up."
        )
