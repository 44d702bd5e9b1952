"""The stack machine of pickle, with inert records where pickle would call.

It builds builtin containers and the records below and nothing else; what a class or function name
may stand for is a ``Dialect``, given by who knows what the pickle is about.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import BinaryIO, Protocol, cast

Arguments = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that the pickle names; never imported."""

    name: str


@dataclass(eq=False, slots=True)
class Instance:
    """What calling ``Global(name)`` would have built, with all that the pickle puts into it."""

    name: str
    args: Arguments = ()
    state: object = None
    #: Of a class that derives from dict.
    items: dict[object, object] = field(default_factory=dict)
    #: Of a class that derives from list.
    elements: list[object] = field(default_factory=list)


class Described(dict[object, object]):
    """A dictionary of a class that also takes attributes, with those that the pickle sets."""

    attributes: Mapping[object, object] = MappingProxyType({})


class Source(Protocol):
    """What opcodes are read from."""

    def read(self, count: int) -> bytes:
        """Up to ``count`` bytes."""

    def readline(self) -> bytes:
        """A line, with its end."""

    def tell(self) -> int:
        """The position, in bytes."""


def _refuse_persistent(_pid: object) -> object:
    raise ValueError("it refers to objects outside the pickle")


@dataclass(frozen=True, slots=True)
class Dialect:
    """What the names in a pickle stand for, beyond numbers, text and containers."""

    #: Names that stand for a value computed from the arguments of the call.
    calls: Mapping[str, Callable[[Machine, Arguments], object]]
    #: Whether any other name may occur; a call of it becomes an Instance.
    is_inert: Callable[[str], bool] = lambda _name: False
    #: The value of a persistent id, which refers to something outside the pickle.
    persistent: Callable[[object], object] = _refuse_persistent


def hashable(key: object) -> object:
    """A key that is cheap to hash: nested tuples and huge integers can be made to take for ever."""
    if key is None or isinstance(key, (str, bytes, bool, Global, Instance)):
        return key
    if isinstance(key, int) and abs(key) < 1 << 60:
        return key
    if isinstance(key, tuple) and len(key) <= 8 and all(type(part) is str for part in key):
        return key
    return Instance("key", (key,))


@dataclass(eq=False, slots=True)
class Machine:
    """One run over one pickle. Whatever a hostile pickle provokes is raised, of any class."""

    dialect: Dialect
    stack: list[object] = field(default_factory=list)
    marks: list[list[object]] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)
    #: An ordered set of the names that the dialect does not know.
    refused: dict[str, None] = field(default_factory=dict)
    globals: dict[str, Global] = field(default_factory=dict)
    #: The values of the persistent ids, in the order of their occurrence.
    persisted: list[object] = field(default_factory=list)
    result: object = None
    copied: int = 0
    source: Source | None = None

    def run(self, source: Source) -> int:
        """Interpret one pickle; returns the number of opcodes."""
        self.source = source
        steps = 0
        # genops reads from anything with read, readline and tell.
        for opcode, arg, _ in pickletools.genops(cast("BinaryIO", source)):
            steps += 1
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(bytes(arg) if type(arg) is bytearray else arg)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _STEPS:
                _STEPS[name](self, arg)
            else:
                raise ValueError(f"opcode {name} is not used by plain data")
        return steps

    def spend(self, copied: int) -> None:
        """Copies never exceed what the pickle wrote, unless it multiplies something shared."""
        self.copied += copied
        if self.source is not None and self.copied > self.source.tell():
            raise ValueError("it copies shared values again and again")

    def pop_mark(self) -> list[object]:
        """Everything above the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def take(self, count: int) -> list[object]:
        """The topmost values, removed from the stack."""
        if len(self.stack) < count:
            raise ValueError("its stack runs empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def find(self, module: object, name: object) -> Global:
        """The record of a name; one that the dialect does not know is noted in ``refused``."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global's name is not text")
        dotted = _present_name(module, name)
        if dotted not in self.globals:
            self.globals[dotted] = Global(dotted)
            if dotted not in self.dialect.calls and not self.dialect.is_inert(dotted):
                self.refused[dotted] = None
        return self.globals[dotted]

    def call(self, function: object, args: object) -> object:
        """What the dialect says that a call stands for, else an Instance."""
        if not isinstance(function, (Global, Instance)) or not isinstance(args, tuple):
            raise ValueError("it calls something that is not a class or function")
        handler = self.dialect.calls.get(function.name) if isinstance(function, Global) else None
        return handler(self, args) if handler else Instance(function.name, args)

    def build(self, _arg: object) -> None:
        """BUILD sets attributes: kept on records and described dictionaries, dropped elsewhere."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Instance):
            target.state = state
        elif isinstance(target, Described) and isinstance(state, dict):
            target.attributes = state

    def set_items(self, items: list[object]) -> None:
        """Set keys and values, which alternate, in the dictionary on top."""
        target = self.stack[-1]
        kept = target.items if isinstance(target, Instance) else target
        if not isinstance(kept, dict):
            raise ValueError("it sets items of something that is not a dictionary")
        kept.update((hashable(k), v) for k, v in zip(items[::2], items[1::2], strict=True))

    def append_items(self, items: list[object]) -> None:
        """Append to the list on top."""
        target = self.stack[-1]
        kept = target.elements if isinstance(target, Instance) else target
        if not isinstance(kept, list):
            raise ValueError("it appends to something that is not a list")
        kept.extend(items)

    def persistent(self, _arg: object) -> None:
        """Replace a persistent id with what it refers to."""
        value = self.dialect.persistent(self.stack.pop())
        self.persisted.append(value)
        self.stack.append(value)


# --- the opcodes ----------------------------------------------------------------------------------


def _present_name(module: str, name: str) -> str:
    """What Python 3 calls what Python 2, and every pickle of protocol 2, calls otherwise."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


