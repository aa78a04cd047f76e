"""Where each token stands for M-RoPE: in time, in height and in width, as Qwen3-VL counts.

Text counts on by one, the same in all three. An image is a block that starts where the text before it has got to, and
the text after it goes on past its longer side:

    a  b  S  ▣  ▣  ▣  ▣  ▣  ▣  E  c       S, E: start and end of vision; ▣: an image of 2 x 3 tokens
    0  1  2  3  3  3  3  3  3  6  7       time
    0  1  2  3  3  3  4  4  4  6  7       height
    0  1  2  3  4  5  3  4  5  6  7       width

Each frame of a video is such a block: when it was is told by the words between the frames, not by a position.

The method: every token says by how much it moves the count on. Text says one, the last token of a block says the
block's longer side, the other tokens of a block and padding say nothing. The running sum before a token is then where
its block starts, and its place inside the block follows from its number among all visual tokens. So there is no loop,
and nothing waits for the device but `check_visual_tokens`.

Axes: B rows of the batch, S tokens of a row, T = B * S all tokens, N sequences (rows, or those packed into one row),
G rows of a grid, 3 time, height and width. A trailing 1 means one more: the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad


def get_rope_index(
    input_ids_BS: Tensor,
    *,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask_BS: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    spatial_merge_size: int,
    image_token_id: int,
    video_token_id: int,
    vision_start_token_id: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions [3, B, S], and per sequence what to add to a number of tokens to get the next position [N, 1]; int64.

    - `image_grid_thw`, `video_grid_thw`: [G, 3] in patches, a row per image and per video, in the order of the prompt
      through the whole batch. Without a grid the tokens of its kind count as text.
    - `attention_mask_BS`: 0 is padding, anywhere in a row. The other tokens stand as if it were not there; it stands
      at 0.
    - `cu_seqlens`: [N + 1], where the sequences packed into the one row start, and where the last ends; each counts
      from 0. Of Megatron-Core's `PackedSeqParams` that is `cu_seqlens_q_padded` where there is one, else
      `cu_seqlens_q`.
    - `vision_start_token_id`: part of this function's usual signature and not needed here: the grids say where a block
      ends, so that two may be adjacent.

    Whether tokens and grids agree is not looked at, see `check_visual_tokens`: if they do not, positions are wrong.
    """
    ids_T = input_ids_BS.reshape(-1)
    valid_T = ~_masked(input_ids_BS, attention_mask_BS)
    step_T, offset_3T = valid_T.long(), torch.zeros(3, 1, dtype=torch.int64, device=ids_T.device)
    for kind in _kinds(ids_T.device, image_token_id, image_grid_thw, video_token_id, video_grid_thw):
        if kind.grid_G3 is None:
            continue
        is_T = valid_T & (ids_T == kind.token_id)
        places = _places(is_T, _blocks(kind.grid_G3, spatial_merge_size, kind.by_frame))
        step_T = torch.where(is_T, places.step_T, step_T)
        offset_3T = torch.where(is_T, places.offset_3T, offset_3T)

    bounds_N1 = _bounds(input_ids_BS, cu_seqlens)
    sum_T1, valid_T1 = _running_sum(step_T), _running_sum(valid_T)
    base_T = sum_T1[:-1] - sum_T1[_starts(bounds_N1, len(ids_T))]
    delta_N = sum_T1[bounds_N1].diff() - valid_T1[bounds_N1].diff()
    return ((base_T + offset_3T) * valid_T).reshape(3, *input_ids_BS.shape), delta_N[:, None]


def decode_positions(offset: int | Tensor, length: int, rope_deltas: Tensor) -> Tensor:
    """Positions [3, B, length] of text that goes on after the tokens in a cache.

    offset: how many tokens the cache has, padding not counted: an int, or one per row, [B] or [B, 1].
    rope_deltas: [B, 1], as `get_rope_index` gave them for the prompt.
    """
    first = offset.reshape(-1, 1) if isinstance(offset, Tensor) else offset
    position_BS = rope_deltas + first + torch.arange(length, device=rope_deltas.device)
    return position_BS.expand(3, -1, -1)


def check_visual_tokens(
    input_ids_BS: Tensor,
    *,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask_BS: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    spatial_merge_size: int,
    image_token_id: int,
    video_token_id: int,
) -> None:
    """Raise ValueError unless the visual tokens of a prompt are exactly the blocks that the grids say.

    Each block must be there whole, in one piece, inside one sequence and not masked; without a grid there must be no
    token of its kind. Arguments are those of `get_rope_index`. Costs a few operations on [T] and one wait for the
    device; what is wrong is worked out only when something is.
    """
    kinds = _kinds(input_ids_BS.device, image_token_id, image_grid_thw, video_token_id, video_grid_thw)
    masked_T = _masked(input_ids_BS, attention_mask_BS)
    prompt = _Prompt(input_ids_BS, masked_T, _bounds(input_ids_BS, cu_seqlens), spatial_merge_size)
    if torch.stack([_has_fault(kind, prompt) for kind in kinds]).any():
        raise ValueError(next(fault for kind in kinds for fault in _faults(kind.on_host(), prompt.on_host())))


