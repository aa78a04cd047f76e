"""The other side of the table of faults: right checkpoints pass; streamed is whole; what ends early leaves nothing."""

import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from broken import QUICK, contents
from qwen3vl_convert import ParallelLayout, megatron_to_hf
from qwen3vl_convert.verify.logits.hollow import Shelf
from qwen3vl_convert.verify.result import LogitsReport, Verification
from qwen3vl_convert.verify.verification import LogitsOptions, verify
from verify.planting import Bases, Fault

pytest.importorskip("transformers")
pytest.importorskip("megatron.core")

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.transformers,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]

STREAM = LogitsOptions(device="cpu", stream=True)
WHOLE = LogitsOptions(device="cpu")


@dataclass(frozen=True)
class Right:
    """A folder, and how it was converted. `experts`: the layout of its experts, put there by another conversion."""

    model: str
    layout: ParallelLayout | None = None
    experts: str = "hub"
    tolerant: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def folders(self, bases: Bases) -> tuple[Path, Path]:
        run = bases.megatron(self.model, layout=self.layout, **self.options)
        folder = bases.huggingface(self.model)
        return (folder if self.experts == "hub" else with_experts(bases, self.model, self.experts)), run


def with_experts(bases: Bases, model: str, layout: str) -> Path:
    """The folder of that name, its experts in another layout."""
    folder = bases.root / f"{model} {layout}"
    if not folder.exists():
        megatron_to_hf(bases.megatron(model), folder, experts_layout=layout, run=QUICK)
    return folder


