"""Reading and writing pickles, against Python's own pickle module and real classes; and what must be refused."""

import argparse
import io
import os
import pathlib
import pickle
import pickletools
import signal
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.planner import WriteItemType

from qwen3vl_convert.errors import CorruptFile, InputError, UnsafeFile
from qwen3vl_convert.megatron.pickled import Global, Instance, PersistentId, Reduce, decode, encode

MEMORY_FORMAT = Global("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")

PLAIN = [
    None,
    True,
    False,
    *(
        sign * (1 << bits) + step
        for bits in (0, 7, 8, 15, 16, 31, 32, 63, 64, 100)
        for sign in (1, -1)
        for step in (-1, 0)
    ),
    0.0,
    -0.0,
    1.5e300,
    float("inf"),
    "",
    "text",
    "ü\U0001f600\ud800",
    "x" * 255,
    "x" * 256,
    (),
    (1,),
    (1, 2),
    (1, 2, 3),
    (1, 2, 3, 4),
    [],
    [1],
    [1, 2],
    list(range(999)),
    list(range(1000)),
    list(range(1001)),
    list(range(2500)),
    {},
    {"a": 1},
    {"a": 1, "b": [2, (3, {})]},
    dict.fromkeys(range(1001), None),
    OrderedDict(),
    OrderedDict(a=1),
    OrderedDict(a=1, b={"c": ()}),
    OrderedDict.fromkeys(range(1001)),
    OrderedDict.fromkeys(range(2002)),
    # More than 256 distinct strings: the memo's long form. Each twice: references.
    [word for word in map(str, range(300)) for _ in range(2)],
]


def stock_load(data: bytes) -> object:
    """Python's own reader: the oracle, fed with bytes made here."""
    return pickle.loads(data)  # noqa: S301


def items(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def unframed(data: bytes) -> bytes:
    """Protocol 4 without its frames, which are optional and which we do not write."""
    for op, _, at in reversed(list(pickletools.genops(data))):
        if op.name == "FRAME" and at is not None:
            data = data[:at] + data[at + 9 :]
    return data


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:20].encode("ascii", "replace").decode())
def test_plain_values_are_written_as_python_writes_them(value: object, protocol: int) -> None:
    written = encode(value, protocol)
    assert written == unframed(pickle.dumps(value, protocol))
    assert repr(decode(written, "here")) == repr(value)  # repr tells 0.0 from -0.0 and 1 from True


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("value", [b"", b"x", bytes(range(256)), b"y" * 1000])
def test_bytes(value: bytes, protocol: int) -> None:
    written = encode(value, protocol)
    assert stock_load(written) == decode(written, "here") == value


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
    ),
)


@given(trees, st.sampled_from([2, 4]))
def test_what_is_written_pickle_loads(value: object, protocol: int) -> None:
    assert repr(stock_load(encode(value, protocol))) == repr(value)


@given(trees, st.sampled_from([2, 3, 4, 5]))
def test_what_pickle_writes_is_read(value: object, protocol: int) -> None:
    assert repr(decode(pickle.dumps(value, protocol), "here")) == repr(value)


REAL = {
    "Namespace": argparse.Namespace(a=1, b=signal.SIGTERM, c=torch.bfloat16),
    "SimpleNamespace": types.SimpleNamespace(a=(1, 2)),
    "enum": signal.SIGTERM,
    "path": pathlib.PosixPath("/a/b"),
    "dtype": torch.bfloat16,
    "Size": torch.Size((1, 2, 3, 4)),
    "memory format": dcp._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT,
    "write item type": WriteItemType.SHARD,
    "MetadataIndex": dcp.MetadataIndex("a.b", torch.Size((0, 0))),
    "tensor metadata": dcp.TensorStorageMetadata(
        dcp.TensorProperties(torch.float32),
        torch.Size((2, 3)),
        [dcp.ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 3)))],
    ),
    "numpy dtype": numpy.dtype("uint32"),
    "numpy scalar": numpy.float32(1.5),
    "bytearray": bytearray(b"abc"),
    "complex": 1 + 2j,
}


def real_and_protocol() -> list[pytest.param]:  # type: ignore[valid-type]
    return [pytest.param(value, p, id=f"{name}-{p}") for name, value in REAL.items() for p in (2, 4)]


