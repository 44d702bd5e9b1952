"""The scores in a model's answer, and what kind of numbers they are.

Measured where it can be: what the last operators of the graph are, and whether the numbers obey
what a kind promises. A single number is a value unless it ends in a sigmoid or two classes have
names: nothing else tells a regression from the logit of "yes".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradscope.errors import UsageError
from gradscope.models.graph import VIEWS, is_attended, is_residual, made_by
from gradscope.models.outputs import Choice, choose, described, is_beside, outputs
from gradscope.models.precision import HALF

#: ``independent`` logits are of classes that do not exclude each other, a ``value`` is a number
#: that a regression gives.
Head = Literal["logits", "independent", "probabilities", "log-probabilities", "value", "embedding"]

_IMAGENET = 1000


@dataclass(frozen=True, eq=False, slots=True)
class Scores:
    """Scores [N, K] of what can be a target, and their kind."""

    values: Tensor
    head: Head

    @property
    def probabilities(self) -> Tensor | None:
        """Probabilities [N, K]; None where the numbers have none."""
        if self.head == "logits":
            return self.values.softmax(1)
        if self.head == "independent":
            return self.values.sigmoid()
        if self.head == "log-probabilities":
            return self.values.exp()
        return self.values if self.head == "probabilities" else None

    @property
    def finite(self) -> bool:
        """Whether they can be explained; the logarithm of 0 is a probability like others."""
        values = self.values.detach()
        if self.head == "log-probabilities":
            values = values.exp()
        return bool(torch.isfinite(values).all())


@dataclass(frozen=True, slots=True)
class Answering:
    """How a model answers: with which of its outputs, and with what kind of numbers."""

    choice: Choice
    head: Head

    def read(self, answer: Any) -> Scores:
        """The scores of every image. A single "yes" becomes two classes, "no" first."""
        values = rows(outputs(answer)[self.choice.name])
        if values.shape[1] > 1 or self.head in ("value", "embedding"):
            return Scores(values, self.head)
        no = 1 - values if self.head == "probabilities" else -values
        return Scores(torch.cat([no, values], 1), self.head)


def answering(answer: Any, wanted: str | None, names: int, module: nn.Module) -> Answering:
    """How a model answers, from one answer of it.

    ``wanted`` is the output's name or position, ``names`` how many classes have names. Raises
    UsageError where no output has one score for each class.
    """
    found = outputs(answer)

    def head(name: str) -> Head:
        return head_of(found[name], names, module, name)

    likely = (lambda n: rows(found[n]).shape[1] == names, lambda n: head(n) != "embedding")
    # The lists of a detector have a row for each box, not for each image.
    boxes = any(name.endswith("boxes") for name in found)
    chosen = choose(found, wanted, (lambda _: False) if boxes else _per_class, likely)
    if chosen is None:
        raise UsageError(f"the model returns {_form(answer, found)}{_advice(found)}")
    return Answering(chosen, head(chosen.name))


def rows(tensor: Tensor) -> Tensor:
    """An output as [N, K], in single precision at least."""
    found = tensor.reshape(len(tensor), -1)
    return found.float() if found.dtype in HALF else found


def everything(answer: Any) -> Scores:
    """The sum of all that a model returned, as one score [1, 1]. Raises UsageError for nothing."""
    found = outputs(answer)
    if not found:
        raise UsageError(f"the model returns {_form(answer, found)}")
    return Scores(torch.stack([t.sum() for t in found.values()]).sum().view(1, 1), "value")


def _per_class(tensor: Tensor) -> bool:
    return tensor.dim() in (1, 2) or (tensor.dim() > 2 and tensor.shape[2:].numel() == 1)


def _form(answer: Any, found: Mapping[str, Tensor]) -> str:
    return described(found) if found else f"a {type(answer).__name__} without scores"


def _advice(found: Mapping[str, Tensor]) -> str:
    told = {name: tensor for name, tensor in found.items() if not is_beside(name)}
    if any("box" in name for name in found):
        return "; --target box:0 explains the surest detection"
    masks = any("mask" in name for name in found)
    if not masks and any(tensor.dim() == 3 for tensor in told.values()):
        return (
            "; if they are detections, --target box:0 explains the surest, if a value at every "
            "pixel, pixel:Y,X one of them"
        )
    if masks or any(tensor.dim() == 4 for tensor in told.values()):
        return ", scores at every position: --target mask:CLASS or pixel:Y,X explains some of them"
    if found and not told:
        return "; these are features, not scores: save the model with the head that reads them"
    return "; attribution needs one score for each class, [N, classes]: is it an image classifier?"


# --- kinds of heads -------------------------------------------------------------------------------

_SUMS = VIEWS | {
    "Add", "Sub", "Rsub", "Div", "Mean", "Sum", "UpsampleBilinear2D", "UpsampleNearest2D",
    "UpsampleBicubic2D",
}  # fmt: skip
_POOLED = VIEWS | {"AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "AvgPool2D", "Mean", "Sum", "Div"}
_ACTIVATIONS = frozenset(
    ("Relu", "Hardtanh", "Hardswish", "Silu", "Gelu", "LeakyRelu", "Elu", "Mish", "Tanh", "Clamp")
)
_NORMS = frozenset(
    ("NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "NativeBatchNormLegitNoTraining",
     "CudnnBatchNorm", "MiopenBatchNorm", "BatchNorm")
)  # fmt: skip
#: Fewer numbers are rather classes.
_NARROWEST = 128


def head_of(tensor: Tensor, names: int, module: nn.Module, name: str = "") -> Head:
    """What the numbers of an output [N, K] are. Its graph, where there is one, begins at it."""
    values = rows(tensor.detach()).double()
    last = made_by(tensor, _SUMS)
    if _are_probabilities(values, last):
        return "probabilities"
    if _are_logarithms(values, last):
        return "log-probabilities"
    problem = getattr(getattr(module, "config", None), "problem_type", None)
    if problem == "regression":
        return "value"
    if problem == "multi_label_classification":
        return "independent"
    if values.shape[1] == 1:
        return "independent" if names == 2 else "value"
    known = values.shape[1] in (names, _IMAGENET)
    return "embedding" if not known and _is_embedding(tensor, values, module, name) else "logits"


def _are_probabilities(values: Tensor, last: set[str]) -> bool:
    if not bool(((values >= 0) & (values <= 1)).all()):
        return False
    sums = values.shape[1] > 1 and bool(((values.sum(1) - 1).abs() < 1e-4).all())
    return sums or (bool(last) and last <= {"Sigmoid", "Hardsigmoid", "Softmax", "SafeSoftmax"})


def _are_logarithms(values: Tensor, last: set[str]) -> bool:
    if not bool((values <= 0).all()):
        return False
    sums = values.shape[1] > 1 and bool(((values.exp().sum(1) - 1).abs() < 1e-4).all())
    return sums or (bool(last) and last <= {"LogSoftmax", "LogSigmoidForward", "LogSigmoid"})


def _is_embedding(tensor: Tensor, values: Tensor, module: nn.Module, name: str) -> bool:
    """Whether an output describes the image rather than scores classes."""
    width = values.shape[1]
    if getattr(module, "num_classes", None) == 0 or any(w in name for w in ("embed", "pool")):
        return True
    if width < _NARROWEST:
        return False
    if bool(((values.norm(dim=1) - 1).abs() < 1e-3).all()):
        return True
    # Attention that pools the image, and a block's sum, as towers for images and texts end in.
    if made_by(tensor) & (_ACTIVATIONS | _NORMS) or is_attended(tensor) or is_residual(tensor):
        return True
    behind = made_by(tensor, _POOLED | _ACTIVATIONS | {"Add"})
    # A projection without a bias, as the towers of CLIP have.
    projected = made_by(tensor) == {"Mm"} and width % 64 == 0
    return projected or (bool(behind) and behind <= _NORMS)
