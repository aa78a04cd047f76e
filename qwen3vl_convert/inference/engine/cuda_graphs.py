"""Decoding by captured CUDA graphs: one launch instead of thousands, for batches padded to a few sizes.

A graph has fixed shapes and addresses, so there is one per number of sequences and number of pages, both rounded up,
captured when it is first needed. Sequences that only pad have row 0 and write to page 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qwen3vl_convert.inference.engine.batching import ID, LENGTH, LINES, NUMBER, Pools, decode_batch

Forward = Callable[[], Tensor]
LEAST_PAGES = 8
WARM_UPS = 2
"""Forwards before the capture: kernels are chosen and compiled in them."""


class DecodeGraphs:
    """Runs decoding steps of a model. `capture` makes of a forward on fixed tensors something that repeats it."""

    def __init__(self, model: nn.Module, pools: Pools, max_batch: int, capture: "Capture | None" = None) -> None:
        self._model, self._pools = model, pools
        self._device = pools.rows.page_table.device
        self._capture = capture or (CudaCapture(self._device) if self._device.type == "cuda" else direct)
        self._batches = batch_sizes(max_batch)
        self._tables: dict[int, Tensor] = {}
        self._graphs: dict[tuple[int, int], Forward] = {}

    @property
    def captured(self) -> list[tuple[int, int]]:
        """(sequences, pages) of the graphs that there are."""
        return list(self._graphs)

    def run(self, table: Tensor) -> Tensor:
        """Logits [B, vocab] for a table [LINES, B] on the host. They are overwritten by the next run."""
        count, longest = table.shape[1], int(table[LENGTH].max())
        batch = next(size for size in self._batches if size >= count)
        pages = round_pages(-(-longest // self._pools.rows.page_size), self._pools.rows.max_pages)
        self._fill(batch, table)
        if (batch, pages) not in self._graphs:
            self._graphs[batch, pages] = self._capture(self._forward(batch, pages))
        return self._graphs[batch, pages]()[:count]

    def _fill(self, batch: int, table: Tensor) -> None:
        """The numbers go where the graphs of that size read them."""
        padded = torch.zeros(LINES, batch, dtype=torch.int64)
        padded[LENGTH] = 1  # a softmax over nothing is no number
        padded[:, : table.shape[1]] = table
        if batch not in self._tables:
            self._tables[batch] = padded.to(self._device)
        else:
            self._tables[batch].copy_(padded)

    def _forward(self, batch: int, pages: int) -> Forward:
        table = self._tables[batch]

        def forward() -> Tensor:
            # A new batch each time: what is worked out for all layers must be part of the graph.
            logits: Tensor = self._model(table[ID], table[NUMBER], decode_batch(table, self._pools, pages))
            return logits

        return forward


Capture = Callable[[Forward], Forward]


def direct(forward: Forward) -> Forward:
    """No capture: the forward itself, each time. For a CPU."""
    return forward


class CudaCapture:
    """Captures on one GPU. All graphs share one pool of memory, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, forward: Forward) -> Forward:
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            try:
                graph, logits = self._captured(forward)
            finally:
                torch.cuda.set_stream(before)  # which a capture that fails does not do itself

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    def _captured(self, forward: Forward) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            logits = forward()
        self._pool = self._pool or graph.pool()
        return graph, logits


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, and by eights, and `most`."""
    return [size for size in (1, 2, 4, *range(8, most, 8)) if size < most] + [most]


def round_pages(pages: int, most: int) -> int:
    """The next power of two, or one and a half times one, from LEAST_PAGES up to `most`."""
    size = LEAST_PAGES
    while size < pages:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, most)
