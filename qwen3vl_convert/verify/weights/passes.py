"""A pass over tensors in threads, a tensor at a time, that tells how far it is."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qwen3vl_convert.fill import Progress

T = TypeVar("T")


def each(
    nbytes: Mapping[str, int],
    work: Callable[[str, Progress], T],
    workers: int,
    report: Callable[[int, int], None],
) -> list[tuple[str, T]]:
    """`work(name, progress)` for every tensor, by name and size; the results in the order of the names.

    `report` is given (bytes done, bytes in all). What `work` leaves out counts as done when it returns.
    """
    lock, done, total = threading.Lock(), 0, sum(nbytes.values())

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            report(done, total)

    def task(name: str) -> T:
        left = nbytes[name]

        def progress(count: int) -> None:
            nonlocal left
            counted = min(count, left)
            left -= counted
            advance(counted)

        result = work(name, progress)
        advance(left)
        return result

    with ThreadPoolExecutor(workers) as pool:
        return list(zip(nbytes, pool.map(task, nbytes), strict=True))
