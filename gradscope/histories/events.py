"""TensorBoard event files: which tags are about gradients, and the history that they make."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gradscope.checkpoints.tensors import Failure
from gradscope.containers.beginning import Beginning
from gradscope.errors import InputError, UsageError
from gradscope.histories.history import History, Layer, Status
from gradscope.histories.names import (
    ONLY_LOSS,
    ONLY_TOTAL,
    Role,
    clean,
    gradient_of,
    guessed_kind,
    likeliest,
    role_of,
)
from gradscope.histories.steps import carried, chosen_records
from gradscope.histories.tfrecords import Histogram, is_events, logged_values
from gradscope.text import quoted


def event_files(folder: str) -> list[str]:
    """The event files below a folder, in the order they were begun (their names carry the time)."""
    found = [
        os.path.join(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if "tfevents" in name
    ]
    return sorted(found, key=lambda path: (_began(path), path))


def _began(path: str) -> float:
    match = re.search(r"tfevents\.(\d+)", path)
    return float(match[1]) if match else 0.0


def recognises(file: Beginning) -> bool:
    """A TFRecord that holds an Event."""
    return is_events(file.start)


def read_event_file(path: str) -> History:
    """A history from one event file, as ``read_events``."""
    return read_events(path, [path])


def read_events(path: str, files: Sequence[str]) -> History:
    """The history in event files; where several have a step, the later file's value stays.

    A last record that was not written to its end is left out, with a note; a damaged file among
    others costs what follows the damage. Raises InputError when nothing in them is about
    gradients, UsageError when a folder holds several runs.
    """
    found, failures = _Logged(), []
    for file in files:
        try:
            for step, tag, value in logged_values(file, found.notes):
                found.add(os.path.dirname(file), step, tag, value)
        except InputError as error:
            if len(files) == 1:
                raise
            failures.append(error)
    if failures and not (found.norms or found.line("total").values):
        raise failures[0]
    found.refuse_several_runs(path)
    return found.history(path, files, failures)


@dataclass(slots=True)
class _Tag:
    """The values of one tag by step, the folders that they are from, and what histograms add."""

    values: dict[int, float] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    tops: dict[int, float] = field(default_factory=dict)
    numel: int | None = None

    def add(self, folder: str, step: int, value: float) -> None:
        self.values[step] = value
        self.folders.add(folder)


@dataclass(slots=True)
class _Logged:
    """What the event files say of gradients, tag by tag."""

    norms: dict[str, _Tag] = field(default_factory=dict)
    whole: dict[Role, dict[str, _Tag]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    binned: bool = False

    def add(self, folder: str, step: int, tag: str, value: float | Histogram) -> None:
        if isinstance(value, Histogram):
            self._add_histogram(folder, step, tag, value)
        elif role := role_of(tag):
            self.whole.setdefault(role, {}).setdefault(tag, _Tag()).add(folder, step, value)
        elif (name := gradient_of(tag)) is not None:
            self.norms.setdefault(name, _Tag()).add(folder, step, value)

    def _add_histogram(self, folder: str, step: int, tag: str, value: Histogram) -> None:
        name = gradient_of(tag)
        if name is not None:
            norms = self.norms.setdefault(name, _Tag())
            norms.add(folder, step, value.l2)
            norms.tops[step], norms.numel = value.max_abs, value.numel
            self.binned |= not value.exact

    def line(self, role: Role) -> _Tag:
        """The values of what has a role, by the plainest name."""
        return likeliest(self.whole.get(role, {}).items()) or _Tag()

    def refuse_several_runs(self, path: str) -> None:
        """Restarts share a folder; one series in two folders is of two runs."""
        losses = self.whole.get("loss", {})
        if any(len(tag.folders) > 1 for tag in losses.values()):
            # add_scalars writes loss_train/ and loss_val/
            losses.clear()
            self.notes.append(
                "the loss is in several folders, not all of training perhaps, and was left out"
            )
        named = ((quoted(name), tag) for name, tag in self.norms.items())
        for called, tag in (*named, ("the total norm", self.line("total"))):
            if len(tag.folders) > 1:
                first, second = sorted(os.path.relpath(f, path) for f in tag.folders)[:2]
                raise UsageError(
                    f"{path} holds several runs: {called} is in {quoted(first)} and in "
                    f"{quoted(second)}; give the folder of one run"
                )

    def history(self, path: str, files: Sequence[str], failures: Sequence[InputError]) -> History:
        steps = self.steps()
        if not len(steps):
            message = "has no tag of a gradient norm, such as grad/NAME or NAME/grad_norm"
            raise InputError(path, "malformed", message)
        skipped = _line(self.line("skipped"), steps)
        place = {int(step): i for i, step in enumerate(steps)}
        l2, status = _table([tag.values for tag in self.norms.values()], place)
        tops = [tag.tops for tag in self.norms.values()]
        if len(low := np.argwhere(l2 < 0)):
            t, row = low[0]
            name = quoted(list(self.norms)[row])
            message = f"the norm of {name} at step {steps[t]} is {l2[t, row]}, below zero"
            raise InputError(path, "malformed", message)
        return History(
            path=path,
            format="tensorboard",
            nbytes=sum(os.path.getsize(file) for file in files),
            steps=steps,
            layers=tuple(Layer(clean(n), guessed_kind(n), s.numel) for n, s in self.norms.items()),
            l2=l2,
            status=status,
            max_abs=_table(tops, place)[0] if tops and all(tops) else None,
            loss=_line(self.line("loss"), steps),
            total_l2=_line(self.line("total"), steps),
            loss_scale=_line(self.line("scale"), steps),
            skipped=None if skipped is None else (np.nan_to_num(skipped) > 0).astype(np.uint8),
            lr=self._rates(steps),
            notes=(*self.notes, *self._said()),
            failures=tuple(
                Failure(e.kind, f"{os.path.relpath(e.path, path)}: {e.message}") for e in failures
            ),
            approximate={"l2": "from histogram bins"} if self.binned else {},
        )

    def _said(self) -> Iterator[str]:
        if self.binned:
            yield "norms are computed from the middles of histogram bins and are approximate"
        if not self.norms:
            yield ONLY_TOTAL if self.line("total").values else ONLY_LOSS

    def steps(self) -> NDArray[np.int64]:
        """The steps that have a gradient; where few have, also those of the loss."""
        about = list(self.norms.values()) or [self.line("total")]
        with_norm = {step for tag in about for step in tag.values}
        every = np.array(sorted(with_norm | self.line("loss").values.keys()), np.int64)
        known = np.isin(every, np.fromiter(with_norm, np.int64, len(with_norm)))
        return every[chosen_records(known)]

    def _rates(self, steps: NDArray[np.int64]) -> NDArray[np.float64] | None:
        lines = [_line(tag, steps) for tag in self.whole.get("rate", {}).values()]
        known = [line for line in lines if line is not None]
        return np.stack(known, axis=1) if known else None


def _table(
    found: Sequence[dict[int, float]], place: dict[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    values = np.full((len(place), len(found)), np.nan)
    status = np.full(values.shape, Status.NOT_RECORDED, np.uint8)
    for column, by_step in enumerate(found):
        for step, value in by_step.items():
            values[place[step], column], status[place[step], column] = value, Status.RECORDED
    return values, status


def _line(found: _Tag, steps: NDArray[np.int64]) -> NDArray[np.float64] | None:
    if not found.values:
        return None
    own = sorted(found.values)
    values = np.array([found.values[step] for step in own])
    return carried(np.array(own, np.int64), values, steps)
