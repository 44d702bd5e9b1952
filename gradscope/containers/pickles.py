"""Reading pickles as data: an interpreter of pickle opcodes that can call nothing.

``pickle.Unpickler`` calls whatever its ``find_class`` returns, hashes whatever keys it is given and
allocates whatever lengths it is told. This reader walks ``pickletools.genops`` instead and only
ever builds builtin containers and inert records, so there is nothing to escape from; its time and
memory are linear in the pickle.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from gradscope.containers.pickle_machine import Arguments, Described, Dialect, Machine, hashable
from gradscope.errors import InputError
from gradscope.text import escaped, listed

#: Real ones are kilobytes to a few megabytes: the tensors lie outside the pickle.
MAX_PICKLE_BYTES = 512 << 20
_LONGEST_LINE = 1 << 20
_MOST_NAMES = 20
_REFUSAL = (
    "needs arbitrary Python classes or functions ({}), which only executing the pickle could "
    "build; gradscope never does. In the environment that made it, save the data in it in another "
    "format"
)


@dataclass(frozen=True, slots=True)
class Unpickled:
    """A value made of builtins and records; ``end`` is the position after the pickle."""

    value: object
    end: int
    #: Opcodes run: no value can have more parts, except by sharing.
    steps: int
    #: What the pickle refers to outside itself, in the order of the references.
    persisted: tuple[object, ...]
    #: The classes and functions that it names, in the order of their first occurrence.
    names: tuple[str, ...]


def read_pickle(
    data: bytes | BinaryIO,
    path: str | Path,
    where: str,
    dialect: Dialect,
    *,
    end: int | None = None,
    refusal: str = _REFUSAL,
) -> Unpickled:
    """Read one pickle from bytes, or from a file at its position and not beyond ``end``.

    ``where`` names the pickle in messages. Raises InputError: ``unsafe`` says ``refusal``, with
    every class or function that the pickle names and the dialect does not know; ``malformed`` and
    ``truncated`` say that it cannot be read.
    """
    window = _window(data, end)
    machine = Machine(dialect)
    try:
        steps = machine.run(window)
    # Whatever a hostile pickle provokes (stack underflow, bad text, deep nesting, no memory) is
    # a fault of the file, and any names seen on the way are still worth telling.
    except Exception as error:
        _refuse(machine.refused, path, where, refusal)
        raise _broken(window, path, where, error) from None
    _refuse(machine.refused, path, where, refusal)
    names = tuple(machine.globals)
    return Unpickled(machine.result, window.tell(), steps, tuple(machine.persisted), names)


def _broken(window: _Window, path: str | Path, where: str, error: Exception) -> InputError:
    if window.exhausted and window.is_file:
        return InputError(
            path,
            "truncated",
            f"ends inside {where}: the file is incomplete. Copy or download it again",
        )
    reason = escaped(str(error), 120) or type(error).__name__
    return InputError(
        path, "malformed", f"{where} is not a valid pickle near byte {window.tell()}: {reason}"
    )


def _refuse(names: Mapping[str, None], path: str | Path, where: str, refusal: str) -> None:
    if names:
        shown = listed((escaped(n, 120) for n in sorted(names)), len(names), _MOST_NAMES)
        raise InputError(path, "unsafe", f"{where} {refusal.format(shown)}")


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


# --- what the names of Python's own library stand for ---------------------------------------------


def _items(machine: Machine, args: Arguments) -> list[object]:
    """A set, list or tuple, as a list: nothing is hashed, and sharing cannot multiply it."""
    if not args:
        return []
    (items,) = args
    if not isinstance(items, (list, tuple)):
        raise ValueError("a collection is built from something that is not a list")
    machine.spend(len(items))
    return list(items)


def tuple_of(machine: Machine, args: Arguments) -> tuple[object, ...]:
    """The tuple that a call with one list or tuple stands for."""
    return tuple(_items(machine, args))


def _mapping(machine: Machine, args: Arguments) -> dict[object, object]:
    if not args:
        return {}
    (pairs,) = args
    if isinstance(pairs, dict):
        machine.spend(len(pairs))
        return dict(pairs)
    if not isinstance(pairs, (list, tuple)):
        raise ValueError("a mapping is built from something that is not a list of pairs")
    machine.spend(len(pairs))
    return {hashable(key): value for key, value in cast("list[tuple[object, object]]", pairs)}


def _ordered(machine: Machine, args: Arguments) -> Described:
    return Described(_mapping(machine, args))


def _defaultdict(machine: Machine, args: Arguments) -> dict[object, object]:
    return _mapping(machine, args[1:])


def _encoded(machine: Machine, args: Arguments) -> bytes:
    """Bytes in a pickle of protocol 2: ``_codecs.encode(text, 'latin1')``."""
    text, *rest = args
    if not isinstance(text, str) or rest not in ([], ["latin1"], ["latin-1"]):
        raise ValueError("_codecs.encode of something other than latin1 text")
    machine.spend(len(text))
    return text.encode("latin1")


def _bytearray(machine: Machine, args: Arguments) -> bytes:
    if args and isinstance(args[0], bytes):
        return args[0]
    return _encoded(machine, args) if args else b""


def _complex(_machine: Machine, args: Arguments) -> complex:
    real, imaginary = args
    if not isinstance(real, (int, float)) or not isinstance(imaginary, (int, float)):
        raise ValueError("a complex number of something other than numbers")
    return complex(real, imaginary)


#: Names that stand for plain values.
PYTHON_CALLS: Mapping[str, Callable[[Machine, Arguments], object]] = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _mapping,
    "collections.defaultdict": _defaultdict,
    "builtins.dict": _mapping,
    "builtins.set": _items,
    "builtins.frozenset": _items,
    "builtins.list": _items,
    "builtins.tuple": tuple_of,
    "builtins.bytes": _bytearray,
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
    "_codecs.encode": _encoded,
}
#: Harmless names of Python's library, whose calls become records.
PYTHON_INERT = frozenset(
    {
        "builtins.bool", "builtins.float", "builtins.int", "builtins.object",
        "builtins.range", "builtins.slice", "builtins.str",
        "collections.deque", "copyreg._reconstructor",
        "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta",
        "datetime.timezone",
        "pathlib._local.PosixPath", "pathlib._local.PurePosixPath", "pathlib._local.WindowsPath",
        "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePath", "pathlib.PurePosixPath",
        "pathlib.PureWindowsPath", "pathlib.WindowsPath",
    }
)  # fmt: skip
