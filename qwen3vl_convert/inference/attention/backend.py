"""What carries out the attention of a batch: the interface, and what all kernels need to know of the batch.

Axes: T tokens of all sequences, B sequences, P pages of the longest, L tokens that fit into them; H heads, K heads of
keys and values, D head_dim.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen3vl_convert.inference.forward_batch import ForwardBatch, ForwardMode

if TYPE_CHECKING:
    from qwen3vl_convert.inference.attention.radix_attention import RadixAttention


@dataclass(frozen=True, slots=True)
class Span:
    """The new tokens of one sequence, which extends: `first` to `stop` of all that extend; `cached` are before them."""

    first: int
    stop: int
    cached: int
    slots: Tensor | None
    """[cached + new] int64: where its keys and values are in the pool; None without one."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """Of one forward. Sequences that decode are the first ones."""

    decodes: int
    pages: Tensor | None
    """[decodes, P]."""
    seen: Tensor | None
    """[decodes, 1, 1, L]: which tokens of its pages a sequence has."""
    spans: tuple[Span, ...]


class AttentionBackend(ABC):
    """Keeps nothing between forwards: what the layers of one share is kept in its batch."""

    @abstractmethod
    def forward_extend(self, q: Tensor, k: Tensor, v: Tensor, layer: "RadixAttention", batch: ForwardBatch) -> Tensor:
        """Of sequences with any number of new tokens. k and v are the new tokens', in the pool already if there is one.

        q [T', H, D] of those sequences only, k and v [T', K, D], to [T', H, D].
        """

    @abstractmethod
    def forward_decode(self, q: Tensor, layer: "RadixAttention", batch: ForwardBatch) -> Tensor:
        """Of one new token per sequence, whose key and value are in the pool already. q [B', H, D] to the same."""

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        """Work out once what every layer of this forward needs. The first layer does it, if nobody did before."""
        decodes = batch.batch_size if batch.forward_mode is ForwardMode.DECODE else batch.num_decodes
        pages, seen = _decoding(batch, decodes) if decodes else (None, None)
        batch.attention_metadata = Metadata(decodes, pages, seen, _spans(batch, decodes))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layer: "RadixAttention", batch: ForwardBatch, save_kv_cache: bool = True
    ) -> Tensor:
        """q [T, H, D], k and v [T, K, D] to [T, H, D]."""
        if batch.attention_metadata is None:
            self.init_forward_metadata(batch)
        if batch.token_to_kv_pool is not None and save_kv_cache:
            assert batch.out_cache_loc is not None
            batch.token_to_kv_pool.set_kv_buffer(layer.layer_id, batch.out_cache_loc, k, v)
        one = batch.attention_metadata.decodes
        if one == len(q):
            return self.forward_decode(q, layer, batch)
        extended = self.forward_extend(q[one:], k[one:], v[one:], layer, batch)
        return torch.cat((self.forward_decode(q[:one], layer, batch), extended)) if one else extended


def paged(batch: ForwardBatch, layer: "RadixAttention") -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, page by page: [pages, page size, K, D] each."""
    assert batch.token_to_kv_pool is not None
    assert batch.req_to_token_pool is not None
    size = batch.req_to_token_pool.page_size
    k, v = batch.token_to_kv_pool.get_kv_buffer(layer.layer_id)
    return k.view(-1, size, *k.shape[1:]), v.view(-1, size, *v.shape[1:])


def _decoding(batch: ForwardBatch, decodes: int) -> tuple[Tensor, Tensor]:
    """(pages, seen) of the sequences that decode. Columns beyond a sequence's end are page 0: they are no one's."""
    table = batch.req_to_token_pool
    if table is None or batch.token_to_kv_pool is None or batch.req_pool_indices is None:
        raise ValueError(
            "Sequences decode, and the batch has no token_to_kv_pool, req_to_token_pool or req_pool_indices. "
            "Pass them, or whole sequences to extend."
        )
    lens = batch.kv_lens
    if lens is None:
        lens = torch.tensor(batch.seq_lens[:decodes], device=batch.input_ids.device)
    most = batch.max_pages or -(-max(batch.seq_lens[:decodes]) // table.page_size)
    pages = table.page_table[batch.req_pool_indices[:decodes], :most]
    own = torch.arange(most, device=lens.device) * table.page_size < lens[:, None]
    seen = torch.arange(most * table.page_size, device=lens.device) < lens[:, None]
    return torch.where(own, pages, 0), seen[:, None, None]


def _spans(batch: ForwardBatch, decodes: int) -> tuple[Span, ...]:
    found, first = [], 0
    new_lens, cached_lens = batch.extend_seq_lens, batch.extend_prefix_lens
    for row in range(decodes, batch.batch_size):
        new, cached = new_lens[row], cached_lens[row]
        found.append(Span(first, first + new, cached, _slots(batch, row, cached + new)))
        first += new
    return tuple(found)


def _slots(batch: ForwardBatch, row: int, tokens: int) -> Tensor | None:
    table = batch.req_to_token_pool
    if table is None or batch.token_to_kv_pool is None:
        return None
    assert batch.req_pool_indices is not None
    pages = table.page_table[batch.req_pool_indices[row], : -(-tokens // table.page_size)]
    inside = torch.arange(table.page_size, device=pages.device)
    return (pages[:, None] * table.page_size + inside).flatten()[:tokens]
