"""What one forward of the model needs to know beside its tokens: whose they are, and where their keys and values go.

Axes: T tokens of all sequences of the batch, one after the other without padding; B sequences; N visual tokens.
"""

from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qwen3vl_convert.inference.attention.backend import AttentionBackend
    from qwen3vl_convert.inference.engine.kv_pool import KVPool, ReqToTokenPool


class ForwardMode(Enum):
    """What the sequences of a batch are doing."""

    EXTEND = auto()
    """Each has tokens of its prompt: the whole of it, or a chunk that follows on a prefix in the cache."""
    DECODE = auto()
    """Each has one token, the last that was sampled."""
    MIXED = auto()
    """The first `num_decodes` sequences decode, the others extend."""
    IDLE = auto()
    """There is none."""

    def is_decode(self) -> bool:
        return self is ForwardMode.DECODE


@dataclass(kw_only=True)
class ForwardBatch:
    """One forward's worth of sequences. Lengths are on the host, since they decide shapes.

    Without a pool (`token_to_kv_pool` is None) nothing is cached, and every sequence must be whole.
    """

    forward_mode: ForwardMode
    input_ids: Tensor
    """[T] int64."""
    seq_lens: list[int]
    """[B]: tokens of each sequence, those in the cache and those of this forward."""
    extend_seq_lens: list[int]
    """[B]: tokens of this forward; 1 each in decoding."""
    num_decodes: int = 0
    """Of a MIXED batch: how many sequences at its start decode."""

    attn_backend: "AttentionBackend | None" = None
    token_to_kv_pool: "KVPool | None" = None
    req_to_token_pool: "ReqToTokenPool | None" = None
    req_pool_indices: Tensor | None = None
    """[B] int64: the row of each sequence in `req_to_token_pool`."""
    out_cache_loc: Tensor | None = None
    """[T] int64: the slot of the pool for each token's key and value."""
    kv_lens: Tensor | None = None
    """[B] int64 on the device, of a DECODE batch: as `seq_lens`, which is then not looked at. For a captured CUDA
    graph, whose numbers change from run to run while its shapes do not."""
    max_pages: int | None = None
    """With `kv_lens`: pages of the longest sequence that the graph is for."""
    attention_metadata: Any = None
    """What the attention backend worked out for this forward, for all layers."""
    rotary: Any = None
    """cos and sin of this forward's positions, for all layers."""

    mrope_positions: Tensor | None = None
    """[3, T] int64: time, height and width of each token. Without them the model works them out, which it can where
    sequences are whole, or are text and `mrope_position_deltas` are known."""
    mrope_position_deltas: Tensor | None = None
    """[B] int64: what to add to the number of a text token to get its position. The model sets it in a forward of whole
    sequences whose positions it works out."""
    pixel_values: Tensor | None = None
    """[patches, channels * temporal_patch * patch * patch] of the images of all sequences, in their order."""
    image_grid_thw: Tensor | None = None
    """[images, 3] in patches."""
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    visual_embeds: Tensor | None = None
    """[N, out_hidden_size * (1 + deepstack layers)]: features for exactly the visual tokens of `input_ids`, in their
    order. With them no pixels are looked at: what an engine passes, which splits images among chunks."""
    logits_indices: Tensor | None = None
    """[rows] int64: the tokens whose logits are wanted; all without it."""

    @property
    def batch_size(self) -> int:
        return len(self.seq_lens)

    @property
    def extend_prefix_lens(self) -> list[int]:
        """[B]: tokens of each sequence that are in the cache already."""
        return [whole - new for whole, new in zip(self.seq_lens, self.extend_seq_lens, strict=True)]

    @property
    def extend_start_loc(self) -> list[int]:
        """[B]: where each sequence starts among the T tokens."""
        return [0, *accumulate(self.extend_seq_lens)][:-1]

    @classmethod
    def whole(cls, sequences: list[Tensor], **fields: Any) -> "ForwardBatch":
        """Whole sequences [length] each, without a cache. `fields`: any other of a batch (pixels, grids)."""
        lengths = [len(one) for one in sequences]
        return cls(
            forward_mode=ForwardMode.EXTEND,
            input_ids=torch.cat(sequences),
            seq_lens=lengths,
            extend_seq_lens=list(lengths),
            **fields,
        )
