"""Compiled loops: numba with the options that every kernel here shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def kernel(**options: Any) -> Callable[[F], F]:
    """``numba.njit`` without the GIL, cached on disk where any cache directory is writable."""

    def compile_(function: F) -> F:
        try:
            compiled: F = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither the package nor the user's cache folder can be written
            compiled = numba.njit(nogil=True, **options)(function)
        return compiled

    return compile_
