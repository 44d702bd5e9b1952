"""One checkpoint examined: its headers, or every tensor measured and what needs another look.

Of a checkpoint that several jobs share, each measures the tensors that are its ``own``; the others
are there with what headers say of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gradscope.checkpoints.documents import folder_of
from gradscope.checkpoints.integrity import check_unchanged, damaged, without
from gradscope.checkpoints.left_out import unread
from gradscope.checkpoints.tensors import Checkpoint, Checksum, Skipped, TensorRef
from gradscope.checkpoints.tokenizer import tokens_beside
from gradscope.quantization.headers import told_by_headers
from gradscope.quantization.weights import Quantization
from gradscope.report.model import InputFailure
from gradscope.report.request import Failures, Judged, part_failures
from gradscope.weights.adapter_config import described
from gradscope.weights.result import Examined, Need, header_result
from gradscope.weights.roles import roles
from gradscope.weights.tables import codebooks, table_rows

if TYPE_CHECKING:  # compiled kernels, which --headers-only has no use for
    from gradscope.statistics import Engine, Pool, Scan
    from gradscope.weights.masters import Digests
    from gradscope.weights.measuring import Measured

#: Told the bytes that are done.
Meter = Callable[[int], None]
#: Another look at the tensors of a checkpoint, which is asked for.
Look = Callable[[Examined, "Engine[Any, Any]", Meter], Examined]


@dataclass(frozen=True, slots=True)
class Origin:
    """How an examination came about: what a part of one needs to be joined with the others."""

    #: As its headers describe it, before anything was read.
    opened: Checkpoint
    #: Names of the tensors that were measured; None is all.
    own: Collection[str] | None = None
    damaged: frozenset[Checksum] = frozenset()
    #: Names of the tensors whose files failed while they were read.
    lost: frozenset[str] = frozenset()
    failures: tuple[InputFailure, ...] = ()
    digests: Mapping[str, Digests] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Examination:
    """One checkpoint examined, and judged once the rules were asked."""

    examined: Examined
    pools: Mapping[str, Pool]
    errors: tuple[InputFailure, ...]
    origin: Origin
    judged: Judged = field(default_factory=Judged)


def headers(checkpoint: Checkpoint) -> Examination:
    """What the headers alone say."""
    weights = told_by_headers(checkpoint)
    values = {name: weight.values for name, weight in weights.items()}
    names = roles(values.get(ref.name) or ref for ref in checkpoint.tensors)
    tensors = tuple(
        header_result(ref, names[ref.name], checkpoint.path, weights.get(ref.name))
        for ref in checkpoint.tensors
    )
    examined = Examined(checkpoint, tensors, frozenset({Need.HEADERS}))
    examined = replace(examined, adapters=described(examined))
    errors = tuple(part_failures(checkpoint.path, unread(checkpoint)))
    return Examination(examined, {}, errors, Origin(checkpoint))


def examine(
    opened: Checkpoint,
    scan: Scan,
    engine: Engine[Any, Any],
    meter: Meter,
    keep_going: bool = False,
    looks: Sequence[Look] = (),
    own: Collection[str] | None = None,
) -> Examination:
    """Measure the tensors that are ``own``; None is all. What fails is among its errors."""
    from gradscope.quantization.recognise import recognise
    from gradscope.statistics import profile
    from gradscope.weights.masters import compared, digests
    from gradscope.weights.measuring import examined, measure

    mine = among(opened.tensors, own)
    broken = damaged(mine, engine)
    sound = [ref for ref in mine if ref.checksum not in broken]
    checkpoint = without(opened, broken)
    failures = Failures()
    run = partial(profile, engine=engine, scan=scan, progress=meter)
    document = checkpoint.metadata.get("config")
    config = document if isinstance(document, Mapping) else {}
    quantization = Quantization()
    with failures.caught():
        quantization = recognise(checkpoint)

    def measured(refs: Sequence[TensorRef]) -> Measured:
        files = {ref.file for ref in refs}
        failed = {ref.file for ref in sound} - files
        found = measure(checkpoint.tensors, refs, failed, quantization, config, run)
        for path in files:
            check_unchanged(path, checkpoint.stamps[path])
        return found

    refs, result = _read(sound, measured, failures, keep_going)
    lost = frozenset(ref.name for ref in sound) - {ref.name for ref in refs}
    checkpoint = without_lost(checkpoint, lost, failures)
    seen = examined(checkpoint, quantization, result)
    found: Mapping[str, Digests] | None = None
    with failures.caught():
        for look in looks:
            seen = look(seen, engine, meter)
        seen = _read_again(seen, engine, own)
        found = digests(checkpoint.tensors, own)
    if own is not None:
        seen = replace(seen, measured=frozenset({Need.TENSOR}))
    elif found is not None:
        seen = replace(seen, masters=compared(checkpoint.tensors, found))
    origin = Origin(opened, own, broken, lost, tuple(failures), found or {})
    return Examination(seen, result.pools, errors_of(checkpoint, failures), origin)


def among(refs: Sequence[TensorRef], own: Collection[str] | None) -> Sequence[TensorRef]:
    """The tensors that are ``own``; None is all."""
    return refs if own is None else [ref for ref in refs if ref.name in own]


def errors_of(checkpoint: Checkpoint, failures: Sequence[InputFailure]) -> tuple[InputFailure, ...]:
    """Why a checkpoint was not read in full, and what failed meanwhile."""
    left = unread(checkpoint, failed=bool(failures))
    return (*part_failures(checkpoint.path, left), *failures)


def _with_tables(examined: Examined, engine: Engine[Any, Any]) -> Examined:
    """What a second look at the tables shows, with the names of tokens where there is any."""
    refs = {ref.name: ref for ref in examined.checkpoint.tensors}
    folder = folder_of(examined.checkpoint)
    tables = table_rows(refs, examined.tensors, folder, engine)
    return replace(
        examined,
        tables=tables,
        codebooks=codebooks(refs, examined.tensors),
        tokens=tokens_beside(folder) if tables else {},
    )


def _read_again(
    examined: Examined, engine: Engine[Any, Any], own: Collection[str] | None
) -> Examined:
    """With what needs another look: tables of tokens and of indices, the products of adapters.

    Raises InputError when a file changed meanwhile.
    """
    from gradscope.weights.indices import index_results
    from gradscope.weights.products import with_products

    checkpoint = examined.checkpoint
    mine = among(checkpoint.tensors, own)
    examined = replace(examined, adapters=described(examined))
    examined = replace(
        _with_tables(examined, engine),
        adapters=with_products(examined, engine, own=own),
        indices=tuple(index_results(mine)),
    )
    for path in {ref.file for ref in mine}:
        check_unchanged(path, checkpoint.stamps[path])
    return examined


def _read(
    refs: Sequence[TensorRef],
    measure: Callable[[Sequence[TensorRef]], Measured],
    failures: Failures,
    keep_going: bool,
) -> tuple[Sequence[TensorRef], Measured]:
    """What could be measured, and of which tensors.

    A file that fails meanwhile costs its tensors, and without ``keep_going`` those of the whole
    checkpoint. Each failure leaves out a file, so there are at most as many as files.
    """
    for _ in {ref.file for ref in refs}:
        with failures.caught():
            return refs, measure(refs)
        failed = failures[-1].input
        refs = [ref for ref in refs if ref.file != failed] if keep_going else []
    return [], measure([])


def without_lost(
    checkpoint: Checkpoint, lost: Collection[str], failures: Sequence[InputFailure]
) -> Checkpoint:
    """A checkpoint without tensors whose files failed while they were read."""
    if not lost:
        return checkpoint
    reason = f"not read: {failures[0].input} failed ({failures[0].kind})"
    skipped = (Skipped(ref.name, reason) for ref in checkpoint.tensors if ref.name in lost)
    return replace(
        checkpoint,
        tensors=tuple(ref for ref in checkpoint.tensors if ref.name not in lost),
        skipped=(*checkpoint.skipped, *skipped),
    )
