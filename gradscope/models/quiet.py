"""Loaders of torch: without their deprecations, and their errors in a line."""

from __future__ import annotations

import warnings
from typing import Any


class silent(warnings.catch_warnings):  # noqa: N801  reads as what it does
    """Torch's loaders warn of deprecations that the user of a file can do nothing about."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
