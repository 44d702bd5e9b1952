"""Kernels as machine code on disk: compiled once by numba, and run without it.

To import numba and have it link what it has cached takes longer than many a checkpoint takes to be
read. So what a command calls first is kept as an object file that needs nothing but itself and that
llvmlite links in milliseconds; numba comes in where there is none yet.

Such a kernel returns nothing, allocates nothing and raises nothing; its arguments are arrays and
numbers. A file is named by all that it depends on: the code of the kernel and of those that it
calls, the types, the processor and the compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradscope.errors import OutputError
from gradscope.files import write_whole

if TYPE_CHECKING:
    from gradscope.compiled import Kernel

#: What an argument is made of, as NumPy abbreviates it, and its dimensions: none for a number.
Form = tuple[str, int]
Array = npt.NDArray[Any]
Code = Callable[..., None]

#: To be raised where something else is made of the same code.
_RECIPE = 3
_DIGEST = 16
_Nothing = ctypes.c_char * 0
_lock = threading.Lock()


class Variants:
    """The machine code of a kernel, one piece for each combination of types that it is given."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._known: dict[tuple[Form, ...], Code | None] = {}

    def run(self, args: tuple[Any, ...]) -> bool:
        """Run the code for such arguments; False where they, or the disk, leave it to numba."""
        if (given := _given(args)) is None or (code := self._of(given[0])) is None:
            return False
        code(*given[1])
        return True

    def _of(self, forms: tuple[Form, ...]) -> Code | None:
        if forms not in self._known:
            with _lock:
                if forms not in self._known:  # another thread was here first
                    self._known[forms] = _code(self._kernel, forms)
        return self._known[forms]


def _given(args: Iterable[Any]) -> tuple[tuple[Form, ...], list[Any]] | None:
    """What arguments are, and how C takes them: an array as its address and shape.

    None where one is an array that does not lie in memory as C has it.
    """
    forms: list[Form] = []
    words: list[Any] = []
    for value in args:
        if isinstance(value, np.ndarray):
            if not _as_in_c(value):
                return None
            words += (_address(value), *value.shape)
            forms.append((value.dtype.char, value.ndim))
        elif isinstance(value, np.generic):
            words.append(value.item())
            forms.append((value.dtype.char, 0))
        else:
            words.append(value)
            forms.append(("d" if isinstance(value, float) else "q", 0))
    return tuple(forms), words


def _as_in_c(array: Array) -> bool:
    return array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative


def _address(array: Any) -> int:
    """Where the numbers lie; in a quarter of the time where they may be written."""
    if array.flags.writeable:
        return ctypes.addressof(_Nothing.from_buffer(array))
    address: int = array.ctypes.data
    return address


def _code(kernel: Kernel, forms: tuple[Form, ...]) -> Code | None:
    symbol = f"{kernel.function.__name__}-{_digest(kernel, forms)}"
    path = _folder(kernel) / f"{symbol}.o"
    code = _read(path)
    if code is None:
        if not _writable(path.parent):
            return None
        _write(path, code := _compiled(kernel, forms, symbol))
    return _linked(code, forms, symbol)


def _folder(kernel: Kernel) -> Path:
    """Where Python keeps what it compiled of the module."""
    return Path(importlib.util.cache_from_source(kernel.function.__code__.co_filename)).parent


def _digest(kernel: Kernel, forms: tuple[Form, ...]) -> str:
    import llvmlite

    told = repr((_RECIPE, forms, llvmlite.__version__, _processor(), *kernel.made_of()))
    return hashlib.blake2b(told.encode(), digest_size=_DIGEST).hexdigest()


def _read(path: Path) -> bytes | None:
    """The code in a file; None where there is none, or not the whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code, checksum = content[:-_DIGEST], content[-_DIGEST:]
    return code if _checksum(code) == checksum else None


def _checksum(code: bytes) -> bytes:
    return hashlib.blake2b(code, digest_size=_DIGEST).digest()


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _write(path: Path, code: bytes) -> None:
    """Whole, because other processes may read it and write it at the same time."""
    with contextlib.suppress(OutputError):  # a full disk: the next run tries again
        write_whole(path, lambda stream: stream.write(code + _checksum(code)))


@cache
def _processor() -> tuple[str, str, str]:
    """Triple, name and features of this processor."""
    from llvmlite import binding

    features = binding.get_host_cpu_features().flatten()
    return binding.get_process_triple(), binding.get_host_cpu_name(), features


def _machine() -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    triple, name, features = _processor()
    return binding.Target.from_triple(triple).create_target_machine(
        cpu=name, features=features, opt=3, codemodel="jitdefault", jit=True
    )


@cache
def _engine() -> Any:
    """What owns all code that was linked."""
    from llvmlite import binding

    return binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())


def _linked(code: bytes, forms: tuple[Form, ...], symbol: str) -> Code | None:
    from llvmlite import binding

    engine = _engine()
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    types = chain.from_iterable(map(_c_types, forms))
    address = engine.get_function_address(symbol)
    return ctypes.CFUNCTYPE(None, *types)(address) if address else None


def _c_types(form: Form) -> list[Any]:
    kind, dimensions = form
    if dimensions:
        return [ctypes.c_void_p, *[ctypes.c_int64] * dimensions]
    return [np.ctypeslib.as_ctypes_type(kind)]


def _compiled(kernel: Kernel, forms: tuple[Form, ...], symbol: str) -> bytes:
    """The kernel within a function of C, as an object file that lacks no symbol."""
    import numba
    from llvmlite import binding
    from numba import carray  # type: ignore[attr-defined]

    types, names, given = _declared(forms)
    globals_ = {"kernel": kernel, "carray": carray}
    function = eval(f"lambda {', '.join(names)}: kernel({', '.join(given)})", globals_)
    entry = numba.cfunc(numba.void(*types))(function)
    module = binding.parse_assembly(entry.inspect_llvm())
    module.get_function(entry.native_name).name = symbol
    machine = _machine()
    _strip(module, symbol, machine)
    code: bytes = machine.emit_object(module)
    return code


def _declared(forms: tuple[Form, ...]) -> tuple[list[Any], list[str], list[str]]:
    """Types and names of the parameters in C, and what the kernel is given of them."""
    import numba

    pointer: Any = numba.types.CPointer
    types: list[Any] = []
    names: list[str] = []
    given: list[str] = []
    for i, (kind, dimensions) in enumerate(forms):
        of = numba.from_dtype(np.dtype(kind))
        shape = [f"n{i}_{k}" for k in range(dimensions)]
        types += [pointer(of), *[numba.int64] * dimensions] if dimensions else [of]
        names += [f"a{i}", *shape]
        given.append(f"carray(a{i}, ({', '.join(shape)},))" if dimensions else f"a{i}")
    return types, names, given


def _strip(module: Any, entry: str, machine: Any) -> None:
    """Leave what the entry needs.

    To numba any function may raise. Once nothing outside can call or replace them, LLVM sees that
    these do not, and drops what would tell Python about it. The loops stay as numba had them made,
    and so do the sums that they add up.
    """
    from llvmlite import binding

    for symbol in chain(module.functions, module.global_variables):
        if not symbol.is_declaration and symbol.name != entry:
            symbol.linkage = "internal"
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    lacking = [f.name for f in module.functions if f.is_declaration and "llvm." not in f.name]
    if lacking:
        raise TypeError(f"{entry} cannot run alone: it needs {', '.join(lacking)}")
