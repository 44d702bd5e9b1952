"""Whatever happens to the recorder, training goes on, and what was written stays."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradscope import GradientRecorder
from gradscope.errors import UsageError
from gradscope.histories import format as history_format
from gradscope.histories.open import open_history
from gradscope.recording import rows, shards, sight, spool

from .training import mlp


def train(recorder: GradientRecorder, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).sum()
        loss.backward()
        recorder.capture(step, loss=loss)
        optimizer.step()


def finish(recorder: GradientRecorder, model: Any, optimizer: Any, steps: range) -> None:
    train(recorder, model, optimizer, steps)
    recorder.close()


def begun(folder: Path, **options: Any) -> tuple[GradientRecorder, Any, Any]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    return GradientRecorder(model, optimizer, folder, every=1, **options), model, optimizer


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_stops_the_recording_once_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, model, optimizer = begun(tmp_path / "a", capacity=4)
    train(recorder, model, optimizer, range(9))
    monkeypatch.setattr(history_format, "_write_zip", full)
    before = model[0].weight.detach().clone()

    with pytest.warns(RuntimeWarning, match=r"stopped \(OSError.*No space left.*2 shards") as said:
        finish(recorder, model, optimizer, range(9, 40))

    assert len(said) == 1
    assert not torch.equal(model[0].weight, before)
    assert open_history(str(tmp_path / "a")).steps.tolist() == list(range(8))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["00000.npz", "00001.npz"]


@pytest.mark.skipif(os.getuid() == 0, reason="root writes anywhere")
def test_a_folder_that_turns_read_only_stops_the_recording(tmp_path: Path) -> None:
    recorder, model, optimizer = begun(tmp_path / "a", capacity=4)
    (tmp_path / "a").chmod(0o500)

    with pytest.warns(RuntimeWarning, match="nothing can be read"):
        train(recorder, model, optimizer, range(12))


def test_a_folder_that_is_gone_stops_the_recording(tmp_path: Path) -> None:
    recorder, model, optimizer = begun(tmp_path / "a", capacity=4)
    (tmp_path / "a").rmdir()

    with pytest.warns(RuntimeWarning, match="FileNotFoundError"):
        train(recorder, model, optimizer, range(12))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("out of memory"), KeyError("x")])
@pytest.mark.parametrize("where", ["take", "same", "arrays"])
def test_a_failure_of_the_measurement_leaves_what_came_before(
    where: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, model, optimizer = begun(tmp_path / "a")
    train(recorder, model, optimizer, range(7))

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(rows.Rows, where, fails)
    with pytest.warns(RuntimeWarning, match=f"stopped .{type(error).__name__}") as said:
        finish(recorder, model, optimizer, range(7, 30))

    assert len(said) == 1
    wanted = 4 if where == "arrays" else 7
    assert open_history(str(tmp_path / "a")).steps.tolist() == list(range(wanted))


def test_a_failure_after_the_step_or_in_the_forward_hook_stops_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, (module, name) in enumerate([(sight, "topology"), (spool, "drained")]):
        recorder, model, optimizer = begun(tmp_path / str(i))
        with monkeypatch.context() as patch:
            patch.setattr(module, name, None)
            with pytest.warns(RuntimeWarning, match="TypeError"):
                finish(recorder, model, optimizer, range(12))
        assert not model._forward_hooks
        assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("what", ["loss", "loss_scale", "clip_coefficient", "max_norm"])
@pytest.mark.parametrize("value", ["low", (1.0, 2.0), {"loss": 1.0}, torch.tensor(1j)])
def test_what_is_no_number_is_left_out_and_said_once(
    what: str, value: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    recorder, model, optimizer = begun(tmp_path / "a")
    train(recorder, model, optimizer, range(3))
    for step in (3, 4):
        recorder.capture(step, **{what: value})
        optimizer.step()
    recorder.close()

    history = open_history(str(tmp_path / "a"))

    assert history.steps.tolist() == [0, 1, 2, 3, 4]
    assert np.isfinite(history.l2).all()
    (said,) = [str(w.message) for w in recwarn]
    assert "is not recorded: capture() takes a number" in said


def test_what_the_caller_asks_wrongly_is_said_at_once(tmp_path: Path) -> None:
    model = mlp()
    with pytest.raises(ValueError, match="at least 1"):
        GradientRecorder(model, None, tmp_path / "a", every=0)
    with pytest.raises(UsageError, match="not an optimizer"):
        GradientRecorder(model, model, tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        GradientRecorder(model, None, tmp_path / "file" / "a")


# --- shards ---------------------------------------------------------------------------------------


def test_two_recorders_in_one_folder_write_over_nothing_and_the_later_is_read(
    tmp_path: Path,
) -> None:
    first, model, optimizer = begun(tmp_path / "a")
    second, other, others = begun(tmp_path / "a")  # the cell was run again
    train(first, model, optimizer, range(10))
    train(second, other, others, range(20))
    second.close()
    first.close()  # a late one, as of an object that is collected

    history = open_history(str(tmp_path / "a"))

    assert len(list((tmp_path / "a").iterdir())) == 4
    assert history.steps.tolist() == list(range(20))
    assert history.meta["run_id"] == second._facts["run_id"]
    assert any("restarts at 0" in note for note in history.notes)


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_taken_in_between_is_not_taken_again(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: full())
    recorder, model, optimizer = begun(tmp_path / "a", capacity=4)
    (tmp_path / "a" / "00000.npz").write_text("another's")
    train(recorder, model, optimizer, range(8))
    recorder.close()

    assert (tmp_path / "a" / "00000.npz").read_text() == "another's"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "00000.npz", "00001.npz", "00002.npz",
    ]  # fmt: skip


def test_the_first_shard_is_early_and_later_ones_come_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, model, optimizer = begun(tmp_path / "a")
    train(recorder, model, optimizer, range(5))
    assert open_history(str(tmp_path / "a")).steps.tolist() == [0, 1, 2, 3]

    monkeypatch.setattr(spool, "SECONDS", 0.0)
    train(recorder, model, optimizer, range(5, 7))
    assert open_history(str(tmp_path / "a")).steps.tolist() == list(range(6))
    recorder.close()


def test_a_recorder_that_nobody_holds_any_more_writes_what_it_has(tmp_path: Path) -> None:
    recorder, model, optimizer = begun(tmp_path / "a")
    train(recorder, model, optimizer, range(3))
    del recorder

    assert open_history(str(tmp_path / "a")).steps.tolist() == [0, 1, 2]


# --- the end --------------------------------------------------------------------------------------

RUN = """
    import os, signal, sys, time, torch
    from gradscope import GradientRecorder
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    {before}
    recorder = GradientRecorder(model, optimizer, sys.argv[1], every=10)
    for step in range(300):
        optimizer.zero_grad(); model(torch.ones(1, 3)).sum().backward()
        recorder.capture(step); optimizer.step()
    print("ready", flush=True)
    time.sleep(60)
    {after}
