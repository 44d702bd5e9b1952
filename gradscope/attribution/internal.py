"""What a layer, or one of its neurons, carries of a score: conductance and internal influence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from gradscope.attribution.attribute import prepared
from gradscope.attribution.formulas.gradients import added_up
from gradscope.attribution.formulas.references import references
from gradscope.attribution.subject import Subject
from gradscope.errors import UsageError
from gradscope.models.forms import as_model
from gradscope.models.model import Model
from gradscope.models.probe import held, run
from gradscope.text import plural, quoted

LayerMethod = Literal["conductance", "internal-influence"]
NeuronMethod = Literal["conductance", "integrated-gradients", "gradient"]


@dataclass(frozen=True, eq=False, slots=True)
class Internal:
    """Raw signed attribution to a layer's output, or to the inputs by way of a neuron."""

    method: str
    #: In the layer's own shape [N, …]; of a neuron [N, C, H, W].
    values: Tensor
    #: The classes that are explained.
    target: tuple[int, ...]
    layer: str
    diagnostics: dict[str, Any] = field(default_factory=dict)


def attribute_layer(
    model: object,
    inputs: Tensor,
    layer: str,
    method: LayerMethod = "conductance",
    *,
    target: int | Sequence[int] | None = None,
    reference: str | Tensor = "mean",
    steps: int = 50,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Internal:
    """What each element of a layer's output carries of the score, along the path from a reference.

    "conductance" (Dhamdhere et al. 2018, arXiv:1805.12233) is the path integral of dS/dy dy, in
    trapezoids (Shrikumar et al. 2018, arXiv:1807.09946): it adds up to the change of the score, and
    the diagnostics say how well. "internal-influence" (Leino et al. 2018, arXiv:1802.03788) is the
    mean of dS/dy over the path. Model, target and reference are those of ``attribute``.

    Raises UsageError for an unknown method, layer or target, and for a layer whose output has no
    row for each image.
    """
    compute = _of_names(method, {"conductance": _conductance, "internal-influence": _influence})
    looked_at = as_model(model)
    with held(looked_at.module):
        subject = _prepared(looked_at, inputs, layer, target, mean, std, steps)
        (base,) = references(subject, reference)
        values, facts = compute(subject, base, steps)
    return Internal(method, values, tuple(subject.targets.tolist()), layer, facts)


def attribute_neuron(
    model: object,
    inputs: Tensor,
    layer: str,
    neuron: int | tuple[int, ...],
    method: NeuronMethod = "conductance",
    *,
    target: int | Sequence[int] | None = None,
    reference: str | Tensor = "mean",
    steps: int = 50,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Internal:
    """What each input element [N, C, H, W] gives to the score by way of one neuron, or to it alone.

    ``neuron`` indexes the layer's output behind the images: all of its dimensions, or the first of
    them, which stands for the sum of what is there (a channel). "conductance" is (x - x') times the
    path integral of dS/dy dy/dx; "integrated-gradients" and "gradient" explain y itself, whatever
    the target. Model, target and reference are those of ``attribute``.

    Raises UsageError as ``attribute_layer``, and for a neuron that the layer does not have.
    """
    path = _of_names(method, {"conductance": True, "integrated-gradients": True, "gradient": False})
    at = (neuron,) if isinstance(neuron, int) else tuple(neuron)
    looked_at = as_model(model)
    with held(looked_at.module):
        subject = _prepared(looked_at, inputs, layer, target, mean, std, steps)
        if path:
            (base,) = references(subject, reference)
            found = _along(subject, base, steps, at, by_score=method == "conductance")
            values = (subject.inputs - base) * found
        else:
            values = _neuron_gradient(subject, subject.inputs, subject.images, at, by_score=False)
    return Internal(method, values, tuple(subject.targets.tolist()), layer)


def _prepared(
    model: Model, inputs: Tensor, layer: str, target: int | Sequence[int] | None,
    mean: Sequence[float] | None, std: Sequence[float] | None, steps: int,
) -> Subject:  # fmt: skip
    if steps < 1:
        raise UsageError("steps has to be at least 1")
    return prepared(model, inputs, layer, target, reads_layer=True, mean=mean, std=std)


T = TypeVar("T")


def _of_names(name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise UsageError(f"unknown method {name!r}; there are {', '.join(known)}")
    return known[name]


def _conductance(subject: Subject, base: Tensor, steps: int) -> tuple[Tensor, dict[str, Any]]:
    """The sum of (g_k + g_k+1) (y_k+1 - y_k) / 2 over steps + 1 points of the path."""
    points = _path(subject, base, [k / steps for k in range(steps + 1)])
    before: dict[int, tuple[Tensor, Tensor]] = {}
    total: dict[int, Tensor] = {}
    for image, _, outputs, slopes in points:
        if image in before:
            last, steeper = before[image]
            part = (steeper + slopes) * (outputs - last) / 2
            total[image] = total[image] + part if image in total else part
        before[image] = outputs, slopes
    values = torch.stack([total[image] for image in sorted(total)])
    start = torch.cat([s for _, _, s in subject.scores(lambda _, images: base[images])])
    change = (subject.own_scores.double() - start.double())[None]
    return values, added_up(values.flatten(1).double().sum(1) - change, change)


def _influence(subject: Subject, base: Tensor, steps: int) -> tuple[Tensor, dict[str, Any]]:
    """The mean of dS/dy at the midpoints of the path's parts."""
    total: dict[int, Tensor] = {}
    for image, _, _, slopes in _path(subject, base, _midpoints(steps)):
        total[image] = total[image] + slopes / steps if image in total else slopes / steps
    return torch.stack([total[image] for image in sorted(total)]), {}


def _midpoints(steps: int) -> list[float]:
    return [(k + 0.5) / steps for k in range(steps)]


def _path(
    subject: Subject, base: Tensor, positions: Sequence[float]
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Image, position, the layer's output and dS by it, along the path; positions in order."""

    def work(which: Tensor, images: Tensor) -> Tensor:
        inputs = _between(subject, base, positions, which, images)
        with torch.enable_grad():
            seen = run(subject.model, inputs, [subject.layer_name])
            total = subject.objective(seen.logits, images).sum()
        pieces = seen.pieces[subject.layer_name]
        slopes = _rows(subject, seen.gradients(total, subject.layer_name), len(images))
        return torch.stack([_rows(subject, pieces, len(images)), slopes], 1)

    for which, images, found in subject.answers(work, len(positions)):
        for at, image, (outputs, slopes) in zip(
            which.tolist(), images.tolist(), found, strict=True
        ):
            yield image, at, outputs, slopes


def _between(
    subject: Subject, base: Tensor, positions: Sequence[float], which: Tensor, images: Tensor
) -> Tensor:
    """Inputs at positions of the path from the reference (0) to the image (1)."""
    at = base.new_tensor(positions)[which].view(-1, 1, 1, 1)
    return base[images] + at * (subject.inputs[images] - base[images])


def _rows(subject: Subject, pieces: Sequence[Tensor], count: int) -> Tensor:
    """A layer's pieces as one tensor with a row for each image."""
    joined = torch.cat([piece.detach() for piece in pieces])
    expected = count if subject.model.batch is None else len(pieces) * subject.model.batch
    if len(joined) != expected:
        raise UsageError(
            f"layer {quoted(subject.layer_name)} returns {list(joined.shape)} for "
            f"{plural(count, 'image')}; it has to have a row for each"
        )
    return joined[:count]


def _along(
    subject: Subject, base: Tensor, steps: int, at: tuple[int, ...], *, by_score: bool
) -> Tensor:
    """The mean over the path of the neuron's gradient by the inputs [N, C, H, W]."""
    total = torch.zeros_like(subject.inputs)
    positions = _midpoints(steps)

    def work(which: Tensor, images: Tensor) -> Tensor:
        inputs = _between(subject, base, positions, which, images)
        return _neuron_gradient(subject, inputs, images, at, by_score=by_score)

    for _, images, found in subject.answers(work, steps):
        total.index_add_(0, images, found / steps)
    return total


def _neuron_gradient(
    subject: Subject, inputs: Tensor, images: Tensor, at: tuple[int, ...], *, by_score: bool
) -> Tensor:
    """dy/dx of a neuron y, times dS/dy where it is asked for ``by_score``."""
    leaf = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        seen = run(subject.model, leaf, [subject.layer_name])
        pieces = seen.pieces[subject.layer_name]
        _rows(subject, pieces, len(images))
        chosen = [_neuron(subject, piece, at) for piece in pieces]
        if by_score:
            total = subject.objective(seen.logits, images).sum()
            slopes = seen.gradients(total, subject.layer_name)
            chosen = [
                y * _neuron(subject, slope, at) for y, slope in zip(chosen, slopes, strict=True)
            ]
        score = torch.cat(chosen)[: len(images)].sum()
    return torch.autograd.grad(score, leaf, allow_unused=True, materialize_grads=True)[0].detach()


def _neuron(subject: Subject, output: Tensor, at: tuple[int, ...]) -> Tensor:
    """The elements of a layer's output that ``at`` selects [N, M]."""
    try:
        found = reduce(lambda part, index: part[:, index], at, output)
    except IndexError:
        raise UsageError(
            f"layer {quoted(subject.layer_name)} has no neuron {list(at)}: for each image it "
            f"returns {list(output.shape[1:])}"
        ) from None
    return found.reshape(len(output), -1)
