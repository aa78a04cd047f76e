"""torch.save archives written and read without torch, against torch itself and the golden checkpoints."""

import argparse
import io
import os
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qwen3vl_convert.errors import CorruptFile, InputError, UnsafeFile, UnsupportedFormat
from qwen3vl_convert.megatron.blob import (
    TensorBlob,
    TensorValue,
    object_blob,
    read_object_blob,
    read_tensor_blob,
    tensor_blob,
)
from qwen3vl_convert.megatron.metadata import Metadata, read_metadata
from qwen3vl_convert.megatron.pickled import Global, Instance, PersistentId, Reduce, encode
from qwen3vl_convert.storage import DTYPES

SHAPES = [(), (0,), (3, 0, 2), (1,), (3,), (2, 3), (1, 1, 64, 60), (1, 300, 70), (65536, 1), (1, 2, 1, 2, 1, 2, 1)]
GIB4 = 1 << 32


def random_tensor(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits, so also NaNs; a bool has only two values."""
    generator = torch.Generator().manual_seed(0)
    count = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    bits = torch.randint(2 if dtype == "bool" else 256, (count,), generator=generator, dtype=torch.uint8)
    return bits.view(getattr(torch, dtype)).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def saved(value: object) -> bytes:
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


def loaded(data: bytes) -> object:
    return torch.load(io.BytesIO(data), weights_only=True)


def without_id(blob: bytes) -> bytes:
    """`blob` (or its tail) with our zeros for its random part: the serialization id, and its CRC in both places."""
    found = re.search(rb"([0-9]{40})PK\x07\x08", blob)
    assert found is not None
    crc, ours = (zlib.crc32(digits).to_bytes(4, "little") for digits in (found[1], b"0" * 40))
    return blob.replace(found[1], b"0" * 40).replace(crc, ours)


def whole(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    blob = tensor_blob(dtype, shape)
    return blob.head + data + blob.tail(zlib.crc32(data))


def objects(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def read(data: bytes, length: int | None = None) -> TensorBlob:
    return read_tensor_blob(io.BytesIO(data), 0, len(data) if length is None else length, "the file")


# Tensors, written.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_blob_is_what_torch_writes(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(dtype, shape)
    blob, written = tensor_blob(dtype, shape), whole(dtype, shape, bits(tensor))
    assert written == without_id(saved(tensor))
    assert (len(written), blob.nbytes, blob.tail_size) == (blob.size, len(bits(tensor)), len(blob.tail(1)))
    assert len(blob.head) % 64 == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_zipfile_accept_a_tensor_blob(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(dtype, shape)
    written = whole(dtype, shape, bits(tensor))
    back = loaded(written)
    assert isinstance(back, torch.Tensor)
    assert (back.dtype, back.shape, bits(back)) == (tensor.dtype, tensor.shape, bits(tensor))
    with zipfile.ZipFile(io.BytesIO(written)) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("elements", [GIB4 // 2 - 1000, GIB4 // 2 - 200, GIB4 // 2 - 1, GIB4 // 2, GIB4 + 5])
def test_blobs_of_four_gib_and_more(elements: int, tmp_path: Path) -> None:
    """Around 4 GiB the archive turns to zip64 in steps; the files are sparse and take no space."""
    theirs, ours = tmp_path / "archive.pt", tmp_path / "ours"
    with torch.serialization.skip_data():
        torch.save(torch.empty(elements, dtype=torch.bfloat16), theirs)
    blob = tensor_blob("bfloat16", (elements,))
    with ours.open("wb") as file:
        file.write(blob.head)
        file.seek(blob.nbytes, os.SEEK_CUR)
        file.write(blob.tail(0))
    assert ours.stat().st_size == theirs.stat().st_size == blob.size
    with theirs.open("rb") as file:
        assert file.read(len(blob.head)) == blob.head
        file.seek(blob.nbytes, os.SEEK_CUR)
        tail = file.read()
        assert without_id(tail) == blob.tail(0)
        assert read_tensor_blob(file, 0, blob.size, "here").data_start == len(blob.head)
    mapped = torch.load(ours, mmap=True, weights_only=True)
    assert mapped.shape == (elements,)
    with zipfile.ZipFile(ours) as archive:
        assert archive.getinfo("archive/data/0").file_size == 2 * elements


# Objects, written.

OBJECTS = {
    "None": [None],
    "dict": {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {"singleton_local_shards": False}},
    "list of dict": [{"a": [1, 2, (3,)], "b": OrderedDict(c=None)}],
    "text": "ü",
}


@pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS)
def test_an_object_blob_is_what_torch_writes(value: object) -> None:
    written = object_blob(value)
    assert written == without_id(saved(value))
    assert loaded(written) == value
    assert read_object_blob(written, "here") == value
    assert read_object_blob(saved(value), "here") == value


def train_state() -> dict[str, tuple[TensorValue, torch.Tensor]]:
    values = {
        "step": torch.tensor(7),
        "flops": torch.tensor(1.5, dtype=torch.float32),
        "do_train": torch.tensor(True),
        "list": torch.tensor([1, 2, 3], dtype=torch.int32),
        "empty": torch.tensor([], dtype=torch.uint8),
        "fp8": torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn),
    }
    return {
        name: (TensorValue(str(value.dtype).removeprefix("torch."), tuple(value.shape), bits(value)), value)
        for name, value in values.items()
    }


def test_a_dict_of_tensors_is_what_torch_writes() -> None:
    ours = {name: value for name, (value, _) in train_state().items()}
    theirs = {name: value for name, (_, value) in train_state().items()}
    written = object_blob(ours)
    assert written == without_id(saved(theirs))
    assert read_object_blob(written, "here") == read_object_blob(saved(theirs), "here") == ours
    back = loaded(written)
    assert isinstance(back, dict)
    assert {name: (value.dtype, value.shape, bits(value)) for name, value in back.items()} == {
        name: (value.dtype, value.shape, bits(value)) for name, value in theirs.items()
    }


def test_tensors_anywhere_in_a_value() -> None:
    one = TensorValue("int64", (), bytes(8))
    value = [(one, OrderedDict(a=one)), Instance(Global("argparse", "Namespace"), {"b": [one]})]
    pair, namespace = objects(read_object_blob(object_blob(value), "here"))
    assert isinstance(namespace, Instance)
    assert pair == (one, OrderedDict(a=one))
    assert namespace.state == {"b": [one]}


def test_a_namespace_loads_as_argparse_namespace() -> None:
    written = object_blob([{"args": Instance(Global("argparse", "Namespace"), {"tensor_model_parallel_size": 2})}])
    torch.serialization.add_safe_globals([argparse.Namespace])  # as Megatron-Core does; a context would take it away
    assert loaded(written) == [{"args": argparse.Namespace(tensor_model_parallel_size=2)}]


def test_a_tensor_value_of_the_wrong_size_is_not_written() -> None:
    with pytest.raises(ValueError, match="7 bytes"):
        object_blob(TensorValue("int64", (), bytes(7)))


def test_equal_values_give_equal_bytes() -> None:
    assert object_blob({"a": [1, "b"]}) == object_blob({"a": [1, "b"]})


# Read.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_is_found_within_a_file(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = random_tensor(dtype, shape)
    blob = saved(tensor)
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(b"before" + blob + b"after")
    with path.open("rb") as file:
        by_descriptor = read_tensor_blob(file.fileno(), 6, len(blob), "here")
        assert by_descriptor == read_tensor_blob(file, 6, len(blob), "here")
    start, nbytes = by_descriptor.data_start, by_descriptor.nbytes
    assert (by_descriptor.dtype, by_descriptor.shape) == (dtype, shape)
    assert path.read_bytes()[start : start + nbytes] == bits(tensor)


def test_a_view_into_a_larger_storage_is_found() -> None:
    tensor = torch.arange(60, dtype=torch.int32).reshape(5, 3, 4)[2:4]
    data = saved(tensor)
    found = read(data)
    assert data[found.data_start : found.data_start + found.nbytes] == bits(tensor)


def test_strides_of_single_elements_do_not_matter() -> None:
    tensor = torch.arange(6).reshape(2, 3).as_strided((1, 2, 1, 3), (77, 3, 99, 1))
    assert read(saved(tensor)).shape == (1, 2, 1, 3)


@pytest.mark.parametrize("tensor", [torch.zeros(3, 4).t(), torch.zeros(3, 4)[:, 1:], torch.zeros(1).expand(5)])
def test_tensors_that_are_not_contiguous_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(UnsupportedFormat, match=r"^the file: blob at byte 0: .* strides"):
        read(saved(tensor))
    (record,) = objects(read_object_blob(saved([tensor]), "here"))
    assert isinstance(record, Reduce)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.float8_e4m3fnuz])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedFormat, match="expected one of float64"):
        read(saved(torch.zeros(2, dtype=dtype)))


@pytest.mark.parametrize("value", [[torch.zeros(1)], None, torch.nn.Parameter(torch.zeros(1))])
def test_a_chunk_must_be_one_tensor(value: object) -> None:
    with pytest.raises(UnsupportedFormat, match="something else than one tensor"):
        read(saved(value))


DATA_PKL = zipfile.ZipFile(io.BytesIO(saved(torch.arange(3.0)))).read("archive/data.pkl")
OLD = {"data.pkl": DATA_PKL, "byteorder": b"little", "data/0": bits(torch.arange(3.0)), "version": b"3\n"}


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED, name: str = "archive") -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", method) as made:
        for member, data in members.items():
            made.writestr(f"{name}/{member}", data)
    return file.getvalue()


@pytest.mark.parametrize("name", ["archive", "chunk_7", "ü"])
@pytest.mark.parametrize("missing", [(), ("byteorder",), ("version",)])
def test_archives_of_older_torch(missing: tuple[str, ...], name: str) -> None:
    """2.6 has no .format_version and no alignment, 2.0 no byteorder; a path given to torch.save names the archive."""
    data = archive({key: value for key, value in OLD.items() if key not in missing}, name=name)
    found = read(data)
    assert data[found.data_start : found.data_start + found.nbytes] == OLD["data/0"]


def test_big_endian_is_refused() -> None:
    with pytest.raises(UnsupportedFormat, match="byte order b'big'"):
        read(archive({**OLD, "byteorder": b"big"}))


# Golden checkpoints.


@pytest.fixture(scope="module")
def checkpoints(golden_megatron: Path) -> dict[Path, Metadata]:
    folders = sorted(path.parent for path in golden_megatron.glob("*/iter_*/.metadata"))
    assert len(folders) >= 7
    return {folder: read_metadata(folder / ".metadata") for folder in folders}


def test_golden_tensors(checkpoints: dict[Path, Metadata]) -> None:
    """Every blob: found where torch finds it, and written by us as Megatron wrote it."""
    for folder, metadata in checkpoints.items():
        files = {path.name: path.read_bytes() for path in folder.glob("*.distcp")}
        for tensor in metadata.tensors.values():
            for chunk in tensor.chunks:
                blob = files[chunk.relative_path][chunk.offset : chunk.offset + chunk.length]
                found, expected = read(blob), loaded(blob)
                assert isinstance(expected, torch.Tensor)
                data = blob[found.data_start : found.data_start + found.nbytes]
                assert data == bits(expected)
                assert (found.dtype, found.shape) == (tensor.dtype, chunk.sizes)
                assert whole(found.dtype, found.shape, data) == without_id(blob)


def test_golden_objects(checkpoints: dict[Path, Metadata]) -> None:
    for folder, metadata in checkpoints.items():
        for entry in metadata.objects.values():
            file = (folder / entry.relative_path).read_bytes()
            blob = file[entry.offset : entry.offset + entry.length]
            value = read_object_blob(blob, "here")
            assert object_blob(value) == without_id(blob)


def test_golden_train_state(checkpoints: dict[Path, Metadata]) -> None:
    for folder in checkpoints:
        data = (folder / "train_state.pt").read_bytes()
        state = read_object_blob(data, "here")
        assert isinstance(state, dict)
        assert state["step"] == TensorValue("int64", (), bytes(8))
        # torch.save to a path names the archive after the file; ours is always "archive".
        ours, theirs = loaded(object_blob(state)), loaded(data)
        assert ours == theirs


# Attacks.


class Payload:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.makedirs, (self.folder,)


@pytest.mark.parametrize("wrap", [lambda payload: payload, lambda payload: [payload], lambda payload: {"a": payload}])
def test_payloads_do_not_run(wrap: object, tmp_path: Path) -> None:
    assert callable(wrap)
    marker = tmp_path / "marker"
    blob = saved(wrap(Payload(str(marker))))
    with pytest.raises(UnsafeFile, match=r"^the file: blob at byte 0: .*makedirs"):
        read(blob)
    with pytest.raises(UnsafeFile, match=r"^the file: .*makedirs.*Nothing was executed"):
        read_object_blob(blob, "the file")
    assert not marker.exists()
    pickle.loads(zipfile.ZipFile(io.BytesIO(blob)).read("archive/data.pkl"))  # noqa: S301
    assert marker.exists(), "the attack itself does not work, so the test shows nothing"


def test_a_compressed_member_is_refused() -> None:
    """A zip bomb: a small file whose storage grows when it is unpacked."""
    size = 1 << 26
    pickled = DATA_PKL.replace(b"K\3tq", b"J" + (size // 4).to_bytes(4, "little") + b"tq")
    bomb = archive({**OLD, "data.pkl": pickled, "data/0": bytes(size)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < size // 100
    with pytest.raises(CorruptFile, match="compressed"):
        read(bomb)
    with pytest.raises(CorruptFile, match="compressed"):
        read_object_blob(bomb, "here")


def described(*args: object, members: dict[str, bytes] = OLD) -> bytes:
    """An archive whose data.pkl calls _rebuild_tensor_v2 with `args`."""
    return archive({**members, "data.pkl": encode(Reduce(Global("torch._utils", "_rebuild_tensor_v2"), args))})


def storage(key: object = "0", count: object = 3, kind: object = Global("torch", "FloatStorage")) -> PersistentId:
    return PersistentId(("storage", kind, key, "cpu", count))


LIES = {
    "longer than the storage": (storage(), 0, (4,), (1,), False, None),
    "starts behind the storage": (storage(), 1, (3,), (1,), False, None),
    "huge": (storage(), 0, (1 << 62,), (1,), False, None),
    "huge in many dimensions": (storage(), 0, (1 << 62,) * 60, (1,) * 60, False, None),
    "negative size": (storage(), 0, (-3, -1), (1, 1), False, None),
    "negative start": (storage(), -1, (3,), (1,), False, None),
    "negative count": (storage(count=-3), 0, (3,), (1,), False, None),
    "storage of another length": (storage(count=2), 0, (2,), (1,), False, None),
    "missing storage": (storage("1"), 0, (3,), (1,), False, None),
    "path for a storage": (storage("../../etc/passwd"), 0, (3,), (1,), False, None),
    "text for a size": (storage(), 0, ("3",), (1,), False, None),
    "bool for a size": (storage(), 0, (True,), (1,), False, None),
    "list for a size": (storage(), 0, [3], (1,), False, None),
    "number for a storage": (0, 0, (3,), (1,), False, None),
    "short storage": (PersistentId(("storage",)), 0, (3,), (1,), False, None),
    "few arguments": (storage(), 0, (3,), (1,)),
}


@pytest.mark.parametrize("args", LIES.values(), ids=LIES)
def test_lies_about_a_tensor(args: tuple[object, ...]) -> None:
    with pytest.raises((CorruptFile, UnsupportedFormat), match=r"^the file: blob at byte 0: "):
        read(described(*args))


def test_missing_and_double_members() -> None:
    for missing in ("data.pkl", "data/0"):
        with pytest.raises(CorruptFile, match=f"the member '{missing}' is missing"):
            read(archive({key: value for key, value in OLD.items() if key != missing}))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file := io.BytesIO(archive(OLD)), "a") as made:
        made.writestr("archive/data.pkl", encode(None))
    with pytest.raises(CorruptFile, match="two members"):
        read(file.getvalue())


@pytest.mark.parametrize(
    ("field", "width", "step", "message"),
    [
        (10, 2, 1, "4 members in a directory of 5"),
        (12, 4, -46, "expected it to end at"),
        (12, 4, 1 << 30, "expected it to end at"),
        (16, 4, -1, "expected it to end at"),
        (16, 4, 1 << 30, "expected it to end at"),
        (4, 2, 1, "does not end in a zip directory"),
        (20, 2, 1, "does not end in a zip directory"),
    ],
)
def test_a_directory_that_is_elsewhere(field: int, width: int, step: int, message: str) -> None:
    data = bytearray(archive(OLD))
    at = len(data) - 22 + field
    value = int.from_bytes(data[at : at + width], "little") + step
    data[at : at + width] = value.to_bytes(width, "little")
    with pytest.raises(CorruptFile, match=message):
        read(bytes(data))


def test_a_storage_that_runs_into_the_directory() -> None:
    """Sizes that agree with each other and with the file, but not with where the members end."""
    data = bytearray(described(storage(count=33), 0, (33,), (1,), False, None))
    entry = data.index(b"archive/data/0", data.index(b"PK\1\2")) - 46
    data[entry + 20 : entry + 28] = 2 * (4 * 33).to_bytes(4, "little")
    with pytest.raises(CorruptFile, match="'data/0' of 132 bytes at .* does not fit"):
        read(bytes(data))


@pytest.fixture(scope="module")
def genuine() -> bytes:
    return saved(torch.arange(1000, dtype=torch.float32))


def test_every_truncation_is_corrupt(genuine: bytes) -> None:
    for length in range(0, len(genuine), 7):
        with pytest.raises(CorruptFile, match=r"^the file: blob at byte 0: "):
            read(genuine[:length])
        with pytest.raises(CorruptFile, match=r"^the file: blob at byte 0: "):
            read(genuine[:length], len(genuine))


def damaged(data: bytes) -> Iterator[bytes]:
    """`data` with each byte outside of the tensor's data changed, and with runs of 0xff over each field."""
    places = [*range(700), *range(len(data) - 800, len(data))]
    for at in places:
        for damage in (bytes([data[at] ^ 0xFF]), bytes([data[at] ^ 1]), b"\xff\xff\xff\xff", bytes(8)):
            if at + len(damage) <= len(data):
                yield data[:at] + damage + data[at + len(damage) :]


def test_damage_leads_nowhere_else(genuine: bytes) -> None:
    """Whatever byte is wrong: an error of ours, or a tensor that lies within the file."""
    for data in damaged(genuine):
        try:
            found = read(data)
            assert found.data_start >= 0
            assert found.data_start + found.nbytes <= len(data)
            read_object_blob(data, "the file")
        except InputError as error:
            if not str(error).startswith("the file: "):
                raise


def test_a_deep_pickle_is_corrupt() -> None:
    deep = b"\x80\x02})" + b"\x85" * 300_000 + b"Ns."
    with pytest.raises(CorruptFile):
        read(archive({**OLD, "data.pkl": deep}))


def test_reading_touches_little() -> None:
    """Two reads, and a few KiB, however large the tensor is."""

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            calls.append(size or 0)
            return super().read(size)

    calls: list[int] = []
    data = saved(torch.zeros(1 << 20))
    read_tensor_blob(Counting(data), 0, len(data), "here")
    assert len(calls) == 2
    assert sum(calls) < 4096


def test_pickle_of_a_blob_is_plain() -> None:
    """What torch's own restricted unpickler needs is all that a tensor blob names."""
    names = re.findall(rb"c([\w.]+)\n(\w+)\n", tensor_blob("bfloat16", (2, 2)).head)
    assert {name for _, name in names} == {b"_rebuild_tensor_v2", b"BFloat16Storage", b"OrderedDict"}
