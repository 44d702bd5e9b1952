"""``manifest`` and ``verify``: a checkpoint -> fingerprints -> what differs from those recorded."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gradscope.checkpoints.integrity import check_unchanged
from gradscope.checkpoints.left_out import unread
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.errors import InputError
from gradscope.fingerprints.document import Fingerprint, Manifest, is_manifest, read_manifest
from gradscope.fingerprints.result import (
    Status,
    TensorVerified,
    Verified,
    VerifyReport,
    VerifyResult,
)
from gradscope.report.config import ConfigLike
from gradscope.report.model import Coverage, Input, Skip
from gradscope.report.request import Failures, part_failures, requested

Progress = Callable[[int, int], None]

#: Elements of a part of a long tensor.
_PART = 16 << 20


def manifest(
    checkpoint: str | Path,
    *,
    key: str | None = None,
    jobs: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> Manifest:
    """The fingerprints of a checkpoint's tensors: type, shape, hash and digest of the histogram.

    ``key`` is the dotted path of the nested dict that is the state dict; ``progress`` is called
    with bytes done and bytes in all. Raises InputError for what cannot be read in full: what a
    manifest leaves out could never be verified.
    """
    opened = open_checkpoint(str(checkpoint), key)
    for part in unread(opened):
        raise InputError(checkpoint, part.kind, part.message)
    return _manifest(opened, jobs, progress)


def _manifest(checkpoint: Checkpoint, jobs: int | None, progress: Progress) -> Manifest:
    from gradscope.fingerprints.hashing import fingerprints
    from gradscope.statistics import threads

    total = sum(ref.nbytes for ref in checkpoint.tensors)
    done = 0

    def tick(amount: int) -> None:
        nonlocal done
        done += amount
        progress(done, total)

    found = fingerprints(checkpoint.tensors, threads(jobs), tick)
    tensors = {ref.name: f for ref, f in zip(checkpoint.tensors, found, strict=True)}
    for path in {ref.file for ref in checkpoint.tensors}:
        check_unchanged(path, checkpoint.stamps[path])
    name = os.path.basename(os.path.abspath(checkpoint.path))
    return Manifest(model=name, bytes=total, tensors=tensors)


def verify(
    *checkpoints: str | Path,
    manifest: str | Path,
    key: str | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
    allow_empty: bool = False,
    config: ConfigLike = None,
    baseline: str | Path | None = None,
    jobs: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> VerifyReport:
    """Hold checkpoints, or their manifests, against a manifest; every tensor that differs is named.

    The manifests of the ranks of a data-parallel run compare in no time. An input that cannot be
    read is an entry of ``errors``, never an exception. Raises UsageError for an unknown rule, key
    or severity.
    """
    request = requested(
        Verified,
        select=select,
        ignore=ignore,
        fail_on=fail_on,
        allow_empty=allow_empty,
        config=config,
        baseline=baseline,
    )
    failures = Failures()
    recorded: Manifest | None = None
    with failures.caught():
        recorded = read_manifest(manifest)
    inputs: list[Input] = []
    found: list[Verified] = []
    skipped: list[Skip] = []
    for path in map(str, checkpoints):
        with failures.caught():
            own, given, checkpoint = _opened(path, key, jobs, progress)
            inputs.append(given)
            if checkpoint is not None:
                skipped += (Skip(subject=s.subject, reason=s.reason) for s in checkpoint.skipped)
                failures += part_failures(path, unread(checkpoint))
            if recorded is not None:
                found.append(Verified(path, str(manifest), tuple(_against(recorded, own, path))))
    tensors = tuple(t for v in found for t in v.tensors)
    counts: dict[str, int] = dict(Counter(t.status for t in tensors))
    return request.report(
        VerifyReport,
        VerifyResult(tensors=tensors, manifest=str(manifest), counts=counts) if found else None,
        inputs=inputs,
        coverage=Coverage(
            analyzed=sum(t.status not in ("missing", "added") for t in tensors),
            total=len(tensors) + len(skipped),
            unit="tensors",
            bytes=sum(given.bytes for given in inputs),
            skipped=tuple(skipped),
        ),
        judged=[request.judged(v, v.path) for v in found],
        errors=failures,
    )


def _opened(
    path: str, key: str | None, jobs: int | None, progress: Progress
) -> tuple[Manifest, Input, Checkpoint | None]:
    """A manifest as it is, or that of a checkpoint."""
    if is_manifest(path):
        found = read_manifest(path)
        return found, Input(path=path, format="manifest", bytes=found.bytes), None
    checkpoint = open_checkpoint(path, key)
    given = Input(path=path, format=checkpoint.format, bytes=checkpoint.nbytes)
    return _manifest(checkpoint, jobs, progress), given, checkpoint


def _against(recorded: Manifest, own: Manifest, path: str) -> Iterator[TensorVerified]:
    """Every tensor of either, in the manifest's order."""
    for name in dict.fromkeys((*recorded.tensors, *own.tensors)):
        before, now = recorded.tensors.get(name), own.tensors.get(name)
        shown = now or before
        assert shown is not None
        yield TensorVerified(
            name=name,
            input=path,
            status=_status(before, now),
            dtype=shown.dtype,
            shape=shown.shape,
            between=tuple(_between(before, now)),
        )


def _status(before: Fingerprint | None, now: Fingerprint | None) -> Status:
    if before is None or now is None:
        return "added" if before is None else "missing"
    if before.hash == now.hash:
        return "match"
    if before.dtype != now.dtype:
        return "retyped"
    if before.shape != now.shape:
        return "reshaped"
    wide = now.dtype in ("F32", "F64")  # of which only the leading bits were counted
    same = before.histogram is not None and before.histogram == now.histogram
    return "rearranged" if same and not wide else "changed"


def _between(before: Fingerprint | None, now: Fingerprint | None) -> Iterator[tuple[int, int]]:
    """The parts of a long tensor that differ."""
    if before is None or now is None or before.shape != now.shape:
        return
    for place, (one, two) in enumerate(zip(before.parts, now.parts, strict=False)):
        if one != two:
            yield place * _PART, min((place + 1) * _PART, math.prod(now.shape))
