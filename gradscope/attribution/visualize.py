"""``visualize``: the image that most activates a class, or a channel of a layer."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradscope.attribution.result import (
    Environment,
    Prediction,
    VisualizeReport,
    VisualizeResult,
)
from gradscope.attribution.subject import Tick
from gradscope.attribution.synthesis import synthesise
from gradscope.attribution.targets import predictions
from gradscope.attribution.writing import output_folder, save_png
from gradscope.errors import InputError, UsageError
from gradscope.files import write_whole
from gradscope.models.labels import Labels, Ranked, parse_target
from gradscope.models.layout import layout_of
from gradscope.models.load import Loaded
from gradscope.models.preprocessing import Preprocessing
from gradscope.models.probe import held, run
from gradscope.models.quick import quick
from gradscope.models.vision import Vision, open_vision
from gradscope.report.model import Coverage, Input, InputFailure
from gradscope.report.request import Request, failure
from gradscope.text import quoted
from gradscope.version import __version__

#: Share of the steps that see crops, the steps that never do, without which a picture has no
#: whole, and the side of the smallest image that is cropped.
_CROPS = 2 / 3
_WHOLE_STEPS = 64
_LEAST_SIDE = 64


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
    steps: int = 256,
    seed: int = 0,
    device: str = "cpu",
    progress: Tick = lambda _done, _total: None,
) -> VisualizeReport:
    """Synthesise the image that most activates a class (``target``) or a layer's ``channel``.

    The model and its preprocessing are as in ``explain``. With ``output`` the image is written to
    that folder as PNG, the course of the objective as CSV. A model that cannot be read becomes an
    entry of ``errors``; raises UsageError for everything else that is wrong with the request.
    """
    if (target is None) == (layer is None) or (layer is None) != (channel is None):
        raise UsageError("name either a target class, or a layer and one of its channels")
    if steps < 1:
        raise UsageError("steps has to be at least 1")
    folder = None if output is None else output_folder(output)
    try:
        vision = open_vision(
            model, arch=arch, key=key, trust=trust, preprocess=preprocess, labels=labels,
            device=device,
        )  # fmt: skip
    except InputError as error:
        return _report(None, None, [failure(error)])
    loaded, size = vision.loaded, vision.size
    vision = vision.answered_by(quick(vision.model))
    with held(vision.model.module):
        goal = _Goal(vision, target, layer, channel)
        whole = max(_WHOLE_STEPS, round(steps * (1 - _CROPS)))
        crops = max(0.0, 1 - whole / steps) if goal.takes_half else 0.0
        found = synthesise(goal.score, size, steps=steps, seed=seed, crops=crops,
                           device=goal.device, progress=progress)  # fmt: skip
        likeliest = goal.predictions(found.image)
    name = _written(folder, goal, found.image, found.objective) if folder else None
    result = VisualizeResult(
        model=loaded.path,
        sha256=loaded.sha256,
        target=goal.target,
        label=goal.label,
        layer=layer,
        channel=channel,
        size=(size[1], size[2]),
        steps=steps,
        objective=found.objective,
        predictions=likeliest,
        image=name,
        environment=Environment(
            seed=seed, device=str(goal.device), dtype=goal.dtype,
            versions={"gradscope": __version__, "torch": str(torch.__version__)},
        ),
        notes=(*loaded.notes, *_notes(crops, steps)),
    )  # fmt: skip
    return _report(loaded, result, [])


def _notes(crops: float, steps: int) -> Iterator[str]:
    if crops:
        yield f"in the first {math.ceil(crops * steps)} steps the model saw crops of half the side"


class _Goal:
    """What is maximised, of a held model."""

    def __init__(
        self, vision: Vision, target: int | str | None, layer: str | None, channel: int | None
    ) -> None:
        self.model, self.vision = vision.model, vision
        self.layer, self.channel = layer, channel
        blank = vision.like_parameters(torch.full((1, *vision.size), 0.5))
        self.device, self.kind = blank.device, blank.dtype
        with torch.no_grad():
            classes = run(self.model, self._inputs(blank)).logits.shape[1]
        self.labels = vision.labels(classes)
        self.target = None if target is None else self._class(str(target), classes)
        self.label = None if self.target is None else (self.labels or {}).get(self.target)
        if layer is not None:
            self._check_channel(blank)

    @property
    def dtype(self) -> str:
        return str(self.kind).removeprefix("torch.")

    @property
    def takes_half(self) -> bool:
        """Whether the model answers about images of half the size, and these are not too small."""
        if min(self.vision.size[1:]) < _LEAST_SIDE:
            return False
        try:
            channels, height, width = self.vision.size
            with torch.no_grad():
                self.score(torch.full((1, channels, height // 2, width // 2), 0.5).to(self.device))
        except (RuntimeError, ValueError, AssertionError, IndexError, UsageError):
            return False
        return True

    @property
    def name(self) -> str:
        return f"class-{self.target}" if self.layer is None else f"{self.layer}-{self.channel}"

    def _inputs(self, pixels: Tensor) -> Tensor:
        return self.vision.preprocessing.normalise(pixels).to(self.kind)

    def _class(self, target: str, classes: int) -> int:
        found = parse_target(target, self.labels, classes)
        if isinstance(found, Ranked):
            message = "without a picture there is no ranking; name a class"
            raise UsageError(f"--target {target}: {message}")
        return found

    def score(self, pixels: Tensor) -> Tensor:
        """The class's logit, or the channel's mean, of pixels [1, C, H, W]."""
        if self.layer is None:
            return run(self.model, self._inputs(pixels)).logits[:, self.target].float()
        return self._channels(pixels)[:, self.channel].float()

    def _channels(self, pixels: Tensor) -> Tensor:
        """The layer's channels [1, C], their mean over positions."""
        assert self.layer is not None
        piece = run(self.model, self._inputs(pixels), [self.layer]).pieces[self.layer][0]
        shape = (self.model.batch or 1, *pixels.shape[1:])
        layout = layout_of(tuple(piece.shape), shape)
        if layout is not None:
            return layout.maps(piece)[:1].mean((2, 3))
        return piece[:1].flatten(1, -2).mean(1) if piece.dim() > 2 else piece[:1]

    def _check_channel(self, blank: Tensor) -> None:
        count = self._channels(blank).shape[1]
        if self.channel is None or not 0 <= self.channel < count:
            raise UsageError(f"layer {quoted(self.layer or '')} has channels 0 to {count - 1}")

    def predictions(self, image: Tensor) -> tuple[Prediction, ...]:
        with torch.no_grad():
            seen = run(self.model, self._inputs(image[None].to(self.device)))
        return predictions(seen.scores, self.labels)


def _written(folder: Path, goal: _Goal, image: Tensor, objective: Sequence[float]) -> str:
    bytes_ = np.rint(image.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
    path = folder / f"{goal.name.replace('/', '_')}.png"
    title = goal.name if goal.label is None else f"{goal.name} {goal.label}"
    colours = np.repeat(bytes_, 3, axis=2) if bytes_.shape[2] == 1 else bytes_
    save_png(path, colours, {"Title": title, "Software": f"gradscope {__version__}"})
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("step", "objective"))
    writer.writerows(enumerate(objective))
    write_whole(path.with_suffix(".csv"), lambda stream: stream.write(table.getvalue().encode()))
    return str(path)


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
