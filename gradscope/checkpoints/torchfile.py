"""Listing the tensors of torch's containers without torch and without executing their pickles."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from gradscope.checkpoints.leftover import leftover
from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.checkpoints.torch_contents import Contents, Source
from gradscope.checkpoints.torch_export import is_export, read_export
from gradscope.checkpoints.torch_legacy import read_legacy
from gradscope.checkpoints.torch_magic import LEGACY_START, is_legacy
from gradscope.checkpoints.torch_zip import read_saved
from gradscope.containers.files import stamp, unreadable
from gradscope.containers.zip import read_archive
from gradscope.containers.zip_bounds import first_end
from gradscope.errors import InputError, UsageError
from gradscope.text import escaped, listed


def read_torch(path: str, key: str | None = None) -> Checkpoint:
    """The tensors of a file made by torch.save, torch.jit.save or torch.export.save.

    ``key`` is the dotted path of the entry to read; without it, the model's state dict is looked
    for and ``notes`` says what was taken. Identical views of the same bytes (tied weights) are
    listed once; ``metadata["tied"]`` maps each other name to the one kept. Raises InputError when
    the file cannot be read as data alone, UsageError when there is no such ``key``.
    """
    before = stamp(path)
    try:
        with open(path, "rb") as file:
            return _checkpoint(Source(file, path, before), key)
    except (InputError, UsageError):
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    # Fields of the wrong type or size surface as these wherever they are first used.
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise InputError(path, "malformed", f"not a valid torch file: {_said(error)}") from None
    except (MemoryError, RecursionError) as error:
        reason = f"not a valid torch file: it is nested or sized beyond reason ({_said(error)})"
        raise InputError(path, "malformed", reason) from None
    except struct.error as error:
        raise InputError(path, "malformed", f"not a valid torch file: {error}") from None


def _said(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no entry {escaped(str(error), 120)}"
    return escaped(str(error), 120) or type(error).__name__


def _checkpoint(source: Source, key: str | None) -> Checkpoint:
    found = _read_container(source, key)
    tensors, tied = _untied(found.tensors)
    if tied:
        found.metadata["tied"] = tied
        found.notes.append(_tied_note(tied))
    return Checkpoint(
        path=source.path,
        format=found.format,
        nbytes=source.size,
        tensors=tensors,
        problems=tuple(found.problems),
        skipped=tuple(found.skipped),
        failures=tuple(found.failures),
        notes=tuple(found.notes),
        metadata=found.metadata,
        stamps={source.path: source.stamp},
        classes=found.classes,
        module=found.module,
        versions=found.versions,
    )


def _read_container(source: Source, key: str | None) -> Contents:
    start = source.at(0, 512)
    if start.startswith(b"PK"):
        return _read_zip(source, key)
    if is_legacy(start):
        return read_legacy(source, key)
    raise _unrecognised(source, start)


def _read_zip(source: Source, key: str | None) -> Contents:
    end = first_end(source.file, source.path, source.size)
    archive = read_archive(source.file, source.path, 0, end)
    found = (read_export if is_export(archive) else read_saved)(source, archive, key)
    found.failures.extend(leftover(source.file, end, source.size, "the zip archive"))
    return found


def _unrecognised(source: Source, start: bytes) -> InputError:
    """Why a file that is neither a zip nor a legacy torch file is refused."""
    if not start:
        return InputError(source.path, "truncated", "is empty. Copy or download it again")
    if start[:1] == b"\x80" and len(start) < 2 + len(LEGACY_START):
        return InputError(source.path, "truncated", "ends inside its first bytes")
    if start[257:262] == b"ustar" or start.startswith((b"storages\0", b"tensors\0", b"pickle\0")):
        return InputError(
            source.path,
            "unsupported",
            "is a tar file, as torch before 0.1.10 saved. Load it with torch "
            "(torch.load(path, weights_only=False), if you trust it) and save the state dict again",
        )
    if start[:1] == b"\x80":
        return InputError(
            source.path,
            "unsupported",
            "is a bare pickle, not a file that torch.save made. In the environment that made it, "
            "save its tensors with torch.save or safetensors",
        )
    return InputError(
        source.path, "malformed", "is not a torch file: neither a zip archive nor a pickle"
    )


def _untied(tensors: Iterable[TensorRef]) -> tuple[tuple[TensorRef, ...], dict[str, str]]:
    """The tensors without exact aliases, and alias -> kept name."""
    kept: dict[object, TensorRef] = {}
    tied: dict[str, str] = {}
    for ref in tensors:
        # Tensors without elements share nothing, wherever they point.
        where = (ref.offset, ref.shape, ref.strides, ref.dtype) if ref.numel else ref.name
        first = kept.setdefault(where, ref)
        if first is not ref:
            tied[ref.name] = first.name
    return tuple(kept.values()), tied


def _tied_note(tied: Mapping[str, str]) -> str:
    pairs = (f"{escaped(name)} is tied to {escaped(kept)}" for name, kept in tied.items())
    return f"counted once: {listed(pairs, len(tied), 5)}"
