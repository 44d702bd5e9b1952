"""Experts are judged alike however they are stored: alone, stacked either way, fused or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import gradscope
from gradscope.report.model import Finding

from .checkpoints import Array, Tensor, bf16, gaussian, write

#: Kind of matrix -> [experts, out, in], and the router, of one layer.
Layer = dict[str, Array]
Model = list[Layer]

WIDTH, INNER = 16, 24


def mixture(experts: int, layers: int = 3) -> Model:
    """A healthy mixture."""
    return [
        {
            "w1": gaussian(experts, INNER, WIDTH, seed=10 * layer),
            "w3": gaussian(experts, INNER, WIDTH, seed=10 * layer + 1),
            "w2": gaussian(experts, WIDTH, INNER, seed=10 * layer + 2),
            "gate": gaussian(experts, WIDTH, seed=10 * layer + 3),
        }
        for layer in range(layers)
    ]


# -- forms ----------------------------------------------------------------------------------------

Form = Callable[[Model], Iterator[tuple[str, Array]]]


def split(model: Model) -> Iterator[tuple[str, Array]]:
    for number, layer in enumerate(model):
        yield f"model.layers.{number}.mlp.gate.weight", layer["gate"]
        for expert in range(len(layer["gate"])):
            for kind in ("w1", "w3", "w2"):
                name = f"model.layers.{number}.mlp.experts.{expert}.{kind}.weight"
                yield name, layer[kind][expert]


def stacked(model: Model) -> Iterator[tuple[str, Array]]:
    for number, layer in enumerate(model):
        yield f"model.layers.{number}.mlp.gate.weight", layer["gate"]
        for kind in ("w1", "w3", "w2"):
            yield f"model.layers.{number}.mlp.experts.{kind}", layer[kind]


def fused(model: Model) -> Iterator[tuple[str, Array]]:
    for number, layer in enumerate(model):
        yield f"model.layers.{number}.mlp.gate.weight", layer["gate"]
        both = np.concatenate([layer["w1"], layer["w3"]], axis=1)
        yield f"model.layers.{number}.mlp.experts.gate_up_proj", both
        yield f"model.layers.{number}.mlp.experts.down_proj", layer["w2"]


def transposed(model: Model) -> Iterator[tuple[str, Array]]:
    for name, values in fused(model):
        yield name, values.swapaxes(1, 2).copy() if values.ndim == 3 else values


def grouped(model: Model) -> Iterator[tuple[str, Array]]:
    """Transformer Engine's grouped layers, gate and up in one."""
    for number, layer in enumerate(model):
        yield f"model.layers.{number}.mlp.router.weight", layer["gate"]
        both = np.concatenate([layer["w1"], layer["w3"]], axis=1)
        for expert in range(len(layer["gate"])):
            path = f"model.layers.{number}.mlp.experts"
            yield f"{path}.linear_fc1.weight{expert}", both[expert]
            yield f"{path}.linear_fc2.weight{expert}", layer["w2"][expert]


FORMS: dict[str, Form] = {
    "split": split,
    "stacked": stacked,
    "fused": fused,
    "transposed": transposed,
    "grouped": grouped,
}
CASTS: dict[str, Callable[[Array], Tensor]] = {
    "F32": lambda values: values,
    "BF16": bf16,
    "F16": lambda values: values.astype(np.float16),
}


def found(folder: Path, form: str, model: Model, dtype: str = "F32") -> list[Finding]:
    tensors = {name: CASTS[dtype](values) for name, values in FORMS[form](model)}
    path = write(folder / "model.safetensors", tensors)
    report = gradscope.analyze_weights(path, ignore=["redundant-precision", "W115"])
    return list(report.findings)


Said = tuple[str, str, str, str]


def said(findings: list[Finding]) -> list[Said]:
    """Rule, severity, layer or expert, and which experts; a router has a name in each form."""
    return [
        (
            f.name,
            f.severity.value,
            f.subject.replace("router", "gate"),
            str(f.evidence.get("experts")),
        )
        for f in findings
    ]


# -- faults ---------------------------------------------------------------------------------------

Fault = Callable[[Model], object]
PATH = "model.layers.1.mlp.experts"
DEAD = ("dead-expert", "high", PATH)
ROUTER = ("dead-expert", "medium", "model.layers.1.mlp.gate.weight")


def zero(model: Model, *experts: int, kinds: tuple[str, ...] = ("w1", "w2", "w3")) -> None:
    for kind in kinds:
        model[1][kind][list(experts)] = 0


def collapse(model: Model, *experts: int) -> None:
    for kind in ("w1", "w2", "w3"):
        model[1][kind][list(experts)] *= 5e-4


