"""Reading pickles as data: an interpreter of pickle opcodes that can call nothing.

``pickle.Unpickler`` calls whatever its ``find_class`` returns, hashes whatever keys it is given and
allocates whatever lengths it is told. This reader walks ``pickletools.genops`` instead and only
ever builds builtin containers and the inert records below, so there is nothing to escape from; its
time and memory are linear in the pickle.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from gradscope.errors import InputError

#: Real ones are kilobytes to a few megabytes: the tensors lie outside the pickle.
MAX_PICKLE_BYTES = 512 << 20
MAX_DIMENSIONS = 64
_INT64 = 1 << 63
_LONGEST_LINE = 1 << 20

Arguments = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that the pickle names; never imported."""

    name: str


@dataclass(eq=False, slots=True)
class Instance:
    """What calling ``Global(name)`` would have built: the name, the arguments and the state."""

    name: str
    args: Arguments = ()
    state: object = None


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """A persistent id of torch: which storage, of which class, with how many elements."""

    kind: str
    key: str
    numel: int
    #: ``(key, offset, numel)`` of a view, in legacy files of old versions.
    view: tuple[str, int, int] | None = None


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A strided tensor over a storage; ``unreadable`` says why there are no plain elements."""

    storage: StorageRecord | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None = None
    unreadable: str | None = None


@dataclass(frozen=True, slots=True)
class Unpickled:
    """A value made of builtins and records; ``end`` is the position after the pickle."""

    value: object
    end: int
    #: Opcodes run: no value can have more parts, except by sharing.
    steps: int
    #: Every storage that the pickle refers to, by key.
    storages: Mapping[str, StorageRecord]


def read_pickle(
    data: bytes | BinaryIO,
    path: str | Path,
    where: str,
    *,
    end: int | None = None,
    allow: Callable[[str], bool] = lambda _name: False,
) -> Unpickled:
    """Read one pickle from bytes, or from a file at its position and not beyond ``end``.

    ``allow`` widens the closed list of names that may occur; all become inert records. Raises
    InputError: ``unsafe`` names every other class or function that the pickle needs, ``malformed``
    and ``truncated`` say that it cannot be read.
    """
    window = _window(data, end)
    machine = _Machine(allow)
    try:
        steps = machine.run(window)
    except InputError:
        raise
    # Whatever a hostile pickle provokes (stack underflow, bad text, deep nesting, no memory) is
    # a fault of the file, and any names seen on the way are still worth telling.
    except Exception as error:
        _refuse(machine.refused, path, where)
        raise _broken(window, path, where, error) from None
    _refuse(machine.refused, path, where)
    return Unpickled(machine.result, window.tell(), steps, machine.storages)


def _broken(window: _Window, path: str | Path, where: str, error: Exception) -> InputError:
    if window.exhausted and window.is_file:
        return InputError(
            path,
            "truncated",
            f"ends inside {where}: the file is incomplete. Copy or download it again",
        )
    reason = printable(str(error)) or type(error).__name__
    return InputError(
        path, "malformed", f"{where} is not a valid pickle near byte {window.tell()}: {reason}"
    )


def _refuse(names: Mapping[str, None], path: str | Path, where: str) -> None:
    if names:
        raise InputError(path, "unsafe", _conversion_advice([*names], where))


def _conversion_advice(names: list[str], where: str) -> str:
    shown = ", ".join(printable(name) for name in sorted(names)[:20])
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (
        f"{where} needs arbitrary Python classes or functions ({shown}{more}), which only "
        "executing the pickle could build; gradscope never does. In the environment that made it, "
        "save just the state dict: torch.save(model.state_dict(), 'weights.pt') or "
        "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
    )


def printable(text: str, longest: int = 120) -> str:
    """Text from a stranger's file, on one line and without control characters."""
    short = text if len(text) <= longest else text[:longest] + "…"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in short)


