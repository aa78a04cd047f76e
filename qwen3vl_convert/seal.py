"""Publish whole or not at all: a staging folder beside the target, a journal to resume from, and one rename at the end.

.TARGET.partial/           the output as it grows, with `journal` naming the chunks that are done
.TARGET.replaced           with --overwrite, the old target for the moment between the two renames
"""

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen3vl_convert.checksum import crc32
from qwen3vl_convert.errors import OutputError
from qwen3vl_convert.fill import Key, Progress, key_of
from qwen3vl_convert.plan import Job, Plan, Target
from qwen3vl_convert.strided import read_into, write_from

MANIFEST = "qwen3vl_convert.json"
_JOURNAL = "journal"
_BLOCK = 1 << 20


class Staging:
    """The folder in which an output grows. `done` are the chunks that an earlier run finished."""

    def __init__(self, target: Path, fingerprint: str, resume: bool) -> None:
        self.target = target
        self.folder = target.parent / f".{target.name}.partial"
        self.content = self.folder / "content"
        self.fingerprint = fingerprint
        self.lock = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._own()
        self.done = self._read_journal() if resume else None
        if self.done is None:
            self._clear()

    @property
    def resumed(self) -> bool:
        return bool(self.done)

    def _own(self) -> None:
        self.held = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.held)
            raise OutputError(
                f"{self.target}: another run is writing it ({self.folder} is locked). Wait for it."
            ) from None

    def _read_journal(self) -> dict[Key, int] | None:
        """The chunks that a journal of the same conversion names, or None to begin anew."""
        with suppress(FileNotFoundError):
            first, *rest = (self.folder / _JOURNAL).read_text().split("\n")
            if first == self.fingerprint:
                lines = [json.loads(line) for line in rest[:-1]]
                return {(file, start): crc for file, start, crc in lines}
        return None

    def _clear(self) -> None:
        self.done = {}
        for entry in self.folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (self.folder / _JOURNAL).write_text(self.fingerprint + "\n")

    def finished(self, key: Key, crc: int) -> None:
        """Note in the journal that a chunk is complete."""
        with self.lock, (self.folder / _JOURNAL).open("a") as journal:
            journal.write(json.dumps([*key, crc]) + "\n")

    def lay_out(self, target: Target) -> None:
        """Create every file at its final size, with all bytes that come from no tensor."""
        for name, size in target.sizes.items():
            path = self.content / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in target.copied:
                shutil.copyfile(target.copied[name], path)
                continue
            with path.open("ab") as file:
                file.truncate(size)
        for name, offset, content in target.literals:
            _write(self.content / name, offset, content)

    def publish(self, fsync: bool) -> None:
        """Make the staged content the target, in one rename; an old target is removed only then."""
        if fsync:
            _sync_tree(self.content)
        old = self.target.parent / f".{self.target.name}.replaced"
        if self.target.exists():
            self.target.rename(old)
        self.content.rename(self.target)
        if fsync:
            _sync(self.target.parent)
        _remove(old)
        self.discard()

    def discard(self) -> None:
        _remove(self.folder)

    def close(self) -> None:
        os.close(self.held)


@contextmanager
def publishing(target: Path, fingerprint: str, *, overwrite: bool = False, resume: bool = False) -> Iterator[Staging]:
    """A staging folder for `target`. It is kept for `--resume` when interrupted or out of space, else removed on an error.

    Raises `OutputError` when the target exists and may not be replaced, cannot be written, or is being written already.
    """
    refuse_existing(target, overwrite)
    try:
        staging = Staging(target, fingerprint, resume)
    except OSError as error:
        raise OutputError(f"{target}: cannot be created: {error.strerror}.") from error
    try:
        yield staging
    except (KeyboardInterrupt, OutputError, OSError) as error:
        if not staging.content.exists():
            staging.discard()
        else:
            error.add_note(f"What was done is kept in {staging.folder}; go on with --resume, or remove it.")
        raise
    except BaseException:
        staging.discard()
        raise
    finally:
        staging.close()


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise `OutputError` when the target exists and may not be replaced."""
    occupied = target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir())))
    if occupied and not overwrite:
        raise OutputError(
            f"{target} exists. Choose another target, or pass --overwrite to replace it when the new one is done."
        )
    if occupied and not target.is_dir():
        raise OutputError(f"{target} is not a folder; it is not replaced. Choose another target.")


def check_space(target: Path, nbytes: int) -> int:
    """Free bytes where the target goes; raises `OutputError` when they do not suffice."""
    folder = next(parent for parent in (target, *target.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(f"{target}: {nbytes / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free on {folder}.")
    return free


def check_written(plan: Plan, folder: Path, crcs: dict[Key, int], workers: int, progress: Progress) -> None:
    """Read every file back: its size, and the CRC-32 of every chunk. Raises `OutputError` on the first that differs."""
    for name, size in plan.target.sizes.items():
        found = (folder / name).stat().st_size
        if found != size:
            raise OutputError(f"{name}: {found} bytes were written, expected {size}. Is the disk sound? Convert again.")

    def check(job: Job) -> None:
        found = _read_crc(folder / job.chunk.file, job.chunk.start, job.nbytes)
        if found != crcs[key_of(job.chunk)]:
            raise OutputError(
                f"{job.name}: what was read back is not what was written. Is the disk sound? Convert again."
            )
        progress(job.nbytes)

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(check, plan.jobs):
            pass


def _read_crc(path: Path, start: int, nbytes: int) -> int:
    crc, block = 0, memoryview(bytearray(min(_BLOCK, nbytes)))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for done in range(0, nbytes, _BLOCK):
            part = block[: min(_BLOCK, nbytes - done)]
            read_into(fd, part, start + done, path)
            crc = crc32(part, crc)
    finally:
        os.close(fd)
    return crc


def _write(path: Path, offset: int, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        write_from(fd, memoryview(content), offset, path)
    finally:
        os.close(fd)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a filesystem on which folders cannot be synced
            raise
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
