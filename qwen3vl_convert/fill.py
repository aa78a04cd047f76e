"""Carry a plan out: threads that read, arrange, check-sum and write one contiguous piece at a time.

A piece whose source is one run of bytes passes through a small buffer that stays in the cache; any other is put
together in a buffer of at most `piece_bytes` from memory-mapped windows. Memory is `workers` buffers, whatever the
size of the model.
"""

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwen3vl_convert.checksum import combine, crc32
from qwen3vl_convert.errors import CorruptFile, OutputError, UsageError
from qwen3vl_convert.plan import Box, Copy, Job, Plan, pieces
from qwen3vl_convert.storage import DTYPES, Chunk
from qwen3vl_convert.strided import carry, raw, read_into, write_from

MIB = 1 << 20
_BLOCK = 128 << 10
"""What is read, check-summed and written at once: it stays in the second-level cache, and ends on a multiple of itself
in the target file, for a page that two writes share costs the kernel more than either."""
_LEAST_PIECE, _MOST_PIECE = 256 << 10, 8 * MIB
_PER_WORKER = 4
"""Pieces' worth of memory that a worker may hold: the buffer, a dtype cast's two copies, and slack."""

Key = tuple[str, int]
"""A chunk of the target: (file, first byte)."""

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class FillOptions:
    """`workers` threads; `max_memory` bytes for all their buffers together."""

    workers: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    max_memory: int = 2 << 30

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: expected 1 or more.")
        if self.max_memory < self.workers * _PER_WORKER * _LEAST_PIECE:
            least = self.workers * _PER_WORKER * _LEAST_PIECE // MIB
            raise UsageError(f"--max-memory is too small for {self.workers} workers: expected at least {least} MiB.")

    @property
    def piece_bytes(self) -> int:
        return min(_MOST_PIECE, self.max_memory // (self.workers * _PER_WORKER))

    @property
    def buffer_bytes(self) -> int:
        """What the buffers may take at most."""
        return self.workers * _PER_WORKER * self.piece_bytes


@dataclass(slots=True)
class _Unfinished:
    """A job whose pieces are being filled: the CRC and length of each, in order."""

    job: Job
    crcs: list[tuple[int, int] | None]


class Filler:
    """One run of `fill`: the shared state of its threads."""

    def __init__(self, plan: Plan, folder: Path, options: FillOptions, done: dict[Key, int]) -> None:
        self.plan, self.folder, self.options = plan, folder, options
        self.crcs = dict(done)
        self.tasks = self._tasks()
        self.lock = threading.Lock()
        self.failure: BaseException | None = None
        self.finished: Callable[[Key, int], None] = lambda key, crc: None
        self.progress: Progress = lambda nbytes: None

    def _tasks(self) -> Iterator[tuple[_Unfinished, int, Box]]:
        for job in self.plan.jobs:
            if key_of(job.chunk) in self.crcs:
                continue
            boxes = list(pieces(job.chunk, DTYPES[job.dtype].itemsize, self.options.piece_bytes))
            unfinished = _Unfinished(job, [None] * len(boxes))
            for index, box in enumerate(boxes):
                yield unfinished, index, box

    def run(self) -> dict[Key, int]:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.options.workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # noqa: BLE001  Ctrl-C lands here: let the pieces in hand end, then go
            self.failure = error
            for thread in threads:
                thread.join()
        if self.failure is not None:
            raise self.failure
        return self.crcs

    def _work(self) -> None:
        buffer = bytearray(self.options.piece_bytes)
        try:
            while self.failure is None:
                with self.lock:
                    task = next(self.tasks, None)
                if task is None:
                    return
                self._piece(*task, buffer)
        except BaseException as error:  # noqa: BLE001  it is raised again where the threads are joined
            self.failure = self.failure or error

    def _piece(self, unfinished: _Unfinished, index: int, box: Box, buffer: bytearray) -> None:
        job = unfinished.job
        nbytes = int(np.prod(box[1])) * DTYPES[job.dtype].itemsize
        copies = list(self.plan.copies(job, box))
        with self._target(job.chunk) as fd:
            offset = job.chunk.start + _first(box, job.chunk) * DTYPES[job.dtype].itemsize
            output = _Output(fd, offset, nbytes, self.folder / job.chunk.file)
            if len(copies) == 1 and is_run(copies[0], job.dtype, nbytes):
                crc = _stream(copies[0], output, buffer)
            else:
                crc = _assemble(copies, job, output, buffer)
        self._done(unfinished, index, crc, nbytes)

    def _done(self, unfinished: _Unfinished, index: int, crc: int, nbytes: int) -> None:
        with self.lock:
            unfinished.crcs[index] = (crc, nbytes)
            self.progress(nbytes)
            if None in unfinished.crcs:
                return
        self._finish(unfinished)

    def _finish(self, unfinished: _Unfinished) -> None:
        """All pieces of a chunk are written: its CRC, and what wraps it."""
        chunk, total = unfinished.job.chunk, 0
        for crc, nbytes in (piece for piece in unfinished.crcs if piece is not None):
            total = combine(total, crc, nbytes)
        frame = self.plan.target.frames.get(key_of(chunk))
        if frame is not None:
            with self._target(chunk) as fd:
                path = self.folder / chunk.file
                write_from(fd, memoryview(frame.head), chunk.start - len(frame.head), path)
                write_from(fd, memoryview(frame.tail(total)), chunk.start + unfinished.job.nbytes, path)
        with self.lock:
            self.crcs[key_of(chunk)] = total
            self.finished(key_of(chunk), total)

    def _target(self, chunk: Chunk) -> AbstractContextManager[int]:
        return _opened(self.folder / chunk.file, os.O_WRONLY)


def fill(
    plan: Plan,
    folder: Path,
    options: FillOptions,
    progress: Progress | None = None,
    done: dict[Key, int] | None = None,
    finished: Callable[[Key, int], None] | None = None,
) -> dict[Key, int]:
    """Fill the skeleton in `folder`; returns the CRC-32 of every chunk's data.

    `done`: chunks that an earlier run finished, with their CRC. `finished` is told of each chunk as it ends.
    Raises `OutputError`, `CorruptFile`, or what interrupted it; the threads have ended then.
    """
    filler = Filler(plan, folder, options, done or {})
    filler.progress = progress or filler.progress
    filler.finished = finished or filler.finished
    return filler.run()


def key_of(chunk: Chunk) -> Key:
    return str(chunk.file), chunk.start


def _first(box: Box, chunk: Chunk) -> int:
    """Elements of the chunk that lie before a contiguous box of it."""
    first = 0
    for offset, origin, size in zip(box[0], chunk.offsets, chunk.sizes, strict=True):
        first = first * size + offset - origin
    return first


def is_run(copy: Copy, dtype: str, nbytes: int) -> bool:
    """Whether a copy is one run of bytes that is the whole piece."""
    if copy.dtype != dtype or copy.numel * DTYPES[dtype].itemsize != nbytes:
        return False
    step = 1
    kept = [axis for axis in zip(copy.sizes, copy.source_strides, copy.target_strides, strict=True) if axis[0] > 1]
    for size, source, target in sorted(kept, key=lambda axis: axis[2]):
        if source != step or target != step:
            return False
        step *= size
    return True


@dataclass(frozen=True, slots=True)
class _Output:
    """Where a piece goes: `nbytes` from byte `offset` of an open file."""

    fd: int
    offset: int
    nbytes: int
    path: Path


def _blocks(output: _Output) -> Iterator[tuple[int, int]]:
    """(first, stop) of the blocks of a piece, in bytes of the piece, that end on block boundaries of the file."""
    first = 0
    while first < output.nbytes:
        stop = min(output.nbytes, first + _BLOCK - (output.offset + first) % _BLOCK)
        yield first, stop
        first = stop


def _stream(copy: Copy, output: _Output, buffer: bytearray) -> int:
    """Pass a run of bytes through a buffer small enough to stay in the cache."""
    crc, whole = 0, memoryview(buffer)
    start = copy.start + copy.source_first * DTYPES[copy.dtype].itemsize
    with _opened(copy.file, os.O_RDONLY) as source:
        for first, stop in _blocks(output):
            part = whole[: stop - first]
            read_into(source, part, start + first, copy.file)
            crc = crc32(part, crc)
            write_from(output.fd, part, output.offset + first, output.path)
    return crc


def _assemble(copies: list[Copy], job: Job, output: _Output, buffer: bytearray) -> int:
    """Put a piece together from strided copies, then write it."""
    crc, whole = 0, memoryview(buffer)[: output.nbytes]
    gather(copies, job, whole)
    for first, stop in _blocks(output):
        crc = crc32(whole[first:stop], crc)
        write_from(output.fd, whole[first:stop], output.offset + first, output.path)
    return crc


def gather(copies: list[Copy], job: Job, whole: memoryview) -> None:
    """Put the contiguous box that `copies` fill together in memory; what none of them reaches is zero (padding)."""
    target = raw(whole, job.dtype)
    if sum(copy.numel for copy in copies) < target.size:
        target[:] = 0
    for copy in copies:
        with _window(copy) as source:
            carry(copy, source, target, job.dtype, job.name)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        kind = CorruptFile if flags == os.O_RDONLY else OutputError
        raise kind(f"{path}: cannot be opened: {error.strerror}.") from error
    try:
        yield fd
    finally:
        os.close(fd)


def mapped_run(copy: Copy, nbytes: int) -> memoryview:
    """The bytes of a copy that is one run of them, mapped: as memory of one's own that the file only begins."""
    start = copy.start + copy.source_first * DTYPES[copy.dtype].itemsize
    lead = start % mmap.ALLOCATIONGRANULARITY
    with _opened(copy.file, os.O_RDONLY) as fd:
        mapped = _mapped(copy.file, fd, lead + nbytes, offset=start - lead, access=mmap.ACCESS_COPY)
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_WILLNEED)
    return memoryview(mapped)[lead:]


def _mapped(path: Path, fd: int, length: int, **how: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, length, **how)
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path}: cannot be read: {error}. Was it changed while it was read?") from error


@contextmanager
def _window(copy: Copy) -> Iterator[np.ndarray]:
    """The elements of the source between the first and the last that a copy needs, mapped."""
    itemsize = DTYPES[copy.dtype].itemsize
    span = 1 + sum((size - 1) * stride for size, stride in zip(copy.sizes, copy.source_strides, strict=True))
    start = copy.start + copy.source_first * itemsize
    lead = start % mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    with _opened(copy.file, os.O_RDONLY) as fd:
        mapped = _mapped(copy.file, fd, lead + span * itemsize, flags=flags, prot=mmap.PROT_READ, offset=start - lead)
    yield raw(memoryview(mapped)[lead:], copy.dtype)
    with suppress(BufferError):  # a view may outlive this frame in a traceback; the mapping then goes with it
        mapped.close()
