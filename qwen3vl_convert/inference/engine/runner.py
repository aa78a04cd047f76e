"""One forward of what the scheduler planned, and the tokens that are sampled from it."""

import warnings
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qwen3vl_convert.errors import InputError
from qwen3vl_convert.inference.engine.batching import ID, NUMBER, Pools, forward_batch, table_of
from qwen3vl_convert.inference.engine.cuda_graphs import DecodeGraphs
from qwen3vl_convert.inference.engine.kv_pool import KVPool, ReqToTokenPool
from qwen3vl_convert.inference.engine.live import Live
from qwen3vl_convert.inference.engine.options import EngineOptions, feature_bytes, free_memory, kv_pages
from qwen3vl_convert.inference.engine.sampler import Draw, PenaltyCounts, Sampled, penalises, sample
from qwen3vl_convert.inference.engine.scheduler import Plan
from qwen3vl_convert.inference.engine.visual import FeatureCache

if TYPE_CHECKING:
    from qwen3vl_convert.inference.attention.backend import AttentionBackend


class Runner:
    """The model with its memory. It holds nothing of a request beyond a step but keys, values and features."""

    def __init__(self, model: Any, options: EngineOptions, context: int, backend: "AttentionBackend | None") -> None:
        self.model, self.dims, self._options = model, model.config, options
        memory = free_memory(model.device)
        self.pools = _pools(model, options, context, memory, backend or _default_backend(model))
        self.features = FeatureCache(model.visual, model.device, feature_bytes(memory))
        self._counts = PenaltyCounts(options.max_running + 1, self.dims.vocab, model.device)
        able = model.device.type == "cuda" and model.capturable
        wanted = able if options.cuda_graphs is None else options.cuda_graphs
        self.graphs = DecodeGraphs(model, self.pools, options.max_running) if wanted else None

    def run(
        self, plan: Plan, pages: dict[tuple[int, int], int], fresh: Sequence[int], lives: Sequence[Live]
    ) -> Sampled:
        """Compute a plan. `pages`: what is new in the table of pages; `fresh`: pages that have just been given out;
        `lives`: the requests of its chunks.

        Raises InputError if the logits are no numbers.
        """
        self.pools.kv.clear(fresh)
        self.pools.rows.write(pages)
        self._start_counts(plan, lives)
        logits = self._logits(plan, lives)
        draws = [_draw(live) for live, chunk in zip(lives, plan.chunks, strict=True) if chunk.last]
        if not draws:
            return Sampled([], [], True)
        sampled = sample(logits, draws, self._counts)
        if not sampled.finite:
            raise InputError(
                "logits: expected numbers, found infinities or NaN. The weights are broken, or too large for "
                f"{self.model.dtype}: verify the checkpoint, or load it in another dtype."
            )
        self._count(draws, sampled.tokens)
        return sampled

    # ---- penalties ---------------------------------------------------------------------------------------------------

    def _start_counts(self, plan: Plan, lives: Sequence[Live]) -> None:
        for live in lives:
            if live.sequence in plan.started and penalises(live.sampling):
                prompt = live.sequence.tokens[: live.sequence.prompt]
                self._counts.start(live.sequence.row, prompt, live.sequence.generated)

    def _count(self, draws: Sequence[Draw], tokens: Sequence[int]) -> None:
        pairs = [(draw.row, token) for draw, token in zip(draws, tokens, strict=True) if penalises(draw.params)]
        self._counts.add([row for row, _ in pairs], [token for _, token in pairs])

    # ---- the forward -------------------------------------------------------------------------------------------------

    def _logits(self, plan: Plan, lives: Sequence[Live]) -> Tensor:
        """[sequences that get a token, vocab]."""
        table = table_of(plan, [live.positions for live in lives], self._options.page_size)
        only_decodes = plan.num_decodes == len(plan.chunks)
        replayed = self._replayed(table) if only_decodes and self.graphs is not None else None
        if replayed is not None:
            return replayed
        embeds = None if only_decodes else self._visual_embeds(plan, lives)
        table = table.to(self.model.device)
        logits: Tensor = self.model(table[ID], table[NUMBER], forward_batch(plan, table, self.pools, embeds))
        return logits

    def _replayed(self, table: Tensor) -> Tensor | None:
        """Logits by a graph; None, and no more graphs, where that fails and nobody insists on them."""
        assert self.graphs is not None
        try:
            return self.graphs.run(table)
        except RuntimeError as error:
            if self._options.cuda_graphs:
                raise
            reason = error.__context__ or error  # what the end of a failed capture says is not what failed it
            warnings.warn(f"CUDA graphs are off, decoding goes on without them: {reason}", RuntimeWarning, stacklevel=2)
            self.graphs = None
            return None

    def _visual_embeds(self, plan: Plan, lives: Sequence[Live]) -> Tensor | None:
        """Features for the visual tokens of the batch in their order, None if there are none."""
        pairs = list(zip(plan.chunks, (live.visual for live in lives), strict=True))
        self.features.hold((prompt, prompt.items_in(chunk.start, chunk.stop)) for chunk, prompt in pairs)
        parts = [
            (*prompt.features(chunk.start, chunk.stop), *self._generated(chunk.generated)) for chunk, prompt in pairs
        ]
        found = list(chain.from_iterable(parts))
        return torch.cat(found) if found else None

    def _generated(self, tokens: Sequence[int]) -> list[Tensor]:
        """A visual token that was generated stands for no pixels: its features are its embedding, as in decoding."""
        ids = (self.dims.image_token_id, self.dims.video_token_id)
        if not any(one in tokens for one in ids):
            return []
        some = torch.tensor([token for token in tokens if token in ids], device=self.model.device)
        embeds: Tensor = self.model.get_input_embeddings()(some)
        return [pad(embeds, (0, self.dims.hidden * len(self.dims.deepstack)))]


def _draw(live: Live) -> Draw:
    sequence = live.sequence
    return Draw(live.sampling, live.seed, len(sequence.tokens) - sequence.prompt, sequence.row)


def _pools(model: Any, options: EngineOptions, context: int, memory: int, backend: "AttentionBackend") -> Pools:
    dims, size = model.config, options.page_size
    token_bytes = 2 * dims.layers * dims.kv_heads * dims.head_dim * model.dtype.itemsize
    pages = kv_pages(options, token_bytes, context, memory)
    pool = KVPool(pages, size, dims.layers, dims.kv_heads, dims.head_dim, model.dtype, model.device)
    rows = ReqToTokenPool(options.max_running, min(context, (pages - 1) * size), size, model.device)
    return Pools(pool, rows, backend)


def _default_backend(model: Any) -> "AttentionBackend":
    from qwen3vl_convert.inference.attention.flash import backend_for

    return backend_for(model.device, model.dtype, model.config.head_dim)
