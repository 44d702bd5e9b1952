"""Two checkpoints examined: what matches what, measured in one pass, and why it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gradscope.checkpoints.integrity import check_unchanged, verified
from gradscope.checkpoints.left_out import unread
from gradscope.checkpoints.tensors import Checkpoint, Skipped, TensorRef
from gradscope.drift.ggml_names import ggml_names
from gradscope.drift.matching import Matched, Matching, canonical, matched, renamed, tied
from gradscope.drift.result import DriftResult, Explanation, Need
from gradscope.report.model import InputFailure
from gradscope.report.request import Failures, part_failures
from gradscope.weights.roles import AUXILIARY, Role, roles

if TYPE_CHECKING:  # compiled kernels, which --headers-only has no use for
    from gradscope.drift.describing import Seen
    from gradscope.drift.logical import Logical, Schemes
    from gradscope.drift.measures import Measures
    from gradscope.statistics import Engine
    from gradscope.weights.shares import Share

#: Told the bytes done, and the bytes in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """What was found of two checkpoints, or of the one that could be opened."""

    checkpoints: tuple[Checkpoint, ...]
    result: DriftResult | None = None
    seen: Sequence[Seen] = ()
    measured: frozenset[Need] = field(default_factory=frozenset)
    #: Of one of several jobs, which has seen and described its share alone.
    share: Shared | None = None

    @property
    def lost(self) -> Iterator[str]:
        """Names of tensors that could not be read."""
        return (s.subject for c in self.checkpoints for s in c.skipped if not s.deliberate)

    def errors(self, failures: Sequence[InputFailure]) -> list[InputFailure]:
        """What failed, and what of the checkpoints could not be read."""
        unread_ = ((c.path, unread(c, bool(failures))) for c in self.checkpoints)
        return [*failures, *(e for path, told in unread_ for e in part_failures(path, told))]


@dataclass(frozen=True)
class Shared:
    """What a job knows of the whole: how all match, and by its pairs' names what is elsewhere."""

    matching: Matching
    names: Mapping[str, Role]
    elsewhere: Mapping[str, Seen]


def headers_of(base: Checkpoint, new: Checkpoint) -> Found:
    """Names, shapes and types alone."""
    from gradscope.drift.assembling import assembled
    from gradscope.drift.experts import unstacked
    from gradscope.drift.logical import by_headers

    base, new = _of_both(base, new), _of_both(new, base)
    here, there, known = unstacked(by_headers(base), by_headers(new), ggml_names(base, new))
    names = _roles(here.tensors, there.tensors)
    matching = matched(here.tensors, there.tensors, known)
    schemes = {**here.schemes, **there.schemes}
    seen = [_seen(m, names, schemes) for m in matching.pairs]
    result = assembled(base, new, matching, seen, names, schemes)
    return Found((base, new), result, seen, frozenset({Need.HEADERS}))


def _seen(
    pair: Matched, names: Mapping[str, Role], schemes: Schemes, measures: Measures | None = None
) -> Seen:
    from gradscope.drift.describing import Seen

    was, stored = schemes.get(pair.base.decoding), schemes.get(pair.new.decoding)
    return Seen(
        pair.base,
        pair.new,
        names[pair.new.name],
        measures,
        base_scheme=was,
        new_scheme=stored,
    )


def _roles(base: Sequence[TensorRef], new: Sequence[TensorRef]) -> Mapping[str, Role]:
    return roles(base) | roles(new)


# -- values ----------------------------------------------------------------------------------------


