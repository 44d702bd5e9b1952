"""The files of an explanation: heatmap, overlay, raw values, and a sheet of several."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gradscope.attribution.diagnostics import Diagnostics
from gradscope.attribution.drawing.colour import Floats, Pixels, default
from gradscope.attribution.drawing.figure import figure
from gradscope.attribution.drawing.overlay import bounds, heatmap, overlay, scale
from gradscope.attribution.drawing.sheet import Panel, sheet
from gradscope.attribution.drawing.writing import save_png
from gradscope.attribution.formulas.blur import gaussian_blur
from gradscope.attribution.maps import Map
from gradscope.attribution.result import Files
from gradscope.errors import UsageError
from gradscope.files import write_whole
from gradscope.models.geometry import Geometry
from gradscope.models.images import Picture
from gradscope.models.picture_files import split_frame
from gradscope.text import escaped, quoted
from gradscope.version import __version__

#: What is drawn on has at most so many pixels, and at least so many along its longer edge.
_MOST_PIXELS, _LEAST_EDGE = 1 << 24, 256
#: Of a pixel; below it a blur changes nothing.
_LEAST_SIGMA = 0.3


@dataclass(frozen=True, eq=False, slots=True)
class Folder:
    """The output folder; pictures with the same name in several folders are numbered."""

    path: Path
    colormap: str | None = None
    #: "png", "svg" or "pdf" for a figure of each map.
    figures: str | None = None
    #: The stem of each picture's file names, by path.
    stems: dict[str, str] = field(default_factory=dict)

    def spare(self, pictures: Sequence[str]) -> None:
        """Refuse to write over a picture that is to be explained. Raises UsageError."""
        pictures = [split_frame(path)[0] for path in pictures]
        own = [re.escape(Path(path).stem) for path in pictures]
        ours = re.compile(rf"(?:{'|'.join(own)})(-\d+)?\..+\.(heatmap|overlay|sheet|figure)\.png")
        for path in pictures:
            if (
                ours.fullmatch(Path(path).name)
                and Path(path).resolve().parent == self.path.resolve()
            ):
                raise UsageError(
                    f"--output {self.path}: it holds {quoted(path)}, an input that a picture of "
                    "this run could overwrite; choose another folder"
                )

    def write(
        self, picture: Picture, geometry: Geometry, maps: Sequence[tuple[Map, Diagnostics]]
    ) -> list[Files]:
        """Write the files of one target's maps, and a sheet where there are several."""
        written = [self._written(picture, geometry, one, known) for one, known in maps]
        if len(maps) > 1:
            size = f"{picture.width} x {picture.height}"
            original = Panel("original", size, _canvas(picture.rgb()))
            target = maps[0][0].target
            caption = f"{Path(picture.path).name}: {target.named}"
            panels = [original, *(panel for _, panel in written)]
            page = sheet(panels, f"{caption}, {target.strength}")
            name = f"{self._stem(picture)}.{_class(maps[0][0])}.sheet.png"
            save_png(self.path / name, page, {"Title": caption})
        return [files for files, _ in written]

    def _written(
        self, picture: Picture, geometry: Geometry, one: Map, known: Diagnostics
    ) -> tuple[Files, Panel]:
        values = one.values.detach().float().cpu().numpy()
        shown, said = _smoothed(one, values)
        below = _canvas(picture.rgb())
        in_picture = geometry.of_size(*below.shape[:2]).to_picture(shown)
        sign, table = one.method.sign, self.colormap or default(one.method.sign)
        # A contour around single pixels would be dust, and they are hard to see among colours.
        pixels = one.method.family == "gradient"
        contour, opacity = (None, 1.0) if pixels else (0.5, 0.65)
        drawn = overlay(
            below, in_picture, sign, table, opacity=opacity, contour=contour, faded=pixels
        )
        name = f"{self._stem(picture)}.{one.method.name.replace('++', 'pp')}.{_class(one)}"
        heat, over, array = (
            self.path / f"{name}.{end}" for end in ("heatmap.png", "overlay.png", "npz")
        )
        save_png(heat, heatmap(in_picture, sign, table), _about(picture, one))
        save_png(over, drawn, _about(picture, one))
        arrays = {"map": values}
        if one.found.values.dim() == 4:
            arrays["attribution"] = one.found.values[0].detach().float().cpu().numpy()
        write_whole(array, lambda stream: np.savez_compressed(stream, allow_pickle=False, **arrays))
        bar, ends = (table, *bounds(shown, sign)), scale(shown, sign)
        numbers = ", ".join(filter(None, (_numbers(known), said)))
        panel = Panel(one.method.name, numbers, drawn, bar, ends.partition(":")[0])
        files = Files(heatmap=str(heat), overlay=str(over), array=str(array))
        if self.figures is None:
            return files, panel
        path = self.path / f"{name}.figure.{self.figures}"
        title, below_title = _titles(one)
        line = "line: half of the mass" if contour else ""
        ends = "; ".join(filter(None, (ends, line, said)))
        made = figure(drawn, title, below_title, bar, ends, self.figures)
        write_whole(path, lambda stream: stream.write(made))
        return files.model_copy(update={"figure": str(path)}), panel

    def _stem(self, picture: Picture) -> str:
        if picture.path not in self.stems:
            file, frame = split_frame(picture.path)
            base = stem = Path(file).stem + ("" if frame is None else f"-{frame}")
            number = 2
            while stem in self.stems.values():
                stem, number = f"{base}-{number}", number + 1
            self.stems[picture.path] = stem
        return self.stems[picture.path]


