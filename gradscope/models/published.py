"""The preprocessing that libraries record of the weights they publish."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from gradscope.errors import UsageError
from gradscope.models.preprocessing import Preprocessing
from gradscope.models.processor_values import filter_named
from gradscope.models.processors import from_timm


def of_module(module: object) -> Preprocessing | None:
    """The steps in a timm model's own configuration."""
    configs = (getattr(module, name, None) for name in ("pretrained_cfg", "default_cfg"))
    for config in configs:
        keys = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        try:
            found = from_timm({"pretrained_cfg": keys}, "timm's configuration", UsageError)
        # Another library's attribute with this name.
        except UsageError:
            continue
        if found is not None:
            return found
    return None


def of_torchvision(factory: str, weights: str, sha256: str) -> Preprocessing | None:
    """The steps of torchvision's weights for its model of this name: those that the file is.

    Of weights that the file is not, by its hash or the one in its name, the default's are taken,
    assumed where others have other steps.
    """
    try:
        known = import_module("torchvision.models").get_model_weights(factory)
        recipes = {entry.name: (_hashes(entry.url), _of_transforms(entry)) for entry in known}
        source = f"torchvision's {{}} for {factory}"
        return _told(source, recipes, known.DEFAULT.name, weights, sha256)
    # Not installed, broken, or the name is unknown to it.
    except Exception:
        return None


def _of_transforms(entry: Any) -> Preprocessing:
    steps = entry.transforms()
    crop = int(steps.crop_size[0])
    name = filter_named(getattr(steps.interpolation, "value", steps.interpolation), ValueError)
    mean, std = tuple(steps.mean), tuple(steps.std)
    return Preprocessing(int(steps.resize_size[0]), (crop, crop), mean, std, name)


def of_timm(model: str, weights: str, sha256: str) -> Preprocessing | None:
    """The same for timm's name of a model; a name with a tag (``.a1_in1k``) tells the weights."""
    try:
        library = import_module("timm")
        names = library.list_pretrained(f"{model.partition('.')[0]}.*")
        configs = {name: library.models.get_pretrained_cfg(name).to_dict() for name in names}
        recipes = {}
        for name, config in configs.items():
            steps = from_timm(config, "", ValueError)
            if steps is not None:
                recipes[name] = ((name, *_hashes(config.get("url") or "")), steps)
        if model in recipes:
            return replace(recipes[model][1], source=f"timm's {model}")
        default = f"{model}.{library.models.get_pretrained_cfg(model).tag}"
        return _told("timm's {}", recipes, default, weights, sha256)
    # Not installed, broken, or the name is unknown to it.
    except Exception:
        return None


def _hashes(address: str) -> tuple[str, ...]:
    """The beginning of the weights' SHA-256, which a published file's name ends with."""
    found = re.search(r"-([0-9a-f]{8,64})\.\w+$", address)
    return (found[1],) if found else ()


def _told(
    source: str,
    recipes: Mapping[str, tuple[Sequence[str], Preprocessing]],
    default: str,
    weights: str,
    sha256: str,
) -> Preprocessing:
    """The recipe of the weights that a file is, or the default one, which may be in doubt."""
    for name, (telling, steps) in recipes.items():
        if any(part in weights or sha256.startswith(part) for part in telling):
            return replace(steps, source=source.format(name))
    _, steps = recipes[default]
    others = [name for name, (_, other) in recipes.items() if other != steps]
    return replace(steps, source=source.format(default), assumed=bool(others))
