"""Many forward passes that go through a model together, layer by layer, so that they share one reading of its weights.

A `Station` is a module at which passes wait for each other. Each pass runs in a thread of its own, one thread at a
time, up to the next station. When all wait, those at the earliest station go through it, and it is left: what was read
for it can be dropped. So what runs is each program's own forward, and nothing here knows what that does.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Station:
    """A module at which passes wait. `key` orders the stations of all models; `leave` is called when all went through.
    `nbytes`: of its weights, which say how far the convoy has come.

    Nothing that a pass leaves in the model may be needed after the next station: the others come in between.
    """

    key: tuple[int, ...]
    module: nn.Module
    leave: Callable[[], None]
    nbytes: int = 0


@dataclass(eq=False)
class _Passage:
    """One forward pass: `work` is run in a thread, `result` is what it gave."""

    work: Callable[[], Any]
    result: Any = None
    failure: BaseException | None = None
    waits_at: Station | None = None
    done: bool = False
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class _Stopped(BaseException):
    """Ends a pass whose convoy has failed; no library's `except Exception` may catch it."""


class Convoy:
    """Passes over models with stations. Use once."""

    def __init__(self, stations: Sequence[Station], passed: Callable[[int, int], None] | None = None) -> None:
        """`passed` is told, at each station that is left, of the bytes of all that were left, and of all there are."""
        self.stations = stations
        self.passed = passed or (lambda done, total: None)
        self.left: set[Station] = set()
        self.open: Station | None = None
        self.stopped = False
        self.back = threading.Semaphore(0)
        self.here = threading.local()

    def run(self, works: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each of the passes gave. What fails in one is raised here, when all have ended."""
        # before all other hooks: none may act for a pass and then see it wait
        hooks = [s.module.register_forward_pre_hook(self._arrival(s), prepend=True) for s in self.stations]
        passages = [_Passage(work) for work in works]
        threads = [threading.Thread(target=self._travel, args=(one,), daemon=True) for one in passages]
        try:
            for one, thread in zip(passages, threads, strict=True):
                thread.start()
                self._until_back(one)
            while waiting := [one for one in passages if not one.done]:
                self._serve(min((one.waits_at for one in waiting if one.waits_at), key=lambda s: s.key), waiting)
        finally:
            self._stop(passages, threads)
            for hook in hooks:
                hook.remove()
        return [one.result for one in passages]

    def _serve(self, station: Station, waiting: Sequence[_Passage]) -> None:
        self.open = station
        for one in waiting:
            if one.waits_at is station:
                one.go.release()
                self._until_back(one)
        self.open = None
        station.leave()
        self.left.add(station)
        self.passed(sum(one.nbytes for one in self.left), sum(one.nbytes for one in self.stations))

    def _until_back(self, one: _Passage) -> None:
        """Until the pass that runs waits again or has ended."""
        self.back.acquire()
        if one.failure is not None:
            raise one.failure

    def _stop(self, passages: Sequence[_Passage], threads: Sequence[threading.Thread]) -> None:
        self.stopped = True
        for one, thread in zip(passages, threads, strict=True):
            one.go.release()
            if thread.ident is not None:
                thread.join()

    def _travel(self, one: _Passage) -> None:
        self.here.passage = one
        try:
            with torch.no_grad():
                one.result = one.work()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  raised again where the convoy is run
            one.failure = error
        one.done = True
        self.back.release()

    def _arrival(self, station: Station) -> Callable[..., None]:
        def arrive(module: nn.Module, args: Any) -> None:
            one: _Passage = self.here.passage
            if station is not self.open:  # or it is called more than once in a row
                one.waits_at = station
                self.back.release()
                one.go.acquire()
                one.waits_at = None
            if self.stopped:
                raise _Stopped

        return arrive
