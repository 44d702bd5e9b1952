"""``--spectral``: the singular values of every matrix, whatever its layout, against NumPy's."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import gradscope
from gradscope.errors import UsageError
from gradscope.report.formats import Display, renderer
from gradscope.report.panels import panels_of
from gradscope.weights.result import SpectrumResult, WeightsReport

from .checkpoints import Array, bf16, conv_net, gaussian, transformer, write

UP = "model.layers.1.mlp.up_proj.weight"


def spectral(path: Path, **options: object) -> WeightsReport:
    return gradscope.analyze_weights(path, spectral=True, **options)


def spectra(path: Path, **options: object) -> dict[str, SpectrumResult]:
    report = spectral(path, **options)
    assert report.result is not None
    assert not report.errors
    return {t.name: t.spectrum for t in report.result.tensors if t.spectrum is not None}


def same(found: SpectrumResult, w: Array) -> None:
    """Norm and ranks are those of NumPy's decomposition."""
    sigma = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    shares = sigma / sigma.sum()
    assert found.spectral_norm == pytest.approx(sigma[0], rel=1e-9)
    assert found.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-9)
    entropy = -(shares * np.log(shares)).sum()
    assert found.effective_rank == pytest.approx(math.exp(entropy), rel=1e-6)


def test_every_matrix_has_a_spectrum_and_no_vector(tmp_path: Path) -> None:
    tensors = transformer()

    found = spectra(write(tmp_path / "m.safetensors", tensors))

    assert list(found) == [name for name, x in tensors.items() if x.ndim == 2]
    for name, seen in found.items():
        same(seen, tensors[name])


def test_half_precision_is_measured_by_its_values(tmp_path: Path) -> None:
    w = torch.randn(40, 90).bfloat16()
    path = write(tmp_path / "m.safetensors", {UP: bf16(w.float().numpy())})

    same(spectra(path)[UP], w.float().numpy())


def test_quantised_weights_are_measured_by_what_they_stand_for(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(-127, 128, (32, 64)).astype(np.int8)
    scale = np.float32(0.01) * np.linspace(1, 2, 32, dtype=np.float32)[:, None]
    tensors = {"a.weight": codes, "a.weight_scale": scale, "a.bias": gaussian(32)}
    path = write(tmp_path / "m.safetensors", tensors)
    report = spectral(path)

    (tensor,) = (t for t in report.result.tensors if t.name == "a.weight")
    assert (tensor.spectrum is None) == (tensor.dequantized is None)
    if tensor.dequantized is not None:
        same(tensor.spectrum, codes * scale)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("features.0.weight", (24, 8, 3, 3)),
        ("features.0.weight", (24, 8, 5)),
        ("features.0.weight", (24, 8, 1, 1)),
    ],
)
def test_a_convolution_is_a_matrix_and_a_map(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    w = gaussian(*shape, seed=1)
    path = write(tmp_path / "m.safetensors", {name: w, "features.0.bias": gaussian(24)})

    found = spectra(path)[name]

    same(found, w.reshape(24, -1))
    if math.prod(shape[2:]) == 1:
        assert found.operator_norm == pytest.approx(found.spectral_norm, rel=1e-5)
    else:
        assert found.operator_norm > found.spectral_norm
        assert found.operator_norm < math.sqrt(math.prod(shape[2:])) * found.spectral_norm


def test_layouts_of_other_frameworks_are_the_same_map(tmp_path: Path) -> None:
    """torch's [out, in, y, x], Flax's [y, x, in, out], the transposed [in, out, y, x]."""
    w = gaussian(24, 8, 3, 3, seed=1)
    torch_ = {"features.0.weight": w, "features.0.bias": gaussian(24)}
    flax = {"conv/kernel": w.transpose(2, 3, 1, 0).copy(), "conv/bias": gaussian(24)}
    back = {"up.deconv.weight": w.swapaxes(0, 1).copy(), "up.deconv.bias": gaussian(24)}

    one, two, three = (
        spectra(write(tmp_path / f"{i}.safetensors", tensors))[next(iter(tensors))]
        for i, tensors in enumerate((torch_, flax, back))
    )

    for other in (two, three):
        assert other.spectral_norm == pytest.approx(one.spectral_norm, rel=1e-9)
        assert other.operator_norm == pytest.approx(one.operator_norm, rel=1e-4)
        assert other.alpha == pytest.approx(one.alpha, rel=1e-9)


def test_each_stacked_expert_has_a_spectrum(tmp_path: Path) -> None:
    w = gaussian(4, 64, 32, seed=6) * np.float32([[[1]], [[10]], [[0.1]], [[1]]])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        name: w,
        "model.layers.0.mlp.experts.down_proj": gaussian(4, 32, 32, seed=8),
        "model.layers.0.mlp.router.weight": gaussian(4, 32, seed=7),
    }

    found = spectra(write(tmp_path / "m.safetensors", tensors))[name]

    for expert, seen in zip(w, found.experts, strict=True):
        same(seen, expert)
    assert found.spectral_norm == found.experts[1].spectral_norm
    assert found.stable_rank == min(e.stable_rank for e in found.experts)
    assert found.alpha is None


