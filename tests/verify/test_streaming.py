"""Models without weights, the shelf that lends them, and the convoy in which passes share what was read."""

import gc
import platform
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen3vl_convert import ParallelLayout, hf_to_megatron, make_checkpoint
from qwen3vl_convert.errors import UnsupportedFormat
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.verify.logits.convoy import Convoy, Station
from qwen3vl_convert.verify.logits.hollow import LentStack, Shelf, apart, give_back_memory, hollow_out, lend, weightless

CPU = torch.device("cpu")


class Block(nn.Module):
    """A linear layer and a norm, and frequencies that no checkpoint has."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("frequencies", 1.0 / 10 ** (torch.arange(0, width) / width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * self.frequencies  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self, depth: int = 3, width: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def hollow(build: Callable[[], nn.Module] = Stack) -> nn.Module:
    with weightless():
        model = build()
    hollow_out(model, CPU)
    return model


def lent(model: nn.Module, read: Callable[[str], Tensor], most: int = 1 << 20) -> Shelf:
    shelf = Shelf(lambda name: read(str(name)), most)
    for name, module in model.named_modules():
        if keys := [key for key, parameter in module._parameters.items() if parameter is not None]:
            lend(module, {key: f"{name}.{key}" for key in keys}, shelf.get)
    return shelf


# ---- hollow ----------------------------------------------------------------------------------------------------------


def test_it_has_everything_but_memory() -> None:
    whole, model = Stack(), hollow()
    for (name, expected), (other, found) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        assert (name, expected.shape, expected.dtype, CPU) == (other, found.shape, found.dtype, found.device)
        assert found.untyped_storage().nbytes() == found.itemsize
        assert found.isnan().all()
    for frequencies, same in zip(whole.buffers(), model.buffers(), strict=True):
        assert torch.equal(frequencies, same)


def test_what_computes_without_a_weight_gives_nan() -> None:
    assert hollow()(torch.ones(1, 4)).isnan().all()


def test_a_buffer_that_was_not_made_of_a_range_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(3))

    with pytest.raises(UnsupportedFormat, match=r"Odd: \.?table"):
        hollow(Odd)


def test_lent_weights_compute_as_the_model_s_own_and_are_given_back() -> None:
    whole, model = Stack(), hollow()
    lent(model, lambda name: whole.get_parameter(name).detach())
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), whole(x))
    assert all(parameter.isnan().all() for parameter in model.parameters())


def test_an_argument_is_lent_to_what_has_no_weight() -> None:
    class Tied(nn.Module):
        def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
            assert weight is not None
            return x @ weight.T

    head, table = Tied(), torch.randn(3, 4)
    lend(head, {"weight": "table"}, lambda name: table)
    assert torch.equal(head(torch.ones(1, 4), weight=torch.full((3, 4), float("nan"))), torch.ones(1, 4) @ table.T)


@pytest.mark.parametrize(("most", "reads"), [(1 << 20, {"a": 1, "b": 1, "c": 1}), (80, {"a": 1, "b": 1, "c": 3})])
def test_a_shelf_holds_as_much_as_it_may(most: int, reads: dict[str, int]) -> None:
    count: Counter[Any] = Counter()

    def read(name: Any) -> Tensor:
        count[name] += 1
        return torch.full((10,), float(ord(name)))

    shelf = Shelf(read, most)
    for _ in range(3):
        for name in "abc":
            assert shelf.get(name)[0] == ord(name)
    assert count == reads
    assert shelf.nbytes == 40 * len(shelf.held) <= most
    shelf.clear()
    shelf.get("c")
    assert list(shelf.held) == ["c"]


def test_a_stack_of_experts_gives_one() -> None:
    experts = torch.randn(5, 2, 3)
    stack = LentStack(lambda name: experts[name[1]] if name[0] == "up" else experts[0], "up")  # type: ignore[index]
    assert torch.equal(stack[3], experts[3])
    assert torch.equal(stack[torch.tensor(3)], experts[torch.tensor(3)])
    assert torch.equal(stack[torch.tensor([3])], experts[torch.tensor([3])])


# ---- the convoy ------------------------------------------------------------------------------------------------------


def convoy(models: list[nn.Module], leave: Callable[[int, int], None] = lambda layer, turn: None) -> Convoy:
    def station(turn: int, layer: int, module: nn.Module) -> Station:
        return Station((layer, turn), module, lambda: leave(layer, turn), nbytes=1)

    return Convoy([station(turn, at, one) for turn, model in enumerate(models) for at, one in enumerate(model.blocks)])  # type: ignore[arg-type]


def test_each_weight_is_read_once_and_one_layer_is_held() -> None:
    """By five passes of two models, of which one skips the first layer."""
    whole, count, held = Stack(), Counter[str](), []
    models = [hollow(), hollow()]

    def read(name: str) -> Tensor:
        count[name] += 1
        return whole.get_parameter(name).detach()

    shelves = [lent(model, read) for model in models]

    def leave(layer: int, turn: int) -> None:
        held.append({name.split(".")[1] for name in map(str, shelves[turn].held)})
        shelves[turn].clear()

    xs = [torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]

    def part(model: nn.Module, x: Tensor) -> Tensor:
        for block in list(model.blocks)[1:]:  # type: ignore[arg-type]
            x = block(x)
        return x

    works: list[Callable[[], Any]] = [partial(model, x) for model in models for x in xs]
    works.append(partial(part, models[1], xs[0]))
    found = convoy(models, leave).run(works)
    with torch.no_grad():
        expected = [whole(x) for x in xs] * 2 + [part(whole, xs[0])]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert set(count.values()) == {2}  # once for each model
    assert held == [{"0"}, {"0"}, {"1"}, {"1"}, {"2"}, {"2"}]


def test_progress_is_told() -> None:
    said: list[tuple[int, int]] = []
    model = Stack()
    made = convoy([model])
    made.passed = lambda done, total: said.append((done, total))
    made.run([lambda: model(torch.ones(1, 4))] * 2)
    assert said == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("error", [ValueError("in a layer"), KeyboardInterrupt()])
def test_what_fails_in_one_ends_all(error: BaseException) -> None:
    model, before = Stack(), threading.active_count()

    def fail(*_: Any) -> None:
        raise error

    model.blocks[1].linear.register_forward_hook(fail)  # type: ignore[union-attr]
    with pytest.raises(type(error)):
        convoy([model]).run([lambda: model(torch.ones(1, 4))] * 3)
    assert threading.active_count() == before
    assert not model.blocks[0]._forward_pre_hooks  # nothing of the convoy is left


def test_no_gradients_are_kept() -> None:
    model = Stack()
    (found,) = convoy([model]).run([lambda: model(torch.ones(1, 4))])
    assert not found.requires_grad


# ---- what is held does not grow with depth ---------------------------------------------------------------------------


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads the kernel's count; other C libraries differ")
def test_memory_is_that_of_a_weight_whatever_the_depth() -> None:
    """Of the process, as the kernel counts it: what a thread freed, and its heap keeps, is held all the same."""
    weight, prompts, taken = 8 << 20, 10, []

    def read(name: str) -> Tensor:
        narrow = torch.zeros(1 << 20)
        found = narrow.double()
        taken.append(anonymous())
        return found.view(1024, 1024) if name.endswith("linear.weight") else found[:1024].clone()

    models = [hollow(lambda: Stack(depth=8, width=1024).double()) for _ in range(2)]
    for model in models:
        lent(model, read, most=2 * weight)
    x = torch.zeros(1, 1024, dtype=torch.float64)
    torch.empty(30 << 20, dtype=torch.uint8)  # as any large block does, its end has glibc raise its threshold
    give_back_memory()
    before = anonymous()
    with apart():
        convoy(models).run([partial(model, x) for model in models for _ in range(prompts)])
    # A few weights when nothing else has run in this process, some more when other tests have; 85 without `apart`.
    assert max(taken) - before < 24 * weight
    assert max(taken[len(taken) // 2 :]) <= max(taken[: len(taken) // 2]) + 4 * weight


def anonymous() -> int:
    """Bytes of this process's own memory."""
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.slow
@pytest.mark.megatron
@pytest.mark.transformers
@pytest.mark.filterwarnings("ignore")
def test_no_layer_leaves_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tensors that are alive whenever a layer was passed, in a model much deeper than those of other tests."""
    pytest.importorskip("transformers")
    pytest.importorskip("megatron.core")
    from qwen3vl_convert.verify.verification import LogitsOptions, verify

    dims = replace(SIZES["tiny-moe"], layers=9, vision_depth=3)
    make_checkpoint(tmp_path / "hf", dims)
    hf_to_megatron(tmp_path / "hf", tmp_path / "run", layout=ParallelLayout(tp=2, ep=2))
    held: dict[tuple[type, int], list[int]] = defaultdict(list)
    passed: list[tuple[int, ...]] = []
    serve = Convoy._serve

    def counting(self: Convoy, station: Station, waiting: Any) -> None:
        serve(self, station, waiting)
        passed.append(station.key)
        if hasattr(station.module, "self_attn") or hasattr(station.module, "self_attention"):
            held[type(station.module), station.key[-1]].append(alive())

    monkeypatch.setattr(Convoy, "_serve", counting)
    assert verify(tmp_path / "hf", tmp_path / "run", logits=LogitsOptions(device="cpu", stream=True)).equal
    firsts = list(dict.fromkeys(passed))
    assert firsts == sorted(firsts)  # side by side, or what one program gave would wait for the other
    layers = [found for found in held.values() if len(found) == dims.layers]
    assert len(layers) == 4
    attention = dims.hidden * dims.head_dim * (dims.heads + dims.kv_heads) * 2 * torch.float32.itemsize
    for found in layers:
        assert max(found[4:]) - max(found[1:4]) < attention


def alive() -> int:
    """Bytes of all tensors that Python knows of."""
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter) and one.device == CPU]
    return sum({one.data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())
