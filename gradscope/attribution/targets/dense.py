"""Scores at every position of the picture, of models that return such.

Maps of classes [N, K, h, w]; one map [N, h, w] of the input's shape, of a value such as depth; and
masks of queries [N, Q, h, w] with their classes [N, Q, K + 1] (MaskFormer), of which each class's
map is the sum of the queries' masks by their probabilities (Cheng et al. 2021, arXiv:2107.06278).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradscope.attribution.targets.detections import has_nothing
from gradscope.errors import UsageError
from gradscope.models.model import Model
from gradscope.models.outputs import choose, described, is_beside, is_picture, outputs
from gradscope.models.precision import HALF
from gradscope.models.scores import Head, head_of


@dataclass(frozen=True, slots=True)
class Dense:
    """How the scores [N, K, h, w] are read in what a model returns, and what they are.

    Of a single map of classes there are two, the background first.
    """

    read: Callable[[Any], Tensor]
    head: Head


def dense_scores(answer: Any, inputs: Tensor, model: Model) -> Dense:
    """The scores at every position of inputs [N, C, H, W]. Raises UsageError where none are."""
    found = outputs(answer)
    # Beside boxes, and of models that return features only, maps are none of classes.
    plain = {name: t for name, t in found.items() if not is_beside(name)}
    if model.output is not None:
        plain = found
    elif any("box" in name for name in found):
        plain = {}
    for form in (_of_queries, _of_classes, _of_values):
        read = form(found if form is _of_queries else plain, inputs, model)
        if read is not None:
            return read
    raise UsageError(
        f"the model returns {described(found)}, and no scores at every position [N, K, h, w], "
        "as pixel:Y,X and mask:CLASS need"
    )


def _of_classes(found: Mapping[str, Tensor], _inputs: Tensor, model: Model) -> Dense | None:
    chosen = choose(found, model.output, lambda t: t.dim() == 4 and t.shape[2:].numel() > 1)
    if chosen is None:
        return None
    one = found[chosen.name][:, :, 0, 0]
    # Of a single map there are two classes.
    head = head_of(one, max(2, one.shape[1]), model.module)

    def read(later: Any) -> Tensor:
        maps = _wide(outputs(later)[chosen.name])
        if maps.shape[1] > 1:
            return maps
        return torch.cat([1 - maps if head == "probabilities" else -maps, maps], 1)

    return Dense(read, head)


def _of_values(found: Mapping[str, Tensor], inputs: Tensor, model: Model) -> Dense | None:
    chosen = choose(found, model.output, lambda t: t.dim() == 3 and is_picture(t, inputs))
    if chosen is None:
        return None
    return Dense(lambda later: _wide(outputs(later)[chosen.name])[:, None], "value")


def _of_queries(found: Mapping[str, Tensor], _inputs: Tensor, model: Model) -> Dense | None:
    masks = next((n for n, t in found.items() if t.dim() == 4 and "mask" in n), None)
    if masks is None or model.output is not None:
        return None
    queries = found[masks].shape[1]
    asked = {n: t for n, t in found.items() if "logits" in n and t.dim() == 3}
    classes = choose(asked, None, lambda t: t.shape[1] == queries)
    if classes is None:
        return None
    nothing = has_nothing(found[classes.name][0].detach(), model.names)

    def read(later: Any) -> Tensor:
        logits, drawn = (_wide(outputs(later)[name]) for name in (classes.name, masks))
        likely = logits.softmax(2)[:, :, :-1] if nothing else logits.sigmoid()
        return torch.einsum("nqk,nqhw->nkhw", likely, drawn.sigmoid())

    return Dense(read, "value")


def _wide(tensor: Tensor) -> Tensor:
    """In single precision at least."""
    return tensor.float() if tensor.dtype in HALF else tensor
