"""What in an exported program's archive ends in Python's hands, checked before torch sees it.

``torch.export.load`` evaluates sizes as Python (through sympy), writes names of the graph into
source code that it compiles, calls whatever function a node names, imports what a tree's context
names, unpacks compiled libraries, and unpickles plainly what a restricted unpickling refuses. Each
of these is allowed what ``torch.export.save`` writes and nothing else. Its reader finds members
whatever their case, so case counts for nothing here.
"""

from __future__ import annotations

import ast
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import torch

from gradscope.containers.strict_json import MalformedError, parse_once
from gradscope.containers.zip import Archive, read_archive
from gradscope.errors import InputError
from gradscope.text import escaped, quoted

_LONGEST = 256 << 20
_LONGEST_TEXT = 1 << 20
_LARGEST = 1 << 40

#: Members that are interpreted, below the archive's one folder, …
_INTERPRETED = re.compile(
    r"models/|aotinductor|custom_obj_|opaque_obj_|executorch|mtia|\.pt$|\.json$|serialized_",
    re.IGNORECASE,
)
#: … and the spellings of those that can be data alone.
_KNOWN = re.compile(
    r"models/[^/]+\.json|data/weights/[^/]+_weights_config\.json"
    r"|data/constants/[^/]+_constants_config\.json|data/(weights|constants|sample_inputs)/[^/]+\.pt"
    r"|serialized_(exported_program|state_dict|constants|example_inputs)\.(json|pt)"
    r"|extra(_files)?/.*"
)
_GRAPH = re.compile(r"models/[^/]+\.json|serialized_exported_program\.json")
_TABLE = re.compile(r"data/.*_config\.json")


def check_program(path: str) -> None:
    """Raise InputError (``unsafe``) for an exported program that is more than data and operators.

    ``malformed`` and ``truncated`` are raised for what is not such an archive, and for one in which
    two members or two keys of an object have the same name: readers would disagree which is meant.
    """
    with open(path, "rb") as file:
        archive = read_archive(file, path, 0, os.fstat(file.fileno()).st_size)
        _check_names(path, archive)
        for name in archive.members:
            inner = _below_root(name)
            if _GRAPH.fullmatch(inner):
                _check(path, name, _document(path, name, archive, file), _RULES)
            elif _TABLE.fullmatch(inner):
                table = _document(path, name, archive, file)
                _check(path, name, table, {})
                for pickled in _pickled(table, archive):
                    _check_pickle(path, pickled, archive.read(file, pickled, _LARGEST))
            elif inner.endswith(".pt"):
                _check_pickle(path, name, archive.read(file, name, _LARGEST))


def _below_root(name: str) -> str:
    """A member's name without the archive's folder, which older archives do not have."""
    return name if name.startswith("extra_files/") else name.partition("/")[2] or name


def _check_names(path: str, archive: Archive) -> None:
    seen: dict[str, str] = {}
    for name in archive.members:
        inner = _below_root(name)
        if "_obj_" in inner or (_INTERPRETED.search(inner) and not _KNOWN.fullmatch(inner)):
            raise _unsafe(path, name, "is not data that torch.export.save writes")
        other = seen.setdefault(name.casefold(), name)
        if other is not name:
            message = f"members {quoted(other)} and {quoted(name)} differ in case only"
            raise InputError(path, "malformed", f"{message}; export it again")


def _document(path: str, name: str, archive: Archive, file: BinaryIO) -> Any:
    try:
        # Older versions of torch wrote infinite constants as Python spells them.
        return parse_once(archive.read(file, name, _LONGEST), escaped(name), non_finite=True)
    except MalformedError as error:
        raise InputError(path, "malformed", f"{error}; export it again") from None


def _pickled(table: Any, archive: Archive) -> Iterator[str]:
    """The members that a table of weights or constants marks as pickled."""
    entries = table.get("config", {}) if isinstance(table, dict) else {}
    for entry in entries.values() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and entry.get("use_pickle"):
            place = "/" + str(entry.get("path_name"))
            yield from (name for name in archive.members if name.endswith(place))


def _check_pickle(path: str, name: str, data: bytes) -> None:
    try:
        if data:
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # Whatever it is that this refuses, the loader would try again without the restriction.
    except Exception:
        raise _unsafe(path, name, "is a pickle of more than tensors") from None


_Rule = Callable[[str], bool]