class _Window:
    """The part of a stream that a pickle may lie in; never reads, nor allocates, more than it."""

    def __init__(self, stream: BinaryIO, end: int, is_file: bool) -> None:
        self._stream = stream
        self._at = stream.tell()
        self._end = min(end, self._at + MAX_PICKLE_BYTES)
        self.is_file = is_file
        self.exhausted = False

    def read(self, count: int) -> bytes:
        if count > self._end - self._at:
            self.exhausted = True
            count = self._end - self._at
        data = self._stream.read(count)
        self._at += len(data)
        return data

    def readline(self) -> bytes:
        line = self._stream.readline(min(_LONGEST_LINE, self._end - self._at))
        self._at += len(line)
        if not line.endswith(b"\n"):
            self.exhausted = self.exhausted or self._at >= self._end
        return line

    def tell(self) -> int:
        return self._at


def _window(data: bytes | BinaryIO, end: int | None) -> _Window:
    if isinstance(data, bytes):
        return _Window(io.BytesIO(data), len(data), is_file=False)
    return _Window(data, MAX_PICKLE_BYTES if end is None else end, is_file=True)


# --- what the names in a torch pickle stand for ---------------------------------------------------

_STORAGE = re.compile(r"torch\.(cuda\.|storage\.)?\w{1,32}Storage")
_TENSOR_TYPE = re.compile(r"torch\.(cuda\.)?\w{1,16}Tensor")
_DTYPE = re.compile(
    r"torch\.(u?int\d{1,2}|float\d{1,2}|float[48]_\w{1,16}|bfloat16|complex\d{2,3}|bool|half|double"
    r"|float|long|int|short|q?u?int\d{1,2}|quint\dx\d|bits\d{1,2}(x\d)?)"
)
_NUMPY = re.compile(
    r"numpy\.(dtype|ndarray|bool_?|u?int\d{1,2}|float\d{1,3}|complex\d{2,3}|str_|bytes_"
    r"|dtypes\.\w{1,32}DType|_?core\.multiarray\.(scalar|_reconstruct)"
    r"|_?core\.numeric\._frombuffer)"
)
_INERT = frozenset(
    {
        "builtins.bool", "builtins.float", "builtins.int", "builtins.object",
        "builtins.range", "builtins.slice", "builtins.str",
        "collections.deque", "copyreg._reconstructor",
        "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta",
        "datetime.timezone",
        "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePath", "pathlib.PurePosixPath",
        "pathlib.PureWindowsPath", "pathlib.WindowsPath",
        "torch.Tensor", "torch.device", "torch.memory_format", "torch.serialization._get_layout",
        "torch.nn.parameter.Buffer", "torch.nn.parameter.Parameter",
        "torch.channels_last", "torch.contiguous_format", "torch.preserve_format",
        "torch.strided", "torch.per_tensor_affine", "torch.per_tensor_symmetric",
        "torch.per_channel_affine", "torch.per_channel_symmetric",
        "torch.per_channel_affine_float_qparams", "torch.torch_version.TorchVersion",
    }
)  # fmt: skip
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def _is_allowed(name: str) -> bool:
    return (
        name in _CALLS
        or name in _INERT
        or any(pattern.fullmatch(name) for pattern in (_STORAGE, _TENSOR_TYPE, _DTYPE, _NUMPY))
    )


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < _INT64:
        raise ValueError("a tensor's offset, size or stride is not a whole number of 64 bits")
    return value