def _smoothed(one: Map, values: Floats) -> tuple[Floats, str]:
    """The map as it is drawn, and what was done to it.

    Signed values of single pixels alternate too finely to be seen: a Gaussian of a hundredth of the
    edge shows where they add up.
    """
    if one.method.family != "gradient" or one.method.sign != "signed":
        return values, ""
    sigma = min(values.shape) / 100
    if sigma < _LEAST_SIGMA or not np.isfinite(values).all():
        return values, ""
    found: Floats = gaussian_blur(torch.from_numpy(values), sigma).numpy()
    return found, f"smoothed by {sigma:.1f} px"


def _titles(one: Map) -> tuple[str, str]:
    """The class and its probability; the method and its layer."""
    target = one.target
    named = target.what if target.aim else target.label or f"class {target.index}"
    if target.versus is not None:
        named += f" rather than {target.versus_label or target.versus}"
    at = f" at {one.found.layer}" if one.found.layer else ""
    return (
        escaped(f"{named}, {target.strength}", 90),
        escaped(f"{one.method.name}{at}", 110),
    )


def _canvas(pixels: Pixels) -> Pixels:
    """The picture at a size to draw on.

    A hundred megapixels would take gigabytes, and a line among 28 x 28 pixels would hide them.
    """
    height, width = pixels.shape[:2]
    factor = (_MOST_PIXELS / (height * width)) ** 0.5
    if factor < 1:
        size = (max(1, int(width * factor)), max(1, int(height * factor)))
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
    times = -(-_LEAST_EDGE // max(height, width))
    return pixels.repeat(times, 0).repeat(times, 1)


def _class(one: Map) -> str:
    """The target in a file's name."""
    target = one.target
    aim = "" if target.aim is None else re.sub(r"[^\w.+-]+", "-", target.aim).strip("-")
    named = (
        f"{aim}.{target.index}" if aim and target.what != target.aim else aim or f"{target.index}"
    )
    return named if target.versus is None else f"{named}-vs-{target.versus}"


def _about(picture: Picture, one: Map) -> dict[str, str]:
    title = f"{one.method.name}: {one.target.named}"
    facts = {"image": picture.path, "image_sha256": picture.sha256, "layer": one.found.layer}
    return {"Title": title, "Software": f"gradscope {__version__}", "Comment": json.dumps(facts)}


def _numbers(known: Diagnostics) -> str:
    if known.insertion_auc is not None:
        return f"insertion {known.insertion_auc:.2f}, deletion {known.deletion_auc:.2f}"
    if known.relative_delta is not None:
        return f"completeness within {known.relative_delta:.1%}"
    return ""
