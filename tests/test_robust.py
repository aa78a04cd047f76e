"""What goes wrong while a conversion runs leaves no target, loses no work, and harms neither source nor old target."""

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from broken import (
    DENSE,
    ITERATION,
    MOE,
    QUICK,
    command,
    command_line,
    contents,
    copied,
    edit_config,
    make,
    read_safetensors,
    user_environment,
)
from qwen3vl_convert import FillOptions, ParallelLayout, RunOptions, convert, fill, hf_to_megatron, megatron_to_hf, seal
from qwen3vl_convert.errors import ConvertError, CorruptFile, InputError, OutputError, UsageError
from qwen3vl_convert.fill import Filler, Key
from qwen3vl_convert.huggingface.hub import Resolved
from qwen3vl_convert.make import make_checkpoint
from qwen3vl_convert.megatron.target import MegatronOptions
from qwen3vl_convert.to_huggingface import plan_megatron_to_hf
from qwen3vl_convert.to_megatron import plan_hf_to_megatron

LAYERS = replace(DENSE, layers=4)
EXPERTS = replace(MOE, layers=4)
LAYOUT = ParallelLayout(tp=2, pp=2)
SINGLE = "model.safetensors"


class Sources(NamedTuple):
    """Sound checkpoints that no test may change; `expected` is what `dense` becomes with `LAYOUT`."""

    dense: Path
    moe: Path
    run: Path
    expected: dict[str, str]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    at = tmp_path_factory.mktemp("sources")
    dense, moe = make(at / "dense", LAYERS), make(at / "moe", EXPERTS)
    (dense / "tokenizer.json").write_text('{"a": 1}')
    hf_to_megatron(dense, at / "run", layout=LAYOUT, run=QUICK)
    before = contents(at)
    yield Sources(dense, moe, at / "run", contents(at / "run"))
    assert contents(at) == before, "a test changed a source"


def options(**changes: Any) -> RunOptions:
    return replace(QUICK, **changes)


def converted(sources: Sources, target: Path, **arguments: Any) -> None:
    hf_to_megatron(sources.dense, target, **{"layout": LAYOUT, "run": QUICK, **arguments})


def stop_after(count: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[str, int, int], None]:
    """A report function that ends a run in the midst of filling."""
    seen = 0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal seen
        seen += stage == "fill"
        if seen > count:
            raise error

    return report


def interrupted(sources: Sources, target: Path, count: int = 20, **arguments: Any) -> Path:
    """The staging folder of a run that was stopped after some pieces."""
    with pytest.raises(KeyboardInterrupt) as caught:
        converted(sources, target, report=stop_after(count), **arguments)
    assert "--resume" in caught.value.__notes__[0]
    assert not target.exists()
    return staging_of(target)


def staging_of(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def journal_of(target: Path) -> set[Key]:
    """The chunks that a staging folder has finished."""
    lines = (staging_of(target) / "journal").read_text().split("\n")[1:-1]
    return {(file, start) for file, start, _ in map(json.loads, lines)}


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """The chunks that are filled from here on."""
    keys: list[Key] = []
    piece = Filler._piece

    def spy(self: Filler, unfinished: Any, *rest: Any) -> None:
        keys.append(fill.key_of(unfinished.job.chunk))
        piece(self, unfinished, *rest)

    monkeypatch.setattr(Filler, "_piece", spy)
    return keys


def check_alone(target: Path, expected: dict[str, str]) -> None:
    """The target is what it should be, and nothing lies beside it."""
    assert contents(target) == expected
    assert [path.name for path in target.parent.iterdir()] == [target.name]


# ----------------------------------------------------------------------------------------------- an existing target


@pytest.fixture
def old(tmp_path: Path) -> Path:
    target = tmp_path / "out" / "target"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "precious").write_bytes(b"\0precious")
    return target


def test_an_existing_target_is_refused(old: Path, sources: Sources) -> None:
    before = contents(old.parent)
    with pytest.raises(OutputError, match=r"target exists.*--overwrite"):
        converted(sources, old)
    with pytest.raises(OutputError, match=r"target exists.*--overwrite"):
        megatron_to_hf(sources.run, old, run=QUICK)
    assert contents(old.parent) == before