# ---- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """Images, or videos. `by_frame`: of a row (t, h, w) each (1, h, w) is a block of its own."""

    name: str
    token_id: int
    grid_G3: Tensor | None
    by_frame: bool

    def on_host(self) -> "_Kind":
        return self if self.grid_G3 is None else replace(self, grid_G3=self.grid_G3.cpu())


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The rows of a grid in tokens: [G] each, int64."""

    first_G: Tensor
    """The number of a row's first token among all tokens of the kind."""
    end_G: Tensor
    size_G: Tensor
    """Tokens of one block."""
    height_G: Tensor
    width_G: Tensor
    side_G: Tensor
    """How far the count has moved on after a block."""


@dataclass(frozen=True, slots=True)
class _Places:
    """For each token as if it were of the kind; only those that are have a meaning."""

    inside_T: Tensor
    """Its number inside its block."""
    offset_3T: Tensor
    """Its place relative to where its block starts."""
    step_T: Tensor
    """By how much it moves the count on."""


def _kinds(
    device: torch.device, image_id: int, image_grid: Tensor | None, video_id: int, video_grid: Tensor | None
) -> tuple[_Kind, _Kind]:
    """A grid without rows is no grid."""
    image, video = (grid.to(device) if grid is not None and len(grid) else None for grid in (image_grid, video_grid))
    return _Kind("image", image_id, image, by_frame=False), _Kind("video", video_id, video, by_frame=True)


def _blocks(grid_G3: Tensor, merge: int, by_frame: bool) -> _Blocks:
    time_G, height_G, width_G = grid_G3.long().unbind(1)
    height_G, width_G = height_G // merge, width_G // merge
    tokens_G = time_G * height_G * width_G
    depth_G = torch.ones_like(time_G) if by_frame else time_G
    return _Blocks(
        first_G=tokens_G.cumsum(0) - tokens_G,
        end_G=tokens_G.cumsum(0),
        size_G=depth_G * height_G * width_G,
        height_G=height_G,
        width_G=width_G,
        side_G=torch.stack([depth_G, height_G, width_G]).amax(0),
    )


