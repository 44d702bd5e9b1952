"""A model as it is looked at: loaded, with its preprocessing and the names of its classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gradscope.errors import UsageError
from gradscope.models import labels as names
from gradscope.models import processors
from gradscope.models.labels import Labels
from gradscope.models.layers import Choice, Layer, choose, survey
from gradscope.models.load import Loaded, load_model
from gradscope.models.model import Model, as_model
from gradscope.models.preprocessing import IMAGENET, Preprocessing, fitted
from gradscope.models.probe import held
from gradscope.models.sizes import image_size


@dataclass(frozen=True, eq=False, slots=True)
class Vision:
    """A loaded model, how pictures become its inputs, and what its classes are called."""

    loaded: Loaded
    preprocessing: Preprocessing
    #: Those given or found beside the file; see ``labels`` for the rest.
    named: Labels | None

    @property
    def model(self) -> Model:
        """The model itself."""
        return self.loaded.model

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width of an input; the model's own where pictures decide."""
        channels = self.preprocessing.channels
        found = self.preprocessing.size or image_size(self.model, channels)[1:]
        return channels, found[0], found[1]

    def labels(self, classes: int) -> Labels | None:
        """The names of a model of so many classes."""
        return self.named or names.of_model(self.model.module, classes)

    def like_parameters(self, inputs: Tensor) -> Tensor:
        """Inputs on the device, and of the type, of the model's parameters."""
        parameters = self.model.module.parameters()
        parameter = next((p for p in parameters if p.is_floating_point()), None)
        return inputs if parameter is None else inputs.to(parameter)

    def survey(self) -> tuple[list[Layer], Choice | None]:
        """Every layer as a noisy image sees it, and which one ``auto`` takes (or none)."""
        # Noise rather than nothing: rectifiers shut on a flat image.
        noise = torch.randn((1, *self.size), generator=torch.Generator().manual_seed(0))
        with held(self.model.module):
            layers = survey(self.model, self.like_parameters(noise))
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
) -> Vision:
    """A model from a path, or one in memory, with what is written down about it.

    Preprocessing is what ``preprocess`` says, else what a file next to the model, the model itself
    or torchvision says, else ImageNet's, assumed. Raises as ``load_model`` does, and UsageError
    for preprocessing that does not suit the model.
    """
    loaded = _loaded(model, arch, key, trust, device)
    return Vision(loaded, _preprocessing(loaded, preprocess), _labels(loaded, labels))


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


def _preprocessing(loaded: Loaded, given: str | Preprocessing | None) -> Preprocessing:
    depth, height, width = loaded.model.size
    found = given if isinstance(given, Preprocessing) else None
    if isinstance(given, str):
        found = processors.parse(given)
    found = found or _written_down(loaded)
    if found is None:
        found = replace(IMAGENET, source="assumed", assumed=True)
    if found.size is None or found.assumed:
        depth, height, width = image_size(loaded.model, depth)
    found = fitted(found, (height, width), depth)
    if depth not in (None, found.channels):
        raise UsageError(
            f"the model takes images of {depth} channels, the preprocessing gives {found.channels}"
        )
    return found


def _written_down(loaded: Loaded) -> Preprocessing | None:
    path = Path(loaded.path)
    found = processors.beside(loaded.path) if path.exists() else None
    found = found or processors.of_module(loaded.model.module)
    if found is None and loaded.architecture and "torchvision" in loaded.architecture:
        factory = loaded.architecture.partition(":")[2].partition("(")[0]
        return processors.of_torchvision(factory)
    return found


def _labels(loaded: Loaded, given: str | Labels | None) -> Labels | None:
    """Those that were given, or those in a file next to the model."""
    if isinstance(given, str):
        return names.read_labels(given)
    if given is not None:
        return given
    return names.beside(loaded.path) if Path(loaded.path).exists() else None