def test_an_empty_folder_is_no_obstacle(tmp_path: Path, sources: Sources) -> None:
    (tmp_path / "out" / "target").mkdir(parents=True)
    converted(sources, tmp_path / "out" / "target")
    check_alone(tmp_path / "out" / "target", sources.expected)


def test_overwrite_replaces_at_the_end_only(old: Path, sources: Sources) -> None:
    before, during = contents(old), []

    def report(stage: str, done: int, total: int) -> None:
        during.append(contents(old) == before)

    converted(sources, old, run=options(overwrite=True), report=report)
    assert during
    assert all(during)
    check_alone(old, sources.expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError, OutputError, RuntimeError, MemoryError])
def test_a_failing_overwrite_keeps_the_old(error: type[BaseException], old: Path, sources: Sources) -> None:
    before = contents(old)
    with pytest.raises(error):
        converted(sources, old, run=options(overwrite=True), report=stop_after(20, error))
    assert contents(old) == before
    assert staging_of(old).exists() == (error in (KeyboardInterrupt, OutputError))


def test_a_failing_rename_gives_the_old_back(old: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "content":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    before = contents(old)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        converted(sources, old, run=options(overwrite=True))
    assert contents(old) == before


def test_what_a_kill_between_the_renames_left_is_cleared(old: Path, sources: Sources) -> None:
    old.rename(old.parent / ".target.replaced")
    (old.parent / ".target.partial" / "content").mkdir(parents=True)
    converted(sources, old, run=options(overwrite=True))
    check_alone(old, sources.expected)
    (old.parent / ".target.replaced").mkdir()
    (old.parent / ".target.replaced" / "rest").write_bytes(b"")
    converted(sources, old, run=options(overwrite=True))
    check_alone(old, sources.expected)


# ---------------------------------------------------------------------------------------------- interrupt and resume


def test_resume_goes_on(tmp_path: Path, sources: Sources, filled: list[Key]) -> None:
    target = tmp_path / "target"
    interrupted(sources, target)
    done = journal_of(target)
    assert len(done) >= 10
    filled.clear()
    converted(sources, target, run=options(resume=True))
    assert not done & set(filled)
    check_alone(target, sources.expected)


def test_resume_of_the_other_direction(tmp_path: Path, sources: Sources, filled: list[Key]) -> None:
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        megatron_to_hf(sources.run, target, run=QUICK, report=stop_after(30))
    done = journal_of(target)
    assert len(done) >= 15
    filled.clear()
    megatron_to_hf(sources.run, target, run=options(resume=True))
    assert not done & set(filled)
    assert read_safetensors(target / SINGLE) == read_safetensors(sources.dense / SINGLE)


def test_resume_as_often_as_it_takes(tmp_path: Path, sources: Sources, filled: list[Key]) -> None:
    target = tmp_path / "target"
    interrupted(sources, target, 10)
    for _ in range(50):
        done = journal_of(target)
        try:
            converted(sources, target, run=options(resume=True), report=stop_after(40))
        except KeyboardInterrupt:
            assert journal_of(target) > done
        else:
            break
    check_alone(target, sources.expected)


def test_resume_with_nothing_to_resume(tmp_path: Path, sources: Sources) -> None:
    converted(sources, tmp_path / "target", run=options(resume=True))
    check_alone(tmp_path / "target", sources.expected)


def test_without_resume_all_begins_anew(tmp_path: Path, sources: Sources, filled: list[Key]) -> None:
    staging = interrupted(sources, tmp_path / "target")
    (staging / "content" / "stray").write_bytes(b"")
    filled.clear()
    converted(sources, tmp_path / "target")
    assert len(set(filled)) == len(filled) > 50
    check_alone(tmp_path / "target", sources.expected)


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "another layout": (lambda source: None, {"layout": ParallelLayout(tp=1, pp=2)}),
    "another dtype": (lambda source: None, {"dtype": "fp16"}),
    "another vocabulary": (lambda source: None, {"padded_vocab_size": 128}),
    "another iteration": (lambda source: None, {"iteration": 5}),
    "for another Megatron-Core": (lambda source: None, {"megatron_core": "0.19"}),
    "other weights": (lambda source: make_checkpoint(source, LAYERS, seed=1, overwrite=True), {}),
    "other files, as long": (lambda source: (source / "tokenizer.json").write_text('{"a": 2}'), {}),
    "another config, as long": (
        edit_config(lambda config: config["text_config"].update(max_position_embeddings=2048)),
        {},
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_resume_of_another_conversion_begins_anew(
    change: tuple[Callable[[Path], object], dict[str, Any]], tmp_path: Path, sources: Sources, filled: list[Key]
) -> None:
    source, target = copied(sources.dense, tmp_path / "source" / "dense"), tmp_path / "out" / "target"
    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron(source, target, layout=LAYOUT, run=QUICK, report=stop_after(20))
    change[0](source)
    arguments = {"layout": LAYOUT, **change[1]}
    hf_to_megatron(source, tmp_path / "anew", run=QUICK, **arguments)
    count = len(filled)
    filled.clear()
    hf_to_megatron(source, target, run=options(resume=True), **arguments)
    assert len(filled) > 0
    assert set(filled) == set(filled[:count])
    assert len(set(filled)) > 50
    check_alone(target, contents(tmp_path / "anew"))


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_resume_with_another_config_takes_that_config(spelling: str, tmp_path: Path, sources: Sources) -> None:
    """A config.json is copied, or written anew where its spelling is old; equal length does not make it the same."""
    reference = copied(sources.dense, tmp_path / "reference")
    edit_config(lambda c: c["text_config"].update({spelling: c["text_config"].pop("dtype")}))(reference)
    with pytest.raises(KeyboardInterrupt):
        megatron_to_hf(sources.run, tmp_path / "target", config=reference, run=QUICK, report=stop_after(20))
    edit_config(lambda c: c.update(image_token_id=80))(reference)
    megatron_to_hf(sources.run, tmp_path / "anew", config=reference, run=QUICK)
    megatron_to_hf(sources.run, tmp_path / "target", config=reference, run=options(resume=True))
    assert json.loads((tmp_path / "target" / "config.json").read_text())["image_token_id"] == 80
    assert contents(tmp_path / "target") == contents(tmp_path / "anew")


TORN = [b'["iter_0000000/__0_0.dis', b"\xff\xfe", b"[1]\n", b"null\n", b'["a", "b"', b"\0" * 50]


@pytest.mark.parametrize("torn", TORN, ids=ascii)
def test_a_torn_journal_costs_a_chunk_at_most(torn: bytes, tmp_path: Path, sources: Sources, filled: list[Key]) -> None:
    """A full disk or a power cut leaves half a line, behind which the next run must not write its own."""
    target = tmp_path / "target"
    staging = interrupted(sources, target, 10)
    with (staging / "journal").open("ab") as journal:
        journal.write(torn)
    interrupted(sources, target, 10, run=options(resume=True))
    done = journal_of(target)
    filled.clear()
    converted(sources, target, run=options(resume=True))
    assert len(done) >= 15
    assert not done & set(filled)
    check_alone(target, sources.expected)


DAMAGED_STAGING: dict[str, Callable[[Path], object]] = {
    "no content": lambda staging: (staging / "content").rename(staging / "elsewhere"),
    "empty journal": lambda staging: (staging / "journal").write_text(""),
    "no journal": lambda staging: (staging / "journal").unlink(),
    "another fingerprint": lambda staging: (staging / "journal").write_text("0" * 64 + "\n"),
}


@pytest.mark.parametrize("damage", DAMAGED_STAGING.values(), ids=DAMAGED_STAGING.keys())
def test_a_staging_folder_that_is_not_whole_is_begun_anew(
    damage: Callable[[Path], object], tmp_path: Path, sources: Sources
) -> None:
    damage(interrupted(sources, tmp_path / "target"))
    converted(sources, tmp_path / "target", run=options(resume=True))
    check_alone(tmp_path / "target", sources.expected)


def test_what_a_power_cut_took_is_found_and_not_resumed_from(tmp_path: Path, sources: Sources) -> None:
    """The journal may know of a chunk whose bytes never reached the disk: the check finds out, and all begins anew."""
    target = tmp_path / "target"
    staging = interrupted(sources, target)
    for file in staging.glob("content/*/__*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(OutputError, match="what was read back is not what was written"):
        converted(sources, target, run=options(resume=True))
    assert list(tmp_path.iterdir()) == []
    converted(sources, target, run=options(resume=True))
    check_alone(target, sources.expected)


def test_an_interrupted_make_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    def stop(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "target", LAYERS, progress=stop)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- real processes

SLOW = """
import time
from qwen3vl_convert.cli.app import main
from qwen3vl_convert.fill import Filler

piece = Filler._piece

def slowly(*arguments):
    time.sleep(0.02)
    piece(*arguments)

Filler._piece = slowly
main()
"""
"""The command line, at a speed at which it can be met in the midst of its work."""


def slow_run(source: Path, target: Path) -> "subprocess.Popen[str]":
    """A run that has finished a few chunks and is at work."""
    line = command_line("hf-to-megatron", source, target, "--tp", 2, "--pp", 2, "--no-fsync", program=SLOW)
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=user_environment())
    deadline = time.monotonic() + 60
    while not (staging_of(target) / "journal").exists() or len(journal_of(target)) < 5:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def signalled(sources: Sources, target: Path, number: signal.Signals) -> tuple[int, str]:
    """Exit code and stderr of a run that gets a signal in the midst of its work."""
    process = slow_run(sources.dense, target)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_ctrl_c(tmp_path: Path, sources: Sources) -> None:
    target = tmp_path / "target"
    code, said = signalled(sources, target, signal.SIGINT)
    assert code == 130
    assert said.startswith("error: interrupted\n")
    assert f"is kept in {staging_of(target)}; go on with --resume" in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]
    arguments = ("hf-to-megatron", sources.dense, target, "--tp", 2, "--pp", 2, "--no-fsync", "--resume")
    assert command(*arguments).returncode == 0
    check_alone(target, sources.expected)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_kill(number: signal.Signals, tmp_path: Path, sources: Sources, filled: list[Key]) -> None:
    target = tmp_path / "target"
    code, _ = signalled(sources, target, number)
    assert code == -number
    assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]
    done = journal_of(target)
    converted(sources, target, run=options(resume=True))
    assert done
    assert not done & set(filled)
    check_alone(target, sources.expected)


