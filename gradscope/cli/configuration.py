"""Which configuration is in force: where it is looked for, and what wins."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradscope.errors import UsageError
from gradscope.report.config import Config, Layer, Origins, layer, merged, read_config, read_toml
from gradscope.text import quoted

_NAME = "gradscope.toml"
_SHARED = "pyproject.toml"
#: A folder with one of these is the root of a repository, above which nothing is looked for.
_ROOTS = (".git", ".hg", ".svn", ".jj")


def in_force(given: Sequence[str], isolated: bool) -> tuple[Config, Origins]:
    """The configuration of ``--config`` and ``--isolated``: options over variables over one file.

    Raises UsageError.
    """
    pairs = [text for text in given if _is_pair(text)]
    files = [text for text in given if not _is_pair(text)]
    if len(files) > 1:
        raise UsageError(f"--config names two files, {files[0]} and {files[1]}; give one")
    return merged([*_file(files, isolated), *_variables(), *map(_pair, pairs)])


def _is_pair(text: str) -> bool:
    return "=" in text and not os.path.exists(text)


def _pair(text: str) -> Layer:
    """``rules.dead-units.high=0.2``, a line of TOML; a bare word is a string."""
    key, _, value = text.partition("=")
    for line in (text, f"{key} = '{value}'"):
        try:
            return layer(tomllib.loads(line), f"--config {text}")
        except ValueError:
            continue
    raise UsageError(f"--config takes FILE or KEY=VALUE in TOML, not {quoted(text)}")


def _variables() -> Iterator[Layer]:
    """``GRADSCOPE_FAIL_ON`` and the like, for every key that is one value."""
    for key in Config.keys():  # noqa: SIM118  no mapping
        name = f"GRADSCOPE_{key.replace('-', '_').upper()}"
        if key not in ("rules", "allow") and (value := os.environ.get(name)):
            yield layer({key: value}, name)


def _file(given: Sequence[str], isolated: bool) -> Iterator[Layer]:
    """The one file that counts; files are not merged."""
    if given:
        yield read_config(given[0])
    elif not isolated and (named := os.environ.get("GRADSCOPE_CONFIG")):
        yield read_config(named)
    elif not isolated and (found := _found(Path.cwd())):
        yield read_config(found)


def _found(start: Path) -> Path | None:
    """The nearest gradscope.toml, else the nearest pyproject.toml with our table.

    Looked for from a folder up to the root of its repository, or in the folder alone.
    """
    folders = [start, *start.parents]
    root = next((i for i, f in enumerate(folders) if any((f / r).exists() for r in _ROOTS)), 0)
    reach = [Path(os.path.relpath(folder, start)) for folder in folders[: root + 1]]
    own = (f / _NAME for f in reach if (f / _NAME).is_file() or (f / _NAME).is_symlink())
    shared = (f / _SHARED for f in reach if (f / _SHARED).is_file() and _has_table(f / _SHARED))
    return next(own, None) or next(shared, None)


def _has_table(path: Path) -> bool:
    tool = read_toml(path).get("tool")
    return isinstance(tool, dict) and "gradscope" in tool
