"""``attribute``: a model, inputs and a method -> raw signed values and diagnostics."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradscope.attribution.applicable import check_applicable
from gradscope.attribution.method import Method, completed
from gradscope.attribution.methods import method_named
from gradscope.attribution.subject import Subject, Tick
from gradscope.attribution.targets.readings import called
from gradscope.errors import InputError, NotApplicableError, UsageError
from gradscope.models.forms import as_model
from gradscope.models.model import Model
from gradscope.models.precision import HALF
from gradscope.models.probe import first_not_finite, held
from gradscope.models.quick import quick
from gradscope.text import plural

#: What autograd says of operators that have no derivative, or write over what it needs.
_UNDERIVED = re.compile(r"derivative for|modified by an inplace operation")


@dataclass(frozen=True, eq=False, slots=True)
class Attribution:
    """Raw signed attribution of N images; display happens elsewhere.

    ``values`` are [N, h, w] in the layer's or the patches' geometry for activation and attention
    methods, [N, C, H, W] for gradient methods and [N, H, W] for perturbation methods.
    """

    method: str
    values: Tensor
    #: [N, H, W] in input geometry: upsampled bilinearly; channels are summed, or (saliency and its
    #: relatives) reduced to the greatest magnitude.
    upsampled: Tensor
    #: The classes that are explained.
    target: tuple[int, ...]
    #: The layer that was read; None for methods that read none.
    layer: str | None
    #: The scores that are explained, and the method's own diagnostics.
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from gradscope.attribution.drawing.notebook import attribution_html

        return attribution_html(self)


def attribute(
    model: object,
    inputs: Tensor,
    method: str = "gradcam",
    *,
    target: int | Sequence[int] | Callable[[Any], Tensor] | None = None,
    versus: int | Sequence[int] | None = None,
    output_name: str | int | None = None,
    layer: str = "auto",
    seed: int = 0,
    chunk: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    progress: Tick | None = None,
    exact: bool = False,
    **options: Any,
) -> Attribution:
    """Which parts of preprocessed inputs [N, C, H, W] the model's score for a target rests on.

    ``model`` is an ``nn.Module``, a ScriptModule, an ExportedProgram or the ``model`` of what
    ``load_model`` returns. ``target`` is a class, one class per image, a function of the model's
    output that returns a number for each image, or None for each image's greatest logit; with
    ``versus`` the difference of two logits is explained. ``output_name`` says which of several
    outputs is meant, by name or position. ``layer`` is read by activation methods; ``auto`` takes
    the last with maps or patch tokens that the gradient reaches. The model sees ``chunk`` inputs at
    a time, by default as many as memory allows; results do not depend on it. ``mean`` and ``std``
    are those of the inputs' normalisation, needed for references such as "black". ``options`` are
    the method's own (see ``gradscope methods``). Long work on a CPU is done by a private copy of
    the model, whose answers agree within 1e-5 of the greatest and which is thrown away (a ``Model``
    keeps it until a change in it is seen, see ``Looks``); ``exact`` puts everything to the model
    itself.

    The model is left as it was: parameters, gradients, buffers, training flags, hooks and the
    random state, also after an exception.

    Raises UsageError for an unknown method, option, layer or target, and for a model or layer
    that the method cannot read, and InputError for inputs and answers that are not finite.
    """
    chosen = method_named(method)
    given = completed(chosen, options)
    looked_at = replace(
        as_model(model), known={}, output=None if output_name is None else str(output_name)
    )
    if callable(target):
        looked_at, target = looked_at.read_by(called(target)), None
    looked_at = looked_at if exact else quick(looked_at)
    with held(looked_at.module):
        subject = prepared(
            looked_at, inputs, layer, target, versus, seed=seed, reads_layer=chosen.reads_layer,
            mean=mean, std=std,
        )  # fmt: skip
        if chunk is not None:
            subject.limit(chunk)
        subject.tick = progress or subject.tick
        check_applicable(subject, chosen)
        return attributed(subject, chosen, given)


def prepared(
    model: Model,
    inputs: Tensor,
    layer: str,
    target: int | Sequence[int] | None,
    versus: int | Sequence[int] | None = None,
    *,
    seed: int = 0,
    reads_layer: bool,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Subject:
    """Inputs, their targets and a held model. Raises UsageError and InputError for wrong ones."""
    _check_inputs(inputs)
    # A tensor of inference mode cannot be differentiated; its copy can.
    own = inputs.clone() if inputs.is_inference() else inputs.detach()
    own = own.float() if own.dtype in HALF else own
    subject = _aimed(subject_of(model, own, layer, seed, reads_layer=reads_layer), target, versus)
    subject.mean, subject.std = (None if t is None else torch.tensor(t) for t in (mean, std))
    return subject


def attributed(subject: Subject, method: Method, options: Mapping[str, Any]) -> Attribution:
    """One method on a subject whose model is held; passes already made are reused."""
    values, facts = computed(subject, method, options)
    notes = (*facts.pop("notes", ()), *(subject.chunks.notes if subject.chunks else ()))
    return Attribution(
        method.name,
        values,
        upsampled(values, method, subject.inputs),
        tuple(subject.targets.tolist()),
        subject.layer_name if method.reads_layer else None,
        {"scores": subject.own_scores.tolist()} | facts | ({"notes": notes} if notes else {}),
    )


def computed(
    subject: Subject, method: Method, options: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """A method's raw values, and what it has to say of them."""
    try:
        values, facts = method.compute(subject, **options)
    except RuntimeError as error:
        if not _UNDERIVED.search(str(error)):
            raise
        raise NotApplicableError(f"the model cannot be differentiated ({error})") from error
    return values, facts


