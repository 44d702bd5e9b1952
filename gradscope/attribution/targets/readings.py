"""What a target reads in a model's output: scores [N, K] of a pixel, a mask, a box, a similarity.

A reading is made for one picture, from the model's output for it; then it reads every output of
the model alike. What was chosen in the picture (the pixels of a mask, the anchor of a box) stays,
so that covered and noisy copies of the picture are asked the same question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradscope.attribution.targets.aim import Aim, parse_aim
from gradscope.attribution.targets.dense import dense_scores
from gradscope.attribution.targets.detections import box_reading
from gradscope.attribution.targets.texts import read_texts
from gradscope.errors import UsageError
from gradscope.models.geometry import Geometry
from gradscope.models.images import open_image
from gradscope.models.labels import Labels, Ranked, parse_target
from gradscope.models.outputs import choose, described, outputs
from gradscope.models.probe import answer_of
from gradscope.models.scores import Scores, head_of, rows
from gradscope.models.vision import Vision
from gradscope.text import listed, plural

Reading = Callable[[Any], Scores]
#: A class, an aim as it is written, or a function of the model's output.
Wanted = int | str | Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class Seen:
    """A picture as the model answered it."""

    vision: Vision
    #: [1, C, H, W]
    inputs: Tensor
    geometry: Geometry
    #: What the model returned.
    answer: Any


@dataclass(frozen=True, eq=False, slots=True)
class Read:
    """A reading, and which of its numbers is meant: a class, as ``--target`` takes it.

    Without a reading it is a class of the whole picture.
    """

    reading: Reading | None
    of: int | str = "top1"
    labels: Labels | None = None


def read_for(wanted: Wanted, vision: Vision, inputs: Tensor, geometry: Geometry) -> Read:
    """How the answer to a picture is read for a target. Raises UsageError and InputError."""
    if callable(wanted):
        return Read(called(wanted))
    aim = parse_aim(str(wanted))
    if aim is None:
        return Read(None, wanted)
    seen = Seen(vision, inputs, geometry, answer_of(vision.model, inputs))
    return _READINGS[aim.kind](aim, seen)


def called(target: Callable[[Any], Tensor]) -> Reading:
    """A reading by a function of the model's output that returns a number for each image [N]."""

    def reading(answer: Any) -> Scores:
        found = target(answer)
        if not isinstance(found, Tensor) or found.dim() not in (1, 2) or found[0].numel() != 1:
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(f"the target returns {what}, not one number for each image, [N]")
        return Scores(rows(found), "value")

    return reading


# --- scores at every position ---------------------------------------------------------------------


def _pixel(aim: Aim, seen: Seen) -> Read:
    """The scores at one pixel of the picture."""
    dense = dense_scores(seen.answer, seen.inputs, seen.vision.model)
    maps = dense.read(seen.answer)
    row, column = _at(aim, seen.geometry, (maps.shape[2], maps.shape[3]))

    def reading(answer: Any) -> Scores:
        return Scores(dense.read(answer)[:, :, row, column], dense.head)

    return Read(reading, aim.of, seen.vision.labels(maps.shape[1]))


def _at(aim: Aim, geometry: Geometry, grid: tuple[int, int]) -> tuple[int, int]:
    """Where a pixel of the picture lies in a grid over the input."""
    found = []
    for axis, pixel in enumerate(aim.numbers):
        if pixel >= geometry.picture[axis]:
            size = f"{geometry.picture[0]} high and {geometry.picture[1]} wide"
            raise UsageError(f"--target {aim}: the picture is {size}, counted from 0")
        at = (pixel + 0.5 - geometry.offset[axis]) * geometry.scale[axis] / geometry.inputs[axis]
        if not 0 <= at <= 1:
            raise UsageError(
                f"--target {aim}: the model does not see that pixel, it is cropped off; "
                "--preprocess sets how (crop_size, or size alone)"
            )
        found.append(min(int(at * grid[axis]), grid[axis] - 1))
    return found[0], found[1]


