"""The report of one of several jobs, sealed: which part it is, and of what.

The jobs of one run must have seen alike files, and headers that say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from gradscope.checkpoints.integrity import sample
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.errors import InputError
from gradscope.report.model import Report
from gradscope.report.partial import Partial, PartialReport, Source, digest, packed, spelled
from gradscope.report.request import Request
from gradscope.weights.shares import Share

R = TypeVar("R")

#: Why rules of the whole are not evaluated by a job.
WAITING = "waits for `gradscope merge`, which has all parts"


class _Opened(BaseModel):
    """What headers say."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    checkpoints: tuple[Checkpoint, ...]


def asked_of(request: Request, part: Share, whole: bool) -> Request:
    """What one job is asked for; ``whole`` is whether there is anything to analyse at all."""
    return replace(
        request,
        narrowed=(*request.narrowed, f"--shard {part}"),
        allow_empty=request.allow_empty or whole,  # there may be more jobs than tensors
    )


def sealed(
    kind: type[PartialReport[R]],
    said: Report[R],
    part: Share,
    options: Mapping[str, Any],
    opened: Sequence[Checkpoint],
    state: BaseModel,
) -> PartialReport[R]:
    """The report of one job, with what the others' parts are joined by.

    ``options`` are those that decide what is measured, ``opened`` every checkpoint that was read.
    """
    coverage = said.coverage
    note = (
        f"part {part} of a run, with {coverage.analyzed:,} of {coverage.total:,} tensors: no "
        "verdict of the whole, which `gradscope merge` makes of all parts"
    )
    gate = said.gate.model_copy(update={"notes": (note, *said.gate.notes)})
    text = packed(state.model_dump())
    return kind(
        **{name: getattr(said, name) for name in type(said).model_fields} | {"gate": gate},
        partial=Partial(
            index=part.index,
            of=part.of,
            options=options,
            files=tuple(_sources(opened)),
            headers=_headers(opened),
            state=text,
            digest=digest(text),
        ),
    )


def _sources(checkpoints: Iterable[Checkpoint]) -> Iterator[Source]:
    """The files of some checkpoints, each once."""
    stamps = {path: stamp for c in checkpoints for path, stamp in c.stamps.items()}
    for path, (nbytes, *_) in stamps.items():
        try:
            yield Source(path=path, bytes=nbytes, sample=sample(path, nbytes))
        except InputError:  # it is gone: what read it has said so
            yield Source(path=path, bytes=nbytes, sample="")


def _headers(checkpoints: Iterable[Checkpoint]) -> str:
    """A digest of what the headers say; stamps differ between machines."""
    opened = tuple(replace(plain(c), stamps={}) for c in checkpoints)
    return digest(spelled(_Opened(checkpoints=opened).model_dump()))


def plain(opened: Checkpoint) -> Checkpoint:
    """Without what only reading data takes."""
    stored = (
        ref if ref.decoding is None else replace(ref, decoding=None) for ref in opened.tensors
    )
    return replace(opened, tensors=tuple(stored), left_out=())
