"""Where objects are in pictures: COCO and Pascal VOC annotations, and masks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from gradscope.errors import InputError
from gradscope.models.images import Picture, open_image
from gradscope.models.picture_files import find_images
from gradscope.text import quoted

Region = npt.NDArray[np.bool_]
#: Of the border between objects in Pascal VOC's masks.
_VOID = 255


@dataclass(frozen=True, slots=True)
class Object:
    """One object: its name, and the pixels it covers, by the picture's height and width."""

    name: str | None
    covers: Callable[[int, int], Region]


@dataclass(frozen=True, slots=True)
class Annotated:
    """The objects of one picture, by the name and size (width, height) that the file gives it."""

    picture: str
    size: tuple[int, int] | None
    objects: tuple[Object, ...]


@dataclass(frozen=True, slots=True)
class Boxes:
    """Annotations of many pictures."""

    path: str
    pictures: tuple[Annotated, ...]

    def of(self, path: str) -> Annotated | None:
        """The annotations of the picture at ``path``: of equal names the one in equal folders."""
        parts = PurePath(path).parts
        known = [a for a in self.pictures if _same(a.picture, parts[-1])]
        return max(known, key=lambda a: _common(PurePath(a.picture).parts, parts), default=None)

    def names(self) -> frozenset[str]:
        """The names of all objects, in lower case."""
        return frozenset(o.name.casefold() for a in self.pictures for o in a.objects if o.name)


def _same(named: str, name: str) -> bool:
    """Whether a name in the annotations, with a suffix or without, is that of a file."""
    last = PurePath(named).name
    return last == name or (not _suffix(last) and last == PurePath(name).stem)


def _suffix(name: str) -> bool:
    return PurePath(name).suffix.lower() in Image.registered_extensions()


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    pairs = zip(reversed(a), reversed(b), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def read_boxes(path: str) -> Boxes:
    """COCO JSON, Pascal VOC (XML, a folder of it, or as JSON), a mask, or a folder of masks.

    A mask has the name of its picture, whatever the suffix; what is not black is the object (and
    not 255 in a palette, Pascal's border). Raises InputError for anything else.
    """
    place = Path(path)
    if not place.exists():
        raise InputError(path, "missing", "file not found")
    try:
        found = tuple(_read(place))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            path,
            "malformed",
            f"neither COCO nor Pascal VOC ({said}); --boxes takes either, as JSON or XML, or masks",
        ) from None
    if not any(a.objects for a in found):
        raise InputError(path, "malformed", "it annotates no object")
    return Boxes(path, found)


def _read(place: Path) -> Iterator[Annotated]:
    if place.is_dir():
        documents = sorted(place.rglob("*.xml"))
        yield from map(_xml, documents)
        if not documents:
            yield from map(_mask, find_images([str(place)]))
    elif place.suffix.lower() == ".xml":
        yield _xml(place)
    elif place.suffix.lower() == ".json":
        yield from _json(json.loads(place.read_text(encoding="utf-8")))
    else:
        yield _mask(str(place))


# --- COCO -----------------------------------------------------------------------------------------


def _json(document: Any) -> Iterator[Annotated]:
    if isinstance(document, list):
        yield from (_voc(one) for one in document)
    elif "annotations" in document:
        yield from _coco(document)
    else:
        yield _voc(document)


def _coco(document: Mapping[str, Any]) -> Iterator[Annotated]:
    names = {c["id"]: str(c["name"]) for c in document.get("categories", ())}
    of: dict[Any, list[Object]] = {}
    for one in document["annotations"]:
        made = Object(names.get(one.get("category_id")), _of_coco(one))
        of.setdefault(one["image_id"], []).append(made)
    for image in document["images"]:
        size = (int(image["width"]), int(image["height"])) if "width" in image else None
        yield Annotated(str(image["file_name"]), size, tuple(of.get(image["id"], ())))


def _of_coco(one: Mapping[str, Any]) -> Callable[[int, int], Region]:
    if one.get("bbox"):
        left, top, width, height = map(float, one["bbox"])
        return partial(_box, (left, top, left + width, top + height))
    outlines = [[float(v) for v in outline] for outline in one["segmentation"]]
    return partial(_polygons, outlines)


def _box(box: tuple[float, float, float, float], height: int, width: int) -> Region:
    """The pixels whose centres lie in left, top, right, bottom."""
    left, top, right, bottom = box
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    return ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))


def _polygons(outlines: Sequence[Sequence[float]], height: int, width: int) -> Region:
    drawn = Image.new("1", (width, height))
    for outline in outlines:
        ImageDraw.Draw(drawn).polygon([*outline], fill=1)
    return np.asarray(drawn)


# --- Pascal VOC -----------------------------------------------------------------------------------


def _xml(path: Path) -> Annotated:
    text = path.read_text(encoding="utf-8", errors="replace")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("it defines entities, which are not read")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{quoted(path.name)}: {error}") from None
    objects = tuple(
        _pascal(one.findtext("name"), {e.tag: e.text for e in one.find("bndbox") or ()})
        for one in root.iter("object")
    )
    size = {e.tag: e.text for e in root.find("size") or ()}
    return Annotated(root.findtext("filename") or path.stem, _size(size), objects)


def _voc(document: Mapping[str, Any]) -> Annotated:
    inside = document.get("annotation", document)
    objects = inside["object"]
    listed = objects if isinstance(objects, list) else [objects]
    made = tuple(_pascal(one.get("name"), one["bndbox"]) for one in listed)
    return Annotated(str(inside["filename"]), _size(inside.get("size", {})), made)


def _size(size: Mapping[str, Any]) -> tuple[int, int] | None:
    """Pascal's files sometimes say 0 for what is not known."""
    found = (int(size.get("width") or 0), int(size.get("height") or 0))
    return found if all(found) else None


def _pascal(name: str | None, box: Mapping[str, Any]) -> Object:
    """Pascal counts pixels from 1, the last included."""
    left, top, right, bottom = (float(box[k]) for k in ("xmin", "ymin", "xmax", "ymax"))
    return Object(name, partial(_box, (left - 1, top - 1, right, bottom)))


# --- masks ----------------------------------------------------------------------------------------


def _mask(path: str) -> Annotated:
    with Image.open(path) as image:
        size = image.size
    return Annotated(Path(path).stem, size, (Object(None, lambda _h, _w: _covered(path)),))


def _covered(path: str) -> Region:
    with Image.open(path) as image:
        if image.mode == "P":
            indices = np.asarray(image)
            drawn: Region = (indices > 0) & (indices != _VOID)
            return drawn
    found: Region = np.any(open_image(path).rgb(), axis=2)
    return found


def region_of(objects: Sequence[Object], picture: Picture) -> Region:
    """The pixels of a picture [H, W] that any of the objects covers."""
    covered = [o.covers(picture.height, picture.width) for o in objects]
    found: Region = np.logical_or.reduce(covered)
    return found
