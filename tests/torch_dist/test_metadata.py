"""`.metadata` read and written, against torch's own reader and writer, Megatron-Core and the golden checkpoints."""

import os
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata as TorchMetadata
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from qwen3vl_convert.errors import CorruptFile, InputError, UnsafeFile, UnsupportedFormat
from qwen3vl_convert.megatron.blob import object_blob, read_tensor_blob, tensor_blob
from qwen3vl_convert.megatron.metadata import (
    Box,
    ChunkEntry,
    Metadata,
    ObjectEntry,
    TensorEntry,
    metadata_bytes,
    read_metadata,
    tiling_problem,
)
from qwen3vl_convert.megatron.pickled import Global, Instance, Reduce, decode, encode

FILE = "__0_0.distcp"
TORCH_METADATA = "torch.distributed.checkpoint.metadata"


@pytest.fixture(scope="module")
def golden_folders(golden_megatron: Path) -> list[Path]:
    folders = sorted(path.parent for path in golden_megatron.glob("*/iter_*/.metadata"))
    assert len(folders) >= 7
    return folders


def stock(folder: Path) -> TorchMetadata:
    """What torch reads: the oracle, for files made here or by Megatron."""
    return FileSystemReader(folder).read_metadata()


def placed(metadata: TorchMetadata) -> dict[tuple[str, Any], tuple[str, int, int]]:
    return {
        (index.fqn, index.offset): (info.relative_path, info.offset, info.length)
        for index, info in metadata.storage_data.items()
    }


def ours_placed(metadata: Metadata) -> dict[tuple[str, Any], tuple[str, int, int]]:
    objects = {
        (name, None): (entry.relative_path, entry.offset, entry.length) for name, entry in metadata.objects.items()
    }
    chunks = {
        (name, torch.Size(chunk.offsets)): (chunk.relative_path, chunk.offset, chunk.length)
        for name, tensor in metadata.tensors.items()
        for chunk in tensor.chunks
    }
    return {**objects, **chunks}


def assert_same(ours: Metadata, theirs: TorchMetadata) -> None:
    assert ours_placed(ours) == placed(theirs)
    assert {*ours.tensors, *ours.objects} == set(theirs.state_dict_metadata)
    for name, tensor in ours.tensors.items():
        expected: Any = theirs.state_dict_metadata[name]
        assert (tensor.dtype, tensor.shape) == (str(expected.properties.dtype)[6:], tuple(expected.size))
        chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in expected.chunks]
        assert [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks] == chunks


# Genuine files, read and written again.


def test_golden_metadata_is_read_as_torch_reads_it(golden_folders: list[Path]) -> None:
    for folder in golden_folders:
        assert_same(read_metadata(folder / ".metadata"), stock(folder))


def test_golden_metadata_written_again_is_equal_in_torch(golden_folders: list[Path], tmp_path: Path) -> None:
    for folder in golden_folders:
        ours = read_metadata(folder / ".metadata")
        (tmp_path / ".metadata").write_bytes(metadata_bytes(ours.tensors, ours.objects))
        written, genuine = stock(tmp_path), stock(folder)
        assert written.state_dict_metadata == genuine.state_dict_metadata
        assert written.storage_data == genuine.storage_data
        as_stored = [{str(vars(index)) for index in each.storage_data} for each in (written, genuine)]
        assert as_stored[0] == as_stored[1]
        assert vars(written).keys() == vars(genuine).keys()
        assert (written.planner_data, written.version) == (None, genuine.version)
        for name, entry in written.state_dict_metadata.items():
            assert vars(entry).keys() == vars(genuine.state_dict_metadata[name]).keys()


# torch says so whenever it is used without process groups.
alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@alone
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_torch_saves_is_read(protocol: int, tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "scalar": torch.tensor(1), "b": b"x", "c": [torch.zeros(2)]}
    torch_save(state, checkpoint_id=tmp_path, no_dist=True)
    theirs = stock(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(theirs, protocol))
    ours = read_metadata(tmp_path / ".metadata")
    assert_same(ours, theirs)
    chunk = ours.tensors["a.weight"].chunks[0]
    data = (tmp_path / chunk.relative_path).read_bytes()
    with (tmp_path / chunk.relative_path).open("rb") as file:
        found = read_tensor_blob(file, chunk.offset, chunk.length, "here")
    assert torch.frombuffer(bytearray(data[found.data_start :][: found.nbytes]), dtype=torch.float32).tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]


# Made here: two tensors in chunks, one object.


def blobs() -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    for layer, half in product(range(3), range(2)):
        yield "layers.fc1.weight", (layer, 4 * half, 0), (1, 4, 5)
    yield "norm.weight", (0,), (5,)


