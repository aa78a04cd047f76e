"""M-RoPE positions of one prompt, in the form that an inference server asks for them."""

import torch
from torch import Tensor

from qwen3vl_convert.models import positions as general


def get_rope_index(
    input_ids: Tensor,
    image_grid_thw: Tensor | None,
    image_token_id: int,
    vision_start_token_id: int,
    spatial_merge_size: int,
    video_grid_thw: Tensor | None = None,
    video_token_id: int = -1,
) -> tuple[Tensor, int]:
    """(positions [3, T] int64, mrope_position_delta) of one sequence `input_ids` [T].

    Text counts on by one in time, height and width; an image is a block (t, h, w) that starts where the text has got
    to, and so is each frame of a video. `*_grid_thw`: [images or videos, 3] in patches, None where there are none; a
    merged token is `spatial_merge_size` patches high and wide. The delta is the largest position + 1 - T: token number
    n of what is generated stands at n + delta. Raises ValueError where grids and visual tokens disagree.
    """
    kinds = {
        "image_grid_thw": image_grid_thw,
        "video_grid_thw": video_grid_thw,
        "spatial_merge_size": spatial_merge_size,
        "image_token_id": image_token_id,
        "video_token_id": video_token_id,
    }
    general.check_visual_tokens(input_ids[None], **kinds)  # type: ignore[arg-type]
    found, delta = general.get_rope_index(input_ids[None], **kinds)  # type: ignore[arg-type]
    return found[:, 0], int(delta)


def packed_rope_index(
    input_ids: Tensor, lengths: list[int], image_grid_thw: Tensor | None, video_grid_thw: Tensor | None, **ids: int
) -> tuple[Tensor, Tensor]:
    """(positions [3, T], deltas [B]) of whole sequences one after the other. `ids`: as `get_rope_index` names them."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    kinds = {"image_grid_thw": image_grid_thw, "video_grid_thw": video_grid_thw, "cu_seqlens": bounds, **ids}
    general.check_visual_tokens(input_ids[None], **kinds)  # type: ignore[arg-type]
    found, deltas = general.get_rope_index(input_ids[None], **kinds)  # type: ignore[arg-type]
    return found[:, 0], deltas[:, 0]