def test_two_runs_to_one_target(tmp_path: Path, sources: Sources) -> None:
    target, begun, go_on = tmp_path / "target", threading.Event(), threading.Event()

    def report(stage: str, done: int, total: int) -> None:
        begun.set()
        assert go_on.wait(60)

    first = threading.Thread(target=converted, args=(sources, target), kwargs={"report": report})
    first.start()
    try:
        assert begun.wait(60)
        for run in (QUICK, options(resume=True), options(overwrite=True)):
            with pytest.raises(OutputError, match="another run is writing it"):
                converted(sources, target, run=run)
        converted(sources, tmp_path / "another")
    finally:
        go_on.set()
        first.join()
    assert contents(target) == contents(tmp_path / "another") == sources.expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "target"]


# --------------------------------------------------------------------------------------- a disk that is full or bad


def failing_after(count: int, function: Callable[..., Any], code: int) -> Callable[..., Any]:
    """A function that works `count` times and then fails with an errno."""
    calls = iter(range(count))

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise OSError(code, os.strerror(code))
        return function(*args, **kwargs)

    return fail


FULL: dict[str, tuple[Any, str, int]] = {
    "while laying out": (os, "pwrite", 3),
    "while filling": (os, "pwrite", 350),
    "while noting what is done": (seal.Staging, "finished", 10),
    "while copying the auxiliary files": (shutil, "copyfile", 0),
    "while writing the manifest": (Path, "write_text", 1),
    "while syncing": (os, "fsync", 4),
}


