"""Publish whole or not at all: a staging folder beside the target, a journal to resume from, and one rename at the end.

.TARGET.partial/           the output as it grows, with `journal` naming the chunks that are done
.TARGET.replaced           with --overwrite, the old target for the moment between the two renames
"""

import errno
import fcntl
import filecmp
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen3vl_convert.checksum import crc32
from qwen3vl_convert.errors import InputError, OutputError
from qwen3vl_convert.fill import Key, Progress, key_of
from qwen3vl_convert.plan import Job, Plan, Target
from qwen3vl_convert.quantities import size
from qwen3vl_convert.strided import read_into, write_from

_JOURNAL = "journal"
_BLOCK = 256 << 10
_UNSOUND = "Is the disk sound? Convert again."


class Staging:
    """The folder in which an output grows. `done` are the chunks that an earlier run finished."""

    def __init__(self, target: Path, fingerprint: str, resume: bool) -> None:
        self.target = target.parent.resolve() / target.name if target.name not in ("", "..") else target.resolve()
        self.folder = self.target.parent / f".{self.target.name}.partial"
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
            if os.fstat(self.held).st_ino == self.folder.stat().st_ino:
                return  # else the run that held it has ended meanwhile, and removed it
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(self.held)
        raise OutputError(f"{self.target}: another run is writing it ({self.folder} is locked). Wait for it.")

    def _read_journal(self) -> dict[Key, int] | None:
        """The chunks that a journal of the same conversion names, or None to begin anew.

        A full disk or a kill may have cut a line short: the journal is written again without it, so that the next line
        does not end up behind it.
        """
        try:
            first, *rest = (self.folder / _JOURNAL).read_text(errors="replace").split("\n")
        except FileNotFoundError:
            return None
        if first != self.fingerprint or not rest or not self.content.is_dir():
            return None
        done = {}
        for line in rest[:-1]:
            with suppress(ValueError, TypeError):
                file, start, crc = json.loads(line)
                done[file, start] = crc
        self._write_journal(done)
        return done

    def _write_journal(self, done: dict[Key, int]) -> None:
        lines = [self.fingerprint, *(_line(key, crc) for key, crc in done.items())]
        fresh = self.folder / f"{_JOURNAL}.new"
        fresh.write_text("".join(f"{line}\n" for line in lines))
        fresh.replace(self.folder / _JOURNAL)

    def _clear(self) -> None:
        self.done = {}
        for entry in self.folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._write_journal({})

    def finished(self, key: Key, crc: int) -> None:
        """Note in the journal that a chunk is complete."""
        with self.lock, (self.folder / _JOURNAL).open("a") as journal:
            journal.write(f"{_line(key, crc)}\n")

    def lay_out(self, target: Target) -> None:
        """Create every file at its final size, with all bytes that come from no tensor."""
        for name, nbytes in target.sizes.items():
            path = self.content / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in target.copied:
                _copy(target.copied[name], path)
                continue
            with path.open("ab") as file:
                file.truncate(nbytes)
        for name, offset, content in target.literals:
            _write(self.content / name, offset, content)

    def publish(self, fsync: bool) -> None:
        """Make the staged content the target, in one rename; an old target is removed only then."""
        if fsync:
            _sync_tree(self.content)
        old = self.target.parent / f".{self.target.name}.replaced"
        try:
            if self.target.exists():
                _remove(old)
                self.target.rename(old)
            self.content.rename(self.target)
        except BaseException:
            if old.exists() and not self.target.exists():
                old.rename(self.target)
            raise
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
    """A staging folder for `target`. It is kept for `--resume` when interrupted or out of space, else removed on an
    error.

    Raises `OutputError` when the target exists and may not be replaced, cannot be written, or is being written already.
    """
    refuse_existing(target, overwrite)
    try:
        staging = Staging(target, fingerprint, resume)
    except OSError as error:
        raise OutputError(f"{target}: cannot be created: {error.strerror}.") from error
    try:
        yield staging
    except (KeyboardInterrupt, OutputError) as error:
        _keep(staging, error)
        raise
    except OSError as error:
        said = OutputError(f"{target}: cannot be written: {error}.")
        _keep(staging, said)
        raise said from error
    except BaseException:
        staging.discard()
        raise
    finally:
        staging.close()


def _keep(staging: Staging, error: BaseException) -> None:
    """Keep what was done, if anything can go on from there."""
    if not staging.content.exists() or not staging.fingerprint:
        staging.discard()
        return
    error.add_note(f"What was done is kept in {staging.folder}; go on with --resume, or remove it.")


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise `OutputError` when the target exists and may not be replaced."""
    occupied = target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir())))
    if occupied and not overwrite:
        raise OutputError(
            f"{target} exists. Choose another target, or pass --overwrite (from Python overwrite=True) "
            "to replace it when the new one is done."
        )
    if occupied and (target.is_symlink() or not target.is_dir()):
        kind = "a link" if target.is_symlink() else "not a folder"
        raise OutputError(f"{target} is {kind}; it is not replaced. Choose another target.")


def check_space(target: Path, nbytes: int) -> int:
    """Free bytes where the target goes, with those of an unfinished run's staging folder; `OutputError` if too few."""
    folder = next(parent for parent in (target, *target.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free + _allocated(target.parent / f".{target.name}.partial")
    if free < nbytes:
        raise OutputError(f"{target}: {size(nbytes)} are needed and {size(free)} are free on {folder}.")
    return free


def _allocated(folder: Path) -> int:
    try:
        return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
    except OSError:
        return 0


def check_written(plan: Plan, folder: Path, crcs: dict[Key, int], workers: int, progress: Progress) -> None:
    """Read every file back: its size, the CRC-32 of every chunk, and all that lies around the chunks.

    Raises `OutputError` on the first that differs.
    """
    for name, nbytes in plan.target.sizes.items():
        found = (folder / name).stat().st_size
        if found != nbytes:
            raise OutputError(f"{name}: {found} bytes were written, expected {nbytes}. {_UNSOUND}")
    for name, offset, content in plan.target.literals:
        _check_bytes(folder / name, offset, content, name)
    for name, source in plan.target.copied.items():
        if not filecmp.cmp(source, folder / name, shallow=False):
            raise OutputError(f"{name}: is not what {source} is. {_UNSOUND}")

    def check(job: Job) -> None:
        path, start, crc = folder / job.chunk.file, job.chunk.start, crcs[key_of(job.chunk)]
        if _read_crc(path, start, job.nbytes) != crc:
            raise OutputError(f"{job.name}: what was read back is not what was written. {_UNSOUND}")
        frame = plan.target.frames.get(key_of(job.chunk))
        if frame is not None:
            _check_bytes(path, start - len(frame.head), frame.head, job.name)
            _check_bytes(path, start + job.nbytes, frame.tail(crc), job.name)
        progress(job.nbytes)

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(check, plan.jobs):
            pass


def _check_bytes(path: Path, offset: int, content: bytes, name: str) -> None:
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(len(content)) != content:
            raise OutputError(f"{name}: what was read back is not what was written. {_UNSOUND}")


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


def _line(key: Key, crc: int) -> str:
    return json.dumps([*key, crc])


def _copy(source: Path, path: Path) -> None:
    try:
        shutil.copyfile(source, path)
    except FileNotFoundError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}. Was it changed meanwhile?") from error


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
