"""Memory for keys and values: the pool, who has which page of it, and which pages each sequence is made of.

A page is `page_size` tokens, of all layers. Page 0 is never given out: what pads a batch reads and writes there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3vl_convert.errors import UsageError


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page_size)


class KVPool:
    """Keys and values of all layers, in slots. Slot i of page p is p * page_size + i."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if num_pages < 2:
            raise UsageError(
                f"KV pool: expected at least 2 pages, one of them for padding, found {num_pages}. Ask for more tokens."
            )
        self.num_pages, self.page_size, self.layers = num_pages, page_size, layers
        shape = (layers, 2, num_pages * page_size, kv_heads, head_dim)
        self._buffer = _zeros(shape, dtype, torch.device(device))
        self._layers = [tuple(layer.unbind(0)) for layer in self._buffer.unbind(0)]

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def get_kv_buffer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [num_pages * page_size, kv_heads, head_dim]; views, not copies."""
        keys, values = self._layers[layer_id]
        return keys, values

    def clear(self, pages: Sequence[int]) -> None:
        """Put zeros into pages that are given out. What is beyond a sequence's end is masked, but NaN times 0 is NaN:
        what a request left that overflowed would be in the next one's answer.
        """
        if pages:
            index = torch.tensor(pages, device=self._buffer.device)
            self._buffer.view(self.layers, 2, self.num_pages, -1).index_fill_(2, index, 0)

    def set_kv_buffer(self, layer_id: int, loc: Tensor, k: Tensor, v: Tensor) -> None:
        """Put keys and values [T, kv_heads, head_dim] into the slots `loc` [T]."""
        keys, values = self._layers[layer_id]
        keys.index_copy_(0, loc, k.to(keys.dtype))
        values.index_copy_(0, loc, v.to(values.dtype))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because what is masked must still be finite. On a CPU the memory is taken as it is used, not before."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    import numpy as np

    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.from_numpy(np.zeros(count, np.uint8)).view(dtype).view(shape)


class TokenToKVPoolAllocator:
    """Which pages are free. A page given out belongs to whoever has it until it is freed, once."""

    def __init__(self, num_pages: int) -> None:
        self.total = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))
        self._is_free = bytearray([0] + [1] * self.total)

    @property
    def available(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def alloc(self, count: int) -> list[int] | None:
        """So many pages, or None, and then nothing has changed."""
        if count > len(self._free):
            return None
        start = len(self._free) - count
        pages = self._free[start:]
        del self._free[start:]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: list[int]) -> None:
        """Take pages back. Raises ValueError, and takes none, where one is free already or is no page of the pool."""
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages freed: expected each once, found {pages}")
        for page in pages:
            if not 0 < page <= self.total or self._is_free[page]:
                raise ValueError(f"page {page}: expected one that was given out, found it free or not in the pool")
        for page in pages:
            self._is_free[page] = 1
        self._free += pages


class ReqToTokenPool:
    """The pages of each sequence under way, in a table on the device that attention reads.

    Token i of a sequence is in slot page_table[row, i // page_size] * page_size + i % page_size. What a row holds
    beyond the length of its sequence is some page of the pool, and means nothing. Row 0 is never given out and is
    all page 0: that of a sequence that only pads a batch.
    """

    def __init__(self, max_reqs: int, max_context_len: int, page_size: int, device: torch.device | str) -> None:
        self.page_size, self.max_reqs = page_size, max_reqs
        self.max_pages = pages_for(max_context_len, page_size)
        self.page_table = torch.zeros(max_reqs + 1, self.max_pages, dtype=torch.int64, device=device)
        self._free = list(range(max_reqs, 0, -1))

    @property
    def available(self) -> int:
        return len(self._free)

    def alloc(self) -> int:
        """A row. Raises ValueError where all are taken."""
        if not self._free:
            raise ValueError(f"rows: expected at most {self.max_reqs} sequences at once, found one more")
        return self._free.pop()

    def free(self, row: int) -> None:
        if not 0 < row <= self.max_reqs or row in self._free:
            raise ValueError(f"row {row}: expected one that was given out, found it free or not in the table")
        self._free.append(row)

    def write(self, pages: dict[tuple[int, int], int]) -> None:
        """`pages` by (row, number of the page in its sequence), in one copy to the device."""
        if not pages:
            return
        entries = torch.tensor([(row, column, page) for (row, column), page in pages.items()], dtype=torch.int64)
        rows, columns, values = entries.to(self.page_table.device).unbind(1)
        self.page_table[rows, columns] = values
