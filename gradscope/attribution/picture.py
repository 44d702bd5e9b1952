"""One picture explained: read, put to the model, its maps made, evaluated, drawn and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradscope.attribution.applicable import check_applicable
from gradscope.attribution.attribute import attributed
from gradscope.attribution.collected import Collected
from gradscope.attribution.diagnostics import Diagnostics
from gradscope.attribution.evaluation.localisation import located, region_in
from gradscope.attribution.evaluation.measured import evaluate
from gradscope.attribution.maps import Map
from gradscope.attribution.method import Method
from gradscope.attribution.request import Asked, Request
from gradscope.attribution.result import Explanation, Files, ImageFacts, NotFinite, Target
from gradscope.attribution.subject import Subject, Tick
from gradscope.attribution.targets.classes import predictions, targets
from gradscope.attribution.targets.readings import Read, read_for
from gradscope.errors import InputError, NotApplicableError, UsageError
from gradscope.models.images import Picture, open_image
from gradscope.models.labels import Labels
from gradscope.models.preprocessing import Prepared
from gradscope.models.probe import first_not_finite
from gradscope.models.scores import Scores
from gradscope.models.vision import Vision
from gradscope.report.model import Input

#: Parts of a tick that one map is.
_FINE = 1000
#: Share of the work for a map that making it is, where it is evaluated too.
_MADE = 0.1


@dataclass(eq=False, slots=True)
class Progress:
    """How much of all maps is done; each is made, then evaluated where that is asked for."""

    tell: Tick | None
    work: int
    shares: dict[int, float] = field(default_factory=dict)

    def part(self, number: int, start: float, end: float) -> Tick:
        """A tick for one part of a map's work, from one share of it to another."""

        def tick(done: int, total: int) -> None:
            self.shares[number] = start + (end - start) * done / max(total, 1)
            if self.tell is not None:
                self.tell(round(sum(self.shares.values()) * _FINE), self.work * _FINE)

        return tick

    def whole(self, first: int, count: int, start: float) -> Tick:
        """A tick for what is done for several maps together, from a share of each to the end."""
        parts = [self.part(first + i, start, 1) for i in range(count)]

        def tick(done: int, total: int) -> None:
            for part in parts:
                part(done, total)

        return tick


def explain_picture(collected: Collected, request: Request, path: str, shown: Progress) -> None:
    """Collect the maps of one picture. The model is held. Raises InputError and UsageError."""
    picture = open_image(path, request.vision.preprocessing.channels)
    prepared = request.vision.preprocessing(picture)
    subject, read = _subject(request, prepared)
    answer = subject.answer
    collected.answered(answer)
    labels = read.labels or _labels(request.vision, answer)
    collected.notes.update(dict.fromkeys(f"{path}: {note}" for note in picture.notes))
    collected.inputs.append(Input(path=path, format=picture.format, bytes=picture.bytes))
    collected.images.append(_image_facts(picture, subject, labels))
    if not answer.finite:
        return
    if request.chunk is not None:
        subject.limit(request.chunk)
    methods = collected.kept(
        request.methods, lambda method, _options: check_applicable(subject, method)
    )
    late = request.budget.next_picture()
    made = _MADE if request.evaluated else 1.0
    for target in targets(subject, read.of, request.versus, labels, request.aim):
        first = len(collected.explanations)
        maps = _maps(collected, methods, subject, target, partial(shown.part, start=0, end=made))
        collected.notes.update(dict.fromkeys(n for m in maps for n in m.notes))
        truth = _located(collected, request, maps, picture, prepared, labels)
        tick = shown.whole(first, len(maps), made)
        measured = _measured(request, maps, late, tick)
        known = [m.diagnostics(t | f) for m, t, f in zip(maps, truth, measured, strict=True)]
        collected.explanations += _explanations(request, picture, prepared, maps, known)


def _maps(
    collected: Collected,
    methods: Sequence[Asked],
    subject: Subject,
    target: Target,
    tick: Callable[[int], Tick],
) -> list[Map]:
    """One target's maps, one for each method that can read the model."""
    maps: list[Map] = []
    first = len(collected.explanations)

    def make(method: Method, options: Mapping[str, Any]) -> None:
        maps.append(_map(subject, target, method, options, tick(first + len(maps))))

    collected.kept(methods, make)
    return maps


