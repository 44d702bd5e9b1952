"""Compiled loops: numba with the options that every kernel here shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from types import ModuleType
from typing import Any

from gradscope.machine_code import Variants


class Kernel:
    """A function that numba compiles when it is first called, by Python or by another kernel.

    Dividing by zero gives what IEEE 754 says, as in NumPy. One that is ``alone`` has its machine
    code in files of its own and runs without numba: see ``machine_code``.
    """

    def __init__(self, function: Callable[..., Any], alone: bool, options: dict[str, Any]) -> None:
        self.function = function
        self.options = {"error_model": "numpy", "nogil": True, **options}
        self._variants = Variants(self) if alone else None

    @cached_property
    def jitted(self) -> Any:
        """The function as ``numba.njit`` has it, cached where any cache folder is writable."""
        import numba

        try:
            return numba.njit(cache=True, **self.options)(self.function)
        except RuntimeError:  # neither the package nor the user's cache folder can be written
            return self._part

    @cached_property
    def _part(self) -> Any:
        """The function as other kernels call it.

        Not cached: what numba keeps of a function outlives changes of the modules that it calls.
        """
        import numba

        return numba.njit(**self.options)(self.function)

    def made_of(self) -> Iterator[object]:
        """The code, the options, and the values and kernels that the code names."""
        code, cells = self.function.__code__, self.function.__closure__ or ()
        held = dict(zip(code.co_freevars, (c.cell_contents for c in cells), strict=True))
        yield code.co_code, code.co_consts
        for name, given in sorted(self.options.items()):
            yield name, sorted(given) if isinstance(given, set) else given
        for name in (*code.co_names, *held):
            value = held.get(name, self.function.__globals__.get(name))
            if isinstance(value, Kernel):
                yield from value.made_of()
            elif not isinstance(value, ModuleType):
                yield name, value

    @property
    def _numba_type_(self) -> Any:
        """What numba asks of a global that another kernel names."""
        return self._part._numba_type_

    def __call__(self, *args: Any) -> Any:
        """Run it, compiled for such arguments."""
        if self._variants is None or not self._variants.run(args):
            return self.jitted(*args)
        return None


def kernel(*, alone: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a function a kernel; ``options`` are those of ``numba.njit``."""
    return lambda function: Kernel(function, alone, options)