"""


def killed(
    folder: Path, number: int, before: str = "", after: str = "", code: str = RUN
) -> tuple[int, str]:
    code = textwrap.dedent(code).format(before=before, after=after)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    return process.returncode, said


def test_a_run_that_is_terminated_leaves_every_record_and_ends_as_it_would_have(
    tmp_path: Path,
) -> None:
    code, _ = killed(tmp_path / "a", signal.SIGTERM)

    assert code == -signal.SIGTERM
    assert len(open_history(str(tmp_path / "a")).steps) == 60


def test_a_run_that_is_killed_leaves_what_was_written(tmp_path: Path) -> None:
    killed(tmp_path / "a", signal.SIGKILL)

    history = open_history(str(tmp_path / "a"))

    assert len(history.steps) >= 20
    assert history.failures == ()


def test_whoever_handled_the_signal_before_still_does(tmp_path: Path) -> None:
    handler = "signal.signal(signal.SIGTERM, lambda *_: (print('mine', flush=True), os._exit(7)))"

    code, said = killed(tmp_path / "a", signal.SIGTERM, before=handler)

    assert (code, said) == (7, "mine\n")
    assert len(open_history(str(tmp_path / "a")).steps) == 60


def test_a_forked_child_writes_nothing_of_its_parents(tmp_path: Path) -> None:
    fork = "pid = os.fork()\n    if pid == 0: sys.exit(0)\n    os.waitpid(pid, 0)"
    code = textwrap.dedent(RUN).replace("time.sleep(60)", textwrap.dedent(fork))
    code = (
        code.format(before="", after="os._exit(0)")
        .replace("\n    if", "\nif")
        .replace("\n    os.waitpid", "\nos.waitpid")
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True)

    assert len(open_history(str(tmp_path / "a")).steps) < 60


def test_the_handler_is_there_while_a_recorder_is_open_and_then_no_more(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    first, _, _ = begun(tmp_path / "a")
    second, _, _ = begun(tmp_path / "b")
    ours = signal.getsignal(signal.SIGTERM)
    first.close()
    still = signal.getsignal(signal.SIGTERM)
    second.close()

    assert ours is still is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_recorder_of_another_thread_leaves_the_signals_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[Any] = []

    def work() -> None:
        recorder, model, optimizer = begun(tmp_path / "a")
        found.append(signal.getsignal(signal.SIGTERM))
        train(recorder, model, optimizer, range(3))
        recorder.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert found == [before]
    assert open_history(str(tmp_path / "a")).steps.tolist() == [0, 1, 2]


def test_a_signal_while_a_shard_is_written_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        recorder, model, optimizer = begun(tmp_path / "a")
        write = shards.save

        def interrupted(*given: Any) -> int:
            monkeypatch.setattr(spool, "save", write)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert came == []
            return write(*given)

        monkeypatch.setattr(spool, "save", interrupted)
        train(recorder, model, optimizer, range(5))
        assert came == [signal.SIGTERM]
        assert open_history(str(tmp_path / "a")).steps.tolist() == list(range(5))
        recorder.close()
    finally:
        signal.signal(signal.SIGTERM, before)


# --- other people's objects -----------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [True, False])
def test_a_failure_in_a_step_leaves_the_optimizers_other_hooks_alone(
    earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch walks through the hooks while ours fails: none may go meanwhile."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    calls: list[int] = []
    if earlier:
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
    recorder = GradientRecorder(model, optimizer, tmp_path / "a", every=1)
    if not earlier:
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(spool.Spool, "add", full)

    with pytest.warns(RuntimeWarning, match="No space left"):
        train(recorder, model, optimizer, range(5))

    assert len(calls) == 5
    recorder.close()
    assert len(optimizer._optimizer_step_post_hooks) == 1
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_model_that_is_recorded_is_a_model_of_its_own(
    copied: Any, trained: int, tmp_path: Path
) -> None:
    recorder, model, optimizer = begun(tmp_path / "a")
    train(recorder, model, optimizer, range(trained))

    other = copied(model)
    other(torch.ones(2, 6)).sum().backward()  # an average of the weights, say
    train(recorder, model, optimizer, range(trained, 6))
    recorder.close()

    history = open_history(str(tmp_path / "a"))
    assert history.steps.tolist() == list(range(6))
    assert history.topology == "recorded"
    assert len(history.edges) == 4


def test_a_pickled_model_needs_no_gradscope(tmp_path: Path) -> None:
    _, model, _ = begun(tmp_path / "a")

    assert b"gradscope" not in pickle.dumps(torch.nn.Sequential(*model)) + pickle.dumps(model)


FORK = """
    import gc, os, sys, torch
    from gradscope import GradientRecorder
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    recorder = GradientRecorder(model, optimizer, sys.argv[1], every=1)
    def train(steps):
        for step in steps:
            optimizer.zero_grad(); model(torch.ones(1, 3)).sum().backward()
            recorder.capture(step); optimizer.step()
    train(range(7))
    if (pid := os.fork()) == 0:
        {child}
        os._exit(0)
    os.waitpid(pid, 0)
    train(range(7, 9))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize(
    "child", ["del recorder; gc.collect()", "recorder.close()", "sys.exit(0)", "recorder.flush()"]
)
def test_a_forked_child_has_no_record_of_its_parents(child: str, tmp_path: Path) -> None:
    code = textwrap.dedent(FORK).format(child=child)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        check=True,
        capture_output=True,
        text=True,
    )

    history = open_history(str(tmp_path / "a"))

    assert history.steps.tolist() == list(range(9))
    assert len(list((tmp_path / "a").iterdir())) == 2
    assert "gradient recording stopped" not in done.stderr


