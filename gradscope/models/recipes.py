"""Which preprocessing a loaded model gets: what is asked for, what is written down, or a guess.

Its size must be the model's. Where the two were specified apart and differ, what the weights were
built for is what the model can see; whoever asks for another size is told whether it takes it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gradscope.errors import UsageError
from gradscope.models import processors, published
from gradscope.models.load import Loaded
from gradscope.models.model import Model
from gradscope.models.own_steps import own_steps
from gradscope.models.preprocessing import IMAGENET, Preprocessing, fitted, resized
from gradscope.models.sizes import Size, built_size, image_size, refusal

#: Steps, and notes on what they were chosen against.
Chosen = tuple[Preprocessing, tuple[str, ...]]


def recipe(loaded: Loaded, given: str | Preprocessing | None) -> Chosen:
    """The preprocessing for a model, and notes where two sources of its size differ.

    Raises UsageError for what is asked for and does not suit the model, and InputError for a file
    that cannot be right.
    """
    asked = processors.parse(given) if isinstance(given, str) else given
    found, notes = _recipe(loaded, asked)
    return _with_channels(loaded.model, found), notes


def _recipe(loaded: Loaded, asked: Preprocessing | None) -> Chosen:
    model = loaded.model
    # The name of a recipe, unlike pairs or a file, asks for no size.
    if asked is not None and asked.source != IMAGENET.source:
        return _asked(model, asked), _twice(model, asked)
    written = asked or _written_down(loaded)
    if written is not None:
        steps, notes = _written(model, written)
        return steps, (*notes, *_twice(model, written))
    return _guessed(model)


def _guessed(model: Model) -> Chosen:
    """ImageNet's steps, less those that the model itself begins with."""
    guess = replace(IMAGENET, source="assumed", assumed=True)
    own = own_steps(model)
    if own is None:
        return fitted(guess, image_size(model)[1:], None), ()
    channels = len(own.mean)
    plain = replace(guess, mean=(0.0,) * channels, std=(1.0,) * channels, rescale=own.white / 255)
    note = f"the model itself {own}: it gets pixels from 0 to {own.white}"
    if own.resizes:
        # Squashed before, its maps lie over the picture as we know it.
        whole = replace(plain, resize=own.squashed, crop=None, source="the model", assumed=False)
        return whole, (note,)
    return fitted(plain, image_size(model)[1:], None), (note,)


def _twice(model: Model, steps: Preprocessing) -> tuple[str, ...]:
    if not any(steps.mean) and set(steps.std) == {1.0}:
        return ()
    own = own_steps(model, steps.channels)
    if own is None:
        return ()
    return (f"the model itself {own}; with the preprocessing of {steps.source} that is done twice",)


def _asked(model: Model, asked: Preprocessing) -> Preprocessing:
    """The steps that a user asked for, of a size that the model takes."""
    own, wanted = built_size(model), _wanted(asked)
    if wanted is None:
        return fitted(asked, image_size(model, asked.channels)[1:], None)
    if own is None and asked.size is not None:
        # The first pass would say as much.
        return asked
    if own is not None and asked.size is None and min(wanted) >= max(own):
        return replace(asked, crop=own)
    if wanted != own and (said := refusal(model, (asked.channels, *wanted))) is not None:
        takes = own or image_size(model, asked.channels)[1:]
        raise UsageError(
            f"--preprocess: the model takes {_shown(takes)}, not {_shown(wanted)} ({said})"
        )
    return asked if asked.size == wanted else replace(asked, crop=wanted)


def _wanted(steps: Preprocessing) -> Size | None:
    """The size that steps are about; the shorter edge alone means a square."""
    edge = steps.resize
    return steps.size or ((edge, edge) if isinstance(edge, int) else None)


def _written(model: Model, written: Preprocessing) -> Chosen:
    """The steps that a file or library has, of the size that the model is built for."""
    own, wanted = built_size(model), _wanted(written)
    if own is None:
        return _freely(model, written, wanted)
    if written.size == own:
        return written, ()
    if wanted is None or written.size is None:
        return fitted(written, own, None), ()
    said = f"{written.source} says {_shown(wanted)}, the model is built for {_shown(own)}"
    of_weights = Path(written.source).name in processors.PROCESSORS
    if of_weights and refusal(model, (written.channels, *wanted)) is None:
        return written, (f"{said}; it takes the former, which is used",)
    return resized(written, own), (f"{said}, which is used",)


def _freely(model: Model, written: Preprocessing, wanted: Size | None) -> Chosen:
    """Steps for a model that is built for no size that is known: theirs, if it takes it."""
    said = None if wanted is None else refusal(model, (written.channels, *wanted))
    if wanted is not None and said is None:
        return written if written.size == wanted else replace(written, crop=wanted), ()
    size = image_size(model, written.channels)[1:]
    if wanted is None:
        return fitted(written, size, None), ()
    note = f"{written.source} says {_shown(wanted)}, which the model refuses ({said}); "
    return resized(written, size), (f"{note}{_shown(size)} is used",)


def _shown(size: Size) -> str:
    return f"{size[0]}×{size[1]}"


def _with_channels(model: Model, found: Preprocessing) -> Preprocessing:
    depth = model.size[0]
    found = fitted(found, (None, None), depth)
    if depth in (None, found.channels):
        return found
    # The first convolution may follow a rearrangement of space into channels.
    if found.size is not None and refusal(model, (found.channels, *found.size)) is None:
        return found
    raise UsageError(
        f"the model takes {depth} channels, the preprocessing makes {found.channels}; --preprocess "
        f"with {depth} means and deviations (image_mean=…,image_std=…) fits it"
    )


def _written_down(loaded: Loaded) -> Preprocessing | None:
    path = Path(loaded.path)
    found = processors.beside(loaded.path) if path.exists() else None
    library, _, call = (loaded.architecture or "").partition(":")
    name = call.partition("(")[0]
    if found is None and library == "timm":
        found = published.of_timm(name, path.name, loaded.sha256)
    found = found or published.of_module(loaded.model.module)
    if found is None and "torchvision" in library:
        return published.of_torchvision(name, path.name, loaded.sha256)
    return found
