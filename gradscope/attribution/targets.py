"""The classes that are explained of one picture, by index, label or rank."""

from __future__ import annotations

from collections.abc import Sequence

from gradscope.attribution.result import Target
from gradscope.attribution.subject import Subject
from gradscope.models.labels import Labels, Ranked, parse_target


def targets(
    subject: Subject, target: int | str, versus: int | str | None, labels: Labels | None
) -> list[Target]:
    """The targets of the subject's first image; several for a rank. Raises UsageError."""
    logits, _ = subject.answer
    classes = len(logits)
    wanted = parse_target(str(target), labels, classes)
    against = None if versus is None else parse_target(str(versus), labels, classes)
    best = wanted.count if isinstance(wanted, Ranked) else 0
    indices = [wanted] if isinstance(wanted, int) else logits.topk(best).indices.tolist()
    ranking = logits.argsort(descending=True).tolist()
    return [_target(subject, index, _other(index, against, ranking), labels) for index in indices]


def _other(index: int, against: int | Ranked | None, ranking: Sequence[int]) -> int | None:
    """The class to contrast with; a rank does not count the target itself."""
    if not isinstance(against, Ranked):
        return against
    others = [other for other in ranking if other != index]
    return others[min(against.count, len(others)) - 1]


def _target(subject: Subject, index: int, other: int | None, labels: Labels | None) -> Target:
    logits, probabilities = subject.answer
    label = (labels or {}).get
    return Target(
        index=index,
        label=label(index),
        score=float(logits[index] - (0 if other is None else logits[other])),
        probability=float(probabilities[index]),
        versus=other,
        versus_label=None if other is None else label(other),
    )
