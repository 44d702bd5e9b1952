"""How often rules about spectra are wrong, on the models their limits were set on and on others.

Each model's findings as it was released, and each rule's faults planted in some of its matrices,
with healthy twins: pruned, of low rank, rounded to eight bits. docs/spectra.md publishes the rates.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import gradscope

from .checkpoints import Array, Tensors, write
from .test_calibration import CASTS, CORPUS, HOLD_OUT, fixture, rng, weights

RULES = ("rank-collapse", "random-spectrum", "attention-range", "head-collapse")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "spectra.md"
#: Models by rule, of those that have matrices.
FOUND = {"tuning": {"random-spectrum": 3}, "hold-out": {}}
MATRICES_A_MODEL = 3
#: Tables, which are moved row by row, and gates, whose initialisation goes by the hidden units.
UNJUDGED = re.compile(r"emb|w_[ih]h|weight_[ih]h")

pytestmark = pytest.mark.fetched


class Rate(NamedTuple):
    """Faults found of faults planted, and findings about healthy twins of so many."""

    found: int
    faults: int
    alarms: int
    twins: int


RATES = {"tuning": Rate(53, 54, 0, 81), "hold-out": Rate(96, 98, 0, 147)}
LISTS: Mapping[str, Sequence[str]] = {"tuning": CORPUS, "hold-out": HOLD_OUT}


def told(path: Path) -> list[str]:
    report = gradscope.analyze_weights(path, spectral=True, select=RULES)
    assert not report.errors, path
    return [f.name for f in report.findings]


@pytest.mark.parametrize("listed", LISTS)
def test_what_is_said_of_released_models(listed: str) -> None:
    found = Counter(rule for name in LISTS[listed] for rule in set(told(fixture(name))))

    assert found == FOUND[listed]


def tensors_of(model: str) -> Mapping[str, Array]:
    """The largest dict of tensors in a file."""
    path = fixture(model)
    if path.suffix in (".safetensors", ".npz"):
        return weights(model)

    def dicts(inside: object) -> Iterator[dict[str, Array]]:
        if isinstance(inside, dict):
            yield {n: t.numpy() for n, t in inside.items() if torch.is_tensor(t)}
            for item in inside.values():
                yield from dicts(item)

    return max(dicts(torch.load(path, map_location="cpu", weights_only=True)), key=len)


def judged(name: str, values: Array) -> bool:
    """Linear layers and convolutions other than depthwise."""
    if values.dtype.kind != "f" or not 2 <= values.ndim <= 4 or UNJUDGED.search(name):
        return False
    short = min(len(values), values.size // len(values))
    return values.size >= 4096 and short >= 32 and values.shape[1] > 1


def matrices(model: str) -> Iterator[tuple[str, Array]]:
    """Some trained matrices of a model large enough to be judged, the same ones each time."""
    large = [(n, t) for n, t in tensors_of(model).items() if judged(n, t)]
    for place in rng(model, "spectra").permutation(len(large))[:MATRICES_A_MODEL]:
        name, values = large[place]
        yield name, values.astype(np.float32)


def default(w: torch.Tensor) -> None:
    torch.nn.init.kaiming_uniform_(w, a=5**0.5)


def small(w: torch.Tensor) -> None:
    torch.nn.init.normal_(w, std=0.02)


STARTS = (
    default, small, torch.nn.init.xavier_uniform_, torch.nn.init.xavier_normal_,
    torch.nn.init.kaiming_normal_,
)  # fmt: skip


def untrained(model: str, name: str, like: Array) -> Array:
    """A matrix of that shape as it is initialised."""
    random = rng(model, name)
    torch.manual_seed(int(random.integers(1 << 31)))
    made = torch.empty(like.shape)
    STARTS[int(random.integers(len(STARTS)))](made)
    return made.numpy()


def collapsed(like: Array) -> Array:
    """Its best approximation of a fortieth of its rank, and a thousandth of itself."""
    w = like.reshape(len(like), -1)
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    kept = max(len(s) // 40, 1)
    return ((u[:, :kept] * s[:kept]) @ vh[:kept] + 1e-3 * w).reshape(like.shape).astype(np.float32)


def twins(like: Array) -> Iterator[Array]:
    """What deployments make of a matrix: pruned by magnitude, of a quarter of its rank, int8."""
    least = np.quantile(np.abs(like), 0.8)
    yield np.where(np.abs(like) >= least, like, np.float32(0))
    w = like.reshape(len(like), -1)
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    kept = max(len(s) // 4, 4)
    yield ((u[:, :kept] * s[:kept]) @ vh[:kept]).reshape(like.shape).astype(np.float32)
    step = np.abs(like).max() / 127
    yield (np.rint(like / step) * step).astype(np.float32)


def rate(models: Sequence[str], folder: Path) -> tuple[Rate, list[str]]:
    """Each matrix in one type of three, by turns."""
    found = faults = alarms = count = 0
    strange: list[str] = []
    for model in models:
        for place, (name, values) in enumerate(matrices(model)):
            kind = list(CASTS)[place % len(CASTS)]
            label = f"{model} {name} {values.shape} {kind}"
            planted = {"random-spectrum": untrained(model, name, values),
                       "rank-collapse": collapsed(values)}  # fmt: skip
            for rule, made in planted.items():
                rules = told(saved({name: made}, kind, folder))
                found += rule in rules
                faults += 1
                strange += [f"missed {rule}: {label}"] if rule not in rules else []
            for made in twins(values):
                rules = told(saved({name: made}, kind, folder))
                alarms += bool(rules)
                count += 1
                strange += [f"{rules} of a twin: {label}"] if rules else []
    return Rate(found, faults, alarms, count), strange


def saved(tensors: Mapping[str, Array], kind: str, folder: Path) -> Path:
    made: Tensors = {name: CASTS[kind](values) for name, values in tensors.items()}
    return write(folder / "model.safetensors", made)


@pytest.mark.parametrize("listed", LISTS)
def test_what_is_published_of_planted_faults_is_what_they_show(listed: str, tmp_path: Path) -> None:
    loaded = [name for name in LISTS[listed] if not name.endswith(".jit")]
    found, strange = rate(loaded, tmp_path)

    assert found == RATES[listed], "\n".join(strange)


def test_the_rates_stand_in_the_documentation() -> None:
    text = " ".join(DOCS.read_text().split())

    for listed in RATES.values():
        assert f"{listed.found} of {listed.faults} planted faults" in text
        assert f"{listed.alarms} of {listed.twins} healthy twins" in text