_CONSTANTS: Mapping[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    {
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
        "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    }
)  # fmt: skip


def _no_effect(machine: Machine, arg: object) -> None:
    pass


def _put(machine: Machine, arg: object) -> None:
    machine.memo[cast("int", arg)] = machine.stack[-1]


def _memoize(machine: Machine, _arg: object) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(machine: Machine, arg: object) -> None:
    machine.stack.append(machine.memo[cast("int", arg)])


def _mark(machine: Machine, _arg: object) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _pop(machine: Machine, _arg: object) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _push_mark(make: Callable[[Machine, list[object]], object]) -> Callable[..., None]:
    def step(machine: Machine, _arg: object) -> None:
        items = machine.pop_mark()
        machine.stack.append(make(machine, items))

    return step


def _on_mark(method: Callable[[Machine, list[object]], None]) -> Callable[..., None]:
    return lambda machine, _arg: method(machine, machine.pop_mark())


def _on_top(count: int, method: Callable[[Machine, list[object]], None]) -> Callable[..., None]:
    return lambda machine, _arg: method(machine, machine.take(count))


def _push(make: Callable[[], object]) -> Callable[..., None]:
    return lambda machine, _arg: machine.stack.append(make())


def _push_tuple(count: int) -> Callable[..., None]:
    return lambda machine, _arg: machine.stack.append(tuple(machine.take(count)))


def _dict_of(_machine: Machine, items: list[object]) -> dict[object, object]:
    return {hashable(k): v for k, v in zip(items[::2], items[1::2], strict=True)}


def _global(machine: Machine, arg: object) -> None:
    module, _, name = cast("str", arg).partition(" ")
    machine.stack.append(machine.find(module, name))


def _stack_global(machine: Machine, _arg: object) -> None:
    module, name = machine.take(2)
    machine.stack.append(machine.find(module, name))


def _reduce(machine: Machine, _arg: object) -> None:
    function, args = machine.take(2)
    machine.stack.append(machine.call(function, args))


def _new_with_keywords(machine: Machine, _arg: object) -> None:
    function, args, _keywords = machine.take(3)
    machine.stack.append(machine.call(function, args))


def _inst(machine: Machine, arg: object) -> None:
    module, _, name = cast("str", arg).partition(" ")
    args = tuple(machine.pop_mark())
    machine.stack.append(machine.call(machine.find(module, name), args))


def _obj(machine: Machine, items: list[object]) -> object:
    return machine.call(items[0], tuple(items[1:]))


def _stop(machine: Machine, _arg: object) -> None:
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
    "APPEND": _on_top(1, Machine.append_items),
    "APPENDS": _on_mark(Machine.append_items),
    "ADDITEMS": _on_mark(Machine.append_items),
    "SETITEM": _on_top(2, Machine.set_items),
    "SETITEMS": _on_mark(Machine.set_items),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_with_keywords,
    "INST": _inst,
    "OBJ": _push_mark(_obj),
    "BUILD": Machine.build,
    "BINPERSID": Machine.persistent,
    "STOP": _stop,
}
