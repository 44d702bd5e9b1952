"""Experts are judged alike however they are stored: alone, stacked either way, fused or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import gradscope
from gradscope.report.model import Finding

from .checkpoints import Array, Tensor, bf16, fp8, gaussian, write

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


def copy(model: Model, target: int | list[int], source: int, layer: int = 1) -> None:
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
        lambda m: copy(m, [5, 6], 2),
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


# -- names ----------------------------------------------------------------------------------------


def flat(model: Model) -> Iterator[tuple[str, Array]]:
    """DBRX: the experts' matrices below one another, the last one as [in, out]."""
    for number, layer in enumerate(model):
        ffn = f"transformer.blocks.{number}.ffn"
        yield f"{ffn}.router.layer.weight", layer["gate"]
        yield f"{ffn}.experts.mlp.w1", layer["w1"].reshape(-1, WIDTH)
        yield f"{ffn}.experts.mlp.v1", layer["w3"].reshape(-1, WIDTH)
        yield f"{ffn}.experts.mlp.w2", layer["w2"].swapaxes(1, 2).reshape(-1, WIDTH)


def granite(model: Model) -> Iterator[tuple[str, Array]]:
    for number, layer in enumerate(model):
        moe = f"model.layers.{number}.block_sparse_moe"
        yield f"{moe}.router.layer.weight", layer["gate"]
        yield f"{moe}.input_linear.weight", np.concatenate([layer["w1"], layer["w3"]], axis=1)
        yield f"{moe}.output_linear.weight", layer["w2"]


def jet(model: Model) -> Iterator[tuple[str, Array]]:
    for name, tensor in granite(model):
        yield name.replace("block_sparse_moe", "mlp"), tensor


def named(experts: str, router: str, *kinds: str) -> Form:
    """One tensor an expert, by other names."""

    def form(model: Model) -> Iterator[tuple[str, Array]]:
        for number, layer in enumerate(model):
            yield router.format(layer=number), layer["gate"]
            for expert in range(len(layer["gate"])):
                for kind, name in zip(("w1", "w3", "w2"), kinds, strict=True):
                    yield (
                        f"{experts.format(layer=number, expert=expert)}.{name}",
                        layer[kind][expert],
                    )

    return form