def _places(is_T: Tensor, blocks: _Blocks) -> _Places:
    """The tokens `is_T` are numbered through the batch; the rows of the grid take them in that order."""
    number_T = is_T.cumsum(0) - 1
    # A token too many or a row of no tokens must not crash here: a fault on an accelerator takes the process along.
    row_T = torch.searchsorted(blocks.end_G, number_T, right=True).clamp(max=len(blocks.end_G) - 1)
    size_T, height_T, width_T = (
        table_G.clamp(min=1)[row_T] for table_G in (blocks.size_G, blocks.height_G, blocks.width_G)
    )
    inside_T = (number_T - blocks.first_G[row_T]) % size_T
    line_T = inside_T // width_T
    return _Places(
        inside_T=inside_T,
        offset_3T=torch.stack([line_T // height_T, line_T % height_T, inside_T % width_T]),
        step_T=blocks.side_G[row_T] * (inside_T == size_T - 1),
    )


# ---- sequences -------------------------------------------------------------------------------------------------------


def _masked(input_ids_BS: Tensor, attention_mask_BS: Tensor | None) -> Tensor:
    """Which tokens are padding [T]."""
    if attention_mask_BS is None:
        return torch.zeros_like(input_ids_BS, dtype=torch.bool).reshape(-1)
    return attention_mask_BS.to(input_ids_BS.device).reshape(-1) == 0


def _bounds(input_ids_BS: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where sequences start among all tokens, and where the last ends [N + 1]."""
    if cu_seqlens is not None:
        return cu_seqlens.to(input_ids_BS.device, torch.int64)
    rows, length = input_ids_BS.shape
    return torch.arange(rows + 1, device=input_ids_BS.device) * length


def _starts(bounds_N1: Tensor, tokens: int) -> Tensor:
    """Where the sequence of each token starts [T]; tokens after the last sequence are as one more."""
    index_T = torch.arange(tokens, device=bounds_N1.device)
    return bounds_N1[torch.searchsorted(bounds_N1, index_T, right=True) - 1]


def _running_sum(value_T: Tensor) -> Tensor:
    """The sum of what is before each token, and of all [T + 1]."""
    return pad(value_T.cumsum(0), (1, 0))


# ---- what can be wrong with a prompt ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Prompt:
    ids_BS: Tensor
    masked_T: Tensor
    bounds_N1: Tensor
    merge: int

    def on_host(self) -> "_Prompt":
        return _Prompt(self.ids_BS.cpu(), self.masked_T.cpu(), self.bounds_N1.cpu(), self.merge)

    def tokens(self, kind: _Kind) -> Tensor:
        """Which tokens are of the kind [T]."""
        return self.ids_BS.reshape(-1) == kind.token_id

    def where(self, which_T: Tensor) -> str:
        """The first token of those."""
        return "input_ids[{}, {}]".format(*divmod(_first(which_T), self.ids_BS.shape[1]))


def _has_fault(kind: _Kind, prompt: _Prompt) -> Tensor:
    """A boolean, on the device."""
    is_T = prompt.tokens(kind)
    if kind.grid_G3 is None:
        return is_T.any()
    blocks = _blocks(kind.grid_G3, prompt.merge, kind.by_frame)
    bad_T = _torn(is_T, blocks, prompt.bounds_N1) | (is_T & prompt.masked_T)
    return bad_T.any() | (is_T.sum() != blocks.end_G[-1]) | _odd(kind.grid_G3, prompt.merge).any()


def _torn(is_T: Tensor, blocks: _Blocks, bounds_N1: Tensor) -> Tensor:
    """Tokens inside a block that have none of their kind right before them in their sequence [T]."""
    goes_on_T = _starts(bounds_N1, len(is_T)) != torch.arange(len(is_T), device=is_T.device)
    return is_T & ~(goes_on_T & pad(is_T[:-1], (1, 0))) & (_places(is_T, blocks).inside_T > 0)


def _odd(grid_G3: Tensor, merge: int) -> Tensor:
    """Rows of a grid that are not a whole number of tokens, or none [G]."""
    return (grid_G3 < 1).any(1) | (grid_G3[:, 1:] % merge != 0).any(1)


def _faults(kind: _Kind, prompt: _Prompt) -> Iterator[str]:
    """What is wrong, in words, worked out on the host: the first is the one to mend first."""
    is_T, tokens, grid = prompt.tokens(kind), f"{kind.name} tokens (id {kind.token_id})", f"{kind.name}_grid_thw"
    if kind.grid_G3 is None:
        if is_T.any():
            yield (
                f"{prompt.where(is_T)}: expected no {tokens} without {grid}, found {int(is_T.sum())}. Pass {grid} and "
                f"the pixels, or keep the token out of the text."
            )
        return
    if (masked_T := is_T & prompt.masked_T).any():
        yield (
            f"{prompt.where(masked_T)}: expected no {tokens} where attention_mask is 0, found {int(masked_T.sum())}. "
            f"Pad with another token, and cut a prompt only outside of its images and videos."
        )
    if (odd_G := _odd(kind.grid_G3, prompt.merge)).any():
        yield (
            f"{grid}[{_first(odd_G)}]: expected time, height and width in patches, the last two multiples of "
            f"{prompt.merge}, found {tuple(kind.grid_G3[_first(odd_G)].tolist())}. Pass what the processor gave."
        )
    for misfit in _misfits(is_T, tokens, grid, kind, prompt):
        yield f"{misfit} Pass the ids and the grid that the processor made together, in the order of the prompt."


def _misfits(is_T: Tensor, tokens: str, grid: str, kind: _Kind, prompt: _Prompt) -> Iterator[str]:
    """The first block that is not whole, or else the first token after the last block."""
    assert kind.grid_G3 is not None
    blocks = _blocks(kind.grid_G3, prompt.merge, kind.by_frame)
    number_T, torn_T = is_T.cumsum(0) - 1, _torn(is_T, blocks, prompt.bounds_N1)
    total, most = int(is_T.sum()), int(blocks.end_G[-1])
    good = int(number_T[_first(torn_T)]) if torn_T.any() else total
    if good < most:
        row = _first(blocks.end_G > good)
        size = int(blocks.size_G[row])
        found = (good - int(blocks.first_G[row])) % size
        place = f" at {prompt.where(is_T & (number_T == good - found))}" if found else ""
        yield (
            f"{grid}[{row}], {tuple(kind.grid_G3[row].tolist())}: expected {size} {tokens} in one piece, found "
            f"{found}{place}; in all, expected {most}, found {total}."
        )
    elif total > most:
        place = prompt.where(is_T & (number_T == most))
        yield f"{place}: expected no {tokens} after the {most} of {grid}, found {total - most} more."


def _first(which: Tensor) -> int:
    return int(which.int().argmax())
