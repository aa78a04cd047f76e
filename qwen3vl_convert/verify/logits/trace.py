"""What goes into and comes out of the modules of both programs, compared as soon as all have it, and dropped.

A point is one side of a module: its input, or its output. Four runners pass it for each prompt: transformers and ours,
each in the dtype of the comparison and in a more exact one. The latter tell how far each program is from itself, which
is how far the two may be from each other.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen3vl_convert.model import OUTPUT
from qwen3vl_convert.verify.logits.alignment import Aligned
from qwen3vl_convert.verify.result import PointResult

HF, MEGATRON = "hf", "megatron"
Runner = tuple[str, bool]
"""(program, whether in the exact dtype)."""
RUNNERS: tuple[Runner, ...] = ((HF, True), (HF, False), (MEGATRON, True), (MEGATRON, False))
_LOOKED_UP = ("word_embeddings", "embed_tokens")
"""Tables of words, whose input are their numbers."""
_MOST_LOGITS = 4096
"""Of each token, evenly spread over the vocabulary without its padding: all of them are compared elsewhere."""


@dataclass(frozen=True)
class Point:
    """One side of a module, or of a mixture of experts as a whole, which has no parameters of its own."""

    aligned: Aligned
    side: str

    def result(self, difference: float, allowed: float) -> PointResult:
        one = self.aligned
        return PointResult(one.module, ", ".join(one.hf_modules), self.side, one.tower, one.layer, difference, allowed)


def points_of(aligned: Sequence[Aligned]) -> tuple[Point, ...]:
    """The points that both programs have. Single experts have none; all of a layer together have one."""
    found: list[Point] = []
    for one in aligned:
        if one.is_expert or one.module.endswith("pos_embed"):  # each program looks it up in calls of its own
            continue
        if not one.module.endswith(_LOOKED_UP):
            found.append(Point(one, "input"))
        if ".router" not in one.module:  # whose outputs are shares here, logits there
            found.append(Point(one, "output"))
        else:
            found.append(Point(_mixture(one, aligned), "output"))
    return tuple(found)


def _mixture(router: Aligned, aligned: Sequence[Aligned]) -> Aligned:
    module, (gate,) = router.module.removesuffix(".router"), router.hf_modules
    parts = [one for one in aligned if one.module.startswith(module + ".")]
    names = tuple(dict.fromkeys(name for one in parts for name in one.parameters))
    return Aligned(module, (gate.removesuffix(".gate"),), names, router.tower, router.layer, None)


class Trace:
    """The comparison at every point. `watch` the models, run every prompt through them, then read `results`.

    `visits`: how often programs run their vision tower for each prompt, once for images and once for videos, if they
    are `revisiting`. Ours on Megatron-Core sees both at once.
    """

    def __init__(
        self,
        points: Sequence[Point],
        sizes: Mapping[str, int],
        visits: Sequence[int],
        multiple: float,
        floor: float,
        revisiting: Collection[str] = (HF,),
    ) -> None:
        self.points, self.sizes = points, sizes
        self.visits, self.revisiting = visits, revisiting
        self.multiple, self.floor = multiple, floor
        self.waiting: dict[tuple[Point, int], dict[Runner, Tensor]] = defaultdict(dict)
        self.partial: dict[tuple[Point, int, Runner], dict[str, Tensor]] = defaultdict(dict)
        self.visited: dict[tuple[Point, int, Runner], list[Tensor]] = defaultdict(list)
        self.found: dict[Point, tuple[float, float]] = {}
        """By point, in the order in which our model came by: relative (difference, allowed) of its worst prompt."""
        self.hooks: list[Any] = []

    def watch(self, runner: Runner, model: nn.Module, prompt: Callable[[], int]) -> None:
        """Hook a model. `prompt` says which prompt it is running."""
        for point in self.points:
            modules = point.aligned.hf_modules if runner[0] == HF else (point.aligned.module,)
            for name in modules[: 1 if point.side == "input" else None]:
                self.hooks.append(self._hook(point, runner, name, model.get_submodule(name), prompt))

    def _hook(self, point: Point, runner: Runner, name: str, module: nn.Module, prompt: Callable[[], int]) -> Any:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._saw(point, runner, prompt(), args[0] if args else next(iter(kwargs.values())))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            tensor = _with_bias(output)
            if len(point.aligned.hf_modules) > 1 and runner[0] == HF:
                self._saw_part(point, runner, prompt(), name, tensor)
            else:
                self._saw(point, runner, prompt(), tensor)

        if point.side == "input":
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _saw_part(self, point: Point, runner: Runner, prompt: int, name: str, tensor: Tensor) -> None:
        parts = self.partial[point, prompt, runner]
        parts[name] = _flat(tensor).clone()
        if len(parts) == len(point.aligned.hf_modules):
            theirs = [parts[name] for name in point.aligned.hf_modules]
            del self.partial[point, prompt, runner]
            self._take(point, runner, prompt, point.aligned.outputs(theirs, self.sizes))

    def _saw(self, point: Point, runner: Runner, prompt: int, tensor: Tensor) -> None:
        flat = _flat(tensor)
        if point.side == "output" and OUTPUT[1].startswith(point.aligned.hf_modules[-1]):
            vocab = self.sizes["vocab"]
            flat = flat[:, : vocab : -(-vocab // _MOST_LOGITS)]
        flat = flat.clone()  # what comes next may write over it
        if point.side == "output" and runner[0] == HF:
            flat = point.aligned.outputs([flat], self.sizes)
        self._take(point, runner, prompt, flat)

    def _take(self, point: Point, runner: Runner, prompt: int, tensor: Tensor) -> None:
        if runner[0] in self.revisiting and point.aligned.tower == "vision" and self.visits[prompt] > 1:
            seen = self.visited[point, prompt, runner]
            seen.append(tensor)
            if len(seen) < self.visits[prompt]:
                return
            tensor = torch.cat(self.visited.pop((point, prompt, runner)))
        waiting = self.waiting[point, prompt]
        waiting[runner] = tensor.flatten()
        if len(waiting) == len(RUNNERS):
            del self.waiting[point, prompt]
            self._compare(point, *(waiting[one].double() for one in RUNNERS))

    def _compare(self, point: Point, exact_hf: Tensor, hf: Tensor, exact_ours: Tensor, ours: Tensor) -> None:
        if len({len(exact_hf), len(hf), len(exact_ours), len(ours)}) > 1:
            self.found[point] = (math.inf, 0.0)
            return
        scale = max(_rms(exact_hf), 1e-300)
        own = _rms(hf - exact_hf) + _rms(ours - exact_ours)
        found = (_rms(hf - ours) / scale, self.multiple * own / scale + self.floor)
        if point not in self.found or _ratio(found) > _ratio(self.found[point]):
            self.found[point] = found

    def results(self) -> tuple[PointResult, ...]:
        return tuple(point.result(*figures) for point, figures in self.found.items())

    def first_wrong(self) -> tuple[Point, PointResult] | None:
        """The first point at which the programs differ by more than they may."""
        results = ((point, point.result(*figures)) for point, figures in self.found.items())
        return next((pair for pair in results if not pair[1].passed), None)


def _ratio(figures: tuple[float, float]) -> float:
    """How much of what is allowed; NaN is the worst."""
    ratio = figures[0] / figures[1]
    return math.inf if math.isnan(ratio) else ratio


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _with_bias(output: Any) -> Tensor:
    """What a module gave, with the bias that Megatron-Core's linear layers hand on beside it."""
    if not isinstance(output, tuple):
        return output  # type: ignore[no-any-return]
    tensor: Tensor = output[0]
    bias = output[1] if len(output) > 1 else None
    return tensor + bias if isinstance(bias, Tensor) and bias.shape == tensor.shape[-1:] else tensor


def _flat(tensor: Tensor) -> Tensor:
    """[tokens, features]; a batch of one, with its axis first or second, is none."""
    return tensor.detach().reshape(-1, tensor.shape[-1])
