"""The code of a model whose file holds weights only: ``package.module:factory(options)``."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from gradscope.errors import UsageError
from gradscope.models.model import nearest

_FORM = "write package.module:factory or path/to/file.py:factory, options in parentheses"
#: Libraries that name their models: module, function, and the options that leave out weights.
_LIBRARIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "timm": ("timm", "create_model", {"pretrained": False}),
    "torchvision": ("torchvision.models", "get_model", {}),
}


def build(spec: str) -> nn.Module:
    """The module that ``--arch`` names, built with the options in its parentheses (literals).

    ``timm:name`` and ``torchvision:name`` are these libraries' models, without weights. Meanwhile
    modules in the working directory can be imported. Raises UsageError naming what cannot be
    found, and quoting the factory's own error when it fails.
    """
    place, colon, call = spec.partition(":")
    if not colon or not place or not call:
        raise UsageError(f"--arch {spec}: {_FORM}")
    path, positional, named = parsed(spec, call)
    if place in _LIBRARIES:
        place, function, without_weights = _LIBRARIES[place]
        path, positional = [function], [".".join(path), *positional]
        named = {**without_weights, **named}
    with importable(str(Path.cwd())):
        factory = _attribute(spec, _module(spec, place), path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = factory(*positional, **named)
        # The user's code: they want to read whatever it raises.
        except (Exception, SystemExit) as error:
            raise UsageError(f"--arch {spec} failed: {type(error).__name__}: {error}") from error
    if isinstance(found, nn.Module):
        return found
    raise UsageError(f"--arch {spec} returns a {type(found).__name__}, not an nn.Module")


def parsed(spec: str, call: str) -> tuple[Sequence[str], list[Any], dict[str, Any]]:
    """The dotted name in a call, and its arguments, which are literals. Raises UsageError."""
    try:
        tree = ast.parse(call, mode="eval").body
        function = tree.func if isinstance(tree, ast.Call) else tree
        path = ast.unparse(function).split(".")
        if not all(part.isidentifier() for part in path):
            raise ValueError(f"{ast.unparse(function)} is not a name")
        if not isinstance(tree, ast.Call):
            return path, [], {}
        positional = [ast.literal_eval(argument) for argument in tree.args]
        pairs = [(k.arg, ast.literal_eval(k.value)) for k in tree.keywords]
        if any(name is None for name, _ in pairs):
            raise ValueError("** is not allowed")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"--arch {spec}: {_FORM}; options are literals, as in resnet18(num_classes=10) "
            f"({error})"
        ) from None
    return path, positional, {str(name): value for name, value in pairs}


def _module(spec: str, place: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            return _from_file(spec, Path(place))
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            raise UsageError(
                f"--arch {spec}: module {error.name} not found; install it, or run in the folder "
                "that contains it"
            ) from None
        raise UsageError(f"--arch {spec}: importing {place} failed: {error}") from error
    except UsageError:
        raise
    # A script without a main guard may end the process.
    except (Exception, SystemExit) as error:
        message = f"importing {place} failed: {type(error).__name__}: {error}"
        raise UsageError(f"--arch {spec}: {message}") from error


def _from_file(spec: str, file: Path) -> ModuleType:
    if not os.path.isfile(file):
        raise UsageError(f"--arch {spec}: file {file} not found")
    description = importlib.util.spec_from_file_location(file.stem, file)
    if description is None or description.loader is None:
        raise UsageError(f"--arch {spec}: {file} cannot be imported")
    module = importlib.util.module_from_spec(description)
    # Dataclasses and pickles look their module up by its name.
    registered = sys.modules.setdefault(file.stem, module) is module
    try:
        with importable(str(file.resolve().parent)):
            description.loader.exec_module(module)
    except BaseException:
        if registered:
            sys.modules.pop(file.stem, None)
        raise
    return module


def _attribute(spec: str, module: ModuleType, path: Sequence[str]) -> Any:
    found: Any = module
    for name in path:
        try:
            there = hasattr(found, name)
        # A package may import its parts lazily.
        except Exception as error:
            message = f"importing {name} failed: {type(error).__name__}: {error}"
            raise UsageError(f"--arch {spec}: {message}") from error
        if not there:
            hint = nearest(name, [n for n in dir(found) if not n.startswith("_")])
            raise UsageError(f"--arch {spec}: {module.__name__} has no {name}{hint}")
        found = getattr(found, name)
    if not callable(found):
        raise UsageError(f"--arch {spec}: {'.'.join(path)} cannot be called")
    return found


@contextmanager
def importable(folder: str) -> Iterator[None]:
    """Meanwhile, modules in the folder can be imported."""
    sys.path.insert(0, folder)
    # Python caches what a folder contains, even if it has just been written to.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
