"""Every layout: its values are those of a plain decoder, and a sound checkpoint has no finding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from safetensors.numpy import load_file

import gradscope
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tiles import read_range
from gradscope.quantization.recognise import recognise
from gradscope.quantization.weights import QuantizedWeight
from gradscope.report.severity import Severity

from ..weights.checkpoints import gaussian, write
from .made import LAYOUTS, Array, Made

OUT, IN = 64, 192


def matrix(seed: int = 0, out: int = OUT, columns: int = IN) -> Array:
    return gaussian(out, columns, seed=seed, scale=0.03).astype(np.float64)


def saved(folder: Path, *layers: Made, **others: Array) -> Path:
    """A checkpoint of some quantised layers, with the configuration that they have."""
    tensors = {name: tensor for made in layers for name, tensor in made.tensors.items()}
    header = {name: text for made in layers for name, text in made.header.items()}
    path = write(folder / "model.safetensors", {**tensors, **others}, **header)
    if layers[0].config:
        (folder / "config.json").write_text(json.dumps({"quantization_config": layers[0].config}))
    return path


def recognised(path: Path) -> Mapping[str, QuantizedWeight]:
    found = recognise(open_checkpoint(str(path), None))
    return {w.codes.name: w for w in found.weights}


def values(weight: QuantizedWeight) -> Array:
    """All values of a weight, read in uneven runs."""
    ref = weight.values
    assert ref is not None, weight.faults
    edges = [*range(0, ref.numel, 1001), ref.numel]
    parts = [read_range(ref, a, b) for a, b in pairwise(edges)]
    return np.concatenate(parts).reshape(ref.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_those_of_a_plain_decoder(layout: str, tmp_path: Path) -> None:
    made = LAYOUTS[layout](matrix(), "model.layers.0.mlp.up_proj")
    weight = recognised(saved(tmp_path, made))[made.codes]

    assert weight.faults == ()
    assert weight.scheme == made.scheme
    assert weight.shape == made.reference.shape
    np.testing.assert_allclose(values(weight), made.reference, rtol=3e-7, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_are_those_of_the_values(layout: str, tmp_path: Path) -> None:
    made = LAYOUTS[layout](matrix(), "model.layers.0.mlp.up_proj")
    report = gradscope.analyze_weights(saved(tmp_path, made))
    (tensor,) = (t for t in report.result.tensors if t.name == made.codes)
    flat = made.reference.ravel()
    s = tensor.statistics

    assert tensor.shape == made.reference.shape
    assert tensor.dequantized is not None
    assert (s.count, s.zero_count) == (flat.size, np.count_nonzero(flat == 0))
    assert s.min == pytest.approx(flat.min(), rel=1e-6)
    assert s.max == pytest.approx(flat.max(), rel=1e-6)
    assert s.mean == pytest.approx(flat.mean(), rel=1e-6, abs=1e-10)
    assert s.std == pytest.approx(flat.std(), rel=1e-6)
    assert s.kurtosis == pytest.approx(scipy.stats.kurtosis(flat), rel=1e-5, abs=1e-5)
    median = np.quantile(flat, 0.5, method="inverted_cdf")
    assert s.median == pytest.approx(median, rel=0.004, abs=1e-9)
    far = tensor.outliers.top[0]
    assert made.reference[far.index] == pytest.approx(far.value, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_checkpoint_is_excellent(layout: str, tmp_path: Path) -> None:
    layers = [
        LAYOUTS[layout](matrix(2 * i + place), f"model.layers.{i}.mlp.{name}_proj")
        for i in range(2)
        for place, name in enumerate(("up", "gate"))
    ]
    norm = 1 + gaussian(IN, seed=9)
    report = gradscope.analyze_weights(
        saved(tmp_path, *layers, **{"model.norm.weight": norm}), fail_on="low"
    )

    assert [
        f"{f.name} {f.subject} {f.message}"
        for f in report.findings
        if f.severity is not Severity.INFO
    ] == []
    assert report.gate.exit_code == 0
    assert report.result.health is not None
    assert report.result.health.status == "excellent"
    assert report.result.notes == ()
    parameters = sum(m.reference.size for m in layers) + IN
    assert report.result.overall.parameters == parameters


def trained() -> Array:
    """A matrix of a released model, cut to what groups of 192 columns need."""
    found = load_file(Path(__file__).parents[2] / "fixtures" / "digits.safetensors")
    largest = max(found.values(), key=lambda t: t.size if t.dtype.kind == "f" else 0)
    flat = largest.astype(np.float64).ravel()
    return np.resize(flat, (OUT, IN))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trained_matrix_stays_what_it_was(layout: str, tmp_path: Path) -> None:
    """Dequantised values are the weight's own but for rounding, which fewer bits make coarser."""
    weight = trained()
    made = LAYOUTS[layout](weight, "model.layers.0.mlp.up_proj")
    report = gradscope.analyze_weights(saved(tmp_path, made))
    (tensor,) = (t for t in report.result.tensors if t.name == made.codes)
    coarse = {2: 0.6, 3: 0.15, 4: 0.05}.get(tensor.dequantized.bits or 8, 0.02)

    assert tensor.role.value in ("linear", "experts")
    assert tensor.statistics.std == pytest.approx(weight.std(), rel=coarse)
    assert tensor.statistics.mean == pytest.approx(weight.mean(), abs=coarse * weight.std())
