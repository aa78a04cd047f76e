"""The vision tower: patches of images and video frames to features of the text model's width.

Axes: S patches, in the processor's order (merge block by merge block); v hidden size, h the text model's; m
spatial_merge_size; F a quarter of a head's rotary pairs per row and per column. A grid [images, 3] has frames, rows and
columns of patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwen3vl_convert.inference.attention.segments import attend_within
from qwen3vl_convert.inference.layers import Linear, Slots, activation, module_slots
from qwen3vl_convert.inference.rope import CosSin, inverse_frequencies, rotate

VISION_EPS = 1e-6
"""Of every norm of the tower; its config does not say."""
_THETA = 10000.0
_DEEPSTACK = (8, 16, 24)
"""Of the published towers with 27 blocks, which the defaults describe."""


class Qwen3VisionMLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, in_features: int, hidden_features: int, hidden_act: str = "silu", bias: bool = True) -> None:
        super().__init__()
        self.linear_fc1 = Linear(in_features, hidden_features, bias)
        self.linear_fc2 = Linear(hidden_features, in_features, bias)
        self.act_fn = activation(hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features]."""
        return self.linear_fc2(self.act_fn(self.linear_fc1(x)))  # type: ignore[no-any-return]


class Qwen3VLVisionPatchEmbed(nn.Module):
    """One linear map of a patch's pixels. Its weight has the shape of a convolution whose stride is its size."""

    def __init__(
        self, patch_size: int = 16, temporal_patch_size: int = 2, in_channels: int = 3, embed_dim: int = 1152
    ) -> None:
        super().__init__()
        self.patch_size, self.temporal_patch_size = patch_size, temporal_patch_size
        self.in_channels, self.embed_dim = in_channels, embed_dim
        size = (temporal_patch_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_channels, embed_dim, size, stride=size).requires_grad_(False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Pixels [S, in_channels * temporal_patch_size * patch_size^2] of any dtype to [S, v]."""
        weight = self.proj.weight.flatten(1)
        if hidden_states.dim() != 2 or hidden_states.shape[1] != weight.shape[1]:
            raise ValueError(
                f"pixel_values: expected [patches, {weight.shape[1]}], found {list(hidden_states.shape)}. "
                "Pass what the processor of this model made."
            )
        return functional.linear(hidden_states.to(weight.dtype), weight, self.proj.bias)


class Qwen3VisionAttention(nn.Module):
    """Every patch looks at all patches of its own frame."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.qkv_proj = Linear(embed_dim, 3 * embed_dim, bias=True)
        self.out_proj = Linear(embed_dim, embed_dim, bias=True)

    def forward(self, x: Tensor, cu_seqlens: Tensor, rotary_pos_emb_cos: Tensor, rotary_pos_emb_sin: Tensor) -> Tensor:
        """x [S, v]; cu_seqlens [frames + 1], best on the CPU: its numbers decide shapes; cos and sin [S, head_dim / 2]
        of the angles, in the dtype in which to turn.
        """
        q, k, v = self.qkv_proj(x).view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        q, k = (rotate(one, rotary_pos_emb_cos, rotary_pos_emb_sin) for one in (q, k))
        return self.out_proj(attend_within(q, k, v, cu_seqlens).flatten(1))  # type: ignore[no-any-return]


class Qwen3VisionBlock(nn.Module):
    """Attention and MLP, each after a norm and beside a residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        intermediate_dim: int,
        hidden_act: str = "silu",
        norm_eps: float = VISION_EPS,
    ) -> None:
        super().__init__()
        self.norm1 = _layer_norm(dim, norm_eps)
        self.norm2 = _layer_norm(dim, norm_eps)
        self.attn = Qwen3VisionAttention(dim, num_heads)
        self.mlp = Qwen3VisionMLP(dim, intermediate_dim, hidden_act)

    def forward(self, x: Tensor, cu_seqlens: Tensor, rotary_pos_emb_cos: Tensor, rotary_pos_emb_sin: Tensor) -> Tensor:
        """As `Qwen3VisionAttention`."""
        x = x + self.attn(self.norm1(x), cu_seqlens, rotary_pos_emb_cos, rotary_pos_emb_sin)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def slots(self, prefix: str) -> Slots:
        for name in ("norm1", "norm2", "mlp"):
            yield from module_slots(self.get_submodule(name), f"{prefix}.{name}")
        yield from self.attn.qkv_proj.slots(f"{prefix}.attn.qkv")
        yield from self.attn.out_proj.slots(f"{prefix}.attn.proj")


class Qwen3VLVisionPatchMerger(nn.Module):
    """Joins m x m patches to one token. `dim`: h; `context_dim`: v; `use_postshuffle_norm`: the norm sees the joined
    patches (deepstack) instead of each by itself. GELU is exact here, unlike in the blocks.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        spatial_merge_size: int = 2,
        use_postshuffle_norm: bool = False,
        norm_eps: float = VISION_EPS,
    ) -> None:
        super().__init__()
        self.hidden_size = context_dim * spatial_merge_size**2
        self.use_postshuffle_norm = use_postshuffle_norm
        self.norm = _layer_norm(self.hidden_size if use_postshuffle_norm else context_dim, norm_eps)
        self.linear_fc1 = Linear(self.hidden_size, self.hidden_size, bias=True)
        self.act_fn = nn.GELU()
        self.linear_fc2 = Linear(self.hidden_size, dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """[S, v], or any shape whose elements lie as in it, to [S / m^2, h]."""
        if self.use_postshuffle_norm:
            joined = self.norm(x.reshape(-1, self.hidden_size))
        else:
            joined = self.norm(x).reshape(-1, self.hidden_size)
        return self.linear_fc2(self.act_fn(self.linear_fc1(joined)))  # type: ignore[no-any-return]


class Qwen3VLVisionModel(nn.Module):
    """The tower. `deepstack_visual_indexes`: the blocks whose output goes to the text model too, each through a merger
    of its own; without them those of the published tower of 27 blocks, and () for none.

    Raises ValueError for indexes that are not ascending numbers of blocks.
    """

    def __init__(
        self,
        depth: int = 27,
        hidden_size: int = 1152,
        hidden_act: str = "gelu_pytorch_tanh",
        intermediate_size: int = 4304,
        num_heads: int = 16,
        in_channels: int = 3,
        patch_size: int = 16,
        spatial_merge_size: int = 2,
        temporal_patch_size: int = 2,
        out_hidden_size: int = 3584,
        num_position_embeddings: int = 2304,
        deepstack_visual_indexes: Sequence[int] | None = None,
        norm_eps: float = VISION_EPS,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.out_hidden_size = hidden_size, num_heads, out_hidden_size
        self.num_position_embeddings = num_position_embeddings
        self.num_grid_per_side = int(num_position_embeddings**0.5)
        self.patch_size, self.temporal_patch_size = patch_size, temporal_patch_size
        self.spatial_merge_size = spatial_merge_size
        self.deepstack_visual_indexes = _checked(_DEEPSTACK, depth, deepstack_visual_indexes)
        self.patch_embed = Qwen3VLVisionPatchEmbed(patch_size, temporal_patch_size, in_channels, hidden_size)
        self.pos_embed = nn.Embedding(num_position_embeddings, hidden_size).requires_grad_(False)
        self.blocks = nn.ModuleList(
            Qwen3VisionBlock(hidden_size, num_heads, intermediate_size, hidden_act, norm_eps) for _ in range(depth)
        )
        merger = (out_hidden_size, hidden_size, spatial_merge_size)
        self.merger = Qwen3VLVisionPatchMerger(*merger, use_postshuffle_norm=False, norm_eps=norm_eps)
        self.deepstack_merger_list = nn.ModuleList(
            Qwen3VLVisionPatchMerger(*merger, use_postshuffle_norm=True, norm_eps=norm_eps)
            for _ in self.deepstack_visual_indexes
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embed.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embed.proj.weight.device

    def rot_pos_emb(self, grid_thw: Tensor) -> CosSin:
        """(cos, sin) [S, head_dim / 2] in float32: of the patch's row, then of its column."""
        at_S2 = torch.cat([_coordinates(grid, self.spatial_merge_size) for grid in grid_thw.tolist()]).to(self.device)
        frequency_F = inverse_frequencies(self.hidden_size // self.num_heads // 2, _THETA, self.device)
        angle = (at_S2[..., None].float() * frequency_F).flatten(1)
        return angle.cos(), angle.sin()

    def fast_pos_embed_interpolate(self, grid_thw: Tensor) -> Tensor:
        """Position embeddings [S, v]: the learned square table, stretched bilinearly over each image, corner on corner.

        Weights and sum are float32, rounded once.
        """
        parts = [self._corners(grid) for grid in grid_thw.tolist()]
        index_S4 = torch.cat([index for index, _ in parts]).to(self.device)
        share_S4 = torch.cat([share for _, share in parts]).to(self.device)
        embeddings = torch.zeros((), device=self.device)
        for index_S, share_S in zip(index_S4.unbind(1), share_S4.unbind(1), strict=True):
            embeddings = embeddings + self.pos_embed(index_S).float() * share_S[:, None]
        return embeddings.to(self.dtype)

    def _corners(self, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(the four rows of the table around each patch [S, 4], their shares [S, 4]) of one image."""
        side = self.num_grid_per_side
        at_S2 = _coordinates(grid, self.spatial_merge_size)
        steps = [
            torch.linspace(0, side - 1, size, dtype=torch.float32)[at]
            for size, at in zip(grid[1:], at_S2.unbind(1), strict=True)
        ]
        low = [step.long() for step in steps]
        high = [(one + 1).clamp(max=side - 1) for one in low]
        share = [step - one for step, one in zip(steps, low, strict=True)]
        index = [row * side + column for row in (low[0], high[0]) for column in (low[1], high[1])]
        shares = [row * column for row in (1 - share[0], share[0]) for column in (1 - share[1], share[1])]
        return torch.stack(index, 1), torch.stack(shares, 1)

    def forward(self, x: Tensor, grid_thw: Tensor) -> Tensor:
        """Pixels x [S, channels * temporal_patch_size * patch_size^2] and grids [images, 3] to
        [S / m^2, out_hidden_size * (1 + deepstack)]: the features, then those of each deepstack merger.

        Raises ValueError where pixels and grids disagree.
        """
        grid_thw = grid_thw.to("cpu", torch.int64)
        _check(x, grid_thw, self.spatial_merge_size)
        x = self.patch_embed(x.to(self.device)) + self.fast_pos_embed_interpolate(grid_thw)
        cos, sin = self.rot_pos_emb(grid_thw)
        cu_seqlens = cumulative_lengths(grid_thw)
        deepstack: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            x = block(x, cu_seqlens, cos, sin)
            if number in self.deepstack_visual_indexes:
                deepstack.append(self.deepstack_merger_list[len(deepstack)](x))
        return torch.cat((self.merger(x), *deepstack), dim=-1)

    def slots(self, prefix: str) -> Slots:
        for name in ("patch_embed", "pos_embed", "merger", "deepstack_merger_list"):
            yield from module_slots(self.get_submodule(name), f"{prefix}.{name}")
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Qwen3VisionBlock)
            yield from block.slots(f"{prefix}.blocks.{number}")


def cumulative_lengths(grid_thw: Tensor) -> Tensor:
    """Where frames start among the patches, and where the last ends [frames + 1], int32 on the CPU."""
    lengths = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
    return functional.pad(lengths.cumsum(0), (1, 0)).int()


def _layer_norm(size: int, eps: float) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=eps).requires_grad_(False)


def _coordinates(grid: Sequence[int], merge: int) -> Tensor:
    """Row and column [S, 2] of each patch of one image or video, in the processor's order, on the CPU."""
    frames, rows, columns = grid
    with torch.device("cpu"):
        row = torch.arange(rows)[:, None].expand(rows, columns)
        column = torch.arange(columns).expand(rows, columns)
    blocks = (rows // merge, merge, columns // merge, merge)
    in_order = [one.reshape(blocks).transpose(1, 2).flatten() for one in (row, column)]
    return torch.stack(in_order, dim=1).repeat(frames, 1)


def _checked(published: Sequence[int], depth: int, indexes: Sequence[int] | None) -> tuple[int, ...]:
    chosen = tuple(published if indexes is None else indexes)
    if list(chosen) != sorted({i for i in chosen if 0 <= i < depth}):
        raise ValueError(
            f"deepstack_visual_indexes: expected ascending numbers of the {depth} blocks, found {list(chosen)}."
        )
    return chosen


def _check(x: Tensor, grid_thw: Tensor, merge: int) -> None:
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or bool((grid_thw[:, 1:] % merge).any()):
        raise ValueError(
            f"grid_thw: expected [images, 3] (frames, rows, columns), the last two multiples of {merge}; found "
            f"{grid_thw.tolist()}."
        )
    patches = int(grid_thw.prod(1).sum())
    if len(x) != patches:
        raise ValueError(f"pixel_values: the grids {grid_thw.tolist()} need {patches} patches, found {len(x)}.")
