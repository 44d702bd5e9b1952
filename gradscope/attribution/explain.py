"""``explain``: model and pictures -> maps, their diagnostics, files -> rules -> report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradscope.attribution import evaluation
from gradscope.attribution.attribute import Attribution, attributed
from gradscope.attribution.drawing.colour import COLORMAPS
from gradscope.attribution.files import Folder, output_folder
from gradscope.attribution.maps import Map
from gradscope.attribution.methods import Method, completed, method_named
from gradscope.attribution.references import NAMES
from gradscope.attribution.result import (
    Diagnostics,
    Environment,
    ExplainReport,
    ExplainResult,
    Explanation,
    Files,
    ImageFacts,
    ModelFacts,
    Prediction,
    Preprocessed,
    Target,
)
from gradscope.attribution.subject import Subject, Tick
from gradscope.errors import InputError, UsageError
from gradscope.models.images import Picture, find_images, open_image
from gradscope.models.labels import Labels, Ranked, parse_target
from gradscope.models.preprocessing import Prepared, Preprocessing
from gradscope.models.probe import held
from gradscope.models.vision import Vision, open_vision
from gradscope.report.model import Coverage, Input, InputFailure
from gradscope.report.request import Failures, Request, failure, requested
from gradscope.version import __version__

#: Classes that the report lists of each picture.
_PREDICTIONS = 5
#: Parts of a tick that one map is.
_FINE = 1000
#: Share of the work that a map is, where it is evaluated, too.
_MADE = 0.1


def explain(
    model: object,
    images: str | Path | Sequence[str | Path],
    method: str | Sequence[str] = "gradcam",
    *,
    arch: str | None = None,
    key: str | None = None,
    trust: Sequence[str] = (),
    target: int | str = "top1",
    versus: int | str | None = None,
    layer: str = "auto",
    preprocess: str | Preprocessing | None = None,
    labels: str | Labels | None = None,
    output: str | Path | None = None,
    colormap: str | None = None,
    evaluated: bool = False,
    device: str = "cpu",
    seed: int = 0,
    chunk: int | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str = "high",
    allow_empty: bool = False,
    progress: Tick | None = None,
    **options: Any,
) -> ExplainReport:
    """Why a vision model answers as it does about pictures, and whether to believe the maps.

    ``model`` is a path (see ``load_model`` for ``arch``, ``key`` and ``trust``) or a model of
    torch; ``images`` are files and folders; ``method`` one name or several, which share passes.
    ``target`` is a class index, a label, "top1" or "topK"; with ``versus`` what speaks for it
    rather than for another class. ``options`` go to every method that has them. With ``output`` a
    heatmap, an overlay and the raw values of each map are written to that folder. ``evaluated``
    measures insertion and deletion, parameter randomisation, sensitivity and agreement.

    Files that cannot be read are entries of ``errors``, never exceptions. Raises UsageError for
    everything else that is wrong with the request.
    """
    wanted = requested(
        ExplainResult, select=select, ignore=ignore, fail_on=fail_on, allow_empty=allow_empty
    )
    asked = _asked(method, options)
    if colormap is not None and colormap not in COLORMAPS:
        raise UsageError(f"no colormap is called {colormap!r}; there are {', '.join(COLORMAPS)}")
    folder = None if output is None else Folder(output_folder(output), colormap)
    try:
        vision = open_vision(
            model, arch=arch, key=key, trust=trust, preprocess=preprocess, labels=labels,
            device=device,
        )  # fmt: skip
        request = _request(vision, asked, target, versus, layer, seed, chunk, evaluated, folder)
    except InputError as error:
        return _report(wanted, [failure(error)])
    failures = Failures()
    paths = _found([images] if isinstance(images, str | Path) else images, failures)
    run = _Run()
    shown = _Progress(progress, len(paths) * request.maps)
    with held(vision.model.module):
        for path in paths:
            with failures.caught():
                _explain_one(run, request, path, shown)
    return _report(wanted, failures, run.inputs, _result(run, request))


# --- what was asked for ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class _Request:
    """Everything that is the same for every picture."""

    vision: Vision
    methods: tuple[tuple[Method, dict[str, Any]], ...]
    target: int | str
    versus: int | str | None
    layer: str | None
    seed: int
    chunk: int | None
    evaluated: bool
    folder: Folder | None

    @property
    def maps(self) -> int:
        """Maps of each picture, for progress: a rank is as many targets."""
        target = str(self.target)
        ranked = target.removeprefix("top").removeprefix("-")
        several = target.startswith("top") and ranked.isdigit()
        return (int(ranked) if several else 1) * len(self.methods)


@dataclass(eq=False, slots=True)
class _Run:
    """What comes together while pictures are worked on."""

    explanations: list[Explanation] = field(default_factory=list)
    images: list[ImageFacts] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    classes: int = 0
    ends_in_softmax: bool = False


def _request(
    vision: Vision,
    asked: tuple[tuple[Method, dict[str, Any]], ...],
    target: int | str,
    versus: int | str | None,
    layer: str,
    seed: int,
    chunk: int | None,
    evaluated: bool,
    folder: Folder | None,
) -> _Request:
    named = None if layer == "auto" else layer
    vision.model.check_layers([] if named is None else [named])
    methods = tuple((m, _with_reference_image(o, vision.preprocessing)) for m, o in asked)
    return _Request(vision, methods, target, versus, named, seed, chunk, evaluated, folder)


def _asked(
    method: str | Sequence[str], options: Mapping[str, Any]
) -> tuple[tuple[Method, dict[str, Any]], ...]:
    """Methods with their options; an option that none of them has is refused."""
    wanted = [method] if isinstance(method, str) else list(method)
    found = [method_named(name) for name in dict.fromkeys(wanted)]
    if not found:
        raise UsageError("no method is named; see `gradscope methods`")
    for option in options:
        if not any(option in m.options for m in found):
            completed(found[0], options)
    return tuple(
        (m, completed(m, {k: v for k, v in options.items() if k in m.options})) for m in found
    )


def _with_reference_image(options: dict[str, Any], steps: Preprocessing) -> dict[str, Any]:
    """Integrated gradients' reference may be a picture."""
    wanted = options.get("reference")
    if not isinstance(wanted, str) or wanted in NAMES:
        return options
    if not Path(wanted).is_file():
        raise UsageError(
            f"--reference {wanted}: neither one of {', '.join(NAMES)} nor a picture's file"
        )
    return options | {"reference": steps(open_image(wanted)).inputs}


