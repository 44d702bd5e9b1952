"""Docstrings that are shown to people, also where ``python -OO`` has dropped them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def docstring(function: Callable[..., Any]) -> str:
    """A function's docstring without its indentation; from its source when it was optimised away.

    Empty when there is neither.
    """
    function = inspect.unwrap(function)
    if function.__doc__ is not None:
        return inspect.cleandoc(function.__doc__)
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    if not isinstance(definition, ast.FunctionDef):
        return ""
    return ast.get_docstring(definition) or ""
