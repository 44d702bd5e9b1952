"""What is asked of a run of ``explain``: the same for every picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradscope.attribution.drawing.folder import Folder
from gradscope.attribution.evaluation.boxes import Boxes
from gradscope.attribution.evaluation.budget import Budget
from gradscope.attribution.formulas.references import NAMES
from gradscope.attribution.method import Method, completed
from gradscope.attribution.methods import method_named
from gradscope.attribution.targets.aim import parse_aim
from gradscope.attribution.targets.readings import Wanted
from gradscope.errors import UsageError
from gradscope.models.images import open_image
from gradscope.models.labels import RANKED
from gradscope.models.preprocessing import Preprocessing
from gradscope.models.vision import Vision

#: A method with its options.
Asked = tuple[Method, dict[str, Any]]


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """All that is the same for every picture."""

    vision: Vision
    methods: tuple[Asked, ...]
    target: Wanted
    versus: int | str | None
    layer: str | None
    seed: int
    chunk: int | None
    evaluated: bool
    boxes: Boxes | None
    budget: Budget
    folder: Folder | None

    @property
    def aim(self) -> str | None:
        """What is explained where it is no class of the whole picture."""
        if callable(self.target):
            return getattr(self.target, "__name__", "a function")
        found = parse_aim(str(self.target))
        return None if found is None else str(found)

    @property
    def maps(self) -> int:
        """Maps of each picture, for progress: topK means K targets."""
        ranked = RANKED.fullmatch(str(self.target).strip())
        # A rank beyond any number of classes is refused when classes are known.
        return len(self.methods) * (int(ranked[1]) if ranked and len(ranked[1]) < 7 else 1)


def request(
    vision: Vision,
    asked: tuple[Asked, ...],
    target: Wanted,
    versus: int | str | None,
    layer: str,
    seed: int,
    chunk: int | None,
    evaluated: bool,
    boxes: Boxes | None,
    budget: Budget,
    folder: Folder | None,
) -> Request:
    """The request with its layer checked and reference pictures read. Raises UsageError."""
    if isinstance(target, str):
        parse_aim(target)
    named = None if layer == "auto" else layer
    vision.model.check_layers([] if named is None else [named])
    methods = tuple((m, _with_reference_image(o, vision.preprocessing)) for m, o in asked)
    return Request(vision, methods, target, versus, named, seed, chunk, evaluated, boxes, budget,
                   folder)  # fmt: skip


def asked(method: str | Sequence[str], options: Mapping[str, Any]) -> tuple[Asked, ...]:
    """Methods with their options. Raises UsageError for an option that none of them has."""
    wanted = [method] if isinstance(method, str) else list(method)
    found = [method_named(name) for name in dict.fromkeys(wanted)]
    if not found:
        raise UsageError("name a method; `gradscope methods` lists them")
    for option in options:
        if not any(option in m.options for m in found):
            completed(found[0], options)
    return tuple(
        (m, completed(m, {k: v for k, v in options.items() if k in m.options})) for m in found
    )


def _with_reference_image(options: dict[str, Any], steps: Preprocessing) -> dict[str, Any]:
    """The options with a reference picture read as an input."""
    wanted = options.get("reference")
    if not isinstance(wanted, str) or wanted in NAMES:
        return options
    if not os.path.isfile(wanted):
        raise UsageError(
            f"--reference {wanted}: neither one of {', '.join(NAMES)} nor a picture file"
        )
    return options | {"reference": steps(open_image(wanted, steps.channels)).inputs}