def _found(given: Iterable[str | Path], failures: Failures) -> list[str]:
    """The pictures, each once, of files and folders."""
    paths: list[str] = []
    for one in given:
        with failures.caught():
            paths.extend(find_images([str(one)]))
    return list(dict.fromkeys(paths))


@dataclass(eq=False, slots=True)
class _Progress:
    """How much of all maps is done; each is made, then perhaps evaluated."""

    tell: Tick | None
    work: int
    shares: dict[int, float] = field(default_factory=dict)

    def part(self, number: int, start: float, end: float) -> Tick:
        """What a map's making or evaluation calls, from one share of the map to another."""

        def tick(done: int, total: int) -> None:
            self.shares[number] = start + (end - start) * done / max(total, 1)
            if self.tell is not None:
                self.tell(round(sum(self.shares.values()) * _FINE), self.work * _FINE)

        return tick


# --- one picture ----------------------------------------------------------------------------------


def _explain_one(run: _Run, request: _Request, path: str, shown: _Progress) -> None:
    picture = open_image(path)
    prepared = request.vision.preprocessing(picture)
    subject = _subject(request, prepared)
    run.classes = subject.answered.logits.shape[1]
    run.ends_in_softmax |= subject.answered.head == "probabilities"
    labels = request.vision.labels(run.classes)
    made = _MADE if request.evaluated else 1.0
    for target in _targets(subject, request, labels):
        first = len(run.explanations)
        maps = [
            _map(subject, target, method, options, shown.part(first + i, 0, made))
            for i, (method, options) in enumerate(request.methods)
        ]
        known = [m.diagnostics() for m in maps]
        if request.evaluated:
            alike = evaluation.agreement({m.method.name: m.values for m in maps})
            known = [
                m.evaluated(alike[m.method.name], shown.part(first + i, made, 1))
                for i, m in enumerate(maps)
            ]
        run.explanations += _explanations(request, picture, prepared, maps, known)
    run.images.append(_image_facts(picture, subject, labels))
    run.inputs.append(Input(path=path, format=picture.format, bytes=picture.bytes))
    notes = () if subject.chunks is None else subject.chunks.notes
    run.notes.update(dict.fromkeys(notes))


def _map(
    subject: Subject, target: Target, method: Method, options: Mapping[str, Any], tick: Tick
) -> Map:
    device = subject.inputs.device
    against = None if target.versus is None else torch.tensor([target.versus], device=device)
    aimed = subject.about(torch.tensor([target.index], device=device), against)
    aimed.tick = tick
    found = _attributed(aimed, method, options)
    tick(1, 1)
    return Map(method, options, aimed, found, target)