@pytest.mark.parametrize(("value", "protocol"), real_and_protocol())
def test_real_objects_survive_being_read_as_records(value: object, protocol: int) -> None:
    """Read without its class, written again, loaded with its class: the same object."""
    record = decode(pickle.dumps(value, protocol), "here")
    assert stock_load(encode(record, protocol)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_numpy_arrays_are_records(protocol: int) -> None:
    array = numpy.arange(624, dtype=numpy.uint32)
    record = decode(pickle.dumps(array, protocol), "here")
    assert isinstance(record, Reduce)
    assert record.callable.name == "_reconstruct"
    numpy.testing.assert_array_equal(numpy.asarray(stock_load(encode(record, 4))), array)


def test_what_the_classes_become() -> None:
    class Saver(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", "0") if value is marker else None

    marker = object()
    Saver(file := io.BytesIO(), 4).dump([marker, argparse.Namespace(a=1), torch.Size((1, 2)), torch.bool, {1, 2}])
    outside, namespace, size, dtype, numbers = items(decode(file.getvalue(), "here"))
    assert outside == PersistentId(("storage", "0"))
    assert isinstance(namespace, Instance)
    assert (namespace.cls, namespace.args, namespace.state) == (Global("argparse", "Namespace"), (), {"a": 1})
    assert type(size) is tuple
    assert (size, dtype, numbers) == ((1, 2), Global("torch", "bool"), {1, 2})


@pytest.mark.parametrize(("module", "protocol"), [("builtins", 4), ("__builtin__", 2)])
def test_enum_members_of_python_3_11_0(module: str, protocol: int) -> None:
    """Before 3.11.4 Python pickled a member of an enum as getattr(enum, name)."""
    data = encode(Reduce(Global(module, "getattr"), (MEMORY_FORMAT, "TORCH_CONTIGUOUS_FORMAT")), protocol)
    assert stock_load(data) is dcp._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    member = decode(data, "here")
    assert isinstance(member, Reduce)
    assert (member.callable, member.args) == (MEMORY_FORMAT, ("TORCH_CONTIGUOUS_FORMAT",))


def test_shared_objects_stay_shared_while_they_are_completed() -> None:
    item = argparse.Namespace(a=1)
    first, second = items(decode(pickle.dumps([item, item]), "here"))
    assert first is second
    assert isinstance(first, Instance)
    assert first.state == {"a": 1}


def test_attributes_of_an_ordered_dict_are_dropped() -> None:
    value = OrderedDict(a=1)
    value._metadata = {"version": 1}  # type: ignore[attr-defined]  # as torch's state dicts have
    assert decode(pickle.dumps(value), "here") == OrderedDict(a=1)


def test_strings_and_globals_are_written_once() -> None:
    name = "language_model.decoder.layers.mlp.linear_fc1.weight"
    many = [Instance(Global("argparse", "Namespace"), {"".join(name): index}) for index in range(100)]
    written = encode(many, 4)
    assert written.count(name.encode()) == written.count(b"argparse") == 1
    assert written == encode(many, 4)


@pytest.mark.parametrize("value", [object(), {1}, 1 << 3000, bytearray(), [1 + 2j]])
def test_other_values_are_not_written(value: object) -> None:
    with pytest.raises(TypeError):
        encode(value)


def test_other_protocols_are_not_written() -> None:
    with pytest.raises(ValueError):
        encode(None, 3)


# Attacks. Each must be refused, and leave nothing behind.


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


PAYLOADS: dict[str, Callable[[str], object]] = {
    "makedirs": lambda folder: Payload(os.makedirs, folder),
    "system": lambda folder: Payload(os.system, f"mkdir {folder}"),
    "eval": lambda folder: Payload(eval, f"__import__('os').makedirs({folder!r})"),
    "exec in a dict": lambda folder: {"a": [Payload(exec, f"import os; os.makedirs({folder!r})")]},
    "subprocess": lambda folder: Payload(subprocess.check_call, ["mkdir", folder]),
    "as a key": lambda folder: {Payload(os.mkdir, folder): 1},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_payloads_do_not_run(payload: Callable[[str], object], protocol: int, tmp_path: Path) -> None:
    folder = tmp_path / "marker"
    data = pickle.dumps(payload(str(folder)), protocol)
    with pytest.raises(UnsafeFile, match=r"^the file: .* names the global .*Nothing was executed"):
        decode(data, "the file")
    assert not folder.exists()
    stock_load(data)
    assert folder.exists(), "the attack itself does not work, so the test shows nothing"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("torch", "load"),
        ("torch", "Size.__init__"),
        ("torch", "hub.load"),
        ("torch.Size", "__class__"),
        ("builtins", "eval"),
        ("builtins", "type"),
        ("__builtin__", "eval"),
        ("operator", "attrgetter"),
        ("torch.storage", "os"),
        ("argparse", "Namespace\x00"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_foreign_names_are_refused(module: str, name: str, protocol: int) -> None:
    with pytest.raises(UnsafeFile) as error:
        decode(encode([1, Global(module, name)], protocol), "the file")
    assert repr(module) in str(error.value)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    "args",
    [
        (),
        (MEMORY_FORMAT,),
        (MEMORY_FORMAT, 1),
        (MEMORY_FORMAT, "a", "b"),
        ("text", "upper"),
        (Global("argparse", "Namespace"), "__init__"),
        (Global("torch", "Size"), "__class__"),
        (Reduce(MEMORY_FORMAT, (0,)), "__class__"),
    ],
)
def test_getattr_is_for_enum_members_only(args: tuple[object, ...]) -> None:
    with pytest.raises(UnsafeFile):
        decode(encode(Reduce(Global("builtins", "getattr"), args), 4), "here")


@pytest.mark.parametrize("args", [("x", "rot13"), (1, "latin1"), ("x", 1)])
def test_encode_is_for_bytes_only(args: tuple[object, ...]) -> None:
    with pytest.raises(UnsafeFile):
        decode(encode(Reduce(Global("_codecs", "encode"), args)), "here")


DEEP = 300_000
MALFORMED = {
    "empty": b"",
    "text": b"hello",
    "zip": b"PK\3\4",
    "protocol 0": pickle.dumps([1], 0),
    "protocol 6": b"\x80\x06N.",
    "no stop": b"\x80\x02N",
    "nothing on the stack": b"\x80\x02.",
    "two values": b"\x80\x02NN.",
    "open mark": b"\x80\x02(N.",
    "data behind the end": b"\x80\x02N.N",
    "missing memo": b"\x80\x02h\x05.",
    "frame too long": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
    "text too long": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fN.",
    "bytes too long": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fN.",
    "long too long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "bad utf-8": b"\x80\x02X\x02\0\0\0\xff\xff.",
    "key without value": b"\x80\x02}(Nu.",
    "list as key": b"\x80\x02}]Ns.",
    "append to a tuple": b"\x80\x02)Na.",
    "state for a list": b"\x80\x02]}b.",
    "state for a name": b"\x80\x02ctorch\nSize\n}b.",
    "call of a number": b"\x80\x02K\x01)R.",
    "call of an object": b"\x80\x02ctorch\nTensor\n)\x81)R.",
    "call without arguments": b"\x80\x02ctorch\nSize\nNR.",
    "Size of text": b"\x80\x02ctorch\nSize\nX\1\0\0\0a\x85R.",
    "class call": b"\x80\x02(ios\nsystem\n.",
    "extension": b"\x80\x02\x82\x01.",
    "out of band": b"\x80\x05\x97.",
    "global of numbers": b"\x80\x04K\1K\1\x93.",
    "deep key": b"\x80\x04})" + b"\x85" * DEEP + b"Ns.",
    "deep frozen set": b"\x80\x04()" + b"\x85" * DEEP + b"\x91.",
    "exponential key": b"\x80\x04}N" + b"2\x86" * 60 + b"Ns.",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_pickles_are_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptFile, match=r"^the file: byte \d+ of \d+"):
        decode(data, "the file")


def test_a_length_is_compared_with_what_is_there() -> None:
    with pytest.raises(CorruptFile, match="5 bytes expected, 3 left"):
        decode(b"\x80\x02X\5\0\0\0ab.", "here")


def test_deep_values_do_not_exhaust_the_stack() -> None:
    """Nothing recurses: neither reading, nor throwing away what was read."""
    value = decode(b"\x80\x04" + b"]" * DEEP + b"a" * (DEEP - 1) + b".", "here")
    assert isinstance(value, list)


def test_a_huge_memo_index_costs_nothing() -> None:
    """The C unpickler makes an array of twice the index for these nine bytes."""
    assert decode(b"\x80\x02Nr\xff\xff\xff\xff.", "here") is None


def test_every_truncation_is_corrupt() -> None:
    data = pickle.dumps([argparse.Namespace(a=1, b=(1, 2.5, "c" * 300)), {"a": OrderedDict(b=2**70)}], 4)
    for length in range(len(data)):
        with pytest.raises(CorruptFile):
            decode(data[:length], "here")


SAMPLE = pickle.dumps([REAL["Namespace"], REAL["tensor metadata"], REAL["numpy dtype"], {("a", 1): 2.5}], 4)


@given(st.integers(0, len(SAMPLE) - 1), st.binary(min_size=1, max_size=8))
def test_damage_raises_nothing_else(at: int, damage: bytes) -> None:
    try:
        decode(SAMPLE[:at] + damage + SAMPLE[at + len(damage) :], "here")
    except InputError as error:
        if not str(error).startswith("here: "):
            raise


@pytest.mark.parametrize("module", ["pickled", "blob", "metadata"])
def test_torch_is_not_imported(module: str) -> None:
    code = f"import sys, qwen3vl_convert.megatron.{module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
