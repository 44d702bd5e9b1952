"""``explain``: model and pictures -> maps, their diagnostics, files -> rules -> report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradscope.attribution.collected import Collected, result_of
from gradscope.attribution.drawing.colour import COLORMAPS
from gradscope.attribution.drawing.figure import check_figures
from gradscope.attribution.drawing.folder import Folder
from gradscope.attribution.drawing.writing import output_folder
from gradscope.attribution.evaluation.boxes import read_boxes
from gradscope.attribution.evaluation.budget import Budget
from gradscope.attribution.picture import Progress, explain_picture
from gradscope.attribution.request import asked, request
from gradscope.attribution.result import ExplainReport, ExplainResult
from gradscope.attribution.subject import Tick
from gradscope.attribution.targets.readings import Wanted
from gradscope.errors import InputError, UsageError
from gradscope.models.labels import Labels
from gradscope.models.picture_files import find_images
from gradscope.models.preprocessing import Preprocessing
from gradscope.models.probe import held
from gradscope.models.quick import quick
from gradscope.models.vision import open_vision
from gradscope.report.config import ConfigLike
from gradscope.report.model import Coverage, Input, InputFailure
from gradscope.report.request import Failures, Request, failure, requested


def explain(
    model: object,
    images: str | Path | Sequence[str | Path],
    method: str | Sequence[str] = "gradcam",
    *,
    arch: str | None = None,
    key: str | None = None,
    trust: Sequence[str] = (),
    target: Wanted = "top1",
    versus: int | str | None = None,
    output_name: str | int | None = None,
    layer: str = "auto",
    preprocess: str | Preprocessing | None = None,
    labels: str | Labels | None = None,
    output: str | Path | None = None,
    colormap: str | None = None,
    figure: str | None = None,
    evaluated: bool = False,
    boxes: str | None = None,
    budget: float | None = None,
    device: str = "cpu",
    seed: int = 0,
    chunk: int | None = None,
    exact: bool = False,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
    allow_empty: bool = False,
    config: ConfigLike = None,
    baseline: str | Path | None = None,
    progress: Tick | None = None,
    **options: Any,
) -> ExplainReport:
    """Why a vision model answers as it does about pictures, and whether to believe the maps.

    ``model`` is a path (see ``load_model`` for ``arch``, ``key`` and ``trust``) or a model of
    torch; ``images`` are files and folders; ``method`` one name or several, which share passes.
    ``target`` is a class index, a label, "top1" or "topK"; "pixel:Y,X", "mask:CLASS", "box:N",
    "similar:IMAGE", "channel:K" or "text:FILE"; or a function of the model's output that returns a
    number for each image. With ``versus`` what speaks for it rather than for another class.
    ``output_name`` says which of several outputs is meant, by name or position. ``options`` go to
    every method that has them. With ``output`` a heatmap, an overlay and the raw values of each map
    are written to that folder, and with ``figure`` ("png", "svg" or "pdf") one for a paper, with a
    title and a colour bar. ``evaluated`` measures insertion and deletion, parameter randomisation,
    sensitivity and agreement; ``boxes`` (COCO or Pascal VOC annotations, masks) whether maps lie on
    the objects, and with ``evaluated`` ROAD, faithfulness correlation and infidelity. Evaluation
    that has not begun after ``budget`` seconds is left out, and said. ``exact`` is as in
    ``attribute``.

    Files that cannot be read are entries of ``errors``, never exceptions. Raises UsageError for
    everything else that is wrong with the request.
    """
    wanted = requested(
        ExplainResult,
        select=select,
        ignore=ignore,
        fail_on=fail_on,
        allow_empty=allow_empty,
        config=config,
        baseline=baseline,
    )
    methods = asked(method, options)
    if budget is not None and not (evaluated and budget > 0):
        raise UsageError("--budget is for --evaluate, in seconds above 0")
    if colormap is not None and colormap not in COLORMAPS:
        raise UsageError(f"no colormap is called {colormap!r}; there are {', '.join(COLORMAPS)}")
    if figure is not None:
        check_figures(figure)
    folder = None if output is None else Folder(output_folder(output), colormap, figure)
    try:
        vision = open_vision(
            model, arch=arch, key=key, trust=trust, preprocess=preprocess, labels=labels,
            device=device, output_name=output_name,
        )  # fmt: skip
        if not exact:
            vision = vision.answered_by(quick(vision.model))
        truth = None if boxes is None else read_boxes(boxes)
        shared = request(vision, methods, target, versus, layer, seed, chunk, evaluated, truth,
                         Budget(budget), folder)  # fmt: skip
    except InputError as error:
        return _report(wanted, [failure(error)])
    failures = Failures()
    paths = _found([images] if isinstance(images, str | Path) else images, failures)
    if folder is not None:
        folder.spare(paths)
    run = Collected()
    shared.budget.pictures = len(paths)
    shown = Progress(progress, len(paths) * shared.maps)
    with held(vision.model.module):
        for path in paths:
            with failures.caught():
                explain_picture(run, shared, path, shown)
    refused = [
        InputFailure(input=vision.loaded.path, kind="unsupported", message=said)
        for said in run.refused
    ]
    return _report(wanted, failures, run.inputs, result_of(run, shared), shared.budget, refused)


def _found(given: Iterable[str | Path], failures: Failures) -> list[str]:
    """The pictures, each once, of files and folders."""
    paths: list[str] = []
    for one in given:
        with failures.caught():
            paths.extend(find_images([str(one)]))
    return list(dict.fromkeys(paths))


def _report(
    wanted: Request,
    failures: Sequence[InputFailure],
    inputs: Sequence[Input] = (),
    result: ExplainResult | None = None,
    budget: Budget | None = None,
    refused: Sequence[InputFailure] = (),
) -> ExplainReport:
    """``failures`` are pictures, ``refused`` methods that cannot read the model."""
    skipped = () if budget is None else tuple(budget.skipped())
    if skipped:
        wanted = replace(wanted, narrowed=("--budget",))
    coverage = Coverage(
        analyzed=len(inputs),
        total=len(inputs) + len(failures),
        unit="images",
        bytes=sum(i.bytes for i in inputs),
        skipped=skipped,
    )
    judged = [] if result is None else [wanted.judged(result, result.model.path)]
    return wanted.report(
        ExplainReport,
        result,
        inputs=inputs,
        coverage=coverage,
        judged=judged,
        errors=[*failures, *refused],
    )