@pytest.mark.parametrize("place", FULL.values(), ids=FULL.keys())
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_a_full_disk(
    place: tuple[Any, str, int], code: int, tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, count = place
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing_after(count, getattr(owner, name), code))
        with pytest.raises(OutputError) as caught:
            converted(sources, target, run=options(fsync=True))
    assert os.strerror(code) in str(caught.value)
    assert "--resume" in caught.value.__notes__[0]
    assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]
    converted(sources, target, run=options(resume=True))
    check_alone(target, sources.expected)


def test_a_disk_that_is_too_small_is_told_at_once(
    tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nothing)
    for run in (lambda: converted(sources, tmp_path / "t"), lambda: megatron_to_hf(sources.run, tmp_path / "t")):
        with pytest.raises(OutputError, match=r"B are needed and 1 kB are free"):
            run()
    assert list(tmp_path.iterdir()) == []
    dry = hf_to_megatron(sources.dense, tmp_path / "t", run=options(dry_run=True))
    assert dry.free_bytes == 1000 < dry.total_bytes


def test_what_is_staged_already_needs_no_space_again(
    tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = interrupted(sources, tmp_path / "target", 60)
    staged = sum(path.lstat().st_blocks * 512 for path in staging.rglob("*"))
    total = sum(path.stat().st_size for path in sources.run.rglob("*") if path.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": total - staged // 2})())
    converted(sources, tmp_path / "target", run=options(resume=True))
    check_alone(tmp_path / "target", sources.expected)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


FLIPS: dict[str, tuple[str, str, float]] = {
    "the first file's data": ("megatron", f"{ITERATION}/__0_0.distcp", 0.5),
    "the last file's data": ("megatron", f"{ITERATION}/__3_0.distcp", 0.5),
    "a blob's head": ("megatron", f"{ITERATION}/__3_0.distcp", 0.0),
    "a blob's tail": ("megatron", f"{ITERATION}/__3_0.distcp", -1),
    ".metadata": ("megatron", f"{ITERATION}/.metadata", 0.3),
    "common.pt": ("megatron", f"{ITERATION}/common.pt", 0.3),
    "the tracker": ("megatron", "latest_checkpointed_iteration.txt", 0.0),
    "a file that travels along": ("megatron", f"{ITERATION}/hf/tokenizer.json", 0.5),
    "weights": ("hf", SINGLE, 0.5),
    "the last weight": ("hf", SINGLE, -1),
    "the header": ("hf", SINGLE, 0.001),
    "config.json": ("hf", "config.json", 0.5),
    "tokenizer.json": ("hf", "tokenizer.json", 0.5),
}


@pytest.mark.parametrize("place", FLIPS.values(), ids=FLIPS.keys())
def test_a_flipped_bit_is_caught_before_publishing(
    place: tuple[str, str, float], tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    to, name, part = place
    check = seal.check_written

    def flipped(plan: Any, folder: Path, *rest: Any) -> None:
        path = folder / name
        flip(path, -1 if part < 0 else int(path.stat().st_size * part))
        check(plan, folder, *rest)

    monkeypatch.setattr(convert, "check_written", flipped)
    run = partial(converted, sources) if to == "megatron" else partial(megatron_to_hf, sources.run, run=QUICK)
    with pytest.raises(OutputError, match=r"Is the disk sound\? Convert again"):
        run(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_shrank_is_caught_before_publishing(
    tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = seal.check_written

    def shrunk(plan: Any, folder: Path, *rest: Any) -> None:
        os.truncate(folder / ITERATION / "__1_0.distcp", 1000)
        check(plan, folder, *rest)

    monkeypatch.setattr(convert, "check_written", shrunk)
    with pytest.raises(OutputError, match=r"__1_0.distcp: 1000 bytes were written, expected"):
        converted(sources, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- a source that changes meanwhile

MEANWHILE: dict[str, tuple[Callable[[Path], object], type[ConvertError]]] = {
    "cut short": (lambda file: os.truncate(file, file.stat().st_size // 2), CorruptFile),
    "cut to a header": (lambda file: os.truncate(file, 100), CorruptFile),
    "emptied": (lambda file: os.truncate(file, 0), CorruptFile),
    "removed": (lambda file: file.unlink(), CorruptFile),
}


@pytest.mark.parametrize("change", MEANWHILE.values(), ids=MEANWHILE.keys())
@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_a_source_that_is_damaged_after_planning(
    change: tuple[Callable[[Path], object], type[ConvertError]], to: str, tmp_path: Path, sources: Sources
) -> None:
    damage, error = change
    if to == "megatron":
        source = copied(sources.dense, tmp_path / "source")
        planned = plan_hf_to_megatron(Resolved(source, None, None), MegatronOptions(LAYOUT))
        file = source / SINGLE
    else:
        source = copied(sources.run, tmp_path / "source")
        planned = plan_megatron_to_hf(source)
        file = source / ITERATION / "__2_0.distcp"
    damage(file)
    with pytest.raises(error, match=file.name):
        convert.carry_out(planned, tmp_path / "target", QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_cut_short_while_it_is_read(tmp_path: Path, sources: Sources) -> None:
    """An error, or SIGBUS where the file was mapped at that very moment: in no case a target."""
    source = copied(sources.dense, tmp_path / "source")
    process = slow_run(source, tmp_path / "out" / "target")
    os.truncate(source / SINGLE, 100)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (3, -signal.SIGBUS)
    assert process.returncode != 3 or f"{SINGLE}: " in said
    assert not (tmp_path / "out" / "target").exists()


WHILE_READ: dict[str, Callable[[Path], object]] = {
    "rewritten weights": lambda source: flip(source / SINGLE, -1),
    "a rewritten tokenizer": lambda source: (source / "tokenizer.json").write_text("{}"),
    "a tokenizer that is gone": lambda source: (source / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("change", WHILE_READ.values(), ids=WHILE_READ.keys())
def test_a_source_that_changes_while_it_is_read(
    change: Callable[[Path], object], tmp_path: Path, sources: Sources
) -> None:
    """Half of the old weights and half of the new would look fine, and be wrong."""
    source = copied(sources.dense, tmp_path / "source")
    changes = iter([lambda: change(source)])

    def report(stage: str, done: int, total: int) -> None:
        next(changes, lambda: None)()

    with pytest.raises(InputError, match="source: was changed while it was read"):
        hf_to_megatron(source, tmp_path / "target", run=QUICK, report=report)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --------------------------------------------------------------------------------------------------- determinism

WORKERS = [(1, 10**9, 8 << 20), (2, 10**9, 1000), (5, 10**9, 4096), (5, 6 << 20, 1 << 20)]
"""Threads, most memory in bytes, and bytes per piece; tensors this small make one piece unless pieces are smaller."""

LAYOUTS = {
    "dense": [{}, {"tp": 2, "pp": 2}, {"tp": 4}, {"pp": 2, "vpp": 2}, {"pp": 2, "first_stage_layers": 1}],
    "moe": [{}, {"ep": 4, "etp": 2}, {"tp": 2, "pp": 2, "ep": 2}],
}
BOTH = [(kind, layout) for kind, layouts in LAYOUTS.items() for layout in layouts]


def fill_options(workers: int, memory: int, piece: int, patch: pytest.MonkeyPatch) -> RunOptions:
    patch.setattr(fill, "_MOST_PIECE", piece)
    return options(fill=FillOptions(workers=workers, max_memory=memory))


@pytest.mark.parametrize(("kind", "layout"), BOTH, ids=[f"{k} {ParallelLayout(**s)}" for k, s in BOTH])
def test_the_same_bytes_for_any_workers_and_memory(
    kind: str, layout: dict[str, int], tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Path = getattr(sources, kind)
    there, back = [], []
    for number, how in enumerate(WORKERS):
        run = fill_options(*how, monkeypatch)
        target = tmp_path / str(number) / "run"
        hf_to_megatron(source, target, layout=ParallelLayout(**layout), run=run)
        there.append(contents(target))
        megatron_to_hf(target, tmp_path / str(number) / "back", run=run)
        back.append(contents(tmp_path / str(number) / "back"))
    assert there.count(there[0]) == back.count(back[0]) == len(WORKERS)
    assert read_safetensors(tmp_path / "0" / "back" / SINGLE) == read_safetensors(source / SINGLE)


@pytest.mark.parametrize("experts_layout", ["hub", "v5", "per-expert"])
def test_the_same_bytes_for_any_layout_of_experts(
    experts_layout: str, tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    hf_to_megatron(sources.moe, run, layout=ParallelLayout(ep=2), run=QUICK)
    found, again = [], []
    for number, how in enumerate(WORKERS):
        folder, how_run = tmp_path / f"hf{number}" / "same", fill_options(*how, monkeypatch)
        megatron_to_hf(run, folder, experts_layout=experts_layout, run=how_run)
        found.append(contents(folder))
        hf_to_megatron(folder, tmp_path / f"again{number}", layout=ParallelLayout(ep=2), run=how_run)
        again.append({n: h for n, h in contents(tmp_path / f"again{number}").items() if n.endswith(".distcp")})
    assert found.count(found[0]) == len(WORKERS)
    assert again == [{n: h for n, h in contents(run).items() if n.endswith(".distcp")}] * len(WORKERS)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_same_bytes_of_another_dtype(
    dtype: str, tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for number, how in enumerate(WORKERS):
        hf_to_megatron(sources.moe, tmp_path / str(number), dtype=dtype, run=fill_options(*how, monkeypatch))
        found.append(contents(tmp_path / str(number)))
    assert found.count(found[0]) == len(WORKERS)


# -------------------------------------------------------------------------------------------------- unusual paths

NAMES = ["with space", "Zielordner für Größe", "模型", "a.b..c", "-dash", "%s {x} 'q' \"", ".hidden", "x" * 200]


@pytest.mark.parametrize("name", NAMES)
def test_unusual_names(name: str, tmp_path: Path, sources: Sources) -> None:
    source = copied(sources.dense, tmp_path / "sources" / name)
    hf_to_megatron(source, tmp_path / "out" / name, layout=LAYOUT, run=QUICK)
    megatron_to_hf(tmp_path / "out" / name, tmp_path / "back" / name, run=QUICK)
    assert read_safetensors(tmp_path / "back" / name / SINGLE) == read_safetensors(sources.dense / SINGLE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize("target", ["out", "./out", "out/", "deep/er/out", "sub/../out", "../here/out", "."])
def test_relative_paths(target: str, tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "sub").mkdir(parents=True)
    empty = target == "."
    here = tmp_path / "here" / "sub" if empty else tmp_path / "here"
    monkeypatch.chdir(here)
    hf_to_megatron(os.path.relpath(sources.dense), target, layout=LAYOUT, run=QUICK)
    monkeypatch.chdir(tmp_path)
    assert contents(here / target) == sources.expected
    assert not list(tmp_path.rglob("*.partial"))


def test_a_name_that_is_too_long(tmp_path: Path, sources: Sources) -> None:
    with pytest.raises(OutputError, match=r"cannot be created: File name too long"):
        converted(sources, tmp_path / ("x" * 250))
    assert list(tmp_path.iterdir()) == []


LINKS: dict[str, Callable[[Path], object]] = {
    "to a folder": lambda at: (at / "real").mkdir(),
    "to a full folder": lambda at: (at / "real" / "precious").mkdir(parents=True),
    "to a file": lambda at: (at / "real").write_bytes(b"x"),
    "to nothing": lambda at: None,
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("prepare", LINKS.values(), ids=LINKS.keys())
def test_a_target_that_is_a_link(
    prepare: Callable[[Path], object], overwrite: bool, tmp_path: Path, sources: Sources
) -> None:
    prepare(tmp_path)
    (tmp_path / "target").symlink_to("real")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"target (exists|is a link)"):
        converted(sources, tmp_path / "target", run=options(overwrite=overwrite))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_target_that_is_a_file(overwrite: bool, tmp_path: Path, sources: Sources) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"target (exists|is not a folder)"):
        converted(sources, tmp_path / "target", run=options(overwrite=overwrite))
    assert contents(tmp_path).keys() == {"target"}
    assert (tmp_path / "target").read_bytes() == b"precious"


def test_a_target_below_a_link(tmp_path: Path, sources: Sources) -> None:
    """Where there are links on the way, the staging folder lies beside the target, on its filesystem."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    converted(sources, tmp_path / "link" / "target")
    check_alone(tmp_path / "real" / "target", sources.expected)


def test_a_target_in_the_source(tmp_path: Path, sources: Sources) -> None:
    """Allowed: it adds to the folder, and harms nothing that is there."""
    source = copied(sources.dense, tmp_path / "source")
    before = contents(source)
    hf_to_megatron(source, source / "megatron", run=QUICK)
    after = contents(source)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"megatron"}


OWN: dict[str, tuple[str, str]] = {
    "a folder onto itself": ("hf", "."),
    "a folder onto its parent": ("hf", ".."),
    "a run onto itself": ("run", "."),
    "a run onto its iteration": ("run", ITERATION),
    "a run onto its parent": ("run", ".."),
}


@pytest.mark.parametrize("case", OWN.values(), ids=OWN.keys())
def test_overwrite_does_not_remove_the_source(case: tuple[str, str], tmp_path: Path, sources: Sources) -> None:
    kind, where = case
    source = copied(sources.dense if kind == "hf" else sources.run, tmp_path / "parent" / "source")
    before = contents(tmp_path)
    run = hf_to_megatron if kind == "hf" else megatron_to_hf
    with pytest.raises(UsageError, match="which is to be converted"):
        run(source, source / where, run=options(overwrite=True))
    assert contents(tmp_path) == before


def test_overwrite_does_not_remove_what_config_names(tmp_path: Path, sources: Sources) -> None:
    reference = copied(sources.dense, tmp_path / "reference")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="which is to be converted"):
        megatron_to_hf(sources.run, reference, config=reference, run=options(overwrite=True))
    assert contents(tmp_path) == before


# --------------------------------------------------------------------------------------------------- permissions


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody but root may write into."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_is_read_only(locked: Path, sources: Sources) -> None:
    with pytest.raises(OutputError, match=r"cannot be created: Permission denied"):
        converted(sources, locked / "target")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_parent_that_refuses(code: int, tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", failing_after(0, os.mkdir, code))
    with pytest.raises(OutputError, match=rf"target: cannot be created: {os.strerror(code)}"):
        converted(sources, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file(tmp_path: Path, sources: Sources) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be created"):
        converted(sources, tmp_path / "file" / "target")


def test_a_read_only_source(tmp_path: Path, sources: Sources) -> None:
    source, run = copied(sources.dense, tmp_path / "dense"), copied(sources.run, tmp_path / "run")
    everything = [path for folder in (source, run) for path in (folder, *folder.rglob("*"))]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        hf_to_megatron(source, tmp_path / "there", layout=LAYOUT, run=QUICK)
        megatron_to_hf(run, tmp_path / "back", run=QUICK)
        megatron_to_hf(run, tmp_path / "back", run=options(overwrite=True))
    finally:
        for path in everything:
            path.chmod(0o755)
    assert contents(tmp_path / "there") == sources.expected
    assert os.access(tmp_path / "back" / "tokenizer.json", os.W_OK)


# ----------------------------------------------------------------------------------------------------- the Hub cache


def test_a_snapshot_of_the_hub_cache(tmp_path: Path, sources: Sources) -> None:
    """All files are links to blobs; the target has files of its own."""
    repo = tmp_path / "models--org--name"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    snapshot.mkdir(parents=True)
    copied(sources.dense, tmp_path / "dense").rename(blobs)
    for file in list(blobs.iterdir()):
        blob = file.rename(blobs / f"{hash(file.name):x}")
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    before = contents(repo)
    hf_to_megatron(snapshot, tmp_path / "target", layout=LAYOUT, run=QUICK)
    megatron_to_hf(tmp_path / "target", tmp_path / "back", config=snapshot, run=QUICK)
    assert contents(repo) == before
    files = {name: what for name, what in contents(tmp_path / "target").items() if "qwen3vl_convert" not in name}
    assert files == {name: what for name, what in sources.expected.items() if "qwen3vl_convert" not in name}
    assert not any(path.is_symlink() for path in (tmp_path / "back").iterdir())
