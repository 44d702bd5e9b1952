"""A vision model: loaded, with its preprocessing and the names of its classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gradscope.errors import UsageError
from gradscope.models import labels as names
from gradscope.models.forms import as_model
from gradscope.models.labels import Labels
from gradscope.models.layers import AutoLayer, Layer, choose, survey
from gradscope.models.load import Loaded, load_model
from gradscope.models.model import Model
from gradscope.models.preprocessing import Preprocessing
from gradscope.models.probe import held
from gradscope.models.recipes import recipe
from gradscope.models.scores import everything
from gradscope.models.sizes import image_size


@dataclass(frozen=True, eq=False, slots=True)
class Vision:
    """A loaded model, its preprocessing and the names of its classes."""

    loaded: Loaded
    preprocessing: Preprocessing
    #: Names given, or found next to the file; see ``labels`` for the rest.
    named: Labels | None

    @property
    def model(self) -> Model:
        """The model itself."""
        return self.loaded.model

    def answered_by(self, model: Model) -> Vision:
        """The same, with another forward pass of the model."""
        return replace(self, loaded=replace(self.loaded, model=model))

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width of an input; the model's own where it depends on pictures."""
        channels = self.preprocessing.channels
        found = self.preprocessing.size or image_size(self.model, channels)[1:]
        return channels, found[0], found[1]

    def labels(self, classes: int) -> Labels | None:
        """The names of so many classes."""
        return self.named or names.of_model(self.model.module, classes)

    def like_parameters(self, inputs: Tensor) -> Tensor:
        """Inputs with the device and type of the model's parameters."""
        parameters = self.model.module.parameters()
        parameter = next((p for p in parameters if p.is_floating_point()), None)
        return inputs if parameter is None else inputs.to(parameter)

    def survey(self) -> tuple[list[Layer], AutoLayer | None]:
        """Every layer as an image of noise sees it, and the one that ``auto`` takes, if any."""
        # Noise rather than zeros: rectifiers are off on a flat image.
        noise = torch.randn((1, *self.size), generator=torch.Generator().manual_seed(0))
        inputs = self.like_parameters(noise)
        with held(self.model.module):
            try:
                layers = survey(self.model, inputs)
            except UsageError:
                # No scores of classes; which target is meant is not asked here.
                layers = survey(self.model.read_by(everything), inputs)
        try:
            return layers, choose(layers)
        except UsageError:
            return layers, None


def open_vision(
    model: object,
    *,
    arch: str | None = None,
    key: str | None = None,
    trust: Sequence[str] = (),
    preprocess: str | Preprocessing | None = None,
    labels: str | Labels | None = None,
    device: str = "cpu",
    output_name: str | int | None = None,
) -> Vision:
    """A model from a path, or one in memory, with its preprocessing and labels.

    Preprocessing comes from ``preprocess``, else from a file next to the model, the model itself or
    torchvision, else it is ImageNet's, assumed. ``output_name`` is the output that is meant where a
    model has several. Raises as ``load_model`` does, and UsageError for
    preprocessing that does not suit the model.
    """
    loaded = _loaded(model, arch, key, trust, device)
    named = _labels(loaded, labels)
    answers = replace(
        loaded.model,
        output=None if output_name is None else str(output_name),
        names=max(named, default=-1) + 1 if named else loaded.model.names,
        known={},
    )
    loaded = replace(loaded, model=answers)
    steps, notes = recipe(loaded, preprocess)
    return Vision(replace(loaded, notes=(*loaded.notes, *notes)), steps, named)


def _loaded(
    model: object, arch: str | None, key: str | None, trust: Sequence[str], device: str
) -> Loaded:
    if isinstance(model, Loaded):
        return model
    if isinstance(model, str | Path):
        return load_model(str(model), arch=arch, key=key, trust=frozenset(trust), device=device)
    found = as_model(model)
    digest = hashlib.sha256()
    for name, tensor in found.module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    kind = type(model).__name__
    return Loaded(found, f"({kind})", found.format, digest.hexdigest(), kind, found.notes)


def _labels(loaded: Loaded, given: str | Labels | None) -> Labels | None:
    """The names given, or those in a file next to the model."""
    if isinstance(given, str):
        return names.read_labels(given)
    if given is not None:
        return given
    return names.beside(loaded.path) if Path(loaded.path).exists() else None