def copy(model: Model, target: int, source: int, layer: int = 1) -> None:
    for kind in ("w1", "w2", "w3"):
        model[1][kind][target] = model[layer][kind][source]


def upcycle(model: Model, *layers: int) -> None:
    for layer in layers:
        for kind in ("w1", "w2", "w3"):
            model[layer][kind][:] = model[layer][kind][:1]


def row(model: Model, target: int, source: int | None = None) -> None:
    model[1]["gate"][target] = 0 if source is None else model[1]["gate"][source]


def together(*faults: Fault) -> Fault:
    return lambda model: [fault(model) for fault in faults]


FAULTS: dict[str, tuple[Fault, list[Said]]] = {
    "healthy": (lambda _: None, []),
    "one of zeros": (lambda m: zero(m, 3), [(*DEAD, "3")]),
    "two of zeros": (lambda m: zero(m, 3, 5), [(*DEAD, "3, 5")]),
    "down alone is zero": (lambda m: zero(m, 2, kinds=("w2",)), [(*DEAD, "2")]),
    "up alone is zero": (lambda m: zero(m, 2, kinds=("w3",)), [(*DEAD, "2")]),
    "gate alone is zero": (lambda m: zero(m, 2, kinds=("w1",)), [(*DEAD, "2")]),
    "collapsed": (lambda m: collapse(m, 6), [(*DEAD, "6")]),
    "most collapsed": (lambda m: collapse(m, *range(6)), [(*DEAD, "0, 1, 2, 3, 4, 5")]),
    "a whole layer collapsed": (
        lambda m: collapse(m, *range(8)),
        [(*DEAD, "0, 1, 2, 3, 4, 5, 6, 7")],
    ),
    "a whole layer of zeros": (
        lambda m: zero(m, *range(8)),
        [(*DEAD, "0, 1, 2, 3, 4, 5, 6, 7")],
    ),
    "twice as small": (lambda m: [m[1][k].__imul__(0.5) for k in ("w1", "w2", "w3")], []),
    "a copy": (lambda m: copy(m, 5, 2), [("dead-expert", "medium", f"{PATH}.5", "5")]),
    "two copies": (
        lambda m: [copy(m, 5, 2), copy(m, 6, 2)],
        [("dead-expert", "medium", f"{PATH}.5", "5, 6")],
    ),
    "a copy from another layer": (
        lambda m: copy(m, 5, 2, layer=0),
        [("dead-expert", "medium", f"{PATH}.5", "5")],
    ),
    "all equal": (
        lambda m: upcycle(m, 1),
        [("dead-expert", "medium", PATH, "0, 1, 2, 3, 4, 5, 6, 7")],
    ),
    "all equal in all layers": (
        lambda m: upcycle(m, 0, 1, 2),
        [("dead-expert", "medium", "model.layers.*.mlp.experts", "0, 1, 2, 3, 4, 5, 6, 7")],
    ),
    "a router's row of zeros": (lambda m: row(m, 4), [(*ROUTER, "4")]),
    "a router's row twice": (lambda m: row(m, 4, 1), [(*ROUTER, "4")]),
    "dead, and so is its row": (
        together(lambda m: zero(m, 3), lambda m: row(m, 3)),
        [(*DEAD, "3")],
    ),
    "a copy, and so is its row": (
        together(lambda m: copy(m, 5, 2), lambda m: row(m, 5, 2)),
        [("dead-expert", "medium", f"{PATH}.5", "5")],
    ),
    "a dead one and an idle one": (
        together(lambda m: zero(m, 3), lambda m: row(m, 4)),
        [(*DEAD, "3"), (*ROUTER, "4")],
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_experts_is_told_alike_in_every_form(
    fault: str, form: str, tmp_path: Path
) -> None:
    plant, expected = FAULTS[fault]
    model = mixture(8)
    plant(model)

    assert said(found(tmp_path, form, model)) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("fault", ["healthy", "one of zeros", "collapsed", "a copy", "all equal"])
def test_a_fault_of_experts_is_told_alike_in_every_type(
    fault: str, dtype: str, form: str, tmp_path: Path
) -> None:
    plant, expected = FAULTS[fault]
    model = mixture(8)
    for layer in model:
        for values in layer.values():
            values *= 4  # above the subnormal numbers of float16
    plant(model)

    assert said(found(tmp_path, form, model, dtype)) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("experts", [1, 2, 16, 128])
def test_the_number_of_experts_makes_no_difference(experts: int, form: str, tmp_path: Path) -> None:
    assert found(tmp_path, form, mixture(experts, 2)) == []
    model = mixture(experts, 2)
    zero(model, experts - 1)

    assert said(found(tmp_path, form, model)) == [(*DEAD, str(experts - 1))]