def _extents(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS:
        raise ValueError("a tensor's shape or strides is not a short tuple")
    return tuple(_whole(item) for item in value)


def _strided(storage: object, offset: object, shape: object, strides: object) -> TensorRecord:
    if not isinstance(storage, StorageRecord):
        raise ValueError("a tensor is built over something that is no storage")
    record = TensorRecord(storage, _whole(offset), _extents(shape), _extents(strides))
    if len(record.shape) != len(record.strides):
        raise ValueError("a tensor has a different number of sizes and strides")
    return record


def _without_elements(shape: tuple[int, ...], why: str) -> TensorRecord:
    return TensorRecord(None, 0, shape, (), unreadable=why)


def _tensor(_machine: _Machine, args: Arguments) -> TensorRecord:
    storage, offset, shape, strides = args[:4]
    return _with_bits(_strided(storage, offset, shape, strides), args[6:7])


def _tensor_v3(_machine: _Machine, args: Arguments) -> TensorRecord:
    storage, offset, shape, strides = args[:4]
    dtype = args[6]
    if not isinstance(dtype, Global):
        raise ValueError("a tensor's dtype is no dtype")
    record = _with_bits(_strided(storage, offset, shape, strides), args[7:8])
    return TensorRecord(
        record.storage, record.offset, record.shape, record.strides, dtype.name, record.unreadable
    )


def _with_bits(record: TensorRecord, metadata: Arguments) -> TensorRecord:
    """Conjugation and negation may be pending: what is stored is then not the tensor's values."""
    bits = metadata[0] if metadata else None
    if not isinstance(bits, dict) or not (bits.get("conj") or bits.get("neg")):
        return record
    return _without_elements(record.shape, "a lazily conjugated or negated view")


def _quantized(_machine: _Machine, args: Arguments) -> TensorRecord:
    record = _strided(args[0], args[1], args[2], args[3])
    return _without_elements(record.shape, "quantized tensor")


def _sparse(_machine: _Machine, _args: Arguments) -> TensorRecord:
    return _without_elements((), "sparse tensor")


def _nested(_machine: _Machine, _args: Arguments) -> TensorRecord:
    return _without_elements((), "nested tensor")


def _meta(_machine: _Machine, args: Arguments) -> TensorRecord:
    return _without_elements(_extents(args[1]), "meta tensor: saved without values")


def _wrapper(_machine: _Machine, _args: Arguments) -> TensorRecord:
    return _without_elements((), "tensor subclass without a storage")


def _first(_machine: _Machine, args: Arguments) -> object:
    return args[0]


def _from_type(machine: _Machine, args: Arguments) -> object:
    function, _type, arguments, _state = args
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("a tensor with attributes is not built by a function")
    return machine.call(function, arguments)


def _items(machine: _Machine, args: Arguments) -> list[object]:
    """A set, list or tuple, as a list: nothing is hashed, and sharing cannot multiply it."""
    if not args:
        return []
    (items,) = args
    if not isinstance(items, (list, tuple)):
        raise ValueError("a collection is built from something that is no list")
    machine.spend(len(items))
    return list(items)


def _size(machine: _Machine, args: Arguments) -> tuple[object, ...]:
    return tuple(_items(machine, args))


def _mapping(machine: _Machine, args: Arguments) -> dict[object, object]:
    if not args:
        return {}
    (pairs,) = args
    if isinstance(pairs, dict):
        machine.spend(len(pairs))
        return dict(pairs)
    if not isinstance(pairs, (list, tuple)):
        raise ValueError("a mapping is built from something that is no list of pairs")
    machine.spend(len(pairs))
    return {_key(key): value for key, value in cast("list[tuple[object, object]]", pairs)}


def _defaultdict(machine: _Machine, args: Arguments) -> dict[object, object]:
    return _mapping(machine, args[1:])


def _encoded(machine: _Machine, args: Arguments) -> bytes:
    """Bytes in a pickle of protocol 2: ``_codecs.encode(text, 'latin1')``."""
    text, *rest = args
    if not isinstance(text, str) or rest not in ([], ["latin1"], ["latin-1"]):
        raise ValueError("_codecs.encode of something else than latin1 text")
    machine.spend(len(text))
    return text.encode("latin1")


def _bytearray(machine: _Machine, args: Arguments) -> bytes:
    if args and isinstance(args[0], bytes):
        return args[0]
    return _encoded(machine, args) if args else b""


def _complex(_machine: _Machine, args: Arguments) -> complex:
    real, imaginary = args
    if not isinstance(real, (int, float)) or not isinstance(imaginary, (int, float)):
        raise ValueError("a complex number of something else than numbers")
    return complex(real, imaginary)


def _numpy_array(_machine: _Machine, _args: Arguments) -> TensorRecord:
    return _without_elements((), "NumPy array inside the pickle")


_CALLS: Mapping[str, Callable[[_Machine, Arguments], object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_xla_tensor": _first,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch.Size": _size,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "numpy.core.multiarray._reconstruct": _numpy_array,
    "numpy._core.multiarray._reconstruct": _numpy_array,
    "numpy.core.numeric._frombuffer": _numpy_array,
    "numpy._core.numeric._frombuffer": _numpy_array,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": _defaultdict,
    "builtins.dict": _mapping,
    "builtins.set": _items,
    "builtins.frozenset": _items,
    "builtins.list": _items,
    "builtins.tuple": _size,
    "builtins.bytes": _bytearray,
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
    "_codecs.encode": _encoded,
}


# --- the interpreter ------------------------------------------------------------------------------


def _key(key: object) -> object:
    """A key that is cheap to hash: nested tuples and huge integers can be made to take for ever."""
    if key is None or isinstance(key, (str, bytes, bool, Global)):
        return key
    if isinstance(key, int) and abs(key) < 1 << 60:
        return key
    if isinstance(key, tuple) and len(key) <= 8 and all(type(part) is str for part in key):
        return key
    return Instance("key", (key,))


_CONSTANTS: Mapping[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    {
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
        "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    }
)  # fmt: skip


@dataclass(eq=False, slots=True)
class _Machine:
    """The stack machine of pickle, with inert records where pickle would call."""

    allow: Callable[[str], bool]
    stack: list[object] = field(default_factory=list)
    marks: list[list[object]] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)
    #: An ordered set of the names that are not allowed.
    refused: dict[str, None] = field(default_factory=dict)
    globals: dict[str, Global] = field(default_factory=dict)
    storages: dict[str, StorageRecord] = field(default_factory=dict)
    result: object = None
    copied: int = 0
    source: _Window | None = None

    def run(self, window: _Window) -> int:
        """Interpret one pickle; returns the number of opcodes."""
        self.source = window
        steps = 0
        # genops reads from anything with read, readline and tell.
        for opcode, arg, _ in pickletools.genops(cast("BinaryIO", window)):
            steps += 1
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(bytes(arg) if type(arg) is bytearray else arg)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _STEPS:
                _STEPS[name](self, arg)
            else:
                raise ValueError(f"opcode {name} has no place in a checkpoint")
        return steps

    def spend(self, copied: int) -> None:
        """Copies never exceed what the pickle wrote, unless it multiplies something shared."""
        self.copied += copied
        if self.source is not None and self.copied > self.source.tell():
            raise ValueError("it copies shared values again and again")

    def pop_mark(self) -> list[object]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def find(self, module: object, name: object) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global's name is not text")
        dotted = f"{_RENAMED.get(module, module)}.{name}"
        if dotted not in self.globals:
            self.globals[dotted] = Global(dotted)
            if not _is_allowed(dotted) and not self.allow(dotted):
                self.refused[dotted] = None
        return self.globals[dotted]

    def call(self, function: object, args: object) -> object:
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise ValueError("it calls something that is no class or function")
        handler = _CALLS.get(function.name)
        return handler(self, args) if handler else Instance(function.name, args)

    def build(self, _arg: object) -> None:
        """BUILD sets attributes: kept on records, dropped elsewhere (``_metadata`` of a dict)."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Instance):
            target.state = state

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update((_key(k), v) for k, v in zip(items[::2], items[1::2], strict=True))
        elif not isinstance(target, Instance):
            raise ValueError("it sets items of something that is no dictionary")

    def append_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Instance):
            raise ValueError("it appends to something that is no list")

    def persistent(self, _arg: object) -> None:
        record = _storage(self.stack.pop())
        if isinstance(record, StorageRecord):
            self.storages.setdefault(record.key, record)
        self.stack.append(record)


def _storage(pid: object) -> object:
    """The storage that a persistent id names; a legacy file also marks its module classes."""
    if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
        return pid[1]
    if (
        not isinstance(pid, tuple)
        or len(pid) not in (5, 6)
        or pid[0] not in ("storage", b"storage")
    ):
        raise ValueError("a persistent id is not that of a torch storage")
    kind, key, numel = pid[1], pid[2], pid[4]
    if not isinstance(kind, Global) or not isinstance(key, (str, int)):
        raise ValueError("a persistent id is not that of a torch storage")
    view = _view(pid[5]) if len(pid) == 6 and pid[5] is not None else None
    return StorageRecord(kind.name.rpartition(".")[2], str(key), _whole(numel), view)


def _view(metadata: object) -> tuple[str, int, int]:
    key, offset, numel = cast("tuple[object, object, object]", metadata)
    if not isinstance(key, (str, int)):
        raise ValueError("a storage view has no key")
    return str(key), _whole(offset), _whole(numel)


def _no_effect(machine: _Machine, arg: object) -> None:
    pass


def _put(machine: _Machine, arg: object) -> None:
    machine.memo[cast("int", arg)] = machine.stack[-1]


def _memoize(machine: _Machine, _arg: object) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(machine: _Machine, arg: object) -> None:
    machine.stack.append(machine.memo[cast("int", arg)])


def _mark(machine: _Machine, _arg: object) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine, _arg: object) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _push_mark(make: Callable[[_Machine, list[object]], object]) -> Callable[..., None]:
    def step(machine: _Machine, _arg: object) -> None:
        items = machine.pop_mark()
        machine.stack.append(make(machine, items))

    return step


def _on_mark(method: Callable[[_Machine, list[object]], None]) -> Callable[..., None]:
    return lambda machine, _arg: method(machine, machine.pop_mark())


def _on_top(count: int, method: Callable[[_Machine, list[object]], None]) -> Callable[..., None]:
    return lambda machine, _arg: method(machine, _take(machine, count))


def _take(machine: _Machine, count: int) -> list[object]:
    if len(machine.stack) < count:
        raise ValueError("its stack runs empty")
    items = machine.stack[-count:]
    del machine.stack[-count:]
    return items


def _push(make: Callable[[], object]) -> Callable[..., None]:
    return lambda machine, _arg: machine.stack.append(make())


def _push_tuple(count: int) -> Callable[..., None]:
    return lambda machine, _arg: machine.stack.append(tuple(_take(machine, count)))


def _dict_of(_machine: _Machine, items: list[object]) -> dict[object, object]:
    return {_key(k): v for k, v in zip(items[::2], items[1::2], strict=True)}


def _global(machine: _Machine, arg: object) -> None:
    module, _, name = cast("str", arg).partition(" ")
    machine.stack.append(machine.find(module, name))


def _stack_global(machine: _Machine, _arg: object) -> None:
    module, name = _take(machine, 2)
    machine.stack.append(machine.find(module, name))


def _reduce(machine: _Machine, _arg: object) -> None:
    function, args = _take(machine, 2)
    machine.stack.append(machine.call(function, args))


def _new_with_keywords(machine: _Machine, _arg: object) -> None:
    function, args, _keywords = _take(machine, 3)
    machine.stack.append(machine.call(function, args))


def _inst(machine: _Machine, arg: object) -> None:
    module, _, name = cast("str", arg).partition(" ")
    args = tuple(machine.pop_mark())
    machine.stack.append(machine.call(machine.find(module, name), args))


def _obj(machine: _Machine, items: list[object]) -> object:
    return machine.call(items[0], tuple(items[1:]))


def _stop(machine: _Machine, _arg: object) -> None:
    machine.result = machine.stack.pop()


_STEPS: Mapping[str, Callable[..., None]] = {
    "PROTO": _no_effect,
    "FRAME": _no_effect,
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _memoize,
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": lambda machine, _arg: machine.pop_mark(),
    "DUP": lambda machine, _arg: machine.stack.append(machine.stack[-1]),
    "EMPTY_LIST": _push(list),
    "EMPTY_DICT": _push(dict),
    "EMPTY_SET": _push(list),
    "EMPTY_TUPLE": _push(tuple),
    "TUPLE1": _push_tuple(1),
    "TUPLE2": _push_tuple(2),
    "TUPLE3": _push_tuple(3),
    "TUPLE": _push_mark(lambda _machine, items: tuple(items)),
    "LIST": _push_mark(lambda _machine, items: items),
    "FROZENSET": _push_mark(lambda _machine, items: items),
    "DICT": _push_mark(_dict_of),
    "APPEND": _on_top(1, _Machine.append_items),
    "APPENDS": _on_mark(_Machine.append_items),
    "ADDITEMS": _on_mark(_Machine.append_items),
    "SETITEM": _on_top(2, _Machine.set_items),
    "SETITEMS": _on_mark(_Machine.set_items),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_with_keywords,
    "INST": _inst,
    "OBJ": _push_mark(_obj),
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "STOP": _stop,
}
