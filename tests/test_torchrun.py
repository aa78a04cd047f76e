"""What is told of a launcher, and to whom: torch is not needed here."""

import sys

import pytest

from launcher import TOLD
from qwen3vl_convert.errors import NotInstalled
from qwen3vl_convert.models.launch import once
from qwen3vl_convert.torchrun import launched, process, processes


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)


def test_one_of_several() -> None:
    assert (launched(), process(), processes()) == (True, 1, 2)


@pytest.mark.parametrize("name", TOLD)
def test_who_is_told_a_part_is_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name)
    assert (launched(), process(), processes()) == (False, 0, 1)
    assert once(lambda: "done") == "done"


def test_several_processes_need_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch.distributed", raising=False)
    with pytest.raises(NotInstalled, match="A conversion under torchrun needs torch, which is not installed: pip"):
        once(lambda: "done")
