"""``explain``: model and pictures -> maps, their diagnostics, files -> rules -> report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradscope.attribution.collected import Collected as _Run
from gradscope.attribution.collected import result_of as _result
from gradscope.attribution.drawing.colour import COLORMAPS
from gradscope.attribution.folder import Folder
from gradscope.attribution.picture import Progress as _Progress
from gradscope.attribution.picture import explain_picture as _explain_one
from gradscope.attribution.request import asked as _asked
from gradscope.attribution.request import request as _request
from gradscope.attribution.result import ExplainReport, ExplainResult
from gradscope.attribution.subject import Tick
from gradscope.attribution.writing import output_folder
from gradscope.errors import InputError, UsageError
from gradscope.models.images import find_images
from gradscope.models.labels import Labels
from gradscope.models.preprocessing import Preprocessing
from gradscope.models.probe import held
from gradscope.models.vision import open_vision
from gradscope.report.gate import gate
from gradscope.report.model import Coverage, Finding, InputFailure, NotEvaluated, Severity
from gradscope.report.rules import Rule, evaluate, load_rules
from gradscope.report.rules import select as selection


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
    if fail_on not in (*Severity, "never"):
        raise UsageError(f"fail_on is {fail_on!r}; it is one of {', '.join(Severity)} or never")
    rules = selection([r for r in load_rules().values() if r.code[0] == "E"], select, ignore)
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
        return _report(None, None, [_failure(error)], rules, fail_on, allow_empty)
    paths, failures = _found([images] if isinstance(images, str | Path) else list(images))
    run = _Run()
    shown = _Progress(progress, len(paths) * request.maps)
    with held(vision.model.module):
        for path in paths:
            try:
                _explain_one(run, request, path, shown)
            except InputError as error:
                failures.append(_failure(error))
    return _report(run, _result(run, request), failures, rules, fail_on, allow_empty)


def _found(given: Sequence[str | Path]) -> tuple[list[str], list[InputFailure]]:
    paths: list[str] = []
    failures = []
    for one in given:
        try:
            paths.extend(find_images([str(one)]))
        except InputError as error:
            failures.append(_failure(error))
    return list(dict.fromkeys(paths)), failures


def _failure(error: InputError) -> InputFailure:
    return InputFailure(input=error.path, kind=error.kind, message=error.message)


def _report(
    run: _Run | None,
    result: ExplainResult | None,
    failures: Sequence[InputFailure],
    rules: Sequence[Rule],
    fail_on: str,
    allow_empty: bool,
) -> ExplainReport:
    inputs = () if run is None else tuple(run.inputs)
    found = [] if result is None else list(evaluate(rules, result, _measured(result)))
    findings = tuple(
        sorted((f for f in found if isinstance(f, Finding)), key=lambda f: -f.severity.rank)
    )
    coverage = Coverage(
        analyzed=len(inputs),
        total=len(inputs) + len(failures),
        unit="images",
        bytes=sum(i.bytes for i in inputs),
        not_evaluated=tuple(dict.fromkeys(f for f in found if isinstance(f, NotEvaluated))),
    )
    return ExplainReport(
        command="explain",
        inputs=inputs,
        coverage=coverage,
        findings=findings,
        result=result,
        gate=gate(findings, failures, coverage, fail_on=fail_on, allow_empty=allow_empty),
        errors=tuple(failures),
    )


def _measured(result: ExplainResult) -> frozenset[str]:
    facts = {"maps"} if result.explanations else set()
    if any(e.diagnostics.completeness_delta is not None for e in result.explanations):
        facts.add("completeness")
    if result.evaluated:
        facts.add("evaluation")
    return frozenset(facts)
