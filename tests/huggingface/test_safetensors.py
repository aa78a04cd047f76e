"""The header's reader and writer against the safetensors library, and against files that lie."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from qwen3vl_convert.errors import CorruptFile, InputError
from qwen3vl_convert.huggingface.safetensors import Entry, file_order, header_bytes, read_header
from qwen3vl_convert.storage import DTYPES
from recorded import HUGGINGFACE

WIDE = ("uint16", "uint32", "uint64", "complex64", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz")
NAMES = ("a", "a.10", "a.2", "B", 'quote"back\\slash', "tab\tline\n\x01", "ü€😀", "model.layers.0.weight", "\x7f/")


def tensors_of(entries: list[Entry]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in entries}


@pytest.mark.parametrize("seed", range(40))
def test_bytes_are_the_librarys(seed: int) -> None:
    chance = random.Random(seed)
    names = chance.sample(NAMES, chance.randint(1, len(NAMES)))
    shapes = [tuple(chance.randint(0, 3) for _ in range(chance.randint(0, 4))) for _ in names]
    entries = [(name, chance.choice([*DTYPES, *WIDE]), shape) for name, shape in zip(names, shapes, strict=True)]
    expected = save(tensors_of(entries), metadata={"format": "pt"})
    header = header_bytes(entries)
    assert header == expected[: len(header)]
    assert len(header) % 8 == 0
    assert len(expected) - len(header) == sum(tensor.nbytes for tensor in tensors_of(entries).values())


def test_bytes_of_nothing_and_of_no_metadata() -> None:
    assert header_bytes([]) == save({}, metadata={"format": "pt"})
    assert save({"a": torch.zeros(1)}).startswith(header_bytes([("a", "float32", (1,))], metadata={}))


@pytest.mark.parametrize("seed", range(10))
def test_reads_what_the_library_writes(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    entries = [(name, chance.choice([*DTYPES, *WIDE]), (chance.randint(0, 3), 2)) for name in NAMES]
    tensors = {name: torch.randint(0, 255, (shape[0] * 2 * 8,), dtype=torch.uint8) for name, _, shape in entries}
    for name, dtype, shape in entries:
        real = getattr(torch, dtype)
        bits = tensors[name][: real.itemsize * shape[0] * 2]
        tensors[name] = (bits % 2 == 0).view(shape) if real is torch.bool else bits.view(real).view(shape)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "by": "ü"})
    header = read_header(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert header.metadata == {"format": "pt", "by": "ü"}
    assert list(header.tensors) == [name for name, _, _ in file_order(entries)]
    for name, dtype, shape in entries:
        found = header.tensors[name]
        assert (found.dtype, found.shape) == (dtype, shape)
        assert raw[found.start : found.stop] == tensors[name].contiguous().view(torch.uint8).numpy().tobytes()


def test_packed_floats_of_four_bits(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, file)
    entry = read_header(file).tensors["a"]
    assert (entry.dtype, entry.shape, entry.stop - entry.start) == ("float4_e2m1fn_x2", (16,), 8)


@pytest.mark.parametrize(
    "file", sorted(HUGGINGFACE.rglob("*.safetensors")), ids=lambda file: f"{file.parent.name}/{file.name}"
)
def test_golden_files(file: Path) -> None:
    header = read_header(file)
    raw = file.read_bytes()
    with safe_open(file, "pt") as library:
        assert set(library.keys()) == set(header.tensors)
        for name, entry in header.tensors.items():
            tensor = library.get_tensor(name)
            assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{entry.dtype}", entry.shape)
            assert raw[entry.start : entry.stop] == tensor.view(torch.uint8).numpy().tobytes()
    entries = [(name, entry.dtype, entry.shape) for name, entry in header.tensors.items()]
    assert raw.startswith(header_bytes(reversed(entries)))


# --- files that lie; "also the library" says that it refuses them too

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(table: Any, data: int = 8, length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def with_entry(**changes: Any) -> dict[str, Any]:
    return {"w": {**GOOD, **changes}}


HOSTILE = {
    "empty": (b"", "expected a header of 0 bytes in a file of 0: it is cut short"),
    "seven bytes": (bytes(7), "in a file of 7: it is cut short"),
    "length beyond the file": (raw_file({"w": GOOD}, length=10**15), "expected a header of 1000000000000000 bytes"),
    "length of all ones": (b"\xff" * 16, "it is cut short"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer.*git lfs pull"),
    "no json": (raw_file(b"nonsense"), "header: expected a JSON object in UTF-8"),
    "no utf-8": (raw_file(b'{"\xff": 1}'), "header: expected a JSON object in UTF-8"),
    "a list": (raw_file([GOOD]), "expected a JSON object, found list"),
    "deep": (raw_file(b'{"a":' * 50_000), "expected a JSON object in UTF-8"),
    "tensor twice": (raw_file(b'{"w": %s, "w": %s}' % ((json.dumps(GOOD).encode(),) * 2)), "'w' stands twice"),
    "key twice": (raw_file(b'{"w": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' stands twice"),
    "metadata no text": (raw_file({"__metadata__": {"format": 1}, "w": GOOD}), "__metadata__: expected text"),
    "metadata a list": (raw_file({"__metadata__": [], "w": GOOD}), "__metadata__: expected text"),
    "tensor no object": (raw_file({"w": 3}), "w: expected dtype, shape and data_offsets, found 3"),
    "no dtype": (raw_file({"w": {"shape": [2], "data_offsets": [0, 8]}}), "w: expected dtype, shape"),
    "unknown dtype": (raw_file(with_entry(dtype="F31")), "w: expected a dtype that safetensors knows, found 'F31'"),
    "dtype no text": (raw_file(with_entry(dtype=["F32"])), r"w: expected a dtype .* found \['F32'\]"),
    "shape of floats": (raw_file(with_entry(shape=[2.0])), "w: expected a shape of whole numbers"),
    "shape of bools": (raw_file(with_entry(shape=[True, 2])), "w: expected a shape of whole numbers"),
    "negative shape": (raw_file(with_entry(shape=[-2])), "w: expected a shape of whole numbers"),
    "two negatives": (raw_file(with_entry(shape=[-2, -1])), "w: expected a shape of whole numbers"),
    "huge dimension": (raw_file(with_entry(shape=[2**64])), "w: expected a shape of whole numbers"),
    "overflowing product": (raw_file(with_entry(shape=[2**62, 4])), r"needs \d+ bytes, but its data_offsets"),
    "three offsets": (raw_file(with_entry(data_offsets=[0, 8, 8])), "w: expected two data_offsets"),
    "offsets no numbers": (raw_file(with_entry(data_offsets=["0", "8"])), "w: expected two data_offsets"),
    "backward offsets": (raw_file(with_entry(data_offsets=[8, 0])), r"but its data_offsets \[8, 0\] hold -8"),
    "wrong length": (
        raw_file(with_entry(shape=[3])),
        r"F32 \(3,\) needs 12 bytes, but its data_offsets \[0, 8\] hold 8",
    ),
    "half a byte": (raw_file(with_entry(dtype="F4", shape=[15])), r"needs 7.5 bytes"),
    "cut short": (raw_file({"w": GOOD}, data=7), "found 76: it is cut short"),
    "too long": (raw_file({"w": GOOD}, data=9), "found 78: there are bytes that no tensor claims"),
    "hole at the start": (raw_file(with_entry(data_offsets=[8, 16]), 16), "w: leaves a hole after the header"),
    "hole": (
        raw_file({"w": GOOD, "z": {**GOOD, "data_offsets": [16, 24]}}, 24),
        "z: leaves a hole after w: it starts at byte 148, expected 140",
    ),
    "overlap": (
        raw_file({"w": GOOD, "z": {**GOOD, "data_offsets": [4, 12]}}, 12),
        "z: overlaps w: it starts at byte",
    ),
    "the same bytes twice": (raw_file({"w": GOOD, "z": GOOD}), "z: overlaps w"),
}
STRICTER_THAN_THE_LIBRARY = {"tensor twice", "key twice", "shape of bools"}


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses(case: str, tmp_path: Path) -> None:
    raw, message = HOSTILE[case]
    file = tmp_path / "bad.safetensors"
    file.write_bytes(raw)
    with pytest.raises(CorruptFile, match=f"bad.safetensors: {message}|bad.safetensors: .*{message}"):
        read_header(file)
    if case not in STRICTER_THAN_THE_LIBRARY:
        with pytest.raises(SafetensorError), safe_open(file, "pt"):
            pass


def test_refuses_a_header_longer_than_the_format_allows(tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    with file.open("wb") as out:
        out.write(struct.pack("<Q", 100_000_001))
        out.truncate(200_000_000)  # a sparse file: nothing of it is read
    with pytest.raises(CorruptFile, match="expected a header of at most 100000000 bytes, found 100000001"):
        read_header(file)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: cannot be read .No such file"):
        read_header(tmp_path / "absent")
    with pytest.raises(InputError, match=r"cannot be read .Is a directory"):
        read_header(tmp_path)


def test_our_dtypes_are_the_librarys() -> None:
    for name, dtype in DTYPES.items():
        header = header_bytes([("w", name, (3,))])
        stop = 3 * dtype.itemsize
        assert f'"dtype":"{dtype.safetensors}","shape":[3],"data_offsets":[0,{stop}]'.encode() in header
