"""Pickles as data: `encode` writes the few kinds of value that a checkpoint consists of, `decode` reads them back.

The two are mirror images. A class or function is only ever a `Global`, a name; an object is a `Reduce` (what would be
called, with what) or an `Instance` (of what, in which state). `decode` imports nothing, calls nothing that a file names
and refuses every name that checkpoints have no need of.

It is a machine of its own, not a subclass of `pickle.Unpickler`: `find_class` stops the execution of code, but not two
other things that small files do to that class. Nine bytes (LONG_BINPUT with a huge index) make it allocate and clear
32 GiB, and half a megabyte of nested tuples used as a dict key overflows the C stack. Here the memo is a dict, a key is
a flat value, every length is checked before it is used, and nothing recurses.

Equal input gives equal bytes: what `encode` writes is, for a tree of plain values, what CPython's own pickler writes.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

from qwen3vl_convert.errors import CorruptFile, UnsafeFile


class Global(NamedTuple):
    """The name of a class, function or constant. Never looked up. (A NamedTuple because those hash fast.)"""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Reduce:
    """`callable(*args)`, then `__setstate__(state)` where there is one. Never called here."""

    callable: Global
    args: tuple[object, ...]
    state: object = None


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """`cls.__new__(cls, *args)`, then `__setstate__(state)`, for a dict of attributes `__dict__.update(state)`."""

    cls: Global
    state: object = None
    args: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class PersistentId:
    """What the file leaves to its surroundings; in torch a tensor's storage."""

    value: object


Builder = Callable[[tuple[object, ...]], object]

SIZE = Global("torch", "Size")
ORDERED_DICT = Global("collections", "OrderedDict")
_ENCODE = Global("_codecs", "encode")
_T = TypeVar("_T")


def _names(module: str, names: str) -> set[Global]:
    return {Global(module, name) for name in names.split()}


_DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu "
    "float4_e2m1fn_x2 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex32 complex64 complex128 "
    "qint8 quint8 qint32 quint4x2 quint2x4"
)
_STORAGES = (
    "DoubleStorage FloatStorage HalfStorage BFloat16Storage LongStorage IntStorage ShortStorage CharStorage "
    "ByteStorage BoolStorage ComplexDoubleStorage ComplexFloatStorage UntypedStorage"
)
_MEMORY_FORMAT = Global("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")
_WRITE_ITEM_TYPE = Global("torch.distributed.checkpoint.planner", "WriteItemType")

