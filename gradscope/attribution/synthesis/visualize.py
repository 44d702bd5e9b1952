"""``visualize``: the picture that most activates a class, or a channel of a layer."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gradscope.attribution.drawing.colour import Pixels
from gradscope.attribution.drawing.writing import output_folder, save_png
from gradscope.attribution.result import (
    Environment,
    Prediction,
    SynthesisedPicture,
    VisualizeReport,
    VisualizeResult,
)
from gradscope.attribution.subject import Tick
from gradscope.attribution.synthesis.ascent import Synthesis, synthesise
from gradscope.attribution.synthesis.diversity import Diverse, cosine
from gradscope.attribution.synthesis.goal import Goal
from gradscope.attribution.synthesis.priors import PRIORS, Prior
from gradscope.attribution.synthesis.views import Area, smaller, stages
from gradscope.errors import InputError, UsageError
from gradscope.files import write_whole
from gradscope.models.labels import Labels
from gradscope.models.load import Loaded
from gradscope.models.preprocessing import Preprocessing
from gradscope.models.probe import held
from gradscope.models.quick import quick
from gradscope.models.vision import Vision, open_vision
from gradscope.report.model import Coverage, Input, InputFailure
from gradscope.report.request import Request, failure
from gradscope.text import quoted
from gradscope.version import __version__

#: A picture's longer side, for models that see at least the second; others get their own size.
_SIDE, _LEAST_SIDE = 512, 64
#: Runs of fewer steps than this are over before a private copy of the model pays.
_COPIED = 16


def visualize(
    model: object,
    target: int | str | None = None,
    *,
    layer: str | None = None,
    channel: int | None = None,
    arch: str | None = None,
    key: str | None = None,
    trust: Sequence[str] = (),
    preprocess: str | Preprocessing | None = None,
    labels: str | Labels | None = None,
    output: str | Path | None = None,
    size: int | None = None,
    prior: str = "fourier",
    starts: int = 1,
    diversity: float = 0.0,
    steps: int = 256,
    seed: int = 0,
    device: str = "cpu",
    progress: Tick = lambda _done, _total: None,
) -> VisualizeReport:
    """Synthesise the picture that most activates a class (``target``) or a layer's ``channel``.

    The model and its preprocessing are as in ``explain``. ``size`` is the picture's longer side;
    ``prior`` what it is made of (``fourier`` or ``maco``). Of several ``starts`` the picture with
    the highest score comes first; ``diversity`` is the share of the score that pictures lose which
    are alike. With ``output`` pictures are written to that folder as PNG, the course of each
    objective as CSV. A model that cannot be read becomes an entry of ``errors``; raises UsageError
    for everything else that is wrong with the request.
    """
    if (target is None) == (layer is None) or (layer is None) != (channel is None):
        raise UsageError("name either a target class, or a layer and one of its channels")
    chosen = _checked(prior, size, starts, diversity, steps)
    folder = None if output is None else output_folder(output)
    try:
        vision = open_vision(
            model, arch=arch, key=key, trust=trust, preprocess=preprocess, labels=labels,
            device=device,
        )  # fmt: skip
    except InputError as error:
        return _report(None, None, [failure(error)])
    compared = _compared(vision, layer) if starts > 1 else None
    if diversity and compared is None:
        raise UsageError("--diversity compares maps, and no layer of this model has any")
    loaded, area = vision.loaded, vision.size[1:]
    if steps >= _COPIED:
        vision = vision.answered_by(quick(vision.model, worth=1))
    picture = (vision.size[0], *_picture(area, size))
    with held(vision.model.module):
        goal = Goal(vision, target, layer, channel)
        shown = smaller(area) if min(area) >= _LEAST_SIDE else ()
        shown = shown if goal.takes(shown) else ()
        objective = (
            Diverse(lambda pixels: goal.answers(pixels, compared or ""), diversity, starts)
            if diversity
            else lambda _, pixels: (goal.score(pixels), 0.0)
        )
        found = synthesise(
            objective, picture, stages(picture[1:], area, shown), prior=chosen, steps=steps,
            seed=seed, starts=starts, device=goal.device, progress=progress,
        )  # fmt: skip
        seen = [_whole(goal, one, seed + k, area) for k, one in enumerate(found)]
        alike = None if compared is None else _alike(goal, seen, compared)
    seen.sort(key=lambda one: -one.scores[-1])
    drawn = [_described(goal, one, k, folder, chosen) for k, one in enumerate(seen, 1)]
    result = VisualizeResult(
        model=loaded.path,
        sha256=loaded.sha256,
        target=goal.target,
        label=goal.label,
        layer=layer,
        channel=channel,
        size=picture[1:],
        seen=area,
        prior=prior,
        diversity=diversity,
        steps=steps,
        **dict(drawn[0]),
        others=tuple(drawn[1:]),
        similarity=alike,
        environment=Environment(
            seed=seed, device=str(goal.device), dtype=goal.dtype,
            versions={"gradscope": __version__, "torch": str(torch.__version__)},
        ),
        notes=(*loaded.notes, *_notes(shown)),
    )  # fmt: skip
    return _report(loaded, result, [])


def _checked(prior: str, size: int | None, starts: int, diversity: float, steps: int) -> Prior:
    """The prior of a name. Raises UsageError for what cannot be meant."""
    if prior not in PRIORS:
        raise UsageError(f"there is no prior {quoted(prior)}; there are {', '.join(PRIORS)}")
    if steps < 1 or starts < 1:
        raise UsageError("steps and starts have to be at least 1")
    if size is not None and size < 1:
        raise UsageError("the size has to be at least 1 pixel")
    if not (math.isfinite(diversity) and diversity >= 0):
        raise UsageError("the diversity has to be 0 or more")
    if diversity and starts == 1:
        raise UsageError("a picture alone has nothing to differ from: ask for several starts")
    return PRIORS[prior]


def _picture(area: Area, size: int | None) -> Area:
    """The picture's height and width: those of the model, enlarged to a longer side."""
    wanted = size or (max(_SIDE, max(area)) if min(area) >= _LEAST_SIDE else max(area))
    factor = wanted / max(area)
    return max(1, round(area[0] * factor)), max(1, round(area[1] * factor))