def test_alpha_says_whether_its_tail_is_long_enough(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(2.5, (400, 600)).astype(np.float32)
    tensors = {"a.weight": heavy, "b.weight": gaussian(30, 40, seed=1)}

    found = spectra(write(tmp_path / "m.safetensors", tensors), bootstrap=20)

    assert found["a.weight"].alpha_reliable is (
        found["a.weight"].alpha_tail_count >= 50 and found["a.weight"].alpha_p_value >= 0.1
    )
    assert found["b.weight"].alpha_reliable is False
    assert 0 <= found["b.weight"].alpha_p_value <= 1


def test_a_fit_that_fails_is_nothing(tmp_path: Path) -> None:
    """weightwatcher drops eigenvalues below 1e-5 whatever the scale; it then says over-trained."""
    path = write(tmp_path / "m.safetensors", {"a.weight": gaussian(40, 60, scale=1e-5)})

    found = spectra(path)["a.weight"]

    assert found.alpha is None
    assert found.alpha_reliable is None
    assert found.spikes == 0


def test_zeros_and_what_is_not_finite_have_no_spectrum(tmp_path: Path) -> None:
    nan = gaussian(20, 30)
    nan[3, 4] = np.nan
    tensors = {"a.weight": np.zeros((20, 30), np.float32), "b.weight": nan}

    assert spectra(write(tmp_path / "m.safetensors", tensors)) == {}


@pytest.mark.filterwarnings("ignore")
def test_alpha_of_layers_is_that_of_weightwatcher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "weightwatcher is not installed (the extra `oracles`)"
    ww = pytest.importorskip("weightwatcher", reason=reason)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(16, 32, 3), torch.nn.Conv2d(32, 64, 1), torch.nn.Linear(64, 200),
        torch.nn.Linear(200, 100), torch.nn.Embedding(500, 40),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / torch.rand_like(parameter).sqrt())
    torch.save(model.state_dict(), tmp_path / "m.pt")

    theirs = ww.WeightWatcher(model=model).analyze()
    found = spectra(tmp_path / "m.pt")

    for _, row in theirs.iterrows():
        ours = found[f"{row['longname']}.weight"]
        assert ours.alpha == pytest.approx(row["alpha"], abs=1e-6)
        assert ours.alpha_distance == pytest.approx(row["D"], abs=1e-9)
        assert ours.alpha_tail_count == row["num_pl_spikes"]
    assert len(theirs) == 5


