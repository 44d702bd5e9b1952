"""``explain``: model and pictures -> maps, their diagnostics, files -> rules -> report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gradscope import __version__
from gradscope.attribution import evaluation
from gradscope.attribution.attribute import Attribution, attributed
from gradscope.attribution.drawing.colour import COLORMAPS, default
from gradscope.attribution.drawing.overlay import bounds, heatmap, overlay, save_png, write_whole
from gradscope.attribution.drawing.sheet import Panel, sheet
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
    MapFacts,
    ModelFacts,
    Prediction,
    Preprocessed,
    Target,
)
from gradscope.attribution.subject import Subject, Tick
from gradscope.errors import InputError, UsageError
from gradscope.models import labels as names
from gradscope.models import preprocessing as pre
from gradscope.models.images import Picture, find_images, open_image
from gradscope.models.labels import Labels, Ranked, parse_target
from gradscope.models.layers import Choice, Layer, choose, survey
from gradscope.models.load import Loaded, load_model
from gradscope.models.model import Model, as_model
from gradscope.models.preprocessing import Prepared, Preprocessing
from gradscope.models.probe import held
from gradscope.models.sizes import image_size
from gradscope.report.gate import gate
from gradscope.report.model import Coverage, Finding, Input, InputFailure, NotEvaluated, Severity
from gradscope.report.rules import evaluate, load_rules
from gradscope.report.rules import select as selection

_PREDICTIONS = 5
#: Parts of a tick that one map is.
_FINE = 1000


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
    given = [images] if isinstance(images, str | Path) else list(images)
    run = _Run(seed=seed, chunk=chunk, evaluated=evaluated, colormap=colormap,
               output=None if output is None else output_folder(output))  # fmt: skip
    try:
        loaded = loaded_model(model, arch, key, trust, device)
        setting = _setting(loaded, preprocess, labels, asked, target, versus, layer, device)
    except InputError as error:
        return _report(run, None, [_failure(error)], rules, fail_on, allow_empty)
    paths, failures = _found(given)
    work = len(paths) * _maps(setting)
    with held(loaded.model.module):
        for path in paths:
            try:
                _explain_one(run, setting, path, _ticker(progress, len(run.explanations), work))
            except InputError as error:
                failures.append(_failure(error))
    result = _result(run, setting)
    return _report(run, result, failures, rules, fail_on, allow_empty)


# --- what was asked for ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class _Setting:
    """Everything that is the same for every picture."""

    loaded: Loaded
    preprocessing: Preprocessing
    labels: Labels | None
    methods: tuple[tuple[Method, dict[str, Any]], ...]
    target: int | str
    versus: int | str | None
    layer: str | None
    device: str


@dataclass(eq=False, slots=True)
class _Run:
    """What comes together while pictures are worked on."""

    seed: int
    chunk: int | None
    evaluated: bool
    colormap: str | None
    output: Path | None
    explanations: list[Explanation] = field(default_factory=list)
    images: list[ImageFacts] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    stems: set[str] = field(default_factory=set)
    classes: int = 0
    ends_in_softmax: bool = False


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


def output_folder(output: str | Path) -> Path:
    """The folder, made if need be. Raises UsageError where it cannot be."""
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {path}: {error.strerror or error}") from error
    return path


def loaded_model(
    model: object, arch: str | None, key: str | None, trust: Sequence[str], device: str
) -> Loaded:
    """A model from a path, or one in memory. Raises as ``load_model`` does."""
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


def _setting(
    loaded: Loaded,
    preprocess: str | Preprocessing | None,
    labels: str | Labels | None,
    asked: tuple[tuple[Method, dict[str, Any]], ...],
    target: int | str,
    versus: int | str | None,
    layer: str,
    device: str,
) -> _Setting:
    named = None if layer == "auto" else layer
    loaded.model.check_layers([] if named is None else [named])
    steps = preprocessing_of(loaded, preprocess)
    known = labels_of(loaded, labels)
    with_images = tuple((m, _with_reference_image(o, steps)) for m, o in asked)
    return _Setting(loaded, steps, known, with_images, target, versus, named, device)


def preprocessing_of(loaded: Loaded, given: str | Preprocessing | None) -> Preprocessing:
    """The steps that were asked for, else those written down for the model, else ImageNet's."""
    depth, height, width = loaded.model.size
    found = given if isinstance(given, Preprocessing) else None
    if isinstance(given, str):
        found = pre.parse(given)
    found = found or _written_down(loaded)
    if found is None:
        found = replace(pre.IMAGENET, source="assumed", assumed=True)
    if found.size is None or found.assumed:
        depth, height, width = image_size(loaded.model, depth)
    found = pre.fitted(found, (height, width), depth)
    if depth not in (None, found.channels):
        raise UsageError(
            f"the model takes images of {depth} channels, the preprocessing gives {found.channels}"
        )
    return found