def _explanations(
    request: _Request,
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


def _subject(request: _Request, prepared: Prepared) -> Subject:
    vision = request.vision
    inputs = vision.like_parameters(prepared.inputs[None])
    mean, std = (torch.tensor(v) for v in (vision.preprocessing.mean, vision.preprocessing.std))
    nothing = torch.zeros(1, dtype=torch.long, device=inputs.device)
    subject = Subject(
        vision.model, inputs, nothing, layer=request.layer, seed=request.seed, mean=mean, std=std
    )
    if request.chunk is not None:
        subject.limit(request.chunk)
    _first_pass(subject, any(m.reads_layer for m, _ in request.methods))
    return subject


def _first_pass(subject: Subject, reads_layer: bool) -> None:
    """Ask the model once; whatever it says against inputs of this size is the user's to know."""
    try:
        _ = subject.tapped if reads_layer else subject.answered
    except (UsageError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UsageError(
            f"the model refuses inputs {list(subject.inputs.shape)}: {said}; --preprocess says how "
            "images become its inputs (size=…, image_mean=…)"
        ) from error


def _attributed(subject: Subject, method: Method, options: Mapping[str, Any]) -> Attribution:
    try:
        return attributed(subject, method, options)
    except UsageError as error:
        raise UsageError(f"{method.name}: {error}") from error


def _targets(subject: Subject, request: _Request, labels: Labels | None) -> list[Target]:
    logits, _ = subject.answer
    classes = len(logits)
    wanted = parse_target(str(request.target), labels, classes)
    against = None if request.versus is None else parse_target(str(request.versus), labels, classes)
    best = wanted.count if isinstance(wanted, Ranked) else 0
    indices = [wanted] if isinstance(wanted, int) else logits.topk(best).indices.tolist()
    ranking = logits.argsort(descending=True).tolist()
    return [_target(subject, index, _other(index, against, ranking), labels) for index in indices]


def _other(index: int, against: int | Ranked | None, ranking: Sequence[int]) -> int | None:
    """The class to contrast with; a rank counts the classes other than the target."""
    if not isinstance(against, Ranked):
        return against
    others = [other for other in ranking if other != index]
    return others[min(against.count, len(others)) - 1]


def _target(subject: Subject, index: int, other: int | None, labels: Labels | None) -> Target:
    logits, probabilities = subject.answer
    label = (labels or {}).get
    return Target(
        index=index,
        label=label(index),
        score=float(logits[index] - (0 if other is None else logits[other])),
        probability=float(probabilities[index]),
        versus=other,
        versus_label=None if other is None else label(other),
    )


def _image_facts(picture: Picture, subject: Subject, labels: Labels | None) -> ImageFacts:
    logits, probabilities = subject.answer
    best = logits.topk(min(_PREDICTIONS, len(logits))).indices.tolist()
    return ImageFacts(
        path=picture.path,
        sha256=picture.sha256,
        width=picture.width,
        height=picture.height,
        mode=picture.mode,
        predictions=tuple(
            Prediction(
                index=index,
                label=(labels or {}).get(index),
                score=float(logits[index]),
                probability=float(probabilities[index]),
            )
            for index in best
        ),
    )


# --- the report -----------------------------------------------------------------------------------


def _result(run: _Run, request: _Request) -> ExplainResult:
    loaded, steps = request.vision.loaded, request.vision.preprocessing
    module = loaded.model.module
    like = next(module.parameters(), torch.zeros(()))
    return ExplainResult(
        explanations=tuple(run.explanations),
        images=tuple(run.images),
        model=ModelFacts(
            path=loaded.path,
            sha256=loaded.sha256,
            format=loaded.format,
            architecture=loaded.architecture,
            parameters=sum(p.numel() for p in module.parameters()),
            classes=run.classes,
            ends_in_softmax=run.ends_in_softmax,
        ),
        preprocessing=Preprocessed(
            size=steps.size or (0, 0),
            mean=steps.mean,
            std=steps.std,
            steps=steps.steps(),
            source=steps.source,
            assumed=steps.assumed,
        ),
        environment=Environment(
            seed=request.seed,
            device=str(like.device),
            dtype=str(like.dtype).removeprefix("torch."),
            versions={"gradscope": __version__, "torch": str(torch.__version__),
                      "numpy": np.__version__},
        ),
        evaluated=request.evaluated,
        notes=(*loaded.notes, *run.notes, *_notes(run)),
    )  # fmt: skip


def _notes(run: _Run) -> Iterator[str]:
    if run.ends_in_softmax:
        yield (
            "the model's answers are probabilities: where it is sure, their gradients vanish; a "
            "model that ends in logits explains better"
        )


def _report(
    wanted: Request,
    failures: Sequence[InputFailure],
    inputs: Sequence[Input] = (),
    result: ExplainResult | None = None,
) -> ExplainReport:
    coverage = Coverage(
        analyzed=len(inputs),
        total=len(inputs) + len(failures),
        unit="images",
        bytes=sum(i.bytes for i in inputs),
    )
    judged = [] if result is None else [wanted.judged(result, result.model.path)]
    return wanted.report(
        ExplainReport, result, inputs=inputs, coverage=coverage, judged=judged, errors=failures
    )
