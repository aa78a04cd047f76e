"""`verify --logits --model inference`: the third opinion passes what is right, and says where it is wrong."""

from pathlib import Path

import pytest

from launcher import TOLD
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.verify import verification
from qwen3vl_convert.verify.result import LogitsReport
from qwen3vl_convert.verify.verification import LogitsOptions, verify
from verify.faults import FAULTS
from verify.planting import Bases

pytest.importorskip("transformers")

pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings("ignore")]

PLACES = {
    "q heads in group order": "text layer 1, self_attn.q_norm, input: the weights differ",
    "o_proj transposed": "text layer 1, self_attn.o_proj, output: its weights differ",
    "gate and up swapped": "text layer 1, mlp, output: its weights differ",
    "expert pair exchanged": "text layer 1, mlp, output: its weights differ",
    "final norm missing": "model.norm, output: its weights differ",
    "tied head not tied": "lm_head, output",
    "vision q, k, v concatenated": "vision layer 1, visual.blocks.1.attn, output: its weights differ",
    "deepstack mergers in another order": "visual.deepstack_merger_list.0, output: its weights differ",
    "one bfloat16 bit flipped": "text layer 1, mlp, output: its weights differ",
    "NaN": "text layer 1, mlp, output: its weights differ",
    "rope theta 500000": "text layer 0, self_attn.o_proj, input: it goes wrong before this module, in attention",
    "top-k too small": "text layer 0, mlp, output: its weights are equal: the choice of experts",
}
"""By fault, how the place begins."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("right"))


def opinion(folder: Path, run: Path, dtype: str = "fp32") -> LogitsReport:
    report = verify(folder, run, logits=LogitsOptions(device="cpu", dtype=dtype, model="inference")).logits
    assert report is not None
    return report


@pytest.mark.parametrize(("name", "dtype"), [("dense", "fp32"), ("tied", "fp32"), ("moe", "fp32"), ("moe", "bf16")])
def test_what_is_right_passes(name: str, dtype: str, bases: Bases) -> None:
    report = opinion(bases.huggingface(name), bases.megatron(name), dtype)
    assert report.equal
    assert report.place is None
    assert "inference model" in report.notes[-1]
    layers = {point.module for point in report.points if point.layer is not None}
    assert {"visual.blocks.2.attn", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp"} <= layers


def test_weights_are_read_once_for_logits_in_several_dtypes(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is passed in is what is answered, what it found different too."""
    right, wrong = (bases.huggingface("dense"), bases.megatron("dense")), FAULTS["o_proj transposed"]
    for pair, equal in ((right, True), (wrong.planted(bases, tmp_path), False)):
        first = verify(*pair)
        with monkeypatch.context() as patch:
            patch.setattr(verification, "compare_weights", lambda *_, **__: pytest.fail("compared again"))
            found = [
                verify(*pair, weights=first.weights, logits=LogitsOptions("cpu", dtype, model="inference"))
                for dtype in ("fp32", "bf16")
            ]
        assert [one.weights for one in found] == [first.weights] * 2
        assert [(one.equal, one.logits is not None and one.logits.equal) for one in found] == [(equal, equal)] * 2
        assert [one.logits.dtype for one in found if one.logits] == ["fp32", "bf16"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_what_is_wrong_is_found_where_it_is(name: str, bases: Bases, tmp_path: Path) -> None:
    report = opinion(*FAULTS[name].planted(bases, tmp_path))
    assert not report.equal
    assert report.place is not None
    assert report.place.text.startswith(PLACES[name])


def test_what_it_cannot_do() -> None:
    with pytest.raises(UsageError, match="--stream with --model inference"):
        LogitsOptions(stream=True, model="inference")
    with pytest.raises(UsageError, match="expected megatron or inference"):
        LogitsOptions(model="vllm")


def test_it_runs_in_one_process(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="without torchrun"):
        opinion(bases.huggingface("dense"), bases.megatron("dense"))