def upsampled(values: Tensor, method: Method, inputs: Tensor) -> Tensor:
    """A method's values as one map [N, H, W] in the inputs' geometry."""
    if values.dim() == 4:
        if method.channels == "sum":
            return values.sum(1)
        return values.abs().amax(1)
    if values.shape[1:] == inputs.shape[2:]:
        return values
    return torch.nn.functional.interpolate(
        values[:, None], size=inputs.shape[2:], mode="bilinear", align_corners=False
    )[:, 0]


def _check_inputs(inputs: Tensor) -> None:
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not inputs.numel():
        shape = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise UsageError(f"inputs have shape {shape}, not [N, C, H, W]")
    if not inputs.is_floating_point():
        raise UsageError(f"inputs are {inputs.dtype}; preprocessed images are floating point")
    wrong = int((~torch.isfinite(inputs)).sum())
    if wrong:
        raise InputError(
            "inputs",
            "malformed",
            f"{wrong:,} of {inputs.numel():,} elements are not finite (NaN or infinite); check how "
            "the images were read and normalised (a standard deviation of 0?)",
        )


def subject_of(
    model: Model, inputs: Tensor, layer: str, seed: int, *, reads_layer: bool
) -> Subject:
    """Images and a held model, the target of each its greatest logit."""
    named = None if layer == "auto" else layer
    model.check_layers([] if named is None else [named])
    nothing = torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)
    subject = Subject(model, inputs, nothing, layer=named, seed=seed)
    # The one pass that CAM methods need also gives the classes.
    answered = subject.tapped if reads_layer else subject.answered
    if not answered.scores.finite:
        where = first_not_finite(model, inputs)
        first = "" if where is None else f", and the first layer whose output is not is {where}"
        raise InputError(
            "model",
            "malformed",
            f"its answer is not finite (NaN or infinite), though the inputs are{first}; look for "
            "NaN in the weights (gradscope weights), or for an overflow of half precision",
        )
    return subject.about(answered.logits.detach().argmax(1))


def _aimed(
    subject: Subject, target: int | Sequence[int] | None, versus: int | Sequence[int] | None
) -> Subject:
    logits = subject.answered.logits
    targets = subject.targets if target is None else _classes(target, logits)
    return subject.about(targets, None if versus is None else _classes(versus, logits))


def _classes(wanted: int | Sequence[int], logits: Tensor) -> Tensor:
    count, classes = logits.shape
    given = wanted.tolist() if isinstance(wanted, Tensor) else wanted
    found = [
        _index(t, classes) for t in (given if isinstance(given, Iterable) else [given] * count)
    ]
    if len(found) != count:
        raise UsageError(f"{plural(len(found), 'target')} for {plural(count, 'image')}")
    return torch.tensor(found, device=logits.device)


def _index(wanted: Any, classes: int) -> int:
    """A class index; tensors' and NumPy's integers count, truth values and fractions do not."""
    whole = hasattr(wanted, "__index__") and not isinstance(wanted, bool)
    if not whole or not 0 <= operator.index(wanted) < classes:
        raise UsageError(f"no class {wanted}: class indices are 0 to {classes - 1}")
    return operator.index(wanted)