UNEVEN = ParallelLayout(tp=2, pp=2, first_stage_layers=3)
RIGHT = {
    "TP2, uneven PP2": Right("deep", UNEVEN),
    "VPP2": Right("deep", ParallelLayout(pp=2, vpp=2)),
    "tied, TP2": Right("tied", ParallelLayout(tp=2)),
    "padded vocabulary": Right("dense", ParallelLayout(tp=2), options={"padded_vocab_size": 640}),
    "stored in bfloat16": Right("bfloat16", ParallelLayout(tp=2)),
    "stored in float16": Right("float16", ParallelLayout(pp=2)),
    "widened to float32": Right("bfloat16", tolerant=True, options={"dtype": "fp32"}),
    "moe, EP2": Right("moe", ParallelLayout(ep=2)),
    "moe, TP2, EP2, ETP2": Right("moe", ParallelLayout(tp=2, ep=2, etp=2)),
    "moe, v5": Right("moe", experts="v5"),
    "moe, per expert": Right("moe", experts="per-expert"),
    "square experts": Right("square up", ParallelLayout(ep=2, pp=2)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("right", RIGHT.values(), ids=RIGHT)
def test_right_checkpoints_pass(right: Right, dtype: str, bases: Bases) -> None:
    options = LogitsOptions(device="cpu", dtype=dtype)
    found = verify(*right.folders(bases), dtype_tolerant=right.tolerant, logits=options)
    assert_passes(found)


def assert_passes(found: Verification) -> None:
    """Everything is equal, and much was compared."""
    assert found.equal
    assert found.weights.equal
    assert found.logits is not None
    assert found.logits.equal
    assert found.logits.place is None
    assert len(found.logits.prompts) == 5
    assert [point.name for point in found.logits.points if not point.passed] == []
    assert {point.layer for point in found.logits.points} >= {None, 0, 1}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("run", "folder"), [("dense_tp2pp1", "dense"), ("moe_tp1pp1ep2", "moe")])
def test_checkpoints_of_megatron_bridge_pass(
    run: str, folder: str, dtype: str, golden_huggingface: Path, golden_megatron: Path
) -> None:
    options = LogitsOptions(device="cpu", dtype=dtype, stream=True)
    assert_passes(verify(golden_huggingface / folder, golden_megatron / run, logits=options))


@pytest.mark.parametrize(("stored", "dtype"), [("bf16", "bf16"), ("fp16", "fp32"), ("bf16", "fp32")])
def test_checkpoints_of_another_dtype_pass(stored: str, dtype: str, bases: Bases) -> None:
    """Rounded as was asked for: that is no difference of the weights, nor of what they compute."""
    run = bases.megatron("dense", dtype=stored)
    options = LogitsOptions(device="cpu", dtype=dtype, stream=True)
    assert_passes(verify(bases.huggingface("dense"), run, dtype_tolerant=True, logits=options))


# ------------------------------------------------------------------------------------------------- streamed and whole


@pytest.fixture(scope="module")
def streamed(bases: Bases) -> Callable[[str], LogitsReport]:
    """What streaming finds of a right checkpoint."""
    return cache(lambda model: logits_of(bases.huggingface(model), bases.megatron(model), STREAM))


def logits_of(folder: Path, run: Path, options: LogitsOptions) -> LogitsReport:
    report = verify(folder, run, logits=options).logits
    assert report is not None
    return report


def numbers(report: LogitsReport) -> tuple[Any, ...]:
    """Every number that was found."""
    return report.prompts, report.points


@pytest.mark.parametrize("model", ["dense", "tied", "moe"])
def test_streamed_is_whole_to_the_last_digit(model: str, bases: Bases, streamed: Callable[[str], LogitsReport]) -> None:
    whole = logits_of(bases.huggingface(model), bases.megatron(model, layout=ParallelLayout(pp=2)), WHOLE)
    assert numbers(whole) == numbers(streamed(model))
    assert (whole.mode, streamed(model).mode) == ("whole", "stream")
    assert min(one.max_abs for one in whole.prompts) > 0, "two programs that round alike would compare nothing"


def test_a_shelf_for_nothing_changes_nothing(
    bases: Bases, streamed: Callable[[str], LogitsReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight at a time, read again for every use of it."""
    ample = streamed("dense")
    reads = count_reads(monkeypatch)
    scarce = logits_of(bases.huggingface("dense"), bases.megatron("dense"), replace(STREAM, shelf_bytes=1))
    assert numbers(ample) == numbers(scarce)
    assert max(Counter(reads).values()) >= len(scarce.prompts)


@pytest.mark.parametrize("experts", ["v5", "per-expert"])
def test_the_layout_of_experts_changes_nothing(
    experts: str, bases: Bases, streamed: Callable[[str], LogitsReport]
) -> None:
    """Whatever the folder has, transformers is given the same weights."""
    folder, run = with_experts(bases, "moe", experts), bases.megatron("moe")
    assert numbers(logits_of(folder, run, STREAM)) == numbers(streamed("moe"))
    assert numbers(logits_of(folder, run, WHOLE)) == numbers(streamed("moe"))


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The weights that are read from now on."""
    reads: list[Any] = []
    original = Shelf.get

    def get(shelf: Shelf, name: Any) -> Any:
        if name not in shelf.held:
            reads.append(name)
        return original(shelf, name)

    monkeypatch.setattr(Shelf, "get", get)
    return reads


# -------------------------------------------------------------------------------------------------------- ended early


class Lost(RuntimeError):
    """What no library raises."""


@dataclass
class Acting:
    """Something that happens whenever a live model of ours comes to its final norm."""

    act: Callable[[], object]
    times: int = 0

    def plant(self, model: Any, patch: pytest.MonkeyPatch) -> None:
        model.language_model.decoder.final_layernorm.register_forward_pre_hook(self)

    def __call__(self, *args: Any) -> None:
        self.times += 1
        self.act()


def lose() -> None:
    raise Lost("on purpose")


def interrupt_here() -> None:
    raise KeyboardInterrupt


def interrupt_main_thread() -> None:
    """As Ctrl-C does, which says nothing to the thread that computes; that goes on."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


ENDS = {
    "an error": (lose, Lost),
    "an interrupt in a pass": (interrupt_here, KeyboardInterrupt),
    "Ctrl-C": (interrupt_main_thread, KeyboardInterrupt),
}


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder and that of temporary files."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.mark.parametrize(("act", "error"), ENDS.values(), ids=ENDS.keys())
def test_what_ends_early_leaves_nothing_behind(
    act: Callable[[], object], error: type[BaseException], bases: Bases, empty: Path
) -> None:
    folders = bases.huggingface("dense"), bases.megatron("dense")
    before, threads, acting = [contents(folder) for folder in folders], set(threading.enumerate()), Acting(act)
    with Fault(change=acting.plant).at_work(), pytest.raises(error) as caught:
        verify(*folders, logits=STREAM)
    assert type(caught.value) is error
    assert acting.times == 1, "passes went on after one had failed"
    assert set(threading.enumerate()) == threads
    assert not torch.distributed.is_initialized()
    assert [contents(folder) for folder in folders] == before
    assert list(empty.iterdir()) == []
    assert verify(*folders, logits=STREAM).equal
