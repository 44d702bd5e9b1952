"""How much of a map lies on the object that was annotated.

Of a map what speaks for the target counts, its positive part. By chance each measure is the share
of the picture that the object covers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradscope.attribution.diagnostics import Localisation
from gradscope.attribution.evaluation.boxes import Annotated, Boxes, Object, Region, region_of
from gradscope.attribution.evaluation.similarity import flattened
from gradscope.attribution.result import Target
from gradscope.models.geometry import Geometry
from gradscope.models.images import Picture
from gradscope.models.labels import Labels
from gradscope.text import escaped, quoted


def located(values: Tensor, region: Region) -> Localisation | None:
    """The measures of a map [H, W] for a region of the same shape; None where nothing is positive.

    Pointing game (Zhang et al. 2018, arXiv:1608.00507, without tolerance): whether the maximum
    lies inside. Relevance mass and rank accuracy (Arras et al. 2022, arXiv:2003.07258): the share
    of the map inside, and of the strongest pixels, as many as the region has. Equal pixels count in
    the proportion in which they lie inside.
    """
    size, inside = flattened(torch.nan_to_num(values).clamp(min=0)), region.ravel()
    total = float(size.sum())
    if total == 0 or not inside.any():
        return None
    return Localisation(
        area=float(inside.mean()),
        pointing_game=float(inside[size == size.max()].mean()),
        relevance_mass=float(size[inside].sum() / total),
        relevance_rank=_rank(size, inside),
    )


def _rank(size: np.ndarray[tuple[int], np.dtype[np.float64]], inside: Region) -> float:
    count = int(inside.sum())
    edge = np.partition(size, -count)[-count]
    above, equal = size > edge, size == edge
    lacking = count - int(above.sum())
    return float(inside[above].sum() + lacking * inside[equal].mean()) / count


def region_in(
    boxes: Boxes, picture: Picture, geometry: Geometry, target: Target, labels: Labels | None
) -> Region | str:
    """The target's objects as a region of the model's input; or why there is none."""
    known = boxes.of(picture.path)
    if known is None:
        return f"{quoted(boxes.path)} does not have {quoted(picture.path)}"
    if known.size not in (None, (picture.width, picture.height)):
        said = "{}×{}".format(*(known.size or ()))
        return (
            f"{quoted(boxes.path)} is for {quoted(known.picture)} of {said} pixels, not "
            f"{picture.width}×{picture.height}"
        )
    objects = _of_target(boxes, known, target, labels)
    if not objects:
        named = target.label or str(target.index)
        return f"{quoted(boxes.path)} has no {escaped(named)} in {quoted(picture.path)}"
    region = geometry.to_inputs(region_of(objects, picture))
    return region if region.any() else f"the object in {quoted(picture.path)} is cropped away"


def _of_target(
    boxes: Boxes, known: Annotated, target: Target, labels: Labels | None
) -> Sequence[Object]:
    """The objects that bear the target's name; all, where no name is that of a class."""
    if boxes.names() & frozenset(
        word for label in (labels or {}).values() for word in _words(label)
    ):
        names = _words(target.label or "")
        return [o for o in known.objects if (o.name or "").casefold() in names]
    return known.objects


def _words(label: str) -> frozenset[str]:
    """A class's names: ImageNet's are lists of synonyms."""
    return frozenset(word.strip().casefold() for word in (label, *label.split(",")) if word.strip())
