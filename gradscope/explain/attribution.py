"""``attribute``: a model, inputs and a method -> raw signed values, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.errors import UsageError
from gradscope.explain.registry import method_named
from gradscope.models.probe import held, last_map, run


@dataclass(frozen=True, eq=False, slots=True)
class Attribution:
    """Raw signed attribution of N images; display happens elsewhere.

    ``values`` are [N, H, W] in the layer's geometry for activation methods, [N, C, H, W] for
    input-gradient methods and [N, H, W] for those that cover the input; ``upsampled`` is [N, H, W]
    in input geometry (bilinear; the sum over channels for input-gradient methods).
    """

    method: str
    values: Tensor
    upsampled: Tensor
    target: tuple[int, ...]
    layer: str | None
    #: The targets' logits, and what the method reports of itself.
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


def attribute(
    model: nn.Module,
    inputs: Tensor,
    method: str = "gradcam",
    *,
    target: int | Sequence[int] | None = None,
    layer: str = "auto",
    **options: Any,
) -> Attribution:
    """Which parts of preprocessed inputs [N, C, H, W] the model's logit of a target rests on.

    ``target`` is a class, one for each image, or None for the greatest logit of each; ``layer``
    names a module for activation methods, ``auto`` the last that gives maps. ``options`` are the
    method's own. The model is left as it was found: parameters, gradients, buffers, training
    flags, hooks and the random state, also after an exception.

    Raises UsageError for an unknown method, option, layer or target, and a model that gives no
    logits.
    """
    chosen = method_named(method, options)
    if inputs.dim() != 4:
        raise UsageError(f"inputs have shape {list(inputs.shape)}; they are [N, C, H, W]")
    inputs = inputs.detach()
    with held(model):
        with torch.no_grad():
            logits = run(model, inputs).logits.detach()
        targets = _targets(target, logits)
        scores = logits.gather(1, targets[:, None]).squeeze(1)
        diagnostics: dict[str, Any] = {"scores": scores.tolist()}
        if chosen.family == "activation":
            layer = last_map(model, inputs) if layer == "auto" else layer
            values = _of_activations(model, inputs, targets, layer, chosen.compute, options)
            upsampled = nn.functional.interpolate(
                values[:, None], size=inputs.shape[2:], mode="bilinear", align_corners=False
            )[:, 0]
        else:
            values, facts = chosen.compute(_score(model, targets), inputs, **options)
            diagnostics |= facts
            upsampled = values if values.dim() == 3 else values.sum(1)
    named = layer if chosen.family == "activation" else None
    return Attribution(method, values, upsampled, tuple(targets.tolist()), named, diagnostics)


def _targets(target: int | Sequence[int] | None, logits: Tensor) -> Tensor:
    count, classes = logits.shape
    if target is None:
        return logits.argmax(1)
    wanted = [target] * count if isinstance(target, int) else list(target)
    if len(wanted) != count:
        raise UsageError(f"{len(wanted)} targets for {count} images")
    wrong = next((t for t in wanted if not -classes <= t < classes), None)
    if wrong is not None:
        raise UsageError(f"there is no class {wrong}: the model has {classes}")
    return torch.tensor([t % classes for t in wanted], device=logits.device)


def _score(model: nn.Module, targets: Tensor):  # type: ignore[no-untyped-def]
    """The logit of each image's own target."""

    def score(inputs: Tensor, images: Tensor) -> Tensor:
        return run(model, inputs).logits.gather(1, targets[images][:, None]).squeeze(1)

    return score


def _of_activations(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    layer: str,
    compute: Any,
    options: Mapping[str, Any],
) -> Tensor:
    found = run(model, inputs, [layer])
    activations = found.activations[layer]
    if activations.dim() != 4:
        shape = list(activations.shape)
        raise UsageError(f"layer {layer!r} gives {shape}; maps have shape [N, C, H, W]")
    total = found.logits.gather(1, targets[:, None]).sum()
    (gradients,) = found.gradients(total, [activations])
    values: Tensor = compute(activations.detach(), gradients, **options)
    return values