# Enums. Python 3.11.0 to 3.11.3 pickles a member as builtins.getattr(enum, name), which is read for these alone.
ENUMS = frozenset(
    {_MEMORY_FORMAT, _WRITE_ITEM_TYPE}
    | _names("signal", "Signals")
    | _names("megatron.core.enums", "ModelType Fp8Recipe Fp4Recipe")
    | _names("megatron.core.rerun_state_machine", "RerunDiagnostic RerunMode RerunState")
    | _names(
        "megatron.core.transformer.enums",
        "AttnBackend AttnMaskType AttnType CudaGraphModule CudaGraphScope InferenceCudaGraphScope LayerType ModelType",
    )
)
# Everything that the checkpoints of torch 1.13 to 2.13 and Megatron-Core 0.9 to 0.19 name.
ALLOWED = frozenset(
    ENUMS
    | _names("torch", f"Size Tensor device {_DTYPES} {_STORAGES}")
    | _names("torch._utils", "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter")
    | _names("torch._tensor", "_rebuild_from_type_v2")
    | _names("torch._C", "Generator")
    | _names("torch.nn.parameter", "Parameter")
    | _names("torch.serialization", "_get_layout")
    | _names("torch.storage", "UntypedStorage TypedStorage _load_from_bytes")
    | _names(
        "torch.distributed.checkpoint.metadata",
        "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties ChunkStorageMetadata MetadataIndex "
        "StorageMeta",
    )
    | _names("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    | _names("torch.distributed.checkpoint.planner", "SavePlan WriteItem TensorWriteData BytesIOWriteData")
    | _names("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata MCoreSavePlan")
    | _names("megatron.core.optimizer", "OptimizerConfig")
    | _names("megatron.core.optimizer.optimizer_config", "OptimizerConfig")
    | _names("collections", "OrderedDict")
    | _names("argparse", "Namespace")
    | _names("types", "SimpleNamespace")
    | _names("pathlib", "PosixPath PurePosixPath Path")
    | _names("pathlib._local", "PosixPath PurePosixPath Path")
    | _names("io", "BytesIO")
    | _names("_codecs", "encode")
    | _names("numpy", "dtype ndarray")
    | _names("numpy.dtypes", "UInt32DType")
    | _names("numpy.core.multiarray", "_reconstruct scalar")
    | _names("numpy._core.multiarray", "_reconstruct scalar")
    | _names("builtins", "getattr set frozenset bytearray bytes complex")
    | _names("__builtin__", "getattr set frozenset bytearray bytes complex")
)


# ---------------------------------------------------------------------------------------------------------------- read


class _Malformed(Exception):
    """The pickle contradicts itself; `decode` adds the place."""


class _Forbidden(Exception):
    """The pickle names what no checkpoint needs; `decode` adds the place."""


def decode(data: bytes, where: str, builders: Mapping[Global, Builder] | None = None) -> object:
    """The value that `data` describes; `where` names the file in errors.

    None, bool, int, float, str, bytes, tuple, list, dict and set are themselves, torch.Size is a tuple, OrderedDict an
    OrderedDict without attributes. All else is a Global, Reduce, Instance or PersistentId. `builders` says what to make
    of the arguments of a Reduce instead of recording it. Raises UnsafeFile for a name outside ALLOWED, CorruptFile for
    bytes that are not a whole pickle of protocol 2 to 5.
    """
    machine = _Machine(data, _BUILDERS if builders is None else {**_BUILDERS, **builders})
    try:
        return machine.run()
    except _Forbidden as error:
        raise UnsafeFile(
            f"{where}: byte {machine.position}: the pickle {error}, which no checkpoint needs. Nothing was executed. "
            "Do not load the file with other tools unless you trust its origin."
        ) from None
    except (_Malformed, ArithmeticError, LookupError, MemoryError, TypeError, ValueError, struct.error) as error:
        raise CorruptFile(
            f"{where}: byte {machine.position} of {len(data)}: not a whole pickle ({_reason(error)}). "
            "Fetch or write the file again."
        ) from None


def _reason(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__


def _ordered_dict(args: tuple[object, ...]) -> object:
    made: OrderedDict[object, object] = OrderedDict()
    for pair in cast(list[tuple[object, object]], args[0]) if args else ():
        key, value = pair
        made[_key(key)] = value
    return made


def _size(args: tuple[object, ...]) -> object:
    (sizes,) = args
    if type(sizes) is not tuple:
        raise _Malformed("torch.Size of something else than a tuple")
    return sizes


def _encoded(args: tuple[object, ...]) -> object:
    text, codec = args
    if type(text) is not str or codec != "latin1":
        raise _Forbidden("names _codecs.encode for something else than bytes")
    return text.encode("latin1")


def _bytes(args: tuple[object, ...]) -> object:
    if args:
        raise _Malformed("bytes with arguments")
    return b""


def _enum_member(args: tuple[object, ...]) -> object:
    """getattr(enum, name), the form of Python 3.11.0 to 3.11.3, and no other use of getattr."""
    if len(args) != 2 or type(args[0]) is not Global or args[0] not in ENUMS or type(args[1]) is not str:
        raise _Forbidden("names builtins.getattr for something else than the member of a known enum")
    return Reduce(args[0], (args[1],))


_BUILDERS: dict[Global, Builder] = {
    SIZE: _size,
    ORDERED_DICT: _ordered_dict,
    _ENCODE: _encoded,
    Global("builtins", "bytes"): _bytes,
    Global("__builtin__", "bytes"): _bytes,
    Global("builtins", "getattr"): _enum_member,
    Global("__builtin__", "getattr"): _enum_member,
}


@lru_cache(maxsize=1024)
def _permitted(module: str, name: str) -> Global:
    found = Global(module, name)
    if found not in ALLOWED:
        raise _Forbidden(f"names the global {module[:200]!r} {name[:200]!r}")
    return found


_FLAT = (str, int, float, bool, type(None), bytes, Global, Instance, Reduce)


def _key(value: object) -> object:
    """`value` if it can be a dict key. Tuples must be flat: hashing a deep one recurses without a limit."""
    if type(value) in _FLAT or (type(value) is tuple and all(type(item) in _FLAT for item in value)):
        return value
    raise _Malformed(f"a {type(value).__name__} as a key")


class _Machine:
    """A stack machine for pickle's opcodes; `pickletools` says what each one means. One method per kind of opcode."""

    def __init__(self, data: bytes, builders: Mapping[Global, Builder]) -> None:
        self.data = data
        self.builders = builders
        self.position = 0
        self.stack: list[object] = []
        self.below: list[list[object]] = []  # one stack for each open mark
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        """The value, once the whole pickle is read. Ends with an error where the bytes end without STOP."""
        data = self.data
        while True:
            opcode = data[self.position]
            self.position += 1
            if opcode == _STOP:
                return self.result()
            _OPERATIONS[opcode](self)

    def result(self) -> object:
        if self.below or len(self.stack) != 1 or self.position != len(self.data):
            raise _Malformed("it does not end in exactly one value")
        return self.stack[0]

    # Operands. A length is compared with the bytes that are there before it is used.

    def take(self, count: int) -> bytes:
        start = self.position
        taken = self.data[start : start + count]
        if len(taken) != count:
            raise _Malformed(f"{count} bytes expected, {len(taken)} left")
        self.position = start + count
        return taken

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        return str(self.take(end + 1 - self.position)[:-1], "utf-8")

    def check_protocol(self) -> None:
        if not 2 <= (version := self.number(1)) <= 5:
            raise _Malformed(f"protocol {version}, expected 2 to 5")

    def check_frame(self) -> None:
        if self.number(8) > len(self.data) - self.position:
            raise _Malformed("a frame longer than the file")

    # Values.

    def constant(self, value: object) -> None:
        self.stack.append(value)

    def tiny(self) -> None:
        self.stack.append(self.data[self.position])
        self.position += 1

    def small(self) -> None:
        self.stack.append(self.number(2))

    def signed(self, width: int) -> None:
        self.stack.append(int.from_bytes(self.take(width), "little", signed=True))

    def long(self, width: int) -> None:
        self.signed(self.number(width))

    def real(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def text(self, width: int) -> None:
        # surrogatepass: Python's pickler writes names of files that are not UTF-8 so.
        self.stack.append(str(self.take(self.number(width)), "utf-8", "surrogatepass"))

    def raw(self, width: int) -> None:
        self.stack.append(self.take(self.number(width)))

    # The stack and the memo.

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[object]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def drop(self) -> None:
        # A mark counts as an item: Python's pickler ends a tuple that contains itself in this way.
        self.stack = self.stack[:-1] if self.stack else self.below.pop()

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def put(self, width: int) -> None:
        self.memo[self.number(width)] = self.stack[-1]

    def get(self) -> None:
        self.stack.append(self.memo[self.data[self.position]])
        self.position += 1

    def get_far(self) -> None:
        self.stack.append(self.memo[_UINT32.unpack_from(self.data, self.position)[0]])
        self.position += 4

    # Containers.

    def marked_tuple(self) -> None:
        items = tuple(self.since_mark())
        self.stack.append(items)

    def single(self) -> None:
        self.stack[-1] = (self.stack[-1],)

    def short_tuple(self, length: int) -> None:
        items = tuple(self.stack[-length:])
        if len(items) != length:
            raise _Malformed("too few items for a tuple")
        self.stack[-length:] = [items]

    def frozen_set(self) -> None:
        items = frozenset(map(_key, self.since_mark()))
        self.stack.append(items)

    def append(self) -> None:
        value = self.stack.pop()
        _expect(list, self.stack[-1]).append(value)

    def extend(self) -> None:
        values = self.since_mark()
        _expect(list, self.stack[-1]).extend(values)

    def add_items(self) -> None:
        values = self.since_mark()
        _expect(set, self.stack[-1]).update(map(_key, values))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _expect(dict, self.stack[-1])[_key(key)] = value

    def set_items(self) -> None:
        items = self.since_mark()
        target = _expect(dict, self.stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) is str else _key(key)] = value

    # Names and objects.

    def named(self) -> None:
        module = self.line()
        self.stack.append(_permitted(module, self.line()))

    def named_by_stack(self) -> None:
        name, module = _expect(str, self.stack.pop()), _expect(str, self.stack.pop())
        self.stack.append(_permitted(module, name))

    def call_parts(self) -> tuple[tuple[object, ...], Global]:
        args, function = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple or type(function) is not Global:
            raise _Malformed("a call of something that is no name, or of a name without arguments")
        return args, function

    def call(self) -> None:
        args, function = self.call_parts()
        builder = self.builders.get(function)
        self.stack.append(Reduce(function, args) if builder is None else builder(args))

    def instance(self) -> None:
        args, cls = self.call_parts()
        self.stack.append(Instance(cls, None, args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Instance or type(target) is Reduce:
            # The memo may hold the object already, so it is completed, not replaced. From here on it is frozen.
            object.__setattr__(target, "state", state)
        elif not isinstance(target, OrderedDict):  # whose attributes (torch's _metadata, hooks) nobody needs
            raise _Malformed(f"a state for a {type(target).__name__}")

    def persistent(self) -> None:
        self.stack.append(PersistentId(self.stack.pop()))


def _expect(kind: type[_T], value: object) -> _T:
    if isinstance(value, kind):
        return value
    raise _Malformed(f"a {type(value).__name__} where a {kind.__name__} belongs")


def _unknown(machine: _Machine) -> None:
    opcode = machine.data[machine.position - 1]
    raise _Malformed(f"opcode 0x{opcode:02x} is unknown or of a kind that checkpoints do not contain")


_Operation = Callable[[_Machine], None]
_STOP = ord(".")
_UINT32 = struct.Struct("<I")


def _operation(method: Callable[[_Machine, int], None], operand: int) -> _Operation:
    return lambda machine: method(machine, operand)


def _constant(value: object) -> _Operation:
    return lambda machine: machine.stack.append(value)


# Missing on purpose: text opcodes of protocol 0 and 1, INST and OBJ (class calls), EXT (the copyreg registry),
# PERSID, NEWOBJ_EX, out-of-band buffers.
_BY_OPCODE: dict[bytes, _Operation] = {
    b"\x80": _Machine.check_protocol,
    b"\x95": _Machine.check_frame,
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b"K": _Machine.tiny,
    b"M": _Machine.small,
    b"J": _operation(_Machine.signed, 4),
    b"\x8a": _operation(_Machine.long, 1),
    b"\x8b": _operation(_Machine.long, 4),
    b"G": _Machine.real,
    b"\x8c": _operation(_Machine.text, 1),
    b"X": _operation(_Machine.text, 4),
    b"\x8d": _operation(_Machine.text, 8),
    b"C": _operation(_Machine.raw, 1),
    b"B": _operation(_Machine.raw, 4),
    b"\x8e": _operation(_Machine.raw, 8),
    b"(": _Machine.mark,
    b"0": _Machine.drop,
    b"1": lambda machine: machine.since_mark().clear(),
    b"2": lambda machine: machine.stack.append(machine.stack[-1]),
    b"\x94": _Machine.memoize,
    b"q": _operation(_Machine.put, 1),
    b"r": _operation(_Machine.put, 4),
    b"h": _Machine.get,
    b"j": _Machine.get_far,
    b")": _constant(()),
    b"t": _Machine.marked_tuple,
    b"\x85": _Machine.single,
    b"\x86": _operation(_Machine.short_tuple, 2),
    b"\x87": _operation(_Machine.short_tuple, 3),
    b"]": lambda machine: machine.stack.append([]),
    b"a": _Machine.append,
    b"e": _Machine.extend,
    b"}": lambda machine: machine.stack.append({}),
    b"s": _Machine.set_item,
    b"u": _Machine.set_items,
    b"\x8f": lambda machine: machine.stack.append(set()),
    b"\x90": _Machine.add_items,
    b"\x91": _Machine.frozen_set,
    b"c": _Machine.named,
    b"\x93": _Machine.named_by_stack,
    b"R": _Machine.call,
    b"\x81": _Machine.instance,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
}
_OPERATIONS: tuple[_Operation, ...] = tuple(_BY_OPCODE.get(bytes([code]), _unknown) for code in range(256))


# --------------------------------------------------------------------------------------------------------------- write


def encode(value: object, protocol: int = 2) -> bytes:
    """`value` as a pickle of protocol 2 (what torch.save uses) or 4 (what .metadata uses).

    `value` is a tree of None, bool, int, float, str, bytes, tuple, list, dict, OrderedDict, Global, Reduce, Instance
    and PersistentId. Strings and globals that occur again are references, everything else is written each time. Raises
    TypeError for any other value and ValueError for another protocol: mistakes of the program, not of a file.
    """
    if protocol not in (2, 4):
        raise ValueError(f"protocol {protocol}, expected 2 or 4")
    writer = _Writer(protocol)
    writer.write(value)
    return b"".join((b"\x80", bytes([protocol]), *writer.out, b"."))


@lru_cache(maxsize=1 << 16)
def _integer(value: int) -> bytes:
    if 0 <= value <= 0xFF:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value <= 0xFFFF:
        return b"M" + value.to_bytes(2, "little")
    if -(2**31) <= value < 2**31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    # Two's complement in as few bytes as hold the sign.
    width = ((value if value >= 0 else ~value).bit_length() >> 3) + 1
    if width > 0xFF:
        raise TypeError("an integer of more than 255 bytes cannot be written")
    return b"\x8a" + bytes([width]) + value.to_bytes(width, "little", signed=True)


# The C pickler's limit for one SETITEMS or APPENDS.
_BATCH = 1000
_DEFAULT_ENCODING = "latin1"


class _Writer:
    """Follows CPython's pickler step by step, memo included, so that its output is the same."""

    def __init__(self, protocol: int) -> None:
        self.protocol = protocol
        self.out: list[bytes] = []
        self.known: dict[str | Global, int] = {}
        self.memoized = 0

    def write(self, value: object) -> None:
        method = _WRITERS.get(type(value))
        if method is None:
            raise TypeError(f"a {type(value).__name__} cannot be written: not one of the values of a checkpoint")
        method(self, value)

    def memoize(self) -> None:
        index = self.memoized
        self.memoized = index + 1
        if self.protocol == 4:
            self.out.append(b"\x94")
        else:
            self.out.append(b"q" + bytes([index]) if index < 256 else b"r" + index.to_bytes(4, "little"))

    def again(self, value: str | Global) -> bool:
        """Write a reference if `value` was written before, else remember that it comes next."""
        index = self.known.get(value)
        if index is None:
            return False
        self.out.append(b"h" + bytes([index]) if index < 256 else b"j" + index.to_bytes(4, "little"))
        return True

    def remember(self, value: str | Global) -> None:
        self.known[value] = self.memoized
        self.memoize()

    def integer(self, value: int) -> None:
        self.out.append(_integer(value))

    def real(self, value: float) -> None:
        self.out.append(b"G" + struct.pack(">d", value))

    def text(self, value: str) -> None:
        if self.again(value):
            return
        data = value.encode("utf-8", "surrogatepass")
        if self.protocol == 4 and len(data) < 256:
            self.out.append(b"\x8c" + bytes([len(data)]) + data)
        else:
            self.out.append(b"X" + len(data).to_bytes(4, "little") + data)
        self.remember(value)

    def raw(self, value: bytes) -> None:
        if self.protocol == 2:
            self.raw_as_text(value)
        elif len(value) < 256:
            self.out.append(b"C" + bytes([len(value)]) + value)
            self.memoize()
        else:
            self.out.append(b"B" + len(value).to_bytes(4, "little") + value)
            self.memoize()

    def raw_as_text(self, value: bytes) -> None:
        # Protocol 2 has no bytes. `__builtin__` is what builtins were called when it was made.
        if value:
            self.reduce(Reduce(_ENCODE, (value.decode(_DEFAULT_ENCODING), _DEFAULT_ENCODING)))
        else:
            self.reduce(Reduce(Global("__builtin__", "bytes"), ()))

    def write_tuple(self, value: tuple[object, ...]) -> None:
        if not value:
            self.out.append(b")")
        elif len(value) <= 3:
            self.each(value)
            self.out.append(b"\x85\x86\x87"[len(value) - 1 : len(value)])
            self.memoize()
        else:
            self.out.append(b"(")
            self.each(value)
            self.out.append(b"t")
            self.memoize()

    def each(self, values: Iterable[object]) -> None:
        out = self.out
        for value in values:
            if type(value) is int:  # most of what a .metadata holds
                out.append(_integer(value))
            else:
                self.write(value)

    def write_list(self, value: Sequence[object]) -> None:
        self.out.append(b"]")
        self.memoize()
        self.items([(item,) for item in value], b"a", b"e")

    def write_dict(self, value: Mapping[object, object]) -> None:
        self.out.append(b"}")
        self.memoize()
        self.items(list(value.items()), b"s", b"u")

    def ordered_dict(self, value: Mapping[object, object]) -> None:
        self.reduce(Reduce(ORDERED_DICT, ()))
        items = list(value.items())
        for start in range(0, len(items), _BATCH):
            self.items(items[start : start + _BATCH], b"s", b"u")

    def items(self, items: Sequence[tuple[object, ...]], one: bytes, many: bytes) -> None:
        if len(items) == 1:
            self.each(items[0])
            self.out.append(one)
            return
        for start in range(0, len(items), _BATCH):
            self.out.append(b"(")
            for item in items[start : start + _BATCH]:
                self.each(item)
            self.out.append(many)

    def name(self, value: Global) -> None:
        if self.again(value):
            return
        if self.protocol == 4:
            self.each((value.module, value.name))
            self.out.append(b"\x93")
        else:
            self.out.append(f"c{value.module}\n{value.name}\n".encode())
        self.remember(value)

    def reduce(self, value: Reduce) -> None:
        self.each((value.callable, value.args))
        self.out.append(b"R")
        self.memoize()
        self.state(value.state)

    def instance(self, value: Instance) -> None:
        self.each((value.cls, value.args))
        self.out.append(b"\x81")
        self.memoize()
        self.state(value.state)

    def state(self, value: object) -> None:
        if value is not None:
            self.write(value)
            self.out.append(b"b")

    def persistent(self, value: PersistentId) -> None:
        self.write(value.value)
        self.out.append(b"Q")


_WRITERS: dict[type, Callable[[_Writer, Any], None]] = {
    type(None): lambda writer, value: writer.out.append(b"N"),
    bool: lambda writer, value: writer.out.append(b"\x88" if value else b"\x89"),
    int: _Writer.integer,
    float: _Writer.real,
    str: _Writer.text,
    bytes: _Writer.raw,
    tuple: _Writer.write_tuple,
    list: _Writer.write_list,
    dict: _Writer.write_dict,
    OrderedDict: _Writer.ordered_dict,
    Global: _Writer.name,
    Reduce: _Writer.reduce,
    Instance: _Writer.instance,
    PersistentId: _Writer.persistent,
}
