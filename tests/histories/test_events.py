"""Event files as TensorBoard's writers make them, and as folders of runs hold them."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradscope.containers.crc import crc32c
from gradscope.errors import InputError, UsageError
from gradscope.histories.history import History
from gradscope.histories.open import open_history

from .files import double, event, message, tfrecords, varint


def run(folder: Path, *events: bytes, number: int = 1) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"events.out.tfevents.{number}.host").write_bytes(tfrecords(list(events)))
    return folder


def tensor_event(step: int, tag: str, values: np.ndarray) -> bytes:
    """As TensorFlow 2 writes them: a TensorProto with a dtype, its bytes in ``content``."""
    code = {"float32": 1, "float64": 2, "int64": 9}[values.dtype.name]
    tensor = varint(1 << 3) + varint(code) + message(4, values.tobytes())
    summary = message(1, message(1, tag.encode()) + message(8, tensor))
    return varint(2 << 3) + varint(step) + message(5, summary)


def test_one_series_in_two_folders_is_of_two_runs_and_they_are_named(tmp_path: Path) -> None:
    run(tmp_path / "first", event(1, "grad/a", 1.0))
    run(tmp_path / "second", event(1, "grad/a", 9.0), number=2)

    with pytest.raises(UsageError, match="several runs: 'a' is in 'first' and in 'second'"):
        open_history(str(tmp_path))
    assert open_history(str(tmp_path / "second")).l2.tolist() == [[9.0]]


def test_a_loss_of_validation_in_its_own_folder_is_not_the_loss(tmp_path: Path) -> None:
    run(tmp_path, event(1, "grad/a", 1.0))
    run(tmp_path / "loss_train", event(1, "loss", 1.0))
    run(tmp_path / "loss_val", event(1, "loss", 5.0))

    history = open_history(str(tmp_path))

    assert history.loss is None
    assert any("several folders" in note for note in history.notes)


def test_tags_beside_gradients_are_no_layers(tmp_path: Path) -> None:
    tags = ["grad/a", "optim/grad_clip", "grad_scale", "gradient_penalty", "val/loss", "grad/a.max"]

    history = open_history(
        str(run(tmp_path, *(event(1, tag, 2.0) for tag in tags), event(1, "train/grad_norm", 3.0)))
    )

    assert [layer.name for layer in history.layers] == ["a"]
    assert history.loss is None
    assert history.total_l2 is not None
    assert history.total_l2.tolist() == [3.0]


def test_a_damaged_file_among_others_is_reported_and_the_rest_read(tmp_path: Path) -> None:
    run(tmp_path, *(event(t, "grad/a", 1.0) for t in range(5)))
    run(tmp_path, *(event(t, "grad/a", 2.0) for t in range(5, 9)), number=2)
    bad = tmp_path / "events.out.tfevents.2.host"
    data = bytearray(bad.read_bytes())
    data[20] ^= 255
    bad.write_bytes(data)

    history = open_history(str(tmp_path))

    assert history.steps.tolist() == list(range(5))
    assert history.failures[0].kind == "malformed"
    assert "tfevents.2" in history.failures[0].message


def test_scalars_of_tensorflow_2_are_read_by_their_dtype(tmp_path: Path) -> None:
    tensors = [np.array(1.5, np.float32), np.array(2.5), np.array(7, np.int64)]

    history = open_history(
        str(run(tmp_path, *(tensor_event(t, "grad/a", v) for t, v in enumerate(tensors))))
    )

    assert history.l2[:, 0].tolist() == [1.5, 2.5]


def test_histograms_of_tensorflow_2_give_a_norm_that_is_said_to_be_approximate(
    tmp_path: Path,
) -> None:
    values = np.random.default_rng(1).normal(size=5000)
    counts, edges = np.histogram(values, 60)
    bins = np.stack([edges[:-1], edges[1:], counts], axis=1)

    history = open_history(str(run(tmp_path, tensor_event(3, "fc.weight/grad", bins))))

    assert history.l2[0, 0] == pytest.approx(np.linalg.norm(values), rel=0.01)
    assert history.layers[0].numel == 5000
    assert history.approximate == {"l2": "from histogram bins"}


def test_a_histogram_of_no_elements_is_a_gradient_of_none(tmp_path: Path) -> None:
    bins = np.array([[-1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])

    history = open_history(str(run(tmp_path, tensor_event(3, "fc.weight/grad", bins))))

    assert (history.l2[0, 0], history.layers[0].numel) == (0.0, 0)
    assert history.max_abs is not None
    assert history.max_abs[0, 0] == 0.0


def test_the_rates_of_all_groups_are_columns(tmp_path: Path) -> None:
    rates = [event(1, f"lr-Adam/pg{group}", 0.5 / group) for group in (1, 2)]

    history = open_history(str(run(tmp_path, event(1, "grad/a", 1.0), *rates)))

    assert history.lr is not None
    assert history.lr.tolist() == [[0.5, 0.25]]


def test_the_parts_of_an_event_that_are_not_a_summary_are_passed_over(tmp_path: Path) -> None:
    """Every writer begins with the version; graphs and logged text are bytes too."""
    version = double(1, 1.7e9) + message(3, b"brain.Event:2")
    graph = varint(2 << 3) + varint(7) + message(4, b"\x0a\x03abc")

    history = open_history(str(run(tmp_path, version, graph, event(1, "grad/a", 2.0))))

    assert (history.steps.tolist(), history.l2.tolist()) == ([1], [[2.0]])


def test_a_step_below_zero_is_the_twos_complement_that_protobuf_writes(tmp_path: Path) -> None:
    steps = [-(2**63), -1, 0, 2**63 - 1]

    history = open_history(
        str(run(tmp_path, *(event(step % 2**64, "grad/a", 1.0) for step in steps)))
    )

    assert history.steps.tolist() == steps


@given(body=st.binary(max_size=60), wrapped=st.integers(0, 3))
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_message_is_a_history_or_an_error_a_person_can_read(
    body: bytes, wrapped: int, tmp_path: Path
) -> None:
    """With right checksums, so that the bytes reach the readers of Event, Summary, tensors."""
    for number in (8, 1, 5)[3 - wrapped :]:
        tag = message(1, b"grad/a") if number == 1 else b""
        body = message(number, tag + body if wrapped else body)
    (tmp_path / "events.out.tfevents.1").write_bytes(
        tfrecords([event(0, "grad/a", 1.0), varint(2 << 3) + varint(4) + body])
    )

    with suppress(InputError, UsageError):
        assert isinstance(open_history(str(tmp_path)), History)


def test_torchs_own_writer_is_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    values = np.random.default_rng(2).normal(size=(30, 40))
    with SummaryWriter(tmp_path) as writer:
        for step in range(3):
            writer.add_histogram("fc.weight.grad", values * 10.0**step, step)
            writer.add_scalar("train/loss", 1.0 / (step + 1), step)

    history = open_history(str(tmp_path))

    want = np.linalg.norm(values) * np.array([1, 10, 100])
    np.testing.assert_allclose(history.l2[:, 0], want, rtol=1e-12)
    assert history.layers[0].numel == 1200
    assert history.loss is not None


def test_a_length_that_lies_is_no_reason_to_read_gigabytes(tmp_path: Path) -> None:
    head = struct.pack("<Q", 1 << 40)
    good = tfrecords([event(0, "grad/a", 1.0)])
    (tmp_path / "events.out.tfevents.1").write_bytes(
        good + head + struct.pack("<I", _masked(head)) + bytes(100)
    )

    history = open_history(str(tmp_path))

    assert history.shape == (1, 1)
    assert any("ends inside a record" in note for note in history.notes)


def _masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