def test_what_the_budget_has_no_time_for_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.safetensors", {f"{i}.weight": gaussian(9 + i, 20) for i in range(5)})
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))

    report = spectral(path, budget="3s", jobs=1)

    having = [t.name for t in report.result.tensors if t.spectrum is not None]
    left = [s.subject for s in report.coverage.skipped]
    assert having == ["0.weight", "1.weight"]
    assert left == ["2.weight", "3.weight", "4.weight"]
    assert all("--budget 3s" in s.reason for s in report.coverage.skipped)
    assert report.coverage.analyzed == report.coverage.total == 5
    assert report.gate.exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "60s"}, "give --spectral"),
        ({"bootstrap": 100}, "give --spectral"),
        ({"norms_only": True}, "--norms-only is about spectra"),
        ({"spectral": True, "norms_only": True, "bootstrap": 9}, "leaves out"),
        ({"spectral": True, "budget": "soon"}, "no time"),
        ({"spectral": True, "headers_only": True}, "--headers-only"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.safetensors", transformer())

    with pytest.raises(UsageError, match=message):
        gradscope.analyze_weights(path, **options)


def test_without_spectra_their_rules_are_not_evaluated(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", transformer())

    plain = gradscope.analyze_weights(path)

    absent = {n.rule for n in plain.coverage.not_evaluated if "--spectral" in n.reason}
    assert {"rank-collapse", "random-spectrum"} <= absent
    assert not spectral(path).coverage.not_evaluated


def test_a_model_that_was_never_trained_is_one_finding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(96, 96) for _ in range(6)]
    torch.save(torch.nn.Sequential(*layers).state_dict(), tmp_path / "m.pt")

    found = [f for f in spectral(tmp_path / "m.pt").findings if f.name == "random-spectrum"]

    assert [f.severity for f in found] == ["medium"]
    assert "6 of 6 matrices" in found[0].message


def test_a_spike_alone_makes_a_matrix_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    w = torch.nn.Linear(96, 96).weight.detach().numpy()
    step = 0.3 * np.outer(gaussian(96, seed=1, scale=0.1), gaussian(96, seed=2, scale=1.0))
    path = write(tmp_path / "m.safetensors", {"a.weight": (w + step).astype(np.float32)})

    assert [f.name for f in spectral(path).findings] == []


@pytest.mark.parametrize("planted", ["dead", "copied", "flipped"])
def test_a_collapse_that_has_another_cause_is_told_once(planted: str, tmp_path: Path) -> None:
    tensors = transformer()
    w = np.repeat(gaussian(1, 32, seed=1), 128, axis=0)
    if planted == "dead":
        w[1:] *= np.float32(1e-7)
        w += gaussian(128, 32, seed=2, scale=1e-9)
    elif planted == "flipped":
        w = gaussian(128, 32, seed=3)
        w[5, 6] = 1e30
    tensors[UP] = w

    found = spectral(write(tmp_path / "m.safetensors", tensors)).findings

    assert "rank-collapse" not in {f.name for f in found}
    assert found


def test_the_same_bytes_come_out_for_any_number_of_threads(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", transformer() | conv_net())

    one, three = (spectral(path, jobs=jobs, bootstrap=3) for jobs in (1, 3))

    assert renderer("json")(one, Display()) == renderer("json")(three, Display())


def test_a_pull_request_has_a_row_for_each_kind_of_matrix(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", transformer())

    shown = renderer("markdown")(spectral(path))

    table = [line for line in shown.partition("### Spectra")[2].splitlines() if "|" in line]
    assert len(table) == 2 + 8
    (up,) = (line for line in table if "up\\_proj" in line)
    assert up.startswith("| model.layers.\\*.mlp.up\\_proj.weight  ×4 | 128×32 |")


def test_plain_statistics_add_nothing_to_a_pull_request(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", transformer())

    assert "###" not in renderer("markdown")(gradscope.analyze_weights(path))


def test_a_pull_request_holds_the_spectra_of_many_kinds_of_matrices(tmp_path: Path) -> None:
    names = [f"{'x' * 150}{chr(97 + i)}.{'y' * 150}.weight" for i in range(26)]
    path = write(tmp_path / "m.safetensors", {n: gaussian(9, 5 + i) for i, n in enumerate(names)})

    shown = renderer("markdown")(spectral(path))

    assert len(shown.encode()) < 65_536
    assert "2 more rows; the JSON report has every matrix" in shown


def test_a_page_has_a_row_for_each_matrix(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", transformer())
    report = spectral(path)

    (grid,) = (p for p in panels_of(report) if p.title == "Spectra")

    rows = {row.cells[0]: row.cells for row in grid.rows}
    assert list(rows) == [t.name for t in report.result.tensors if t.spectrum is not None]
    (seen,) = (t.spectrum for t in report.result.tensors if t.name == UP)
    assert rows[UP][2:5] == [seen.spectral_norm, None, seen.stable_rank]
    assert all(len(row.cells) == len(grid.columns) for row in grid.rows)


def test_norms_alone_are_those_of_whole_spectra(tmp_path: Path) -> None:
    tensors = transformer() | conv_net() | {"wide.weight": gaussian(300, 700, seed=9)}
    path = write(tmp_path / "m.safetensors", tensors)

    whole, alone = spectra(path), spectra(path, norms_only=True)

    assert list(alone) == list(whole)
    for name, seen in alone.items():
        assert seen.spectral_norm == pytest.approx(whole[name].spectral_norm, rel=1e-4)
        assert seen.stable_rank == pytest.approx(whole[name].stable_rank, rel=3e-4)
        assert seen.alpha is seen.effective_rank is seen.mp_edge is None
    absent = {n.rule for n in spectral(path, norms_only=True).coverage.not_evaluated}
    assert "rank-collapse" in absent