def _check(path: str, member: str, value: Any, rules: Mapping[str, _Rule]) -> None:
    for key, text in _texts(value):
        if not rules.get(key, _is_quotable)(text):
            place = f" as {quoted(key)}" if key else ""
            what = f"has {quoted(text, 80)}{place}, which is not a plain name or expression"
            raise _unsafe(path, member, what)


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Every text of a document, with the key that it lies under; keys lie under none."""
    waiting = [("", value)]
    while waiting:
        key, found = waiting.pop()
        if isinstance(found, str):
            yield key, found
        elif isinstance(found, dict):
            yield from (("", name) for name in found)
            waiting.extend(found.items())
        elif isinstance(found, list):
            waiting.extend((key, item) for item in found)


def _unsafe(path: str, member: str, what: str) -> InputError:
    return InputError(
        path,
        "unsafe",
        f"{quoted(member)} in it {what}: loading it could run code from the file. If you trust "
        "where it comes from, say --trust pickle; else export the model again, without custom "
        "objects, or save its state dict",
    )


# --- what a text may be, by its key ---------------------------------------------------------------


def _is_quotable(text: str) -> bool:
    """A text that stays one text between double quotes of Python."""
    return '"' not in text and "\\" not in text and text.isprintable()


def _is_name(text: str) -> bool:
    """A name that is written into code unquoted."""
    return bool(re.fullmatch(r"[A-Za-z_]\w*|", text, re.ASCII))


def _is_remark(text: str) -> bool:
    """A stack trace or other remark: at most a comment, which other line ends would close."""
    return all(char in "\n\t" or char >= " " for char in text)


def _is_json_remark(text: str) -> bool:
    """A remark that is JSON, without escapes: decoded, they would be other line ends."""
    return _is_remark(text) and "\\" not in text


def _is_data(_text: str) -> bool:
    return True


_OPERATORS = "eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ not_ lshift"
_TARGET = re.compile(
    r"torch\.ops(\.[A-Za-z]\w*|\._[A-Za-z]\w*){2,3}|torch\.sym_\w+|torch\._C\._set_grad_enabled"
    r"|math\.[a-z]\w*|torch\.ops\.aten\.__[a-z]+__\.[A-Z]\w*"
    rf"|_operator\.({'|'.join(_OPERATORS.split())}|rshift|getitem)",
    re.ASCII,
)
#: Operators that read and write files or call Python.
_REACHING_OUT = re.compile(
    r"torch\.ops\.(aten\.(from_file|save|load)|prim|c10d\w*|profiler|debugprims)\b"
)


def _is_operator(text: str) -> bool:
    return bool(_TARGET.fullmatch(text)) and not _REACHING_OUT.match(text)


def _is_tree(text: str) -> bool:
    """The shape of a program's inputs or outputs: JSON, whose contexts are JSON again.

    A defaultdict's context names a module to import, and so does an enumeration's.
    """
    if not text:
        return True
    try:
        found = parse_once(text.encode("utf-8", "surrogatepass"), "a tree")
    except MalformedError:
        return False
    return all(_is_part_of_tree(key, part) for key, part in _texts(found))


def _is_part_of_tree(key: str, text: str) -> bool:
    if key == "context":
        return _is_tree(text) or bool(re.fullmatch(r"[\w.]*", text, re.ASCII))
    plain = re.fullmatch(r"[\w.\-]*", text, re.ASCII)
    return bool(plain) and text not in ("__enum__", "collections.defaultdict")


#: The classes that torch's sizes are made of, by the names that ``sympy.srepr`` gives.
_CLASSES = frozenset({
    "Symbol", "Dummy", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs",
    "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt",
    "TruncToInt", "TruncToFloat", "RoundToInt", "RoundDecimal", "ToFloat", "LShift", "RShift",
    "ModularIndexing", "IntTrueDiv", "FloatTrueDiv", "FloatPow", "PowByNatural", "Where",
    "Identity", "IsNonOverlappingAndDenseIndicator", "BitwiseFn_bitwise_and",
    "BitwiseFn_bitwise_or", "And", "Or", "Not", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality",
    "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "floor",
    "ceiling", "Piecewise", "ExprCondPair", "ITE", "Tuple",
})  # fmt: skip
_NODES = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.keyword, ast.Constant, ast.Tuple, ast.UnaryOp,
    ast.USub, ast.UAdd, ast.Invert, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv,
    ast.Mod, ast.Pow, ast.BitAnd, ast.BitOr, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE,
    ast.Gt, ast.GtE,
)  # fmt: skip


def is_size(text: str) -> bool:
    """Whether an expression only builds sizes: of torch's classes, numbers and symbols.

    sympy evaluates it where every built-in function can be called, so that calls are allowed by
    name. Text is a symbol's name, or the digits of a number.
    """
    if len(text) > _LONGEST_TEXT or not re.fullmatch(r"[\w (),.=+\-*/%<>!&|~']*", text, re.ASCII):
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    named = {id(text) for call in calls for text in call.args[:1] if isinstance(text, ast.Constant)}
    return all(map(_is_class, calls)) and all(_is_part_of_size(node, named) for node in nodes)


def _is_class(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in _CLASSES


def _is_part_of_size(node: ast.AST, named: set[int]) -> bool:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return id(node) in named and bool(re.fullmatch(r"[\w.+\-]{1,64}", node.value, re.ASCII))
    if isinstance(node, ast.keyword):
        return node.arg is not None and isinstance(node.value, ast.Constant | ast.UnaryOp)
    return isinstance(node, _NODES)


_RULES: Mapping[str, _Rule] = {
    "name": _is_name,
    "as_name": _is_name,
    "forward_arg_names": _is_name,
    "target": _is_operator,
    "as_operator": _is_operator,
    "expr_str": is_size,
    "in_spec": _is_tree,
    "out_spec": _is_tree,
    "as_string": _is_data,
    "as_strings": _is_data,
    "guards_code": _is_data,
    "stack_trace": _is_remark,
    "torch_fn": _is_remark,
    "source_fn_stack": _is_remark,
    "from_node": _is_json_remark,
    "custom": _is_json_remark,
}
