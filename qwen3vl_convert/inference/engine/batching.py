"""From what the scheduler says to what the model takes: one table of numbers per forward, copied to the device at once.

Axes: T tokens of a forward, B sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen3vl_convert.inference.engine.kv_pool import KVPool, ReqToTokenPool
from qwen3vl_convert.inference.engine.scheduler import Chunk, Plan
from qwen3vl_convert.inference.forward_batch import ForwardBatch, ForwardMode

if TYPE_CHECKING:
    from qwen3vl_convert.inference.attention.backend import AttentionBackend

ID, NUMBER, MROPE, SLOT, ROW, LENGTH = 0, 1, slice(2, 5), 5, 6, 7
"""What the lines of a table are. ROW and LENGTH (of the sequence) only count in decoding, where T is B."""
LINES = 8


@dataclass(frozen=True, slots=True)
class Positions:
    """M-RoPE positions of one sequence."""

    prompt: Tensor
    """[3, prompt tokens], on the host."""
    delta: int
    """Token n of what was generated stands at n + delta."""

    def of(self, start: int, stop: int) -> Tensor:
        """[3, stop - start]."""
        inside = self.prompt[:, start:stop]
        beyond = torch.arange(max(start, self.prompt.shape[1]), max(stop, self.prompt.shape[1])) + self.delta
        return torch.cat([inside, beyond.expand(3, -1)], dim=1)


@dataclass(frozen=True, slots=True)
class Pools:
    """Where keys and values are, and what reads them."""

    kv: KVPool
    rows: ReqToTokenPool
    backend: "AttentionBackend"


def table_of(plan: Plan, positions: Sequence[Positions], page_size: int) -> Tensor:
    """[LINES, T] on the host. `positions`: of each chunk's sequence."""
    parts = [_decodes(plan.chunks[: plan.num_decodes], positions, page_size)]
    for chunk, its in list(zip(plan.chunks, positions, strict=True))[plan.num_decodes :]:
        parts.append(_columns(chunk, its, page_size))
    return torch.cat(parts, dim=1)


def _decodes(chunks: Sequence[Chunk], positions: Sequence[Positions], size: int) -> Tensor:
    """One column each."""
    columns = []
    for chunk, its in zip(chunks, positions, strict=False):
        number, sequence = chunk.start, chunk.sequence
        at, slot = number + its.delta, sequence.pages[number // size] * size + number % size
        columns.append((sequence.tokens[number], number, at, at, at, slot, sequence.row, number + 1))
    return torch.tensor(columns, dtype=torch.int64).reshape(-1, LINES).T


def _columns(chunk: Chunk, positions: Positions, size: int) -> Tensor:
    number = torch.arange(chunk.start, chunk.stop)
    first = chunk.start // size
    pages = torch.tensor(chunk.sequence.pages[first : -(-chunk.stop // size)])
    table = torch.empty(LINES, len(number), dtype=torch.int64)
    table[ID] = torch.tensor(chunk.sequence.tokens[chunk.start : chunk.stop])
    table[NUMBER] = number
    table[MROPE] = positions.of(chunk.start, chunk.stop)
    table[SLOT] = pages[number // size - first] * size + number % size
    table[ROW], table[LENGTH] = chunk.sequence.row, number + 1
    return table


def forward_batch(plan: Plan, table: Tensor, pools: Pools, visual_embeds: Tensor | None) -> ForwardBatch:
    """`table`: that of the plan, on the device."""
    lengths = [chunk.stop - chunk.start for chunk in plan.chunks]
    ends = torch.tensor(lengths).cumsum(0) - 1
    wanted = ends[torch.tensor([chunk.last for chunk in plan.chunks])]
    rows = torch.tensor([chunk.sequence.row for chunk in plan.chunks])
    rows, wanted = torch.split(torch.cat([rows, wanted]).to(table.device), [len(rows), len(wanted)])
    return ForwardBatch(
        forward_mode=_mode(plan),
        input_ids=table[ID],
        seq_lens=[chunk.stop for chunk in plan.chunks],
        extend_seq_lens=lengths,
        num_decodes=plan.num_decodes,
        attn_backend=pools.backend,
        token_to_kv_pool=pools.kv,
        req_to_token_pool=pools.rows,
        req_pool_indices=rows,
        out_cache_loc=table[SLOT],
        mrope_positions=table[MROPE],
        visual_embeds=visual_embeds,
        logits_indices=wanted,
    )


def _mode(plan: Plan) -> ForwardMode:
    if plan.num_decodes == len(plan.chunks):
        return ForwardMode.DECODE
    return ForwardMode.MIXED if plan.num_decodes else ForwardMode.EXTEND


def decode_batch(table: Tensor, pools: Pools, max_pages: int) -> ForwardBatch:
    """A batch that reads all numbers from the table [LINES, B] on the device, and none from the host."""
    count = table.shape[1]
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        input_ids=table[ID],
        seq_lens=[max_pages * pools.rows.page_size] * count,
        extend_seq_lens=[1] * count,
        num_decodes=count,
        attn_backend=pools.backend,
        token_to_kv_pool=pools.kv,
        req_to_token_pool=pools.rows,
        req_pool_indices=table[ROW],
        out_cache_loc=table[SLOT],
        mrope_positions=table[MROPE],
        kv_lens=table[LENGTH],
        max_pages=max_pages,
    )