def compared(
    base: Checkpoint,
    new: Checkpoint,
    failures: Failures,
    *,
    engine: Engine[Any, Any],
    parents: Mapping[str, Checkpoint],
    part: Share | None = None,
    keep_going: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Found:
    """Both in full. A file that fails while it is read costs its tensors, which ``keep_going`` goes
    on without; else there is no result.

    ``parents`` by what they are called are what the new one may be mixed from. One job of several
    compares its ``part`` of the pairs.
    """
    files = {ref.file for c in (base, new) for ref in c.tensors}
    for _ in range(len(files) + 1):
        with failures.caught():
            return _compared(base, new, engine, parents, part, progress)
        failed = failures[-1]
        if not keep_going or failed.input not in files:
            break
        base, new = _without(base, new, failed)
    return Found((base, new))


def _compared(
    base: Checkpoint,
    new: Checkpoint,
    engine: Engine[Any, Any],
    parents: Mapping[str, Checkpoint],
    part: Share | None,
    progress: Progress,
) -> Found:
    """Raises InputError when a file changes or ends while it is read."""
    from gradscope.drift.assembling import assembled
    from gradscope.drift.experts import unstacked
    from gradscope.drift.logical import logical
    from gradscope.drift.misplaced import elsewhere, with_misplaced
    from gradscope.drift.second_look import same
    from gradscope.statistics.engine import one_blas_thread

    base, new = verified(base, engine), verified(new, engine)
    base, new = _of_both(base, new), _of_both(new, base)
    here, there, known = unstacked(logical(base), logical(new), ggml_names(base, new))
    matching = matched(here.tensors, there.tensors, known)
    matching = renamed(matching, here.tensors, there.tensors, _Content(engine))
    matching = tied(matching, here.tensors, there.tensors, same)
    names = _roles(here.tensors, there.tensors)
    mine = matching if part is None else _share(matching, part)
    schemes = {**here.schemes, **there.schemes}
    measured = _measured(mine.pairs, names, schemes, engine, progress)
    weights = {**here.quantized, **there.quantized}
    mixed = _parents(here, parents)
    tasks = (
        _Task(
            seen,
            weights.get(seen.new.name) or weights.get(seen.base.name),
            mixed.get(seen.base.name, ()),
            matching.ties.get(seen.new.name),
        )
        for seen in measured
    )
    with one_blas_thread():
        found = list(engine(_explained, tasks))
        seen = with_misplaced(found, here.tensors)
        shared = None
        if part is not None:
            shared = Shared(matching, names, elsewhere(found, here.tensors))
    for checkpoint in (base, new, *parents.values()):
        unchanged(checkpoint)
    result = assembled(base, new, mine, seen, names, schemes)
    return Found((base, new), result, seen, frozenset({Need.HEADERS, Need.VALUES}), shared)


def _of_both(checkpoint: Checkpoint, other: Checkpoint) -> Checkpoint:
    """A checkpoint without what the other has, too, but could not be read of: it is not lacking
    there, and what was skipped tells of it.
    """
    lost = {canonical(s.subject) for s in other.skipped}
    lost -= {canonical(ref.name) for ref in other.tensors} if lost else set()
    if not lost:
        return checkpoint
    kept = tuple(ref for ref in checkpoint.tensors if canonical(ref.name) not in lost)
    return replace(checkpoint, tensors=kept)


def _share(matching: Matching, part: Share) -> Matching:
    """The pairs that one job of several compares; what has no partner is the first one's."""
    from gradscope.weights.shares import balanced

    jobs = balanced([m.base.nbytes + m.new.nbytes for m in matching.pairs], part.of)
    pairs = tuple(m for m, job in zip(matching.pairs, jobs, strict=True) if job == part.index)
    if part.index == 0:
        return replace(matching, pairs=pairs)
    return replace(matching, pairs=pairs, removed=(), added=())


def unchanged(checkpoint: Checkpoint) -> None:
    """Raises InputError for a file that was written to since its headers were read."""
    for path in {ref.file for ref in checkpoint.tensors}:
        check_unchanged(path, checkpoint.stamps[path])


def _measured(
    pairs: Sequence[Matched],
    names: Mapping[str, Role],
    schemes: Schemes,
    engine: Engine[Any, Any],
    progress: Progress,
) -> list[Seen]:
    from gradscope.drift.comparing import Pair, compare

    alike = [m for m in pairs if m.base.shape == m.new.shape]
    total = sum(m.base.nbytes + m.new.nbytes for m in alike)
    done = 0

    def tick(amount: int) -> None:
        nonlocal done
        done += amount
        progress(done, total)

    found = compare([Pair(m.base, m.new) for m in alike], engine, tick)
    measured = {m.new.name: measures for m, measures in zip(alike, found, strict=True)}
    return [_seen(m, names, schemes, measured.get(m.new.name)) for m in pairs]


def _without(
    base: Checkpoint, new: Checkpoint, failed: InputFailure
) -> tuple[Checkpoint, Checkpoint]:
    """Both without the tensors of a file, and without those that these would be compared with."""
    pairs = matched(base.tensors, new.tensors).pairs
    broken = {
        r for m in pairs if failed.input in (m.base.file, m.new.file) for r in (m.base, m.new)
    }
    reason = f"not read: {failed.input} failed ({failed.kind})"

    def rest(checkpoint: Checkpoint) -> Checkpoint:
        gone = broken | {r for r in checkpoint.tensors if r.file == failed.input}
        kept = tuple(r for r in checkpoint.tensors if r not in gone)
        lost = (Skipped(r.name, reason) for r in checkpoint.tensors if r in gone)
        return replace(checkpoint, tensors=kept, skipped=(*checkpoint.skipped, *lost))

    return rest(base), rest(new)


@dataclass(frozen=True)
class _Content:
    """A tensor's content hash, None where it has none."""

    engine: Engine[Any, Any]

    def __call__(self, ref: TensorRef) -> str | None:
        from gradscope.statistics import profile

        return profile([ref], engine=self.engine).tensors[0].content_hash


def _parents(base: Logical, parents: Mapping[str, Checkpoint]) -> dict[str, tuple[Any, ...]]:
    """By the base's names, the same tensors of the parents that have them."""
    from gradscope.drift.explanations import Parent
    from gradscope.drift.logical import logical

    found: dict[str, tuple[Any, ...]] = {}
    for label, checkpoint in parents.items():
        for m in matched(base.tensors, logical(checkpoint).tensors).pairs:
            found[m.base.name] = (*found.get(m.base.name, ()), Parent(label, m.new))
    return found


# -- why -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A tensor to explain, with what is known of it."""

    seen: Seen
    quantized: Any
    parents: tuple[Any, ...]
    tie: str | None


def _explained(task: _Task) -> Seen:
    from gradscope.drift.explanations import Subject, explained, reshaped

    seen = task.seen
    if seen.measures is None:
        return replace(seen, explanation=reshaped(seen.base, seen.new))
    trained = seen.role not in AUXILIARY
    subject = Subject(seen.base, seen.new, seen.measures, task.quantized, trained, task.parents)
    return replace(seen, explanation=_with_tie(_retyped(seen) or explained(subject), task))


def _retyped(seen: Seen) -> Explanation | None:
    """Of identical values: another type, or other codes."""
    if seen.measures is None or not seen.measures.identical or seen.base_type == seen.new_type:
        return None
    text = f"{seen.base_type} stored as {seen.new_type}, every value kept"
    return Explanation(kind="cast", text=text, residual=0.0)


def _with_tie(why: Explanation | None, task: _Task) -> Explanation | None:
    if task.tie is None:
        return why
    measures = task.seen.measures
    if why is None and measures is not None and measures.identical:
        return Explanation(kind="tied", text=task.tie, residual=0.0)
    return why and why.model_copy(update={"text": f"{why.text}; {task.tie}"})
