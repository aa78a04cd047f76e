"""Every fault of `faults` is found: in the weights, in the logits, and at the right place."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import pytest

from qwen3vl_convert.verify.result import LogitsReport, WeightsReport
from qwen3vl_convert.verify.verification import LogitsOptions, verify
from verify.faults import FAULTS, IN_CODE, IN_SETTINGS, IN_WEIGHTS
from verify.planting import Bases, Fault

pytest.importorskip("transformers")
pytest.importorskip("megatron.core")

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.transformers,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]

IN_BFLOAT16 = ("gate and up swapped", "no deepstack", "one TP shard twice")


Made = TypeVar("Made")


@dataclass(frozen=True)
class Planted:
    """Faults, each planted and verified once."""

    root: Path
    bases: Bases
    known: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def folders(self, name: str) -> tuple[Path, Path]:
        return once(self.known, (name,), lambda: FAULTS[name].planted(self.bases, self.root / name))

    def weights(self, name: str) -> WeightsReport:
        """What the verifier says of the weights, by default."""
        return once(self.known, (name, "weights"), lambda: verify(*self.folders(name)).weights)

    def logits(self, name: str, dtype: str = "fp32") -> LogitsReport:
        """What it says of the logits."""
        return once(self.known, (name, dtype), lambda: self._logits(name, dtype))

    def _logits(self, name: str, dtype: str) -> LogitsReport:
        folder, run = self.folders(name)
        with FAULTS[name].at_work():
            report = verify(folder, run, logits=LogitsOptions(device="cpu", dtype=dtype, stream=True)).logits
        assert report is not None
        return report


def once(known: dict[tuple[str, ...], Any], key: tuple[str, ...], make: Callable[[], Made]) -> Made:
    """What was made for a key, or is made now."""
    if key not in known:
        known[key] = make()
    made: Made = known[key]
    return made


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    root = tmp_path_factory.mktemp("faults")
    return Planted(root, Bases(root / "right"))


@pytest.mark.parametrize("name", IN_WEIGHTS | IN_SETTINGS)
def test_the_weight_check_finds_what_is_in_the_checkpoint(name: str, faults: Planted) -> None:
    """The tensors that differ are those and no others; so are the settings."""
    fault, report = FAULTS[name], faults.weights(name)
    assert not report.equal
    assert_matches([difference.name for difference in report.differences], fault.wrong)
    assert {setting.partition(" ")[0] for setting in report.settings} == set(fault.settings)


def assert_matches(names: list[str], patterns: tuple[str, ...]) -> None:
    """Each name by a pattern, each pattern by a name."""
    assert [name for name in names if not any(fnmatchcase(name, one) for one in patterns)] == []
    assert [one for one in patterns if not any(fnmatchcase(name, one) for name in names)] == []


@pytest.mark.parametrize("name", IN_CODE)
def test_the_weight_check_passes_what_is_in_code_only(name: str, faults: Planted) -> None:
    assert faults.weights(name).equal


@pytest.mark.parametrize("name", FAULTS)
def test_the_logit_check_finds_what_changes_the_function(name: str, faults: Planted) -> None:
    """And passes what does not."""
    report = faults.logits(name)
    assert report.equal != FAULTS[name].function
    assert (report.place is None) == report.equal


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_in_bfloat16_too(name: str, faults: Planted) -> None:
    report = faults.logits(name, "bf16")
    assert report.dtype == "bf16"
    assert not report.equal
    assert names_the_place(FAULTS[name], report)


def test_the_place_is_right_for_nine_in_ten(faults: Planted) -> None:
    """Of the module where the models part, and of what is said of the tensors that differ."""
    wrong: dict[str, Any] = {}
    for name, fault in FAULTS.items():
        if not (names_the_place(fault, faults.logits(name)) and names_the_mistake(fault, faults.weights(name))):
            said = [difference.guess for difference in faults.weights(name).differences]
            wrong[name] = (faults.logits(name).place, said)
    print(f"{len(FAULTS) - len(wrong)} of {len(FAULTS)} places are right; not:")
    for name, said in wrong.items():
        print(f"    {name}: {said}")
    assert len(FAULTS) >= 28
    assert len(wrong) <= len(FAULTS) / 10, wrong


def names_the_place(fault: Fault, report: LogitsReport) -> bool:
    if not fault.function:
        return report.place is None
    place = report.place
    if place is None or not place.text.startswith(fault.place) or fault.blames not in place.text:
        return False
    blamed = any(fnmatchcase(name, one) for name in place.parameters for one in fault.wrong)
    return blamed or not fault.wrong or bool(fault.blames)


def names_the_mistake(fault: Fault, report: WeightsReport) -> bool:
    return not fault.wrong or any(fault.guess in difference.guess for difference in report.differences)
