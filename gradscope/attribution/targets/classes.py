"""The classes that are explained of one picture, by index, label or rank."""

from __future__ import annotations

from collections.abc import Sequence

from gradscope.attribution.result import Prediction, Target
from gradscope.attribution.subject import Subject
from gradscope.errors import UsageError
from gradscope.models.labels import Labels, Ranked, parse_target
from gradscope.models.scores import Scores

#: Classes that a report lists for each picture.
_PREDICTIONS = 5


def predictions(scores: Scores, labels: Labels | None) -> tuple[Prediction, ...]:
    """The first image's likeliest classes; none of numbers that do not compete to be the answer."""
    if scores.head == "embedding" or (scores.head == "value" and scores.values.shape[1] > 1):
        return ()
    values, probabilities = scores.values[0], scores.probabilities
    return tuple(
        Prediction(
            index=index,
            label=(labels or {}).get(index),
            score=float(values[index]),
            probability=None if probabilities is None else float(probabilities[0, index]),
        )
        for index in values.topk(min(_PREDICTIONS, len(values))).indices.tolist()
    )


def targets(
    subject: Subject,
    target: int | str,
    versus: int | str | None,
    labels: Labels | None,
    aim: str | None = None,
) -> list[Target]:
    """The targets of the subject's first image; several for a rank. Raises UsageError.

    ``aim`` is what they are where they are no classes of the whole picture.
    """
    scores = subject.answer
    values = scores.values[0]
    wanted = parse_target(str(target), labels, len(values))
    if isinstance(wanted, Ranked) and scores.head == "embedding":
        raise UsageError(
            f"the model returns {len(values)} numbers that describe the image (an embedding), not "
            "scores of classes: --target similar:IMAGE explains the likeness to another picture, "
            "text:FILE that to texts, channel:K one number; if they are classes, name them with "
            "--labels or one by its index"
        )
    against = None if versus is None else parse_target(str(versus), labels, len(values))
    best = wanted.count if isinstance(wanted, Ranked) else 0
    indices = [wanted] if isinstance(wanted, int) else values.topk(best).indices.tolist()
    ranking = values.argsort(descending=True).tolist()
    others = [(index, _other(index, against, ranking)) for index in indices]
    return [_target(scores, index, other, labels, aim) for index, other in others]


def _other(index: int, against: int | Ranked | None, ranking: Sequence[int]) -> int | None:
    """The class to contrast with; a rank does not count the target itself."""
    if not isinstance(against, Ranked):
        return against
    others = [other for other in ranking if other != index]
    if not others:
        raise UsageError(
            "--versus: the model returns one number, there is nothing to contrast with"
        )
    return others[min(against.count, len(others)) - 1]


def _target(
    scores: Scores, index: int, other: int | None, labels: Labels | None, aim: str | None
) -> Target:
    values, probabilities = scores.values[0], scores.probabilities
    label = (labels or {}).get
    return Target(
        index=index,
        label=label(index),
        score=float(values[index] - (0 if other is None else values[other])),
        probability=None if probabilities is None else float(probabilities[0, index]),
        versus=other,
        versus_label=None if other is None else label(other),
        aim=aim or _aim(scores, index),
    )


def _aim(scores: Scores, index: int) -> str | None:
    """What a number is called that is no class."""
    if scores.head == "value":
        return "value" if scores.values.shape[1] == 1 else f"value:{index}"
    return f"channel:{index}" if scores.head == "embedding" else None
