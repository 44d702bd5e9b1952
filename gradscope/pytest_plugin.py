"""The pytest plugin: the fixture ``gradient_recorder``. It imports nothing until it is used."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    from gradscope.recording.optimizers import Given
    from gradscope.recording.recorder import GradientRecorder


class Recordings:
    """The runs that a test records, each in a folder of its own; what ``gradient_recorder`` is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: list[tuple[GradientRecorder, Callable[[], None]]] = []

    def __call__(
        self,
        model: torch.nn.Module,
        optimizer: Given | None = None,
        *,
        every: int = 1,
        select: Sequence[str] = (),
        ignore: Sequence[str] = (),
        fail_on: str | None = None,
        **options: Any,
    ) -> GradientRecorder:
        """A ``gradscope.GradientRecorder`` that begins now; ``options`` are its own.

        Once the test has passed, the run is judged as by ``assert_healthy`` with ``select``,
        ``ignore`` and ``fail_on``.
        """
        from gradscope.recording.recorder import GradientRecorder

        folder = self._folder / f"gradients-{len(self._runs)}"
        recorder = GradientRecorder(model, optimizer, folder, every=every, **options)
        judge = partial(_judge, folder, select=select, ignore=ignore, fail_on=fail_on)
        self._runs.append((recorder, judge))
        return recorder

    def close(self) -> None:
        """Write what is left and let go of the models."""
        for recorder, _ in self._runs:
            recorder.close()

    def judge(self) -> None:
        """Fail the test for a run that is not healthy, and for one that was not recorded."""
        if not self._runs:
            pytest.fail("gradient_recorder(model, optimizer) was never called", pytrace=False)
        for _, judge in self._runs:
            judge()


def _judge(folder: Path, **chosen: Any) -> None:
    from gradscope.flow.analysis import analyze_flow
    from gradscope.testing import assert_healthy

    if not any(folder.glob("*.npz")):
        pytest.fail(
            "no step was recorded: neither capture() nor an optimizer's step() was called",
            pytrace=False,
        )
    try:
        assert_healthy(analyze_flow(folder), **chosen)
    except AssertionError as error:
        pytest.fail(str(error), pytrace=False)


_RECORDINGS = pytest.StashKey[Recordings]()


@pytest.fixture
def gradient_recorder(request: pytest.FixtureRequest, tmp_path: Path) -> Recordings:
    """Record a test's training: ``gradient_recorder(model, optimizer)``, before its first step.

    The test fails on findings of ``gradscope flow`` at or above high (``fail_on``), and where
    nothing was recorded.
    """
    recordings = Recordings(tmp_path)
    request.node.stash[_RECORDINGS] = recordings
    return recordings


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Judge within the call, so that a run that is not healthy is a failure and not an error."""
    __tracebackhide__ = True
    recordings = item.stash.get(_RECORDINGS, None)
    try:
        result = yield
    finally:
        if recordings is not None:
            recordings.close()
    if recordings is not None:
        recordings.judge()
    return result
