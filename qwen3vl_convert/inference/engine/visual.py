"""Images and videos of a prompt: what they are for the prefix cache, and their features, a slice at a time."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.inference.engine.requests import VisualInputs
from qwen3vl_convert.models.positions import check_visual_tokens

MOST_PATCHES = 1 << 14
"""Of one run of the vision tower, unless one image or video alone has more."""


class VisionDims(Protocol):
    """What must be known of a model, as `dims.Dims` says it."""

    @property
    def image_token_id(self) -> int: ...
    @property
    def video_token_id(self) -> int: ...
    @property
    def spatial_merge(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def temporal_patch(self) -> int: ...
    @property
    def patch(self) -> int: ...


class VisionTower(Protocol):
    def __call__(self, pixel_values: Tensor, grid_thw: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One image, or one video."""

    kind: str
    """image, or video."""
    digest: bytes
    """Of all that its features follow from."""
    pixels: Tensor
    grid: Tensor
    """[1, 3]."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """The tokens start <= i < stop of a prompt are the features `first`, first + 1, ... of an item."""

    start: int
    stop: int
    item: int
    first: int


@dataclass(frozen=True, slots=True, eq=False)
class VisualPrompt:
    """The visual tokens of one prompt. `held` has the features of items that are being computed, and no others."""

    items: tuple[Item, ...]
    runs: tuple[Run, ...]
    held: dict[int, Tensor] = field(default_factory=dict)

    def grid(self, kind: str) -> Tensor | None:
        """[images or videos, 3], None if there are none."""
        rows = [item.grid for item in self.items if item.kind == kind]
        return torch.cat(rows) if rows else None

    def runs_in(self, start: int, stop: int) -> Iterator[Run]:
        """The parts of runs that are inside of start <= i < stop."""
        at = max(0, bisect_right(self.runs, start, key=lambda run: run.start) - 1)
        for run in self.runs[at:]:
            if run.start >= stop:
                return
            first, last = max(start, run.start), min(stop, run.stop)
            if first < last:
                yield Run(first, last, run.item, run.first + first - run.start)

    def items_in(self, start: int, stop: int) -> set[int]:
        return {run.item for run in self.runs_in(start, stop)}

    def features(self, start: int, stop: int) -> list[Tensor]:
        """Features of the visual tokens among start <= i < stop, in their order; `held` must have their items."""
        return [self.held[run.item][run.first : run.first + run.stop - run.start] for run in self.runs_in(start, stop)]

    def forget(self, computed: int) -> None:
        """Let go of what no token from `computed` on needs."""
        needed = self.items_in(computed, self.runs[-1].stop) if self.runs else set()
        for item in self.held.keys() - needed:
            del self.held[item]


def visual_prompt(token_ids: Sequence[int], visual: VisualInputs | None, dims: VisionDims) -> VisualPrompt:
    """Raises UsageError unless visual tokens, grids and pixels fit each other and the model."""
    ids = torch.tensor(token_ids)
    _check(ids, visual, dims)
    items, runs = list[Item](), list[Run]()
    for kind, pixels, grid in visual.kinds() if visual else ():
        token_id = dims.image_token_id if kind == "image" else dims.video_token_id
        places = (ids == token_id).nonzero()[:, 0]
        for item in _items(kind, pixels, grid, dims.spatial_merge):
            runs += _runs(places[: item.tokens], len(items))
            places = places[item.tokens :]
            items.append(item)
    return VisualPrompt(tuple(items), tuple(sorted(runs, key=lambda run: run.start)))


def content_of(token_ids: Sequence[int], prompt: VisualPrompt) -> list[int]:
    """The key of a prompt in the prefix cache: visual tokens are what their pixels are, a number below 0."""
    key = list(token_ids)
    numbers = [-1 - int.from_bytes(item.digest, "little") for item in prompt.items]
    for run in prompt.runs:
        key[run.start : run.stop] = [numbers[run.item]] * (run.stop - run.start)
    return key


class FeatureCache:
    """Features of images and videos by their digests, the last used ones, up to so many bytes."""

    def __init__(self, tower: VisionTower, device: torch.device, most_bytes: int) -> None:
        self._tower, self._device, self._most_bytes = tower, device, most_bytes
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    def hold(self, wanted: Iterable[tuple[VisualPrompt, set[int]]]) -> None:
        """See that prompts hold the features of those of their items. Each content is computed once."""
        lacking = [(prompt, at) for prompt, items in wanted for at in sorted(items) if at not in prompt.held]
        contents = {prompt.items[at].digest: prompt.items[at] for prompt, at in lacking}
        found = {digest: self._features[digest] for digest in contents if digest in self._features}
        for group in _groups([item for digest, item in contents.items() if digest not in found]):
            found |= self._encode(group)
        for prompt, at in lacking:
            prompt.held[at] = found[prompt.items[at].digest]
        for digest, features in found.items():
            self._keep(digest, features)

    def clear(self) -> None:
        self._features.clear()
        self._bytes = 0

    def _encode(self, items: list[Item]) -> dict[bytes, Tensor]:
        pixels = torch.cat([item.pixels.to(self._device) for item in items])
        features = self._tower(pixels, torch.cat([item.grid for item in items]))
        parts = torch.split(features, [item.tokens for item in items])
        # A part of a larger tensor would keep all of it alive.
        return {item.digest: part.clone() for item, part in zip(items, parts, strict=True)}

    def _keep(self, digest: bytes, features: Tensor) -> None:
        if digest not in self._features:
            self._bytes += features.nbytes
        self._features[digest] = features
        self._features.move_to_end(digest)
        while self._bytes > self._most_bytes:
            _, oldest = self._features.popitem(last=False)
            self._bytes -= oldest.nbytes


def _groups(items: list[Item]) -> Iterator[list[Item]]:
    """Items that go through the tower together."""
    group, patches = list[Item](), 0
    for item in items:
        if group and patches + len(item.pixels) > MOST_PATCHES:
            yield group
            group, patches = [], 0
        group.append(item)
        patches += len(item.pixels)
    if group:
        yield group


def _check(ids: Tensor, visual: VisualInputs | None, dims: VisionDims) -> None:
    width = dims.channels * dims.temporal_patch * dims.patch**2
    grids: dict[str, Tensor] = {}
    for kind, pixels, grid in visual.kinds() if visual else ():
        if pixels.shape[1] != width:
            raise UsageError(
                f"pixels of the {kind}s: expected {width} values in a patch, found {pixels.shape[1]}. Pass what the "
                f"model's own processor gives."
            )
        grids[f"{kind}_grid_thw"] = grid.cpu()
    try:
        check_visual_tokens(
            ids[None],
            **grids,
            spatial_merge_size=dims.spatial_merge,
            image_token_id=dims.image_token_id,
            video_token_id=dims.video_token_id,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _items(kind: str, pixels: Tensor, grid: Tensor, merge: int) -> Iterator[Item]:
    start = 0
    for row in grid.cpu().long():
        patches = int(row.prod())
        part = pixels[start : start + patches]
        start += patches
        yield Item(kind, _digest(kind, part, row), part, row[None], patches // merge**2)


def _digest(kind: str, pixels: Tensor, grid: Tensor) -> bytes:
    """128 bits of the pixels and of all that says what they are."""
    digest = blake2b(f"{kind} {grid.tolist()} {pixels.dtype} {list(pixels.shape)} ".encode(), digest_size=16)
    data: Any = pixels.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    digest.update(data)
    return digest.digest()


def _runs(places: Tensor, item: int) -> Iterator[Run]:
    """Stretches of neighbours among the places [tokens] of one item."""
    breaks = (places.diff() != 1).nonzero()[:, 0] + 1
    bounds = [0, *breaks.tolist(), len(places)]
    for first, last in pairwise(bounds):
        start = int(places[first])
        yield Run(start, start + last - first, item, first)
