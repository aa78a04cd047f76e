"""Parts of the vision tower: the patch embedding, the mergers, and the block of layers with its deepstack mergers.

Axes: S patches, v vision hidden size, m spatial_merge_size, h text hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from torch.nn import functional

from qwen3vl_convert.models.transformer_config import Qwen3VLTransformerConfig, parameter_device


class Qwen3VLVisionPatchEmbed(nn.Module):
    """Patches to hidden states. The stored weight is that of a Conv3d; over whole patches that is a matrix product."""

    def __init__(self, config: Qwen3VLTransformerConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        device = parameter_device(config)
        self.proj = nn.Conv3d(
            config.in_channels, config.hidden_size, kernel, kernel, dtype=config.params_dtype, device=device
        )

    def forward(self, patches: Tensor) -> Tensor:
        """patches [S, channels * frames * height * width] of any dtype; [S, v] in the weight's."""
        weight = self.proj.weight.flatten(1)
        return functional.linear(patches.to(weight.dtype), weight, self.proj.bias)


class Qwen3VLVisionPatchMerger(nn.Module):
    """m x m neighbouring patches to one feature of the text model's width: norm, linear, exact GELU, linear.

    `use_postshuffle_norm`: the norm sees the m * m patches together (deepstack mergers) or each alone (the main one).
    """

    def __init__(
        self,
        config: Qwen3VLTransformerConfig,
        submodules: Any,
        use_postshuffle_norm: bool = False,
        tp_group: Any = None,
    ) -> None:
        super().__init__()
        self.use_postshuffle_norm = use_postshuffle_norm
        self.merged_size = config.hidden_size * config.spatial_merge_size**2
        self.tp_group = tp_group
        normed = self.merged_size if use_postshuffle_norm else config.hidden_size
        self.patch_norm = build_module(
            submodules.patch_norm, config=config, hidden_size=normed, eps=config.layernorm_epsilon
        )
        linear = {"config": config, "bias": True, "skip_bias_add": False, "is_expert": False, "tp_group": tp_group}
        self.linear_fc1 = build_module(
            submodules.linear_fc1, self.merged_size, self.merged_size,
            init_method=config.init_method, gather_output=False, tp_comm_buffer_name="patch_fc1", **linear,
        )  # fmt: skip
        self.linear_fc2 = build_module(
            submodules.linear_fc2, self.merged_size, config.out_hidden_size,
            init_method=config.output_layer_init_method, input_is_parallel=True, tp_comm_buffer_name="patch_fc2",
            **linear,
        )  # fmt: skip

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [S, 1, v], the m * m patches of a feature in a row; [S / m^2, h]."""
        if self.use_postshuffle_norm:
            merged = self.patch_norm(hidden_states.reshape(-1, 1, self.merged_size))
        else:
            merged = self.patch_norm(hidden_states).reshape(-1, 1, self.merged_size)
        merged, _ = self.linear_fc1(merged)
        features, _ = self.linear_fc2(functional.gelu(merged))
        return features[:, 0]  # type: ignore[no-any-return]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Megatron-Core's sharded tensors of the three modules."""
        return _sharded_children(self, prefix, sharded_offsets, metadata, self.tp_group)


def _sharded_children(
    module: nn.Module, prefix: str, sharded_offsets: Sequence[tuple[int, int, int]], metadata: Any, tp_group: Any
) -> dict[str, Any]:
    from megatron.core.transformer.utils import sharded_state_dict_default

    state: dict[str, Any] = {}
    for name, child in module.named_children():
        place = f"{prefix}{name}."
        state.update(sharded_state_dict_default(child, place, sharded_offsets, metadata, tp_group=tp_group))
    return state


class DeepstackMergers(nn.ModuleList):
    """One merger per deepstack feature, stored as layers are: stacked, with the merger as the leading axis."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Megatron-Core's sharded tensors, one chunk of each stacked tensor per merger."""
        if sharded_offsets:
            raise ValueError(f"{prefix}: mergers are stacked here, and cannot be stacked again ({sharded_offsets}).")
        per_layer = bool(metadata) and any(
            metadata.get(style) for style in ("non_homogeneous_layers", "singleton_local_shards")
        )
        state: dict[str, Any] = {}
        for number, merger in enumerate(self):
            own = f"{prefix}{number}."
            offsets = () if per_layer else ((0, number, len(self)),)
            part = merger.sharded_state_dict(own, offsets, metadata)  # type: ignore[operator]
            replace_prefix_for_sharding(part, own, own if per_layer else prefix)
            state.update(part)
        return state


class Qwen3VLVisionTransformerBlock(TransformerBlock):
    """The layers of the vision tower, and the mergers of what some of them hand over."""

    def __init__(self, config: Qwen3VLTransformerConfig, spec: Any, patch_merger_spec: ModuleSpec, **kwargs: Any):
        super().__init__(config, spec, post_layer_norm=False, **kwargs)
        self.deepstack_merger_list = DeepstackMergers(
            build_module(patch_merger_spec, config, use_postshuffle_norm=True, tp_group=self.tp_group)
            for _ in config.deepstack_visual_indexes
        )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """(hidden states [S, 1, v], deepstack features [S / m^2, h] in the order of the layers they come from)."""
        indexes = self.config.deepstack_visual_indexes
        *taps, hidden_states = torch.chunk(super().forward(*args, **kwargs), len(indexes) + 1)
        mergers = [self.deepstack_merger_list[indexes.index(layer)] for layer in sorted(indexes)]
        return hidden_states, [merger(tap) for merger, tap in zip(mergers, taps, strict=True)]
