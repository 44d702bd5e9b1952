"""What an archive of ``torch.export`` would run while it is loaded.

``torch.export.load`` falls back to plain unpickling for its sample inputs and some weights, and
hands the sizes' expressions to sympy, which evaluates them. What is not data is refused here.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from gradscope.errors import InputError

_OPERATORS = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.keyword, ast.UnaryOp, ast.USub, ast.UAdd,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.Compare,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Constant, ast.Tuple, ast.BitAnd,
    ast.BitOr, ast.Invert,
)  # fmt: skip
_LONGEST = 10_000


def check_export(path: str) -> None:
    """Raise InputError (``unsafe``) for an archive that holds more than data and a graph."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                _check_member(path, name, archive)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise InputError(path, "malformed", f"a damaged archive ({error})") from None


def _check_member(path: str, name: str, archive: zipfile.ZipFile) -> None:
    if "custom_obj_" in name:
        raise _unsafe(path, name, "an object that is unpickled")
    if name.endswith(".pt"):
        _check_pickle(path, name, archive.read(name))
    elif name.endswith(".json"):
        value = _json(path, name, archive.read(name))
        for inner in _pickled_members(value, archive.namelist()):
            _check_pickle(path, inner, archive.read(inner))
        for expression in _expressions(value):
            if not is_plain(expression):
                raise _unsafe(path, name, f"an expression that is evaluated ({expression[:80]!r})")


def _check_pickle(path: str, name: str, data: bytes) -> None:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # Whatever it is that this refuses, the loader would try again without the restriction.
    except Exception:
        raise _unsafe(path, name, "a pickle that is not only tensors") from None


def _json(path: str, name: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(path, "malformed", f"{name} in it is no JSON ({error})") from None


def _pickled_members(value: Any, names: list[str]) -> Iterator[str]:
    """The members that a table of weights or constants marks as pickled."""
    for found in _dicts(value):
        if found.get("use_pickle") and isinstance(found.get("path_name"), str):
            yield from (n for n in names if n.endswith("/" + found["path_name"]))


def _expressions(value: Any) -> Iterator[str]:
    for found in _dicts(value):
        if isinstance(found.get("expr_str"), str):
            yield found["expr_str"]


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield found
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(found)


def is_plain(expression: str) -> bool:
    """Whether an expression only calls sympy's classes on numbers and symbols.

    Text appears nowhere but as a symbol's name: sympy evaluates text that is handed to others.
    """
    if len(expression) > _LONGEST:
        return False
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    texts = {
        id(a) for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_symbol(node)
        for a in node.args[:1]
    }  # fmt: skip
    return all(_is_harmless(node, texts) for node in ast.walk(tree))


def _is_symbol(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in ("Symbol", "Dummy")


def _is_harmless(node: ast.AST, texts: set[int]) -> bool:
    if not isinstance(node, _OPERATORS):
        return False
    if isinstance(node, ast.Name):
        return bool(re.fullmatch(r"[A-Za-z][A-Za-z0-9]*|int_oo", node.id)) and node.id not in (
            "eval", "exec", "open", "compile", "input", "getattr", "setattr", "breakpoint",
        )  # fmt: skip
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
        return id(node) in texts and bool(re.fullmatch(r"\w{1,64}", str(node.value)))
    return True


def _unsafe(path: str, member: str, what: str) -> InputError:
    return InputError(
        path,
        "unsafe",
        f"{member} in it is {what}: loading would run code from the file. If you trust where it "
        "comes from, say --trust pickle; else export it again without example inputs or custom "
        "objects",
    )
