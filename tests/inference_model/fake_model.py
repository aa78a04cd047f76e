"""A model whose tokens are hashes of all that an engine can get wrong, in whole numbers and so without rounding.

The key of a token is what it is made of (an embedding, or features of pixels) and its three positions; its value hashes
the keys of all tokens before it. Logits hash what the pool holds for the whole sequence. A wrong page, position, row of
features or prefix changes every token after it. `expected` gives the tokens without pool, pages, chunks or batches.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qwen3vl_convert.inference.engine.requests import Request, VisualInputs
from qwen3vl_convert.inference.engine.sampler import Draw, PenaltyCounts, penalises, sample
from qwen3vl_convert.inference.forward_batch import ForwardBatch, ForwardMode
from qwen3vl_convert.inference.positions import get_rope_index

PRIME = 1_048_573
VOCAB, IMAGE, VIDEO, EOS = 300, 290, 291, 299
HIDDEN, MERGE, WIDTH = 4, 2, 3 * 2 * 2 * 2
DIMS = SimpleNamespace(
    layers=2,
    hidden=HIDDEN,
    kv_heads=1,
    head_dim=4,
    vocab=VOCAB,
    max_positions=4096,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=292,
    spatial_merge=MERGE,
    channels=3,
    temporal_patch=2,
    patch=2,
    deepstack=(0, 1),
    eos_token_id=EOS,
)
COEFFICIENTS = torch.randint(1, PRIME, (4096, 4), generator=torch.Generator().manual_seed(0))


def scramble(x: Tensor) -> Tensor:
    """[...] int64 to numbers below PRIME that look random."""
    x = x % PRIME
    for factor, shift in ((48_271, 11), (69_621, 7), (16_807, 13)):
        x = (x * factor + 12_345) % PRIME
        x = (x ^ (x >> shift)) % PRIME
    return x


def content(rows: Tensor) -> Tensor:
    """[tokens, features] to [tokens]."""
    return scramble((rows.long() * torch.arange(1, rows.shape[1] + 1)).sum(-1))


def keys_of(contents: Tensor, positions: Tensor) -> Tensor:
    """[T, 4]: contents [T], positions [3, T]."""
    return torch.stack([contents, *positions])[:, :].T % PRIME


def running(keys: Tensor) -> Tensor:
    """[T, 4] to what all up to each token amount to [T]."""
    return scramble((keys * COEFFICIENTS[: len(keys)]).sum(-1).cumsum(0))


def logits_of(keys: Tensor, values: Tensor) -> Tensor:
    """[T, 4] and [T] of a whole sequence to [VOCAB]."""
    seed = (running(keys)[-1] + (values * COEFFICIENTS[: len(values), 0]).sum()) % PRIME
    return scramble(seed + 7919 * torch.arange(1, VOCAB + 1)) / PRIME * 20 - 10


class FakeModel(nn.Module):
    """Counts what it was asked for: `encoded` images, `forwards`, and `tokens` in them."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.dtype, self.device = DIMS, torch.float32, torch.device("cpu")
        self.embeddings: nn.Embedding = nn.Embedding.from_pretrained(
            torch.randint(1, 1000, (VOCAB, HIDDEN), generator=torch.Generator().manual_seed(1)).float()
        )
        self.encoded: list[int] = []
        self.modes: list[ForwardMode] = []
        self.tokens: list[int] = []

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def rope_index(self, ids: Tensor, image_grid: Tensor | None, video_grid: Tensor | None) -> tuple[Tensor, int]:
        return get_rope_index(ids, image_grid, IMAGE, 292, MERGE, video_grid, VIDEO)

    def visual(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """Whole numbers below PRIME, other ones for each feature."""
        assert int(grid.prod(-1).sum()) == len(pixels)
        self.encoded += grid.prod(-1).tolist()
        merged = content(pixels.reshape(-1, MERGE**2 * WIDTH))
        return scramble(merged[:, None] + torch.arange(HIDDEN * (1 + len(DIMS.deepstack)))).float()

    def contents(self, ids: Tensor, embeds: Tensor | None) -> Tensor:
        rows = torch.nn.functional.pad(self.embeddings(ids), (0, HIDDEN * len(DIMS.deepstack)))
        if embeds is not None:
            where = ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0]
            if len(where) != len(embeds):
                raise ValueError(f"{len(where)} visual tokens, {len(embeds)} features")
            rows[where] = embeds
        return content(rows)

    def forward(self, ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        self.modes.append(batch.forward_mode)
        self.tokens.append(len(ids))
        assert batch.mrope_positions is not None
        decodes = batch.forward_mode is ForwardMode.DECODE
        embeds = batch.visual_embeds
        if embeds is None and not decodes:
            embeds = torch.empty(0, HIDDEN * (1 + len(DIMS.deepstack)))
        keys = keys_of(self.contents(ids, None if decodes else embeds), batch.mrope_positions)
        return torch.stack(self._rows(keys, positions, batch) or [torch.empty(VOCAB)])[: self._wanted(batch, len(ids))]

    def _wanted(self, batch: ForwardBatch, tokens: int) -> int:
        return tokens if batch.logits_indices is None else len(batch.logits_indices)

    def _rows(self, keys: Tensor, positions: Tensor, batch: ForwardBatch) -> list[Tensor]:
        """Logits of the sequences whose last token is wanted."""
        rows, first = [], 0
        wanted = range(len(keys)) if batch.logits_indices is None else batch.logits_indices.tolist()
        lens = batch.seq_lens if batch.kv_lens is None else batch.kv_lens.tolist()
        for number, new in enumerate(batch.extend_seq_lens):
            some = slice(first, first + new)
            slots = self._slots(batch, number, lens[number])
            assert positions[some].tolist() == list(range(lens[number] - new, lens[number])) or slots[0] == 0
            logits = self._sequence(keys[some], slots, some, batch)
            first += new
            if first - 1 in wanted:
                rows.append(logits)
        return rows

    def _slots(self, batch: ForwardBatch, number: int, length: int) -> Tensor:
        """Of the whole sequence, by the table."""
        table = batch.req_to_token_pool
        assert table is not None
        assert batch.req_pool_indices is not None
        at = torch.arange(length)
        if batch.max_pages is not None:
            assert length <= batch.max_pages * table.page_size
        pages = table.page_table[batch.req_pool_indices[number], at // table.page_size]
        return pages * table.page_size + at % table.page_size

    def _sequence(self, keys: Tensor, slots: Tensor, some: slice, batch: ForwardBatch) -> Tensor:
        pool, new = batch.token_to_kv_pool, len(keys)
        assert pool is not None
        assert batch.out_cache_loc is not None
        assert batch.out_cache_loc[some].equal(slots[len(slots) - new :])
        before = pool.get_kv_buffer(0)[0][slots[: len(slots) - new], 0].long()
        values = running(torch.cat([before, keys]))[-new:]
        for layer in range(DIMS.layers):
            sign = 1 - 2 * layer
            pool.set_kv_buffer(
                layer, batch.out_cache_loc[some], keys[:, None] * sign, values[:, None, None].expand(-1, 1, 4) * sign
            )
        last = DIMS.layers - 1
        k, v = (one[slots, 0].long() * (1 - 2 * last) for one in pool.get_kv_buffer(last))
        return logits_of(k, v[:, 0])


def pixels_for(grid: Sequence[Sequence[int]], seed: int) -> Tensor:
    """Whole numbers, so that nothing is rounded."""
    patches = sum(t * h * w for t, h, w in grid)
    return torch.randint(0, 255, (patches, WIDTH), generator=torch.Generator().manual_seed(seed)).float()


def visual_of(images: Sequence[Sequence[int]] = (), videos: Sequence[Sequence[int]] = (), seed: int = 0) -> Any:
    return VisualInputs(
        pixel_values=pixels_for(images, seed) if images else None,
        image_grid_thw=torch.tensor(images) if images else None,
        pixel_values_videos=pixels_for(videos, seed + 1) if videos else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
    )


def expected(request: Request, seed: int = 0, ends: Sequence[int] = (EOS,)) -> list[int]:
    """The tokens that a request must get, the whole sequence computed anew for each."""
    model, ids, sampling = FakeModel(), list(request.token_ids), request.sampling
    grids = {kind: (pixels, grid) for kind, pixels, grid in (request.visual.kinds() if request.visual else ())}
    positions, delta = model.rope_index(
        torch.tensor(ids), *(grids[kind][1] if kind in grids else None for kind in ("image", "video"))
    )
    prompt = len(ids)
    rows = torch.nn.functional.pad(model.embeddings(torch.tensor(ids)), (0, HIDDEN * len(DIMS.deepstack)))
    for kind, token in (("image", IMAGE), ("video", VIDEO)):
        if kind in grids:
            rows[torch.tensor(ids) == token] = model.visual(*grids[kind])
    contents = content(rows)
    while len(ids) < prompt + sampling.max_new_tokens:
        keys = keys_of(contents, positions)
        counts = PenaltyCounts(1, VOCAB, "cpu")
        if penalises(sampling):
            counts.start(0, ids[:prompt], ids[prompt:])
        draw = Draw(sampling, sampling.seed or seed, len(ids) - prompt)
        token = sample(logits_of(keys, running(keys))[None], [draw], counts).tokens[0]
        contents = torch.cat([contents, model.contents(torch.tensor([token]), None)])
        positions = torch.cat([positions, torch.full((3, 1), len(ids) + delta)], dim=1)
        ids.append(token)
        if token in (*sampling.stop_token_ids, *(() if sampling.ignore_eos else ends)):
            break
    return ids[prompt:]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token % 256 for token in ids).decode("utf-8", errors="replace")