def _written_down(loaded: Loaded) -> Preprocessing | None:
    path = Path(loaded.path)
    found = pre.beside(loaded.path) if path.exists() else None
    found = found or pre.of_module(loaded.model.module)
    if found is None and loaded.architecture and "torchvision" in loaded.architecture:
        factory = loaded.architecture.partition(":")[2].partition("(")[0]
        return pre.of_torchvision(factory)
    return found


def labels_of(loaded: Loaded, given: str | Labels | None) -> Labels | None:
    """The names that were given, or those in a file next to the model."""
    if isinstance(given, str):
        return names.read_labels(given)
    if given is not None:
        return given
    return names.beside(loaded.path) if Path(loaded.path).exists() else None


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


def _maps(setting: _Setting) -> int:
    target = str(setting.target)
    ranked = int(target[3:].lstrip("-")) if target.startswith("top") and target[-1].isdigit() else 1
    return ranked * len(setting.methods)


def _ticker(progress: Tick | None, done: int, work: int) -> Callable[[int], Tick]:
    """For the n-th map of a picture, what turns its own ticks into those of the whole run."""

    def of(number: int) -> Tick:
        def tick(start: int, total: int) -> None:
            if progress is not None:
                whole = (done + number) * _FINE + _FINE * start // max(total, 1)
                progress(min(whole, work * _FINE), work * _FINE)

        return tick

    return of


# --- one picture ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class _Map:
    """One method's answer to one picture and target, with what it takes to say more of it."""

    method: Method
    options: Mapping[str, Any]
    subject: Subject
    found: Attribution
    target: Target

    @property
    def values(self) -> Tensor:
        """The map [H, W] in input geometry."""
        return self.found.upsampled[0]

    def again(self, inputs: Tensor) -> Tensor:
        """The map of other inputs [1, C, H, W] for the same target."""
        subject = replace(self.subject, inputs=inputs, shared={}, tick=lambda _d, _t: None,
                          layer=self.found.layer or self.subject.layer)  # fmt: skip
        return attributed(subject, self.method, self.options).upsampled[0]


def _explain_one(run: _Run, setting: _Setting, path: str, ticks: Callable[[int], Tick]) -> None:
    picture = open_image(path)
    prepared = setting.preprocessing(picture)
    subject = _subject(run, setting, prepared)
    run.classes = subject.answered.logits.shape[1]
    run.ends_in_softmax |= subject.answered.head == "probabilities"
    labels = setting.labels or names.of_model(setting.loaded.model.module, run.classes)
    targets = _targets(subject, setting, labels)
    number = 0
    for target in targets:
        maps = []
        for method, options in setting.methods:
            aimed = subject.about(torch.tensor([target.index], device=subject.inputs.device),
                                  _versus(target, subject))  # fmt: skip
            aimed.tick = ticks(number)
            found = _attributed(aimed, method, options)
            maps.append(_Map(method, options, aimed, found, target))
            aimed.tick(1, 1)
            number += 1
        _record(run, picture, prepared, maps)
    run.images.append(_image_facts(picture, subject, labels))
    run.inputs.append(Input(path=path, format=picture.format, bytes=picture.bytes))
    notes = () if subject.chunks is None else subject.chunks.notes
    run.notes.update(dict.fromkeys(notes))


def _subject(run: _Run, setting: _Setting, prepared: Prepared) -> Subject:
    model = setting.loaded.model
    inputs = like_parameters(model, prepared.inputs[None])
    mean, std = (torch.tensor(v) for v in (setting.preprocessing.mean, setting.preprocessing.std))
    nothing = torch.zeros(1, dtype=torch.long, device=inputs.device)
    subject = Subject(
        model, inputs, nothing, layer=setting.layer, seed=run.seed, mean=mean, std=std
    )
    if run.chunk is not None:
        subject.limit(run.chunk)
    _first_pass(subject, any(m.reads_layer for m, _ in setting.methods))
    return subject


def like_parameters(model: Model, inputs: Tensor) -> Tensor:
    """Inputs on the device, and of the type, of a model's parameters."""
    parameter = next((p for p in model.module.parameters() if p.is_floating_point()), None)
    return inputs if parameter is None else inputs.to(parameter)


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


def _targets(subject: Subject, setting: _Setting, labels: Labels | None) -> list[Target]:
    logits, _ = subject.answer
    classes = len(logits)
    wanted = parse_target(str(setting.target), labels, classes)
    against = None if setting.versus is None else parse_target(str(setting.versus), labels, classes)
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


def _versus(target: Target, subject: Subject) -> Tensor | None:
    if target.versus is None:
        return None
    return torch.tensor([target.versus], device=subject.inputs.device)


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


