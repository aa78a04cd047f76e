"""How context parallelism cuts a sequence: Megatron-Core's way, 2 * cp pieces, of which a rank has one from each end.

So every rank has as much causal attention to compute as the others. The attention itself is Transformer Engine's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceCut:
    """Which tokens this rank has: `index` [tokens of the rank] into the whole sequence. None: all of them."""

    index: Tensor | None

    @classmethod
    def of(cls, group: Any, length: int, packed: Any, device: torch.device) -> "SequenceCut":
        """For sequences of `length` tokens, or a packed batch of as many."""
        if group is None or group.size() == 1:
            return cls(None)
        starts = torch.tensor([0, length], device=device) if packed is None else _starts(packed)
        return cls(cut_index(starts, length, group.size(), group.rank()))

    def along(self, tensor: Tensor | None, dim: int) -> Tensor | None:
        """The rank's part of a tensor that has the sequence on axis `dim`."""
        return tensor if tensor is None or self.index is None else tensor.index_select(dim, self.index)


def _starts(packed: Any) -> Tensor:
    starts = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    return starts.long()  # type: ignore[no-any-return]


def cut_index(starts: Tensor, length: int, size: int, rank: int) -> Tensor:
    """Tokens of `rank` among `size`: piece `rank` and piece 2 * size - 1 - rank of each sequence (`starts`).

    Raises ValueError where a sequence does not divide into 2 * size pieces.
    """
    lengths = starts.diff()
    if (lengths % (2 * size)).any():
        raise ValueError(
            f"Context parallelism over {size} ranks: expected sequences of multiples of {2 * size} tokens, found "
            f"{lengths.tolist()}. Pad each (packed ones too, and say so in cu_seqlens_q_padded)."
        )
    at = torch.arange(length, device=starts.device)
    sequence = torch.bucketize(at, starts[1:], right=True)
    piece = (at - starts[sequence]) * (2 * size) // lengths[sequence]
    return at[(piece == rank) | (piece == 2 * size - 1 - rank)]