def _compared(vision: Vision, layer: str | None) -> str | None:
    """The layer by whose maps pictures are compared: the goal's, else ``auto``'s, if any."""
    if layer is not None:
        return layer
    auto = vision.survey()[1]
    return None if auto is None else auto.layer.name


@dataclass(frozen=True, eq=False, slots=True)
class _Seen:
    """A finished picture, and the whole of it as the model sees it."""

    found: Synthesis
    seed: int
    whole: Tensor
    scores: tuple[float, ...]
    predictions: tuple[Prediction, ...]


def _whole(goal: Goal, found: Synthesis, seed: int, area: Area) -> _Seen:
    whole = interpolate(found.image[None], area, mode="bilinear", antialias=True)[0].clamp(0, 1)
    with torch.no_grad():
        score = float(goal.score(whole[None].to(goal.device)).sum())
    return _Seen(found, seed, whole, (*found.scores, score), goal.predictions(whole))


def _alike(goal: Goal, pictures: Sequence[_Seen], layer: str) -> float | None:
    try:
        with torch.no_grad():
            shown = [one.whole[None].to(goal.device) for one in pictures]
            return cosine([goal.answers(pixels, layer)[1] for pixels in shown])
    except UsageError:
        return None


def _notes(shown: Sequence[Area]) -> Iterator[str]:
    if shown:
        sides = " and ".join(f"{height}×{width}" for height, width in shown)
        yield f"before the last of the steps the model saw {sides}"


def _described(
    goal: Goal, one: _Seen, rank: int, folder: Path | None, prior: Prior
) -> SynthesisedPicture:
    name = None if folder is None else _written(folder, goal, one, rank, prior)
    return SynthesisedPicture(
        start=one.seed, objective=one.scores, predictions=one.predictions, image=name
    )


def _written(folder: Path, goal: Goal, one: _Seen, rank: int, prior: Prior) -> str:
    name = goal.name.replace("/", "_") + (f"-{rank}" if rank > 1 else "")
    title = goal.name if goal.label is None else f"{goal.name} {goal.label}"
    about = {"Title": title, "Software": f"gradscope {__version__}"}
    path, image = folder / f"{name}.png", one.found.image
    save_png(path, _bytes(image), about)
    if prior is PRIORS["maco"]:
        opacity = one.found.opacity[None]
        save_png(folder / f"{name}.alpha.png", _bytes(torch.cat([_colours(image), opacity])), about)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("step", "objective"))
    writer.writerows(enumerate(one.scores))
    write_whole(path.with_suffix(".csv"), lambda stream: stream.write(table.getvalue().encode()))
    return str(path)


def _colours(image: Tensor) -> Tensor:
    """Three channels of an image: its own, the first three of more, or grey."""
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def _bytes(image: Tensor) -> Pixels:
    """Pixels [C, H, W] in 0..1 as bytes [H, W, C]; colours where they are fewer."""
    shown = image if len(image) >= 3 else _colours(image)
    found: Pixels = np.rint(shown.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
    return found


def _report(
    loaded: Loaded | None, result: VisualizeResult | None, failures: Sequence[InputFailure]
) -> VisualizeReport:
    inputs = []
    if loaded is not None:
        path = Path(loaded.path)
        size = path.stat().st_size if path.is_file() else 0
        inputs = [Input(path=loaded.path, format=loaded.format, bytes=size)]
    coverage = Coverage(
        analyzed=int(result is not None), total=1, unit="images", bytes=sum(i.bytes for i in inputs)
    )
    return Request("visualize").report(
        VisualizeReport, result, inputs=inputs, coverage=coverage, errors=failures
    )
