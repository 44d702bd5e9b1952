"""The errors a user can cause. Each carries the exit code it ends in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

InputKind = Literal["missing", "malformed", "truncated", "unsafe", "unsupported", "changed"]


class GradscopeError(Exception):
    """Base of the errors whose message is meant for the user; anything else is a bug."""

    exit_code: int = 70


class UsageError(GradscopeError):
    """The request is wrong: an option, a rule name, a device, a missing optional dependency."""

    exit_code = 2


class NotApplicableError(UsageError):
    """A method cannot read this model; other methods may."""


class InputError(GradscopeError):
    """An input is missing, malformed, refused as unsafe, or changed while it was read.

    ``message`` says what is wrong, where, and what to do; it does not repeat the path.
    """

    exit_code = 3

    def __init__(self, path: str | Path, kind: InputKind, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = str(path)
        self.kind: InputKind = kind
        self.message = message

    def __reduce__(self) -> tuple[type[InputError], tuple[str, InputKind, str]]:
        return InputError, (self.path, self.kind, self.message)


class OutputError(GradscopeError):
    """A file or a stream could not be written: the disk is full, the folder is read-only."""

    exit_code = 3

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path} cannot be written: {reason}")