# --- one map --------------------------------------------------------------------------------------


def _record(run: _Run, picture: Picture, prepared: Prepared, maps: Sequence[_Map]) -> None:
    """Diagnose, draw and write the maps of one target, and keep what the report says of them."""
    alike = evaluation.agreement({m.method.name: m.values for m in maps}) if run.evaluated else {}
    stem = _stem(run, picture) if run.output is not None and maps else ""
    panels = []
    for one in maps:
        diagnostics = _diagnosed(run, one, alike.get(one.method.name))
        files, panel = _drawn(run, stem, picture, prepared, one, diagnostics)
        panels.append(panel)
        run.explanations.append(_explanation(picture, one, files, diagnostics))
    if run.output is not None and len(maps) > 1:
        original = Panel("original", f"{picture.width} x {picture.height}", picture.rgb())
        target = maps[0].target
        caption = f"{Path(picture.path).name}: {target.index} {target.label or ''}".rstrip()
        page = sheet([original, *panels], f"{caption}, probability {target.probability:.2g}")
        save_png(run.output / f"{stem}.{target.index}.sheet.png", page, {"Title": caption})


def _stem(run: _Run, picture: Picture) -> str:
    """The picture's name for its files; pictures of one name in several folders are numbered."""
    base = Path(picture.path).stem
    path_of = {i.path for i in run.images}
    stem, number = base, 2
    while stem in run.stems and picture.path not in path_of and not _is_mine(run, picture):
        stem, number = f"{base}-{number}", number + 1
    run.stems.add(stem)
    return stem


def _is_mine(run: _Run, picture: Picture) -> bool:
    return bool(run.explanations) and run.explanations[-1].image == picture.path


def _diagnosed(run: _Run, one: _Map, alike: Mapping[str, float] | None) -> Diagnostics:
    facts = dict(one.found.diagnostics)
    facts.pop("scores")
    delta, relative = (facts.pop(k, [None])[0] for k in ("completeness_delta", "relative_delta"))
    own = {k: _plain(v) for k, v in facts.items()}
    known = Diagnostics(completeness_delta=delta, relative_delta=relative, method=own)
    if not run.evaluated:
        return known
    return known.model_copy(update=_evaluated(run, one, alike))