NAMES: dict[str, tuple[Form, str, str]] = {
    "DBRX": (
        flat,
        "transformer.blocks.1.ffn.experts",
        "transformer.blocks.1.ffn.router.layer.weight",
    ),
    "Granite": (
        granite,
        "model.layers.1.block_sparse_moe",
        "model.layers.1.block_sparse_moe.router.layer.weight",
    ),
    "Mixtral": (
        named(
            "model.layers.{layer}.block_sparse_moe.experts.{expert}",
            "model.layers.{layer}.block_sparse_moe.gate.weight",
            "w1.weight", "w3.weight", "w2.weight",
        ),
        "model.layers.1.block_sparse_moe.experts",
        "model.layers.1.block_sparse_moe.gate.weight",
    ),
    "DeepSeek": (
        named(
            "layers.{layer}.ffn.experts.{expert}", "layers.{layer}.ffn.gate.weight",
            "w1.weight", "w3.weight", "w2.weight",
        ),
        "layers.1.ffn.experts",
        "layers.1.ffn.gate.weight",
    ),
    "Qwen": (
        named(
            "model.layers.{layer}.mlp.experts.{expert}", "model.layers.{layer}.mlp.gate.weight",
            "gate_proj.weight", "up_proj.weight", "down_proj.weight",
        ),
        "model.layers.1.mlp.experts",
        "model.layers.1.mlp.gate.weight",
    ),
    "Switch": (
        named(
            "encoder.block.{layer}.layer.1.mlp.experts.expert_{expert}",
            "encoder.block.{layer}.layer.1.mlp.router.classifier.weight",
            "wi_0.weight", "wi_1.weight", "wo.weight",
        ),
        "encoder.block.1.layer.1.mlp.experts",
        "encoder.block.1.layer.1.mlp.router.classifier.weight",
    ),
    "DeepSpeed": (
        named(
            "h.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.{expert}",
            "h.{layer}.mlp.deepspeed_moe.gate.wg.weight",
            "gate.weight", "up.weight", "down.weight",
        ),
        "h.1.mlp.deepspeed_moe.experts.deepspeed_experts",
        "h.1.mlp.deepspeed_moe.gate.wg.weight",
    ),
    "a list of experts": (
        named(
            "blocks.{layer}.ffn.expert_list.{expert}", "blocks.{layer}.ffn.gate.weight",
            "gate.weight", "up.weight", "down.weight",
        ),
        "blocks.1.ffn.expert_list",
        "blocks.1.ffn.gate.weight",
    ),
    "MLPs in a mixture": (
        named(
            "blocks.{layer}.moe.mlps.{expert}", "blocks.{layer}.moe.gate.weight",
            "gate.weight", "up.weight", "down.weight",
        ),
        "blocks.1.moe.mlps",
        "blocks.1.moe.gate.weight",
    ),
    "numbers inside": (
        named(
            "layers.{layer}.experts.mlp.{expert}", "layers.{layer}.router.weight",
            "gate.weight", "up.weight", "down.weight",
        ),
        "layers.1.experts.mlp",
        "layers.1.router.weight",
    ),
    "glued numbers": (
        named(
            "layers.{layer}.moe.expert{expert}", "layers.{layer}.moe.gating.weight",
            "gate.weight", "up.weight", "down.weight",
        ),
        "layers.1.moe.expert",
        "layers.1.moe.gating.weight",
    ),
    "JetMoE": (
        jet,
        "model.layers.1.mlp",
        "model.layers.1.mlp.router.layer.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", NAMES)
def test_experts_of_a_family_are_known_by_its_names(family: str, tmp_path: Path) -> None:
    form, path, router = NAMES[family]
    FORMS[family] = form
    model = mixture(8)
    assert found(tmp_path, family, model) == []
    zero(model, 3)
    copy(model, 6, 2)
    row(model, 4)

    assert said(found(tmp_path, family, model)) == [
        ("dead-expert", "high", path, "3"),
        ("dead-expert", "medium", f"{path}.6", "6"),
        ("dead-expert", "medium", router.replace("router", "gate"), "4"),
    ]


@pytest.mark.parametrize("name", ["shared_expert", "shared_experts", "shared_experts.0"])
def test_a_shared_expert_is_none_of_the_series(name: str, tmp_path: Path) -> None:
    model = mixture(8)
    tensors = dict(split(model))
    path = f"model.layers.1.mlp.{name}.up_proj.weight"
    tensors[path] = np.zeros((INNER, WIDTH), np.float32)
    tensors["model.layers.1.mlp.shared_expert_gate.weight"] = gaussian(1, WIDTH)

    report = gradscope.analyze_weights(write(tmp_path / "model.safetensors", tensors))

    assert [(f.name, f.subject) for f in report.findings] == [("all-zero", path)]


def test_a_layer_that_was_copied_whole_is_left_to_duplicate_tensors(tmp_path: Path) -> None:
    for form in ("split", "stacked"):
        model = mixture(8)
        model[2] = model[1]

        assert {f.name for f in found(tmp_path, form, model)} == {"duplicate-tensors"}


@pytest.mark.parametrize("form", ["split", "stacked"])
def test_dead_units_of_one_expert_weigh_as_they_would_alone(form: str, tmp_path: Path) -> None:
    model = mixture(8)
    model[1]["w1"][5][:10] = 0

    (seen,) = found(tmp_path, form, model)

    assert (seen.name, seen.severity.value) == ("dead-units", "high")
    assert "10 of 24" in seen.message.replace("of the", "of")


@pytest.mark.parametrize("form", FORMS)
def test_a_dead_expert_lowers_the_health_of_its_tensors_alone(form: str, tmp_path: Path) -> None:
    model = mixture(8)
    zero(model, 3)
    path = write(tmp_path / "model.safetensors", dict(FORMS[form](model)))

    tensors = gradscope.analyze_weights(path).result.tensors

    lowered = {t.name for t in tensors if t.health.score < 90}
    hit = {"split": ".experts.3.", "grouped": ".weight3"}.get(form, ".experts.")
    assert lowered == {t.name for t in tensors if "layers.1." in t.name and hit in t.name}


# -- experts that are not there -------------------------------------------------------------------


def without(model: Model, *left_out: str) -> dict[str, Array]:
    return {n: v for n, v in split(model) if not any(part in n for part in left_out)}


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        ((), {}),
        (("layers.1.mlp.experts.5.",), {f"{PATH}.5": 1}),
        (("layers.1.mlp.experts.7.",), {f"{PATH}.7": 1}),
        (("layers.1.mlp.experts.5.w3",), {f"{PATH}.5": 1}),
        (("layers.1.mlp.experts.0.", "layers.1.mlp.experts.2."), {f"{PATH}.0": 2}),
        (("layers.1.mlp.experts.7.", "layers.1.mlp.gate"), {}),
        (("layers.1.mlp.experts.5.", "gate"), {f"{PATH}.5": 1}),
        (tuple(f"layers.1.mlp.experts.{n}." for n in range(4)), {}),
        (("w3",), {}),
    ],
)
def test_an_expert_that_is_not_there_is_a_missing_layer(
    left_out: tuple[str, ...], expected: dict[str, int], tmp_path: Path
) -> None:
    path = write(tmp_path / "model.safetensors", without(mixture(8), *left_out))

    report = gradscope.analyze_weights(path, select=["missing-layer"])

    assert {f.subject: f.evidence["missing_experts"] for f in report.findings} == expected
    assert {f.severity.value for f in report.findings} <= {"high"}


def test_experts_left_out_on_request_or_in_other_shards_are_not_missing(tmp_path: Path) -> None:
    part = without(mixture(8), "layers.1.mlp.experts.5.")
    shard = write(tmp_path / "model-00001-of-00002.safetensors", part)
    whole = write(tmp_path / "model.safetensors", dict(split(mixture(8))))

    assert gradscope.analyze_weights(shard, select=["missing-layer"]).findings == ()
    asked = gradscope.analyze_weights(whole, select=["missing-layer"], exclude=["*.experts.5.*"])
    assert asked.findings == ()


# -- quantised ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["healthy", "one of zeros", "two of zeros", "a copy", "all equal"]
)
def test_experts_in_float8_are_judged_as_those_in_float32(fault: str, tmp_path: Path) -> None:
    plant, expected = FAULTS[fault]
    model = mixture(8)
    plant(model)
    tensors: dict[str, Tensor] = {}
    for name, values in split(model):
        if ".experts." not in name:
            tensors[name] = values
            continue
        scale = np.float32(max(np.abs(values).max(), 1e-4) / 448)
        tensors |= {name: fp8(values / scale), f"{name}_scale": scale[None]}

    report = gradscope.analyze_weights(write(tmp_path / "model.safetensors", tensors))

    assert said([f for f in report.findings if f.name != "dtype-headroom"]) == expected
