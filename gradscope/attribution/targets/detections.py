"""Detections: the box that a target names, and how later outputs are asked about it.

Four forms are read: a list with a dictionary for each image (torchvision); logits and boxes of
queries (DETR); predictions at every anchor [N, 4 + K, A] or [N, A, 5 + K] (YOLO); and final boxes
[N, A, 6]. Anchors and queries keep their place, so their scores are read there. Lists of boxes do
not: of each class the box that overlaps the named one most counts, by its score times the overlap
(Petsiuk et al. 2021, arXiv:2006.03204), which is its score in the picture itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradscope.errors import UsageError
from gradscope.models.model import Model
from gradscope.models.outputs import choose, described, is_beside, is_picture, outputs
from gradscope.models.scores import Scores, head_of, rows
from gradscope.text import plural

#: Anchors that are looked at; boxes that overlap more are one detection.
_SUREST, _OVERLAP = 500, 0.5
#: As many final boxes as exporters keep; more are anchors.
_MOST_FINAL = 1000
#: From this share of queries that see nothing on, the last class is taken for that.
_NOTHING = 0.25

Reading = Callable[[Any], Scores]


@dataclass(frozen=True, eq=False, slots=True)
class Boxes:
    """The boxes of one image, surest first: corners [M, 4], scores [M], classes [M]."""

    corners: Tensor
    scores: Tensor
    classes: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Named:
    """How later outputs are asked about one detection, and the class that it was found to be."""

    reading: Reading
    #: None for the surest of all the classes that are read.
    best: int | None = None


def box_reading(number: int, answer: Any, inputs: Tensor, model: Model) -> Named:
    """How later outputs are asked about the ``number``-th detection. Raises UsageError."""
    for form in (_listed, _final, _queries, _anchors):
        found = form(number, answer, inputs, model)
        if found is not None:
            return found
    raise UsageError(
        f"the model returns {described(outputs(answer))}, and no boxes: box:N reads torchvision's "
        "list of dictionaries, DETR's logits and boxes, and YOLO's [N, 4 + classes, anchors]"
    )


# --- lists of boxes, which have no fixed place ----------------------------------------------------


def _listed(number: int, answer: Any, _inputs: Tensor, _model: Model) -> Named | None:
    return _matched(number, answer, _of_dictionaries) if _of_dictionaries(answer) else None


def _of_dictionaries(answer: Any) -> list[Boxes] | None:
    # Scripted detectors return losses first.
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], list):
        answer = answer[1]
    images = answer if isinstance(answer, list | tuple) else [answer]
    if not images or not all(
        isinstance(i, Mapping) and {"boxes", "scores"} <= set(i) for i in images
    ):
        return None
    return [_boxes(i["boxes"], i["scores"], i.get("labels")) for i in images]


def _boxes(corners: Tensor, scores: Tensor, labels: Tensor | None) -> Boxes:
    order = scores.detach().argsort(descending=True, stable=True)
    classes = torch.zeros_like(order) if labels is None else labels[order].long()
    return Boxes(corners[order], scores[order], classes)


def _final(number: int, answer: Any, _inputs: Tensor, _model: Model) -> Named | None:
    return _matched(number, answer, _of_rows) if _of_rows(answer) else None


def _of_rows(answer: Any) -> list[Boxes] | None:
    """Corners, score and class in each row, as exporters with their own suppression write."""
    found = list(outputs(answer).values())[:1]
    if (
        not found
        or found[0].dim() != 3
        or found[0].shape[2] != 6
        or found[0].shape[1] > _MOST_FINAL
    ):
        return None
    image = found[0]
    classes = image[..., 5]
    if not bool((classes == classes.round()).all()) or bool((classes < 0).any()):
        return None
    return [_boxes(one[:, :4], one[:, 4], one[:, 5]) for one in image]


def _matched(number: int, answer: Any, read: Callable[[Any], list[Boxes] | None]) -> Named:
    first = (read(answer) or [])[0]
    _check(number, len(first.scores))
    box = first.corners[number].detach()
    classes = int(first.classes.max()) + 1

    def reading(later: Any) -> Scores:
        found = [_inside(one, box, classes) for one in read(later) or []]
        return Scores(torch.stack(found), "probabilities")

    return Named(reading)


def _inside(boxes: Boxes, box: Tensor, classes: int) -> Tensor:
    """For each class [K] the score times the overlap of the box that overlaps most; 0 without."""
    found = boxes.scores.new_zeros(classes)
    if not len(boxes.scores):
        return found
    weighted = boxes.scores * overlaps(boxes.corners.detach(), box)
    kept = boxes.classes < classes
    return found.scatter_reduce(0, boxes.classes[kept], weighted[kept], "amax")


def overlaps(boxes: Tensor, box: Tensor) -> Tensor:
    """Intersection over union [M] of corners [M, 4] and one box [4]."""
    low, high = torch.maximum(boxes[:, :2], box[:2]), torch.minimum(boxes[:, 2:], box[2:])
    common = (high - low).clamp(min=0).prod(1)
    sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return common / (sizes - common).clamp(min=torch.finfo(boxes.dtype).tiny)


def _check(number: int, count: int) -> None:
    if number >= count:
        found = f"{plural(count, 'detection')} in this picture"
        numbers = f", box:0 to box:{count - 1}" if count else ""
        raise UsageError(f"--target box:{number}: the model makes {found}{numbers}")


# --- anchors and queries, which keep their place --------------------------------------------------


def _queries(number: int, answer: Any, _inputs: Tensor, model: Model) -> Named | None:
    found = {name: t for name, t in outputs(answer).items() if t.dim() == 3}
    boxed = [name for name, t in found.items() if t.shape[2] == 4 and "box" in name]
    asked = {name: t for name, t in found.items() if name not in boxed}
    queries = found[boxed[0]].shape[1] if boxed else 0
    logits = choose(asked, model.output, lambda t: t.shape[1] == queries)
    if logits is None:
        return None
    name = logits.name
    first = found[name][0].detach()
    nothing = has_nothing(first, model.names)
    sure = (first.softmax(1)[:, :-1] if nothing else first).amax(1)
    _check(number, queries)
    place = int(sure.argsort(descending=True, stable=True)[number])
    head = head_of(found[name][:, place], first.shape[1], model.module)
    if head == "logits" and not nothing:
        head = "independent"
    best = int(first[place][: first.shape[1] - nothing].argmax())
    return Named(lambda later: Scores(rows(outputs(later)[name][:, place]), head), best)


def has_nothing(logits: Tensor, names: int) -> bool:
    """Whether the last class of queries [Q, K] is "nothing", which excludes the others.

    Without it classes are independent of each other, as focal losses train them. Names tell; else
    most queries do, since there are more of them than objects.
    """
    classes = logits.shape[1]
    if names in (classes, classes - 1):
        return names < classes
    return bool((logits.argmax(1) == classes - 1).double().mean() > _NOTHING)


def _anchors(number: int, answer: Any, inputs: Tensor, model: Model) -> Named | None:
    found = outputs(answer)
    if model.output is None:
        found = {
            n: t
            for n, t in found.items()
            if not (is_beside(n) or (t.dim() == 3 and is_picture(t, inputs)))
        }
    chosen = choose(found, model.output, lambda t: t.dim() == 3 and min(t.shape[1:]) > 4)
    if chosen is None:
        return None
    name = chosen.name
    columns = found[name].shape[1] < found[name].shape[2]
    # Rows come from models that also say whether there is an object at all.
    width = min(found[name].shape[1:])
    boxed = width - model.names if width - model.names in (4, 5) else 4 if columns else 5

    def anchors(later: Any) -> Tensor:
        """[N, A, 4 + K] or [N, A, 5 + K]."""
        values = outputs(later)[name]
        return values.transpose(1, 2) if columns else values

    def classes(values: Tensor) -> Tensor:
        scores = values[..., boxed:]
        return scores * values[..., 4:5] if boxed == 5 else scores

    first = anchors(answer)[0].detach()
    if not bool((first[:, 2:4] > 0).all()):
        # Boxes have a width and a height: these are other numbers.
        return None
    places = _suppressed(first[:, :4], classes(first))
    _check(number, len(places))
    place = places[number]
    sure = bool(((classes(first) >= 0) & (classes(first) <= 1)).all())
    head = "probabilities" if sure else "independent"
    return Named(lambda later: Scores(rows(classes(anchors(later)[:, place])), head))  # type: ignore[arg-type]


def _suppressed(middles: Tensor, classes: Tensor) -> Sequence[int]:
    """Anchors, surest first, without those that overlap a surer one of the same class."""
    scores, kinds = classes.max(1)
    half = middles[:, 2:] / 2
    corners = torch.cat([middles[:, :2] - half, middles[:, :2] + half], 1)
    left = scores.argsort(descending=True, stable=True)[:_SUREST]
    kept: list[int] = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        same = (overlaps(corners[left], corners[best]) > _OVERLAP) & (kinds[left] == kinds[best])
        left = left[~same]
    return kept