@pytest.mark.parametrize(
    ("number", "handler", "records"),
    [
        (signal.SIGTERM, "sys.exit(3)", 60),  # which ends in our atexit
        (signal.SIGTERM, "os._exit(3)", 36),  # which nobody sees
        (signal.SIGINT, "sys.exit(3)", 60),
    ],
)
def test_a_handler_that_comes_later_is_the_programs_own(
    number: signal.Signals, handler: str, records: int, tmp_path: Path
) -> None:
    later = f"signal.signal({int(number)}, lambda *_: {handler})\n    for step in range(300)"
    code = RUN.replace("for step in range(300)", later)

    returned, _ = killed(tmp_path / "a", number, code=code)

    history = open_history(str(tmp_path / "a"))
    assert returned == 3
    assert (len(history.steps), history.failures) == (records, ())


def test_an_interrupt_leaves_every_record(tmp_path: Path) -> None:
    killed(tmp_path / "a", signal.SIGINT)

    assert len(open_history(str(tmp_path / "a")).steps) == 60


@pytest.mark.parametrize("where", ["drained", "save"])
def test_an_interrupt_while_a_shard_is_made_loses_no_record(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, whose next cell goes on with the recorder."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    recorder, model, optimizer = begun(tmp_path / "a", capacity=4)
    with monkeypatch.context() as patch:
        patch.setattr(spool, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recorder, model, optimizer, range(20))
    train(recorder, model, optimizer, range(5, 9))
    recorder.close()

    assert open_history(str(tmp_path / "a")).steps.tolist() == [0, 1, 2, 3, *range(5, 9)]


@pytest.mark.parametrize("managed", [True, False])
def test_an_exception_of_the_training_passes_and_leaves_what_led_to_it(
    managed: bool, tmp_path: Path
) -> None:
    def loop() -> None:
        recorder, model, optimizer = begun(tmp_path / "a")
        with recorder if managed else nullcontext():
            train(recorder, model, optimizer, range(7))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    gc.collect()

    assert open_history(str(tmp_path / "a")).steps.tolist() == list(range(7))


@pytest.mark.parametrize(
    "target", ["tempfile.mkstemp", "os.fsync", "os.chmod", "gradscope.histories.format._claimed"]
)
def test_a_write_that_fails_anywhere_leaves_whole_shards_and_nothing_else(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, model, optimizer = begun(tmp_path / "a", capacity=4)
    train(recorder, model, optimizer, range(6))
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.warns(RuntimeWarning, match=r"No space left.*the 1 shard written can be read"):
            finish(recorder, model, optimizer, range(6, 20))

    assert [p.name for p in (tmp_path / "a").iterdir()] == ["00000.npz"]
    assert open_history(str(tmp_path / "a")).steps.tolist() == [0, 1, 2, 3]


def test_without_links_a_name_is_given_back_when_its_shard_cannot_be_moved_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, model, optimizer = begun(tmp_path / "a", capacity=4)
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(os, "replace", full)

    with pytest.warns(RuntimeWarning, match="No space left"):
        train(recorder, model, optimizer, range(8))

    assert list((tmp_path / "a").iterdir()) == []


def test_a_folder_that_is_deleted_on_the_way_stops_the_recording(tmp_path: Path) -> None:
    recorder, model, optimizer = begun(tmp_path / "a", capacity=4)
    train(recorder, model, optimizer, range(6))
    shutil.rmtree(tmp_path / "a")
    before = model[0].weight.detach().clone()

    with pytest.warns(RuntimeWarning, match="FileNotFoundError") as said:
        finish(recorder, model, optimizer, range(6, 20))

    assert len(said) == 1
    assert not torch.equal(model[0].weight, before)


def test_two_processes_in_one_folder_write_over_nothing(tmp_path: Path) -> None:
    code = textwrap.dedent(RUN).format(before="", after="").replace("time.sleep(60)", "")
    code = code.replace("every=10", "every=1, capacity=8")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "a")],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [run.communicate(timeout=120)[1] for run in runs]

    # Whoever comes when the other has begun to write is told so.
    done = [run for run, words in zip(runs, said, strict=True) if "already holds" not in words]
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert all(run.returncode == 0 for run in done)
    assert names == [f"{i:05d}.npz" for i in range(38 * len(done))]
    assert open_history(str(tmp_path / "a")).failures == ()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_workers_of_a_data_loader_leave_the_recording_alone(tmp_path: Path) -> None:
    recorder, model, optimizer = begun(tmp_path / "a")
    data: Any = torch.utils.data.DataLoader(
        torch.ones(8, 6), batch_size=2, num_workers=2, multiprocessing_context="fork"
    )
    for epoch in range(2):
        for step, batch in enumerate(data, 4 * epoch):
            optimizer.zero_grad()
            model(batch).sum().backward()
            recorder.capture(step)
            optimizer.step()
    recorder.close()

    history = open_history(str(tmp_path / "a"))

    assert history.steps.tolist() == list(range(8))
    assert len(list((tmp_path / "a").iterdir())) == 2