def _plain(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _evaluated(run: _Run, one: _Map, alike: Mapping[str, float] | None) -> dict[str, Any]:
    subject, values = one.subject, torch.nan_to_num(one.values)
    quiet = replace(subject, tick=lambda _d, _t: None)
    insertion, deletion, i_spread, d_spread = evaluation.areas(quiet, values, run.seed)
    width = torch.ones(1) if subject.std is None else subject.std
    radius = (evaluation.RADIUS / width).view(-1, 1, 1).to(subject.inputs)
    module = subject.model.module
    return {
        "insertion_auc": insertion,
        "deletion_auc": deletion,
        "insertion_spread": i_spread,
        "deletion_spread": d_spread,
        "random_control": evaluation.random_control(quiet, values, run.seed),
        "randomisation": evaluation.randomisation(
            module, lambda: one.again(subject.inputs), values, run.seed
        )
        or None,
        "sensitivity": evaluation.sensitivity(one.again, subject.inputs, values, radius, run.seed),
        "agreement": dict(alike) if alike else None,
    }


def _explanation(
    picture: Picture, one: _Map, files: Files, diagnostics: Diagnostics
) -> Explanation:
    values = one.values
    choice = one.subject.choice if one.method.reads_layer else None
    shown = {k: "an image" if isinstance(v, Tensor) else v for k, v in one.options.items()}
    return Explanation(
        image=picture.path,
        image_sha256=picture.sha256,
        method=one.method.name,
        target=one.target,
        layer=one.found.layer,
        layer_reason=None if choice is None else choice.reason,
        options=shown,
        sign=one.method.sign,
        map=MapFacts(
            shape=(values.shape[0], values.shape[1]),
            min=float(values.min()),
            max=float(values.max()),
            sum=float(values.double().sum()),
            concentration=evaluation.concentration(values),
        ),
        files=files,
        diagnostics=diagnostics,
    )


def _drawn(
    run: _Run, stem: str, picture: Picture, prepared: Prepared, one: _Map, known: Diagnostics
) -> tuple[Files, Panel]:
    """The map's pictures, written where a folder is given, and its panel for the sheet."""
    if run.output is None:
        return Files(), Panel("", "", np.zeros((1, 1, 3), np.uint8))
    values = one.values.detach().float().cpu().numpy()
    in_picture = prepared.geometry.to_picture(values)
    sign, table = one.method.sign, run.colormap or default(one.method.sign)
    # A line around single pixels would be dust, and they are hard to see among colours.
    pixels = one.method.family == "gradient"
    contour, opacity = (None, 1.0) if pixels else (0.5, 0.65)
    over = overlay(picture.rgb(), in_picture, sign, table, opacity=opacity, contour=contour,
                   faded=pixels)  # fmt: skip
    base = f"{stem}.{one.method.name.replace('++', 'pp')}.{one.target.index}"
    if one.target.versus is not None:
        base += f"-vs-{one.target.versus}"
    paths = [run.output / f"{base}.{end}" for end in ("heatmap.png", "overlay.png", "npz")]
    about = _about(picture, one)
    save_png(paths[0], heatmap(in_picture, sign, table), about)
    save_png(paths[1], over, about)
    arrays = {"map": values}
    if one.found.values.dim() == 4:
        arrays["attribution"] = one.found.values[0].detach().float().cpu().numpy()
    write_whole(paths[2], lambda stream: _save(stream, arrays))
    heat, covered, array = map(str, paths)
    panel = Panel(one.method.name, _numbers(known), over, (table, *bounds(values, sign)))
    return Files(heatmap=heat, overlay=covered, array=array), panel


def _save(stream: BinaryIO, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    np.savez_compressed(stream, allow_pickle=False, **arrays)


def _about(picture: Picture, one: _Map) -> dict[str, str]:
    title = f"{one.method.name}: {one.target.index} {one.target.label or ''}".rstrip()
    facts = {"image": picture.path, "image_sha256": picture.sha256, "layer": one.found.layer}
    return {"Title": title, "Software": f"gradscope {__version__}", "Comment": json.dumps(facts)}


def _numbers(known: Diagnostics) -> str:
    if known.insertion_auc is not None:
        return f"insertion {known.insertion_auc:.2f}, deletion {known.deletion_auc:.2f}"
    if known.relative_delta is not None:
        return f"completeness within {known.relative_delta:.1%}"
    return ""


# --- the report -----------------------------------------------------------------------------------


def _result(run: _Run, setting: _Setting) -> ExplainResult:
    loaded, steps = setting.loaded, setting.preprocessing
    module = loaded.model.module
    parameter = next(module.parameters(), None)
    size = steps.size or (0, 0)
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
            size=size,
            mean=steps.mean,
            std=steps.std,
            steps=steps.steps(),
            source=steps.source,
            assumed=steps.assumed,
        ),
        environment=Environment(
            seed=run.seed,
            device=setting.device if parameter is None else str(parameter.device),
            dtype="float32" if parameter is None else str(parameter.dtype).removeprefix("torch."),
            versions={"gradscope": __version__, "torch": str(torch.__version__),
                      "numpy": np.__version__},
        ),
        evaluated=run.evaluated,
        notes=tuple(_notes(run, loaded)),
    )  # fmt: skip


def _notes(run: _Run, loaded: Loaded) -> Iterator[str]:
    yield from loaded.notes
    yield from run.notes
    if run.ends_in_softmax:
        yield (
            "the model's answers are probabilities: where it is sure, their gradients vanish; a "
            "model that ends in logits explains better"
        )


def _report(
    run: _Run,
    result: ExplainResult | None,
    failures: Sequence[InputFailure],
    rules: Sequence[Any],
    fail_on: str,
    allow_empty: bool,
) -> ExplainReport:
    found = [] if result is None else list(evaluate(rules, result, _measured(result)))
    findings = tuple(
        sorted((f for f in found if isinstance(f, Finding)), key=lambda f: -f.severity.rank)
    )
    coverage = Coverage(
        analyzed=len(run.images),
        total=len(run.images) + len(failures),
        unit="images",
        bytes=sum(i.bytes for i in run.inputs),
        not_evaluated=tuple(dict.fromkeys(f for f in found if isinstance(f, NotEvaluated))),
    )
    return ExplainReport(
        command="explain",
        inputs=tuple(run.inputs),
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


# --- before anything is explained -----------------------------------------------------------------


def surveyed(
    model: object,
    *,
    arch: str | None = None,
    key: str | None = None,
    trust: Sequence[str] = (),
    preprocess: str | Preprocessing | None = None,
    device: str = "cpu",
) -> tuple[list[Layer], Choice | None]:
    """Every layer of a model as a noisy image sees it, and which one ``auto`` takes (or none).

    Raises as ``load_model`` does.
    """
    loaded = loaded_model(model, arch, key, trust, device)
    steps = preprocessing_of(loaded, preprocess)
    size = steps.size or image_size(loaded.model, steps.channels)[1:]
    # Noise rather than nothing: rectifiers shut on a flat image.
    noise = torch.randn((1, steps.channels, *size), generator=torch.Generator().manual_seed(0))
    with held(loaded.model.module):
        layers = survey(loaded.model, like_parameters(loaded.model, noise))
    try:
        return layers, choose(layers)
    except UsageError:
        return layers, None
