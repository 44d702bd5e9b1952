"""Files of plain arrays, in the layouts that people's loops leave behind."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.errors import InputError, UsageError
from gradscope.histories.open import open_history

RNG = np.random.default_rng(3)
STEPS = (10, 20, 30)
GRADIENTS = {
    step: {"0.weight": RNG.normal(size=(4, 5)), "0.bias": RNG.normal(size=4)} for step in STEPS
}
NORMS = [[np.linalg.norm(g) for g in record.values()] for record in GRADIENTS.values()]


def saved(path: Path, what: Any) -> str:
    import torch

    torch.save(what, path / "g.pt")
    return str(path / "g.pt")


def tensors() -> list[dict[str, Any]]:
    import torch

    return [{n: torch.tensor(g) for n, g in record.items()} for record in GRADIENTS.values()]


def by_name(records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [record[name] for record in records] for name in records[0]}


def by_step(records: list[dict[str, Any]], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{step}": record for step, record in zip(STEPS, records, strict=True)}


CONTAINERS = {
    "a list of records": lambda r: r,
    "records by step": lambda r: dict(zip(STEPS, r, strict=True)),
    "records by a name with the step": lambda r: by_step(r, "step_"),
    "a list for each name": by_name,
    "a list inside an entry": lambda r: {"grads": r},
    "a list for each name inside an entry": lambda r: {"grads": by_name(r)},
}  # fmt: skip


@pytest.mark.parametrize("container", CONTAINERS)
def test_torch_files_are_read_by_their_containers_not_by_the_dots_in_names(
    container: str, tmp_path: Path
) -> None:
    history = open_history(saved(tmp_path, CONTAINERS[container](tensors())))

    assert [layer.name for layer in history.layers] == ["0.weight", "0.bias"]
    np.testing.assert_allclose(history.l2, NORMS, rtol=1e-12)
    assert history.steps.tolist() == (list(STEPS) if "step" in container else [0, 1, 2])
    assert [layer.kind for layer in history.layers] == ["matrix", "bias"]


def test_numbers_in_names_are_no_steps(tmp_path: Path) -> None:
    import torch

    stacks = {f"{i}.weight": torch.tensor(RNG.normal(size=(6, 3))) for i in range(2)}

    history = open_history(saved(tmp_path, stacks), as_="vectors")

    assert history.shape == (6, 2)
    assert [layer.name for layer in history.layers] == ["0.weight", "1.weight"]


def test_gradients_kept_without_a_copy_are_said_to_share_memory(tmp_path: Path) -> None:
    import torch

    one = torch.ones(3)

    history = open_history(saved(tmp_path, [{"w": one}, {"w": one}]))

    assert any(".clone()" in note for note in history.notes)


def test_steps_losses_and_rates_beside_gradients_are_taken(tmp_path: Path) -> None:
    path = str(tmp_path / "g.npz")
    stack = np.stack([g["0.weight"] for g in GRADIENTS.values()])
    np.savez(path, w=stack, steps=np.array(STEPS), loss=np.array([3.0, 2, 1]), lr=np.full(3, 0.1))

    history = open_history(path, as_="vectors")

    assert history.steps.tolist() == list(STEPS)
    assert history.loss is not None
    assert history.lr is not None
    assert history.loss.tolist() == [3, 2, 1]
    assert history.lr.shape == (3, 1)
    assert history.layers[0].kind == "matrix"


def test_a_gradient_larger_than_any_buffer_is_read_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "g.npz")
    np.savez(path, **{"0/w": np.ones(5_000_000, np.float32)})

    assert open_history(path).l2[0, 0] == pytest.approx(np.sqrt(5e6), rel=1e-12)


@pytest.mark.parametrize("records", [0, 1, 2])
def test_few_records_are_a_history_too(records: int, tmp_path: Path) -> None:
    path = str(tmp_path / "g.npz")
    np.savez(path, **{"fc.weight": np.ones((records, 4, 5))})

    history = open_history(path, as_="vectors")

    assert history.shape == (records, 1)
    if records:
        assert (history.layers[0].kind, history.layers[0].numel) == ("matrix", 20)


def test_a_number_for_each_step_and_name_is_ambiguous_and_readable_either_way(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "n.npz")
    np.savez(path, **{"5/a": np.float64(3), "6/a": np.float64(4), "6/b": np.float64(-1)})

    with pytest.raises(UsageError, match="--as norms or --as vectors"):
        open_history(path)
    assert open_history(path, as_="vectors").l2[1].tolist() == [4, 1]
    with pytest.raises(InputError, match=r"b is -1\.0 in record 1"):
        open_history(path, as_="norms")


def test_names_that_end_in_numbers_are_norms_when_steps_fit_them(tmp_path: Path) -> None:
    path = str(tmp_path / "n.npz")
    np.savez(path, **{"steps": np.arange(3), "h/0": np.ones(3), "h/1": np.ones(3)})

    assert [layer.name for layer in open_history(path).layers] == ["h/0", "h/1"]


@pytest.mark.parametrize(
    ("steps", "said"),
    [([0.5, 1, 2], "0 is 0.5"), ([0, 1e300, 2], "entry 1"), ([0, 1, np.nan], "2 is nan")],
)
def test_steps_are_whole_numbers(steps: list[float], said: str, tmp_path: Path) -> None:
    path = str(tmp_path / "n.npz")
    np.savez(path, steps=np.array(steps), w=np.ones(3))

    with pytest.raises(InputError, match=said):
        open_history(path)


def test_complex_gradients_are_refused_in_any_layout(tmp_path: Path) -> None:
    path = str(tmp_path / "g.npz")
    np.savez(path, w=np.ones((3, 4)) * 1j)

    with pytest.raises(InputError, match="complex"):
        open_history(path, as_="vectors")


def test_every_statistic_is_that_of_numpy(tmp_path: Path) -> None:
    path = str(tmp_path / "g.npz")
    values = RNG.standard_t(2, size=(5, 40))
    values[2, :30] = 0
    np.savez(path, **{f"{t}/w": values[t].astype(np.float16) for t in range(5)})
    wanted = values.astype(np.float16).astype(np.float64)

    history = open_history(path)

    for found, want in (
        (history.l2, np.linalg.norm(wanted, axis=1)),
        (history.max_abs, np.abs(wanted).max(1)),
        (history.mean_abs, np.abs(wanted).mean(1)),
        (history.mean, wanted.mean(1)),
        (history.zero_fraction, (wanted == 0).mean(1)),
    ):
        assert found is not None
        np.testing.assert_allclose(found[:, 0], want, rtol=1e-12, atol=1e-15)
    assert history.exact is not None
    assert np.isnan(history.exact.cosine[0, 0])


def test_the_extremes_of_float64_are_measured(tmp_path: Path) -> None:
    path = str(tmp_path / "g.npz")
    np.savez(path, **{"0/w": np.full(10, 1.7e308), "1/w": np.full(4, 5e-324)})

    history = open_history(path)

    assert history.mean_abs is not None
    assert history.mean_abs[0, 0] == pytest.approx(1.7e308)
    assert history.l2[0, 0] == np.inf  # beyond float64 itself; max_abs is finite
    assert history.l2[1, 0] == 1e-323


def test_the_order_of_the_entries_changes_nothing_but_the_order_of_the_layers(
    tmp_path: Path,
) -> None:
    keyed = {f"{s}/{n}": g for s, record in GRADIENTS.items() for n, g in record.items()}
    np.savez(tmp_path / "a.npz", **keyed)
    np.savez(tmp_path / "b.npz", **dict(reversed(keyed.items())))

    one, other = (open_history(str(tmp_path / name)) for name in ("a.npz", "b.npz"))

    assert one.steps.tolist() == other.steps.tolist()
    rows = [[layer.name for layer in other.layers].index(layer.name) for layer in one.layers]
    np.testing.assert_array_equal(one.l2, other.l2[:, rows])
    assert one.sketches is not None
    assert other.sketches is not None
    np.testing.assert_array_equal(one.sketches.values, other.sketches.values[:, rows])


@pytest.mark.parametrize("kind", ["quantised", "plain"])
def test_gradients_that_cannot_be_read_are_a_failure_of_the_history(
    kind: str, tmp_path: Path
) -> None:
    import torch

    def gradients() -> dict[str, Any]:
        odd = torch.randn(4)
        if kind == "quantised":
            odd = torch.quantize_per_tensor(odd, 0.1, 0, torch.qint8)
        return {"a.weight": torch.randn(4, 4), "odd": odd}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of its quantised tensors
        torch.save([gradients() for _ in range(6)], tmp_path / "grads.pt")

    report = analyze_flow(tmp_path / "grads.pt")

    assert report.gate.exit_code == (3 if kind == "quantised" else 0)
    assert report.coverage.analyzed == (1 if kind == "quantised" else 2)
    assert ["6 of 12 tensors" in e.message for e in report.errors] == [True] * (kind == "quantised")