SHAPES = {"layers.fc1.weight": (3, 8, 5), "norm.weight": (5,)}


def value_of(name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    whole = torch.arange(float(torch.Size(SHAPES[name]).numel())).reshape(SHAPES[name])
    for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole.contiguous()


def checkpoint(folder: Path) -> tuple[dict[str, TensorEntry], dict[str, ObjectEntry]]:
    """A whole checkpoint, written with this package alone."""
    extra = object_blob([None])
    content, chunks = bytearray(extra), {name: list[ChunkEntry]() for name in SHAPES}
    for name, offsets, sizes in blobs():
        data = value_of(name, offsets, sizes).numpy().tobytes()
        blob = tensor_blob("float32", sizes)
        chunks[name].append(ChunkEntry(offsets, sizes, FILE, len(content), blob.size))
        content += blob.head + data + blob.tail(zlib.crc32(data))
    tensors = {name: TensorEntry("float32", SHAPES[name], tuple(found)) for name, found in chunks.items()}
    objects = {"norm._extra_state/shard_0_1": ObjectEntry(FILE, 0, len(extra))}
    (folder / FILE).write_bytes(content)
    (folder / ".metadata").write_bytes(metadata_bytes(tensors, objects))
    return tensors, objects


@pytest.fixture
def made(tmp_path: Path) -> Path:
    checkpoint(tmp_path)
    return tmp_path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors, objects = checkpoint(tmp_path)
    ours = read_metadata(tmp_path / ".metadata")
    assert (ours.tensors, ours.objects, ours.version, ours.flattened) == (tensors, objects, "1.0.0", frozenset())


@alone
def test_torch_loads_what_is_written(made: Path) -> None:
    state = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    torch_load(state, checkpoint_id=made, no_dist=True)
    for name, loaded in state.items():
        assert torch.equal(loaded, value_of(name, (0,) * loaded.dim(), SHAPES[name]))


MEGATRON = """
import sys, torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
folder, store = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
norm = ShardedTensor.from_rank_offsets("norm.weight", torch.zeros(5))
fc1 = {
    layer: ShardedTensor.from_rank_offsets("layers.fc1.weight", torch.zeros(8, 5), (0, layer, 3), prepend_axis_num=1)
    for layer in range(3)
}
extra = ShardedObject("norm._extra_state", None, (1,), (0,))
state = dist_checkpointing.load({"norm": norm, "fc1": fc1, "extra": extra}, folder)
assert state["norm"].tolist() == [0, 1, 2, 3, 4], state
assert [state["fc1"][layer].flatten().tolist() for layer in range(3)] == torch.arange(120).view(3, 40).tolist(), state
assert state["extra"] is None, state
torch.distributed.destroy_process_group()
"""


@pytest.mark.megatron
def test_megatron_loads_what_is_written(made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    backend = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}'
    (made / "metadata.json").write_text(backend)
    (made / "common.pt").write_bytes(object_blob({"checkpoint_version": 3.0}))
    store = tmp_path_factory.mktemp("store") / "file"
    command = [sys.executable, "-W", "ignore", "-c", MEGATRON, str(made), str(store)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_equal_entries_give_equal_bytes(tmp_path: Path) -> None:
    assert metadata_bytes(*checkpoint(tmp_path)) == metadata_bytes(*checkpoint(tmp_path))
    assert str(tmp_path).encode() not in (tmp_path / ".metadata").read_bytes()


# Older and newer writers: the same file with what they add or leave out.


class Editable:
    """The `.metadata` of a folder, taken apart as far as records; `save` writes it back."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".metadata"
        self.root = cast(Instance, decode(self.path.read_bytes(), "here"))
        self.state = cast(dict[str, Any], self.root.state)

    def save(self, cls: Global | None = None) -> Path:
        self.path.write_bytes(encode(unsized(Instance(cls or self.root.cls, self.state)), 4))
        return self.path


def unsized(value: Any) -> Any:
    """The tree that `encode` takes. A torch.Size stays the tuple that it was read as, which is as good here."""
    if isinstance(value, dict):
        return {unsized(key): unsized(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unsized(item) for item in value]
    return Instance(value.cls, unsized(value.state), value.args) if isinstance(value, Instance) else value


@pytest.fixture
def editable(made: Path) -> Editable:
    return Editable(made)


def plans() -> list[object]:
    planner = "torch.distributed.checkpoint.planner"
    item = Instance(Global(planner, "WriteItem"), {"type": Reduce(Global(planner, "WriteItemType"), (2,))})
    return [Instance(Global(planner, "SavePlan"), {"items": [item], "storage_data": None, "planner_data": None})]


@pytest.mark.parametrize(
    "fields",
    [
        {"all_local_plans": plans()},
        {"mcore_data": {}},
        {"planner_data": {"a": ("a", "b")}},
        {"storage_meta": Instance(Global(TORCH_METADATA, "StorageMeta"), {"checkpoint_id": "/x", "modules": []})},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_additions_of_other_versions(fields: dict[str, object], editable: Editable) -> None:
    before = read_metadata(editable.path)
    editable.state.update(fields)
    assert read_metadata(editable.save()) == before


def test_torch_before_2_11_gives_no_version(editable: Editable) -> None:
    del editable.state["version"]
    assert read_metadata(editable.save()).version is None


def test_megatron_0_15_has_its_own_class_and_flattened_tensors(editable: Editable) -> None:
    shape = {"nd_reformulated_orig_global_shape": (2, 3)}
    editable.state["mcore_data"] = {"optimizer.state.exp_avg.a": shape, "layers.fc1.weight": {}}
    path = editable.save(Global("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"))
    assert read_metadata(path).flattened == {"optimizer.state.exp_avg.a"}


# What must be refused. Each test changes one thing in a good checkpoint.


def written(folder: Path, change: Callable[[TensorEntry], TensorEntry]) -> Path:
    """The checkpoint of `checkpoint`, its first tensor changed."""
    tensors, objects = checkpoint(folder)
    name = next(iter(tensors))
    (folder / ".metadata").write_bytes(metadata_bytes({**tensors, name: change(tensors[name])}, objects))
    return folder / ".metadata"


def with_chunk(**changes: object) -> Callable[[TensorEntry], TensorEntry]:
    """Changes the third chunk."""
    return lambda tensor: replace(
        tensor,
        chunks=(*tensor.chunks[:2], replace(tensor.chunks[2], **changes), *tensor.chunks[3:]),  # type: ignore[arg-type]
    )


def with_chunks(
    change: Callable[[tuple[ChunkEntry, ...]], tuple[ChunkEntry, ...]],
) -> Callable[[TensorEntry], TensorEntry]:
    return lambda tensor: replace(tensor, chunks=change(tensor.chunks))


IMPOSSIBLE: dict[str, tuple[Callable[[TensorEntry], TensorEntry], str]] = {
    "hole": (with_chunks(lambda chunks: chunks[:2] + chunks[3:]), r"100 elements of 120; there is none at \(1, 0, 0\)"),
    "no chunks": (with_chunks(lambda chunks: ()), "0 elements of 120"),
    "small chunk": (with_chunk(sizes=(1, 3, 5)), "115 elements of 120"),
    "empty chunk": (with_chunk(sizes=(1, 0, 5)), "100 elements of 120"),
    "overlap": (with_chunk(offsets=(0, 2, 0)), r"overlaps chunk"),
    "large chunk": (with_chunk(sizes=(1, 5, 5)), r"chunk \(1, 4, 0\) of \(1, 4, 5\) overlaps chunk \(1, 0, 0\)"),
    "twice": (with_chunks(lambda chunks: (*chunks, chunks[0])), "stored twice|overlaps"),
    "out of bounds": (with_chunk(offsets=(3, 0, 0)), r"chunk \(3, 0, 0\) of \(1, 4, 5\) is not within it"),
    "negative offset": (with_chunk(offsets=(-1, 0, 0)), "where numbers of 0 or more belong"),
    "negative size": (with_chunk(sizes=(-1, 4, 5)), "where numbers of 0 or more belong"),
    "bool": (with_chunk(sizes=(True, 4, 5)), "where numbers of 0 or more belong"),
    "huge": (with_chunk(sizes=(1 << 70, 4, 5)), "where numbers of 0 or more belong"),
    "rank": (with_chunk(sizes=(4, 5)), "another number of dimensions"),
    "shape": (lambda tensor: replace(tensor, shape=(3, 8, 6)), "120 elements of 144"),
    "rank of shape": (lambda tensor: replace(tensor, shape=(24, 5)), "another number of dimensions"),
    "file missing": (with_chunk(relative_path="__9_9.distcp"), "'__9_9.distcp', which is not there"),
    "end behind the file": (with_chunk(length=1 << 40), r"layers.fc1.weight chunk \(\d, \d, 0\)"),
    "start behind the file": (with_chunk(offset=1 << 40), r"chunk \(1, 0, 0\) ends at byte \d+ of"),
    "negative start": (with_chunk(offset=-5), "where a number of 0 or more belongs"),
    "number as text": (with_chunk(offset="5"), "where a number of 0 or more belongs"),
    "same bytes twice": (with_chunk(offset=2000), "share bytes"),
    "no room": (with_chunk(length=60), r"chunk \(1, 0, 0\) lies in 60 bytes, and has 80"),
    "path is a number": (with_chunk(relative_path=5), "where a name belongs"),
}


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_true_is_corrupt(
    change: Callable[[TensorEntry], TensorEntry], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CorruptFile, match=message) as error:
        read_metadata(written(tmp_path, change))
    assert str(error.value).startswith(f"{tmp_path / '.metadata'}: ")


PATHS = ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\\b", "x" * 300, "\x1b[2J"]


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_paths_out_of_the_folder_are_unsafe(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    with pytest.raises(UnsafeFile):
        read_metadata(written(folder, with_chunk(relative_path=path, offset=0)))


def test_links_out_of_the_folder_are_unsafe(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    (folder / "link").symlink_to("../secret")
    with pytest.raises(UnsafeFile, match="a link out of the checkpoint"):
        read_metadata(written(folder, with_chunk(relative_path="link", offset=0)))
    (folder / "link").unlink()
    (folder / "link").symlink_to(FILE)
    read_metadata(written(folder, with_chunk(relative_path="link")))


def test_a_folder_for_a_file_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CorruptFile, match="not there"):
        read_metadata(written(tmp_path, with_chunk(relative_path="folder")))


@pytest.mark.parametrize("dtype", ["complex64", "uint16", "qint8", "Size"])
def test_unknown_dtypes_are_unsupported(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedFormat, match=rf"layers.fc1.weight is of dtype torch\.{dtype}, expected one of float64"
    ):
        read_metadata(written(tmp_path, lambda tensor: replace(tensor, dtype=dtype)))


def test_names_with_control_characters_are_unsafe(tmp_path: Path) -> None:
    tensors, objects = checkpoint(tmp_path)
    (tmp_path / ".metadata").write_bytes(metadata_bytes({"\x1b[2Ja": tensors["norm.weight"]}, objects))
    with pytest.raises(UnsafeFile, match=r"'\\x1b\[2Ja' has control characters"):
        read_metadata(tmp_path / ".metadata")


def first_tensor(editable: Editable) -> Any:
    return editable.state["state_dict_metadata"]["layers.fc1.weight"]


def store_twice(editable: Editable) -> None:
    """A second index equal to the last: torch cannot write it, and which of the two holds would be chance."""
    storage = editable.state["storage_data"]
    index, info = list(storage.items())[-1]
    storage[Instance(index.cls, index.state)] = info


EDITS: dict[str, Callable[[Editable], object]] = {
    "no storage data": lambda edit: edit.state.pop("storage_data"),
    "no tensors": lambda edit: edit.state.pop("state_dict_metadata"),
    "tensors as a list": lambda edit: edit.state.update(state_dict_metadata=[]),
    "storage of one chunk missing": lambda edit: edit.state["storage_data"].popitem(),
    "storage of the object missing": lambda edit: edit.state["storage_data"].pop(
        next(iter(edit.state["storage_data"]))
    ),
    "storage twice": store_twice,
    "number for a tensor": lambda edit: edit.state["state_dict_metadata"].update(a=1),
    "number for a name": lambda edit: edit.state["state_dict_metadata"].update({1: None}),
    "number for a chunk": lambda edit: first_tensor(edit).state["chunks"].append(1),
    "chunk of another class": lambda edit: first_tensor(edit).state["chunks"].append(Instance(Global("torch", "Size"))),
    "no chunks": lambda edit: first_tensor(edit).state.pop("chunks"),
    "no properties": lambda edit: first_tensor(edit).state.pop("properties"),
    "no size": lambda edit: first_tensor(edit).state.pop("size"),
    "list for a size": lambda edit: first_tensor(edit).state.update(size=[3, 8, 5]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_missing_and_misplaced_parts_are_corrupt(edit: Callable[[Editable], object], editable: Editable) -> None:
    edit(editable)
    with pytest.raises(CorruptFile):
        read_metadata(editable.save())


def test_sparse_tensors_are_unsupported(editable: Editable) -> None:
    properties = first_tensor(editable).state["properties"]
    layout = Reduce(Global("torch.serialization", "_get_layout"), ("torch.sparse_coo",))
    state = (properties.state[0], layout, *properties.state[2:])
    first_tensor(editable).state["properties"] = Instance(properties.cls, state)
    with pytest.raises(UnsupportedFormat, match="sparse"):
        read_metadata(editable.save())


def test_transformed_storage_is_unsupported(editable: Editable) -> None:
    for info in editable.state["storage_data"].values():
        info.state["transform_descriptors"] = ["zstd"]
    with pytest.raises(UnsupportedFormat, match="transformed"):
        read_metadata(editable.save())


@pytest.mark.parametrize("root", [None, [], {}, Instance(Global("argparse", "Namespace"), {})])
def test_another_value_is_corrupt(root: object, made: Path) -> None:
    (made / ".metadata").write_bytes(encode(root, 4))
    with pytest.raises(CorruptFile, match="where a Metadata belongs"):
        read_metadata(made / ".metadata")


def test_an_absent_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_metadata(tmp_path / ".metadata")


def test_every_truncation_is_corrupt(made: Path) -> None:
    data = (made / ".metadata").read_bytes()
    for length in range(0, len(data), 11):
        (made / ".metadata").write_bytes(data[:length])
        with pytest.raises(CorruptFile):
            read_metadata(made / ".metadata")


@given(st.data())
def test_damage_raises_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    checkpoint(folder)
    good = (folder / ".metadata").read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    damage = data.draw(st.binary(min_size=1, max_size=8))
    (folder / ".metadata").write_bytes(good[:at] + damage + good[at + len(damage) :])
    try:
        read_metadata(folder / ".metadata")
    except InputError as error:
        if str(folder) not in str(error):
            raise


class Payload:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.makedirs, (self.folder,)


@pytest.mark.parametrize("place", ["root", "planner_data", "storage_meta", "state_dict_metadata"])
def test_payloads_do_not_run(place: str, made: Path) -> None:
    marker = made / "marker"
    metadata: Any = stock(made)
    if place == "root":
        metadata = Payload(str(marker))
    elif place == "state_dict_metadata":
        metadata.state_dict_metadata["evil"] = Payload(str(marker))
    else:
        setattr(metadata, place, Payload(str(marker)))
    (made / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafeFile, match=r"\.metadata: .*'makedirs'.*Nothing was executed"):
        read_metadata(made / ".metadata")
    assert not marker.exists()
    pickle.loads((made / ".metadata").read_bytes())  # noqa: S301
    assert marker.exists(), "the attack itself does not work, so the test shows nothing"


# Tilings, against marking every element.


def problem_by_marking(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    marks = torch.zeros(shape, dtype=torch.int64)
    for offsets, sizes in boxes:
        marks[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))] += 1
    return not bool((marks == 1).all())


@st.composite
def cut_up(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A tensor cut in two again and again, anywhere, so seldom into a grid."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, sizes[dim]))
        boxes += [
            (offsets, (*sizes[:dim], at, *sizes[dim + 1 :])),
            (
                (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :]),
                (*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :]),
            ),
        ]
    return shape, draw(st.permutations(boxes))


@given(cut_up())
def test_any_cutting_up_tiles(cut: tuple[tuple[int, ...], list[Box]]) -> None:
    assert tiling_problem(*cut) is None


@given(cut_up(), st.data())
def test_any_other_arrangement_does_not(cut: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    """One box moved or resized within the tensor: right if and only if every element is still covered once."""
    shape, boxes = cut
    changed = data.draw(st.integers(0, len(boxes) - 1))
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(data.draw(st.integers(0, size - start)) for size, start in zip(shape, offsets, strict=True))
    boxes[changed] = offsets, sizes
    assert (tiling_problem(shape, boxes) is not None) == problem_by_marking(shape, boxes)


def test_scalars_and_empty_tensors() -> None:
    assert tiling_problem((), [((), ())]) is None
    assert tiling_problem((), []) == "its chunks have 0 elements of 1; there is none at ()"
    assert tiling_problem((), [((), ()), ((), ())]) is not None
    assert tiling_problem((0, 4), [((0, 0), (0, 4))]) is None
    assert tiling_problem((0, 4), []) is None


def test_many_chunks_are_checked_fast() -> None:
    """94 layers of 128 experts in gate and up: a second would be much; all pairs would take hours."""
    shape = (94, 128, 4, 5)
    boxes: list[Box] = [((i, j, 2 * k, 0), (1, 1, 2, 5)) for i, j, k in product(range(94), range(128), range(2))]
    assert tiling_problem(shape, boxes) is None
    assert tiling_problem(shape, [*boxes[:-1], boxes[0]]) is not None


def test_made_up_tables_do_not_take_forever() -> None:
    """Half of the boxes long in each dimension, so that all pairs would have to be compared."""
    count = 20_000
    boxes: list[Box] = [((0, i), (count, 1)) for i in range(count)]
    boxes += [((i, count), (1, i + 1)) for i in range(count)]
    problem = tiling_problem((count, 3 * count), boxes)
    assert problem is not None