def _mask(aim: Aim, seen: Seen) -> Read:
    """Each class's scores, summed over the pixels that the model gives to that class."""
    dense = dense_scores(seen.answer, seen.inputs, seen.vision.model)
    maps = dense.read(seen.answer).detach()[:1]
    classes = maps.shape[1]
    labels = seen.vision.labels(classes)
    wanted = parse_target(aim.of, labels, classes)
    if isinstance(wanted, Ranked):
        raise UsageError(f"--target {aim}: name the class of the mask")
    given = torch.nn.functional.one_hot(maps.argmax(1), classes).movedim(-1, 1).to(maps)
    shares = given.mean((0, 2, 3))
    if not float(shares[wanted]):
        order = [c for c in shares.argsort(descending=True).tolist() if float(shares[c])]
        named = (f"{c} {(labels or {}).get(c, '')}".rstrip() for c in order)
        raise UsageError(
            f"--target {aim}: the model gives no pixel to this class, but to "
            f"{listed(named, len(order), 6)}; pixel:Y,X:CLASS explains a class anywhere"
        )

    def reading(answer: Any) -> Scores:
        return Scores((dense.read(answer) * given).sum((2, 3)), "value")

    return Read(reading, str(wanted), labels)


# --- embeddings -----------------------------------------------------------------------------------


def _embedding(seen: Seen) -> Callable[[Any], Tensor]:
    """The output that describes the image [N, D]: an embedding, else the model's answer."""
    found = outputs(seen.answer)
    model = seen.vision.model
    flat = {name: tensor for name, tensor in found.items() if tensor.dim() == 2}
    described_by = [n for n, t in flat.items() if head_of(t, 0, model.module, n) == "embedding"]
    chosen = choose(found, model.output, lambda t: t.dim() == 2)
    if chosen is None:
        raise UsageError(f"the model returns {described(found)}, and no embedding [N, D]")
    name = described_by[0] if described_by and model.output is None else chosen.name
    return lambda answer: rows(outputs(answer)[name])


def _similar(aim: Aim, seen: Seen) -> Read:
    """The cosine of the picture's embedding and another picture's."""
    read, vision = _embedding(seen), seen.vision
    steps = vision.preprocessing
    other = vision.like_parameters(steps(open_image(aim.place, steps.channels)).inputs[None])
    batch = other.expand(vision.model.batch or 1, *other.shape[1:]).clone()
    with torch.no_grad():
        wanted = read(vision.model.forward(batch, {}))[:1]
    return Read(lambda answer: Scores(_cosines(read(answer), wanted), "value"))


def _cosines(embeddings: Tensor, others: Tensor) -> Tensor:
    """Cosines [N, K] of [N, D] and [K, D]."""
    unit = torch.nn.functional.normalize
    return unit(embeddings, dim=1) @ unit(others, dim=1).T


def _channel(aim: Aim, seen: Seen) -> Read:
    read = _embedding(seen)
    return Read(lambda answer: Scores(read(answer), "embedding"), aim.of)


def _text(aim: Aim, seen: Seen) -> Read:
    """Cosines to texts; with the file's scale (and bias) the logits of CLIP (and SigLIP)."""
    texts, read = read_texts(aim.place), _embedding(seen)
    image = read(seen.answer)
    if texts.features.shape[1] != image.shape[1]:
        raise UsageError(
            f"{aim.place} has texts of {plural(texts.features.shape[1], 'number')}, the model's "
            f"embedding has {image.shape[1]:,}; are they of the same model?"
        )
    features = texts.features.to(image)

    def reading(answer: Any) -> Scores:
        cosines = _cosines(read(answer), features)
        return Scores(texts.scale * cosines + texts.bias, texts.head)

    return Read(reading, aim.of, texts.names)


def _box(aim: Aim, seen: Seen) -> Read:
    """The scores of one detection; its own class, not "nothing", is the likeliest."""
    named = box_reading(aim.numbers[0], seen.answer, seen.inputs, seen.vision.model)
    best = aim.of == "top1" and named.best is not None
    return Read(named.reading, str(named.best) if best else aim.of)


_READINGS: Mapping[str, Callable[[Aim, Seen], Read]] = {
    "pixel": _pixel,
    "mask": _mask,
    "box": _box,
    "similar": _similar,
    "channel": _channel,
    "text": _text,
}