def _located(
    collected: Collected,
    request: Request,
    maps: Sequence[Map],
    picture: Picture,
    prepared: Prepared,
    labels: Labels | None,
) -> list[dict[str, Any]]:
    """How the maps of one target lie on its annotated objects; a note where there are none."""
    if request.boxes is None:
        return [{} for _ in maps]
    region = region_in(request.boxes, picture, prepared.geometry, maps[0].target, labels)
    if isinstance(region, str):
        collected.notes[f"no ground truth: {region}"] = None
        return [{} for _ in maps]
    return [{"ground_truth": located(m.values, region)} for m in maps]


def _measured(
    request: Request, maps: Sequence[Map], late: Callable[[], bool], tick: Tick
) -> list[dict[str, Any]]:
    """What is measured of the maps of one target, if that is asked for."""
    if not request.evaluated:
        return [{} for _ in maps]
    found, left = evaluate(maps, late, tick, compared=request.boxes is not None)
    request.budget.missing.update(left)
    return found


def _map(
    subject: Subject, target: Target, method: Method, options: Mapping[str, Any], tick: Tick
) -> Map:
    device = subject.inputs.device
    against = None if target.versus is None else torch.tensor([target.versus], device=device)
    aimed = subject.about(torch.tensor([target.index], device=device), against)
    aimed.tick = tick
    found = attributed(aimed, method, options)
    tick(1, 1)
    return Map(method, options, aimed, found, target)


def _explanations(
    request: Request,
    picture: Picture,
    prepared: Prepared,
    maps: Sequence[Map],
    diagnoses: Sequence[Diagnostics],
) -> Iterator[Explanation]:
    """The maps of one target, drawn and written."""
    files = [Files() for _ in maps]
    if request.folder is not None:
        pairs = list(zip(maps, diagnoses, strict=True))
        files = request.folder.write(picture, prepared.geometry, pairs)
    for one, written, known in zip(maps, files, diagnoses, strict=True):
        yield one.explanation(picture, written, known)


def _subject(request: Request, prepared: Prepared) -> tuple[Subject, Read]:
    """A picture as the methods take it, after a first pass, and what is explained of it."""
    vision = request.vision
    inputs = vision.like_parameters(prepared.inputs[None])
    mean, std = (torch.tensor(v) for v in (vision.preprocessing.mean, vision.preprocessing.std))
    with _refusals(inputs):
        read = read_for(request.target, vision, inputs, prepared.geometry)
        model = vision.model if read.reading is None else vision.model.read_by(read.reading)
        nothing = torch.zeros(1, dtype=torch.long, device=inputs.device)
        subject = Subject(
            model, inputs, nothing, layer=request.layer, seed=request.seed, mean=mean, std=std
        )
        if any(m.reads_layer for m, _ in request.methods):
            with suppress(NotApplicableError):
                _ = subject.tapped
        _ = subject.answered
    return subject, read


@contextmanager
def _refusals(inputs: Tensor) -> Iterator[None]:
    """The model's own error about inputs of this size goes to the user."""
    try:
        yield
    except (UsageError, InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UsageError(
            f"the model refuses inputs {list(inputs.shape)}: {said}; --preprocess sets how images "
            "become inputs (size=…, image_mean=…)"
        ) from error


def _labels(vision: Vision, answer: Scores) -> Labels | None:
    """The names of what is scored; one number, and those of an embedding, have none."""
    classes = answer.values.shape[1]
    return None if classes == 1 or answer.head == "embedding" else vision.labels(classes)


def _image_facts(picture: Picture, subject: Subject, labels: Labels | None) -> ImageFacts:
    answer = subject.answer
    return ImageFacts(
        path=picture.path,
        sha256=picture.sha256,
        width=picture.width,
        height=picture.height,
        mode=picture.mode,
        predictions=predictions(answer, labels) if answer.finite else (),
        not_finite=None if answer.finite else _not_finite(subject),
    )


def _not_finite(subject: Subject) -> NotFinite:
    values = subject.answer.values
    return NotFinite(
        scores=int((~torch.isfinite(values)).sum()),
        total=values.numel(),
        layer=first_not_finite(subject.model, subject.inputs),
    )
