"""What a command shows of its result, which its own wing knows best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from gradscope.report.model import AnyReport, Record


def shown_in(report: AnyReport, form: str) -> Callable[..., Iterator[Any]] | None:
    """What shows a result in a form (``table``, ``markdown``, ``page``); None where nothing does.

    Found by name: the function that is called as the command, in the module that is called as the
    form, beside the module of the result's type.
    """
    if not isinstance(report.result, Record):
        return None
    home = type(report.result).__module__.rpartition(".")[0]
    try:
        module = import_module(f"{home}.{form}")
    except ModuleNotFoundError as error:
        if error.name != f"{home}.{form}":
            raise
        return None
    found: Callable[..., Iterator[Any]] | None = getattr(module, report.command, None)
    return found
