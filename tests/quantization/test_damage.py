"""What is missing, misshapen or worthless beside the codes is told, once, of the right tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradscope
from gradscope.report.model import Finding
from gradscope.report.severity import Severity

from ..weights.checkpoints import Codes, bf16, fp8, gaussian, write
from .made import LAYOUTS, Array, typed
from .test_layouts import matrix

Tensors = dict[str, Any]
Damage = Callable[[Tensors], object]
HURT = "model.layers.1.mlp.up_proj"


def layers(layout: str, count: int = 3) -> tuple[Tensors, dict[str, str], Mapping[str, object]]:
    made = [LAYOUTS[layout](matrix(i), f"model.layers.{i}.mlp.up_proj") for i in range(count)]
    tensors = {name: tensor for m in made for name, tensor in m.tensors.items()}
    return tensors, {n: t for m in made for n, t in m.header.items()}, made[0].config


def findings(path: Path, **options: Any) -> list[Finding]:
    report = gradscope.analyze_weights(path, **options)
    assert not report.errors
    return [f for f in report.findings if f.severity is not Severity.INFO]


def damaged(folder: Path, layout: str, damage: Damage, count: int = 3) -> list[Finding]:
    tensors, header, config = layers(layout, count)
    damage(tensors)
    path = write(folder / "model.safetensors", tensors, **header)
    if config:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return findings(path)


def without(*parts: str, module: str = HURT) -> Damage:
    def damage(tensors: Tensors) -> None:
        for part in parts:
            del tensors[f"{module}.{part}"]

    return damage


def changed(part: str, change: Callable[[Array], Any]) -> Damage:
    def damage(tensors: Tensors) -> None:
        old = tensors[f"{HURT}.{part}"]
        codes = old.codes if isinstance(old, Codes) else old
        new = change(np.array(codes))
        tensors[f"{HURT}.{part}"] = Codes(old.dtype, new) if isinstance(old, Codes) else new

    return damage


def put(value: float, *place: int) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        array[place] = value
        return array

    return change


def fewer(array: Array) -> Array:
    return np.ascontiguousarray(array[:-1])


def narrower(array: Array) -> Array:
    return np.ascontiguousarray(array[..., :-1])


DOWN = "experts.down_proj"
STATE = "weight.quant_state.bitsandbytes__nf4"

#: layout, damage, the part of the layer that must be named.
DAMAGES = {
    "gpt-oss without scales": ("mxfp4 of gpt-oss", without(f"{DOWN}_scales"), f"{DOWN}_blocks"),
    "gpt-oss, wrong grid": (
        "mxfp4 of gpt-oss",
        changed(f"{DOWN}_scales", narrower),
        f"{DOWN}_scales",
    ),
    "gpt-oss, an expert's scales too few": (
        "mxfp4 of gpt-oss",
        changed(f"{DOWN}_scales", fewer),
        f"{DOWN}_scales",
    ),
    "gpt-oss, 255": (
        "mxfp4 of gpt-oss",
        changed(f"{DOWN}_scales", put(255, 1, 2, 3)),
        f"{DOWN}_scales",
    ),
    "ModelOpt without block scales": ("nvfp4 of ModelOpt", without("weight_scale"), "weight"),
    "ModelOpt without the second scale": ("nvfp4 of ModelOpt", without("weight_scale_2"), "weight"),
    "ModelOpt without either": (
        "nvfp4 of ModelOpt",
        without("weight_scale", "weight_scale_2"),
        "weight",
    ),
    "ModelOpt, second scale of zero": (
        "nvfp4 of ModelOpt",
        changed("weight_scale_2", lambda _: np.float32(0)),
        "weight_scale_2",
    ),
    "ModelOpt, second scale infinite": (
        "nvfp4 of ModelOpt",
        changed("weight_scale_2", lambda _: np.float32(np.inf)),
        "weight_scale_2",
    ),
    "ModelOpt, wrong grid": (
        "nvfp4 of ModelOpt",
        changed("weight_scale", narrower),
        "weight_scale",
    ),
    "ModelOpt, NaN among block scales": (
        "nvfp4 of ModelOpt",
        changed("weight_scale", put(0x7F, 3, 4)),
        "weight_scale",
    ),
    "ModelOpt, block scales of zero": (
        "nvfp4 of ModelOpt",
        changed("weight_scale", np.zeros_like),
        "weight_scale",
    ),
    "ModelOpt, a negative block scale": (
        "nvfp4 of ModelOpt",
        changed("weight_scale", put(0xB8, 3, 4)),
        "weight_scale",
    ),
    "ModelOpt, a bad activation scale": (
        "nvfp4 of ModelOpt",
        changed("input_scale", lambda _: np.float32(np.nan)),
        "input_scale",
    ),
    "compressed-tensors nvfp4 without the global scale": (
        "nvfp4 of compressed-tensors",
        without("weight_global_scale"),
        "weight_packed",
    ),
    "compressed-tensors nvfp4 without block scales": (
        "nvfp4 of compressed-tensors",
        without("weight_scale"),
        "weight_packed",
    ),
    "compressed-tensors mxfp4 without scales": (
        "mxfp4 of compressed-tensors",
        without("weight_scale"),
        "weight_packed",
    ),
    "nf4 without absmax": ("nf4", without("weight.absmax"), "weight"),
    "nf4 without quant_state": ("nf4", without(STATE), "weight"),
    "nf4 without its table": ("nf4", without("weight.quant_map"), "weight"),
    "nf4 without anything": (
        "nf4",
        without("weight.absmax", STATE, "weight.quant_map"),
        "weight",
    ),
    "nf4, absmax too short": ("nf4", changed("weight.absmax", fewer), "weight.absmax"),
    "nf4, absmax NaN": ("nf4", changed("weight.absmax", put(np.nan, 7)), "weight.absmax"),
    "nf4, nested, without the outer maxima": (
        "nf4, nested",
        without("weight.nested_absmax"),
        "weight",
    ),
    "nf4, nested, without the outer table": (
        "nf4, nested",
        without("weight.nested_quant_map"),
        "weight",
    ),
    "nf4, nested, outer maxima of Inf": (
        "nf4, nested",
        changed("weight.nested_absmax", put(np.inf, 0)),
        "weight.nested_absmax",
    ),
    "int8 without SCB": ("int8 of bitsandbytes", without("SCB"), "weight"),
    "int8 without SCB and format": (
        "int8 of bitsandbytes",
        without("SCB", "weight_format"),
        "weight",
    ),
    "int8, SCB too short": ("int8 of bitsandbytes", changed("SCB", fewer), "SCB"),
    "int8, SCB of zero over codes": ("int8 of bitsandbytes", changed("SCB", put(0, 5)), "SCB"),
    "int8 without weight_scale": ("int8 a row", without("weight_scale"), "weight"),
    "torchao without a scale": ("int8 of torchao", without("_weight_scale"), "_weight_qdata"),
    "quanto without a scale": ("int8 of quanto", without("weight._scale"), "weight._data"),
    "gptq without scales": ("gptq, 4 bits", without("scales"), "qweight"),
    "gptq without zeros": ("gptq, 4 bits", without("qzeros"), "qweight"),
    "gptq, an index too large": ("gptq, 4 bits", changed("g_idx", put(6, 3)), "g_idx"),
    "gptq, a negative index": ("gptq, 4 bits", changed("g_idx", put(-1, 3)), "g_idx"),
    "gptq, scales too few": ("gptq, 4 bits", changed("scales", fewer), "scales"),
    "gptq, scales too narrow": ("gptq, 4 bits", changed("scales", narrower), "scales"),
    "gptq, zeros too few": ("gptq, 4 bits", changed("qzeros", fewer), "qzeros"),
    "gptq, NaN": ("gptq, 4 bits", changed("scales", put(np.nan, 1, 2)), "scales"),
    "awq without scales": ("awq", without("scales"), "qweight"),
    "awq without zeros": ("awq", without("qzeros"), "qweight"),
    "awq, scales too few": ("awq", changed("scales", fewer), "scales"),
    "awq, a negative scale": ("awq", changed("scales", put(-0.1, 1, 2)), "scales"),
    "compressed int4 without scales": (
        "compressed-tensors, 4 bits",
        without("weight_scale"),
        "weight_packed",
    ),
    "compressed int4, scales of a wrong grid": (
        "compressed-tensors, 4 bits",
        changed("weight_scale", fewer),
        "weight_scale",
    ),
    "compressed int4 with a wrong shape": (
        "compressed-tensors, 4 bits",
        changed("weight_shape", lambda _: np.array([64, 4000])),
        "weight_shape",
    ),
    "mlx without biases": ("mlx, 4 bits", without("biases"), "weight"),
    "mlx without scales": ("mlx, 4 bits", without("scales"), "weight"),
    "mlx, a scale of NaN": ("mlx, 4 bits", changed("scales", put(np.nan, 1, 1)), "scales"),
    "fp8 rows without scale": ("fp8 a row", without("weight_scale"), "weight"),
    "fp8 rows, too few": ("fp8 a row", changed("weight_scale", fewer), "weight_scale"),
    "fp8 of zero": (
        "fp8 a tensor",
        changed("weight_scale", lambda _: np.float32(0)),
        "weight_scale",
    ),
    "fp8 of a wrong sign": (
        "fp8 a tensor",
        changed("weight_scale", lambda _: np.float32(-1)),
        "weight_scale",
    ),
    "fp8 blocks, a line too few": (
        "fp8 in blocks of 32",
        changed("weight_scale_inv", fewer),
        "weight_scale_inv",
    ),
    "fp8 blocks, one zero": (
        "fp8 in blocks of 32",
        changed("weight_scale_inv", put(0, 1, 1)),
        "weight_scale_inv",
    ),
    "ComfyUI without scale": ("fp8 of ComfyUI", without("scale_weight"), "weight"),
    "mxfp8 of a wrong grid": ("mxfp8", changed("weight_scale", narrower), "weight_scale"),
    "mxfp8 with a 255": ("mxfp8", changed("weight_scale", put(255, 3, 3)), "weight_scale"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_of_one_layer_is_one_finding_that_names_it(case: str, tmp_path: Path) -> None:
    layout, damage, part = DAMAGES[case]
    (found,) = damaged(tmp_path, layout, damage)

    assert (found.name, found.severity) == ("scale-missing", Severity.HIGH)
    assert found.subject == f"{HURT}.{part}"


ALONE = [
    case
    for case in DAMAGES
    if "without" not in case
    or case
    in (
        "gpt-oss without scales",
        "ModelOpt without block scales",
        "ModelOpt without the second scale",
        "compressed-tensors nvfp4 without the global scale",
        "nf4 without absmax",
        "nf4 without anything",
        "nf4 without quant_state",
        "int8 without SCB",
        "int8 without weight_scale",
        "gptq without scales",
        "awq without scales",
        "mlx without scales",
    )
]


@pytest.mark.parametrize("case", ALONE)
def test_a_layer_alone_is_judged_without_siblings(case: str, tmp_path: Path) -> None:
    layout, damage, part = DAMAGES[case]
    tensors, header, _ = layers(layout)
    damage(tensors)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(HURT)}
    (found,) = findings(write(tmp_path / "model.safetensors", own, **header))

    assert (found.name, found.severity) == ("scale-missing", Severity.HIGH)
    assert found.subject == f"{HURT}.{part}"


def test_a_layer_without_a_scale_has_no_health_to_speak_of(tmp_path: Path) -> None:
    tensors, *_ = layers("int8 of bitsandbytes")
    without("SCB")(tensors)
    report = gradscope.analyze_weights(write(tmp_path / "model.safetensors", tensors))
    hurt = next(t for t in report.result.tensors if t.name == f"{HURT}.weight")

    assert hurt.statistics is None
    assert hurt.health.status == "critical"


@pytest.mark.parametrize("value", [np.nan, np.inf, 0, -1])
def test_codes_with_worthless_scales_have_no_values(value: float, tmp_path: Path) -> None:
    tensors, *_ = layers("fp8 a row")
    changed("weight_scale", put(value, 3, 0))(tensors)
    report = gradscope.analyze_weights(write(tmp_path / "model.safetensors", tensors))
    hurt = next(t for t in report.result.tensors if t.name == f"{HURT}.weight")

    assert hurt.dequantized is None
    assert [f.name for f in report.findings if f.severity is not Severity.INFO] == ["scale-missing"]


def test_what_all_layers_lack_is_one_finding(tmp_path: Path) -> None:
    def strip(tensors: Tensors) -> None:
        for i in range(6):
            without("weight_scale", module=f"model.layers.{i}.mlp.up_proj")(tensors)

    (found,) = damaged(tmp_path, "nvfp4 of ModelOpt", strip, count=6)

    assert found.subject == "model.layers.*.mlp.up_proj.weight"
    assert "6 of 6" in found.message
    assert "weight_scale" in found.message


def test_every_layers_wrong_grid_is_one_finding(tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> None:
        for i in range(5):
            name = f"model.layers.{i}.mlp.up_proj.weight_scale"
            tensors[name] = typed("F8_E4M3", narrower(tensors[name].codes))

    (found,) = damaged(tmp_path, "nvfp4 of ModelOpt", cut, count=5)

    assert found.subject == "model.layers.*.mlp.up_proj.weight_scale"
    assert "4 more" in found.message


def test_a_damaged_scale_says_where(tmp_path: Path) -> None:
    (found,) = damaged(
        tmp_path, "mxfp4 of gpt-oss", changed("experts.down_proj_scales", put(255, 1, 2, 3))
    )
    assert "[1, 2, 3]" in found.message


# -- zeros that makers leave ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["fp8 a row", "int8 of bitsandbytes", "nf4"])
def test_a_scale_of_zero_over_codes_of_zero_is_sound(layout: str, tmp_path: Path) -> None:
    """All-zero rows and blocks: their greatest magnitude is zero."""
    tensors, header, _ = layers(layout)
    part = {"fp8 a row": "weight_scale", "int8 of bitsandbytes": "SCB", "nf4": "weight.absmax"}
    changed(part[layout], put(0, 0))(tensors)
    zero_code = 0x77 if layout == "nf4" else 0
    first = 32 if layout == "nf4" else 1

    def clear(codes: Array) -> Array:
        codes[:first] = zero_code
        return codes

    changed("weight", clear)(tensors)
    assert findings(write(tmp_path / "model.safetensors", tensors, **header)) == []


# -- siblings, configuration, plain casts ---------------------------------------------------------


def int8(seed: int) -> Array:
    return np.random.default_rng(seed).integers(-127, 128, (64, 64), np.int8)


def test_a_sibling_with_a_scale_is_proof(tmp_path: Path) -> None:
    made = {"l.0.weight": int8(0), "l.0.SCB": np.ones(64, np.float32), "l.1.weight": int8(1)}
    (found,) = findings(write(tmp_path / "k.safetensors", made))

    assert (found.name, found.subject, found.severity) == ("scale-missing", "l.1.weight", "high")
    assert "l.1.SCB" in found.recommendation


def test_a_sibling_of_another_scheme_is_proof(tmp_path: Path) -> None:
    made, *_ = layers("nvfp4 of ModelOpt")
    made["model.layers.0.attn.q.weight"] = fp8(gaussian(64, 48))
    (found,) = findings(write(tmp_path / "k.safetensors", made))

    assert (found.name, found.severity) == ("scale-missing", "high")
    assert found.subject == "model.layers.0.attn.q.weight"


def test_packed_words_have_no_moments(tmp_path: Path) -> None:
    made, *_ = layers("gptq, 4 bits")
    result = gradscope.analyze_weights(write(tmp_path / "k.safetensors", made)).result
    statistics = {t.name.rpartition(".")[2]: t.statistics for t in result.tensors}

    assert statistics["qzeros"] is None
    assert statistics["g_idx"].max == 5
    assert result.overall.by_role["packed"].statistics.max == 5


def test_int8_weights_without_any_scale_are_codes(tmp_path: Path) -> None:
    made = {f"l.{i}.weight": int8(i) for i in range(3)}
    (found,) = findings(write(tmp_path / "k.safetensors", made))

    assert (found.name, found.subject, found.severity) == ("scale-missing", "l.*.weight", "high")


@pytest.mark.parametrize("scale", [0.02, 1, 20, 90])
@pytest.mark.parametrize("count", [1, 6])
def test_a_plain_cast_to_float8_is_info_at_any_magnitude(
    scale: float, count: int, tmp_path: Path
) -> None:
    made = {f"l.{i}.weight": fp8(gaussian(64, 48, seed=i, scale=scale)) for i in range(count)}
    made["norm.weight"] = bf16(1 + gaussian(48))
    report = gradscope.analyze_weights(write(tmp_path / "k.safetensors", made))

    assert [(f.name, f.severity) for f in report.findings] == [("scale-missing", Severity.INFO)]
    assert report.result.health.status == "excellent"
    assert {t.role.value for t in report.result.tensors} == {"linear", "norm-gain"}


def test_a_cast_is_scaled_where_the_configuration_says_so(tmp_path: Path) -> None:
    made = {f"l.{i}.weight": fp8(gaussian(64, 48, seed=i)) for i in range(3)}
    path = write(tmp_path / "k.safetensors", made)
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    (found,) = findings(path)

    assert (found.name, found.severity) == ("scale-missing", "high")
    assert "weight_scale_inv" in found.message


def test_modules_that_are_not_to_be_converted_need_no_scale(tmp_path: Path) -> None:
    made, *_ = layers("fp8 a tensor")
    made["lm_head.weight"] = fp8(gaussian(64, 48, seed=9))
    path = write(tmp_path / "k.safetensors", made)
    said = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))

    assert findings(path) == []


def test_a_marker_of_scaled_float8_asks_for_scales(tmp_path: Path) -> None:
    made = {f"l.{i}.weight": fp8(gaussian(64, 48, seed=i)) for i in range(3)}
    made["scaled_fp8"] = typed("F8_E4M3", np.zeros(2))
    (found,) = findings(write(tmp_path / "k.safetensors", made))

    assert (found.severity, found.subject) == ("high", "l.*.weight")
    assert "scale_weight" in found.message


def test_matrices_that_all_end_at_the_greatest_value_lost_their_scales(tmp_path: Path) -> None:
    made, *_ = layers("fp8 a tensor", count=4)
    bare = {name: tensor for name, tensor in made.items() if name.endswith(".weight")}
    (found,) = findings(write(tmp_path / "k.safetensors", bare))

    assert (found.name, found.severity) == ("scale-missing", "high")


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "scale"),
    ],
)
def test_a_configuration_that_disagrees_is_told(
    said: dict[str, object], word: str, tmp_path: Path
) -> None:
    tensors, *_ = layers("gptq, 4 bits")
    path = write(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    (found,) = findings(path)

    assert (found.name, found.severity) == ("scale-missing", "high")
    assert word in found.message


def test_a_configuration_that_promises_codes_where_there_are_none_is_told(tmp_path: Path) -> None:
    made = {f"model.layers.{i}.up.weight": bf16(gaussian(64, 48, seed=i)) for i in range(3)}
    path = write(tmp_path / "model.safetensors", made)
    quantization = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantization))
    (found,) = findings(path)

    assert (found.name, found.severity) == ("scale-missing", "medium")
    assert found.subject == "hf_quant_config.json"


def test_blocks_are_those_that_the_configuration_says(tmp_path: Path) -> None:
    tensors, *_ = layers("fp8 in blocks of 32")
    path = write(tmp_path / "model.safetensors", tensors)
    for block, expected in (([32, 32], []), ([128, 128], ["scale-missing"])):
        said = {"quant_method": "fp8", "weight_block_size": block}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
        assert [f.name for f in findings(path)] == expected


# -- parts of a checkpoint ------------------------------------------------------------------------


def test_scales_that_were_not_asked_for_are_not_missing(tmp_path: Path) -> None:
    tensors, *_ = layers("nvfp4 of ModelOpt")
    path = write(tmp_path / "model.safetensors", tensors)
    report = gradscope.analyze_weights(path, include=["*.weight"])

    assert [f for f in report.findings if f.severity is not Severity.INFO] == []
    assert all(t.dequantized for t in report.result.tensors)


def test_a_shard_alone_is_not_asked_for_the_scales_of_others(tmp_path: Path) -> None:
    tensors, *_ = layers("nvfp4 of ModelOpt")
    without("weight_scale")(tensors)
    path = write(tmp_path / "model-00001-of-00002.safetensors", tensors)
    report = gradscope.analyze_weights(path)

    assert "scale-missing" in {n.rule for n in report.coverage.not_evaluated}
    assert not [f for f in report.findings if f.name == "scale-missing"]


# -- experts --------------------------------------------------------------------------------------


def test_experts_stacked_and_split_have_the_same_values(tmp_path: Path) -> None:
    """Codes, statistics and pools do not depend on how experts are stored."""
    tensors, *_ = layers("mxfp4 of gpt-oss", count=1)
    stem = "model.layers.0.mlp.up_proj.experts"
    blocks, scales = tensors[f"{stem}.down_proj_blocks"], tensors[f"{stem}.down_proj_scales"]
    split = {}
    for e in range(2):
        split[f"{stem}.{e}.down_proj.weight_packed"] = blocks[e].reshape(32, -1)
        split[f"{stem}.{e}.down_proj.weight_scale"] = scales[e]
    whole = gradscope.analyze_weights(write(tmp_path / "a.safetensors", tensors)).result
    parts = gradscope.analyze_weights(write(tmp_path / "b.safetensors", split)).result
    a, b = whole.overall.statistics, parts.overall.statistics

    assert (a.count, a.min, a.max, a.zero_count) == (b.count, b.min, b.max, b.zero_count)
    assert a.std == pytest.approx(b.std, rel=1e-12)
    assert a.kurtosis == pytest.approx(b.kurtosis, rel=1e-10)


def test_a_dead_row_of_codes_is_a_dead_unit(tmp_path: Path) -> None:
    w = matrix(3)
    w[:30] *= 1e-9
    made = LAYOUTS["int8 of bitsandbytes"](w, HURT)
    report = gradscope.analyze_weights(write(tmp_path / "k.safetensors", dict(made.tensors)))
    (found,) = (f for f in report.findings if f.severity is not Severity.INFO)

    assert (found.name, found.subject) == ("dead-units", f"{HURT}.weight")


def test_a_flipped_bit_in_a_scale_is_an_extreme_value(tmp_path: Path) -> None:
    tensors, *_ = layers("fp8 in blocks of 32")
    changed("weight_scale_inv", lambda s: np.where(s == s[1, 1], s * 2.0**40, s).astype("f4"))(
        tensors
    )

    names = [(f.name, f.subject) for f in findings(write(tmp_path / "k.safetensors", tensors))]
    assert ("extreme-value", f"{HURT}.weight") in names


# -- schemes that nobody knows ---------------------------------------------------------------------


DRAWN = np.random.default_rng(11)


def integers(kind: type, *shape: int) -> Array:
    info = np.iinfo(kind)
    return DRAWN.integers(info.min, info.max, shape, kind, endpoint=True)


def positive(*shape: int) -> Array:
    return (np.abs(DRAWN.normal(0, 1, shape)) + 0.5).astype(np.float16)


#: Scheme -> the parts of one layer, and those that it cannot do without.
UNKNOWN: dict[str, tuple[Callable[[], Tensors], tuple[str, ...]]] = {
    "HQQ": (
        lambda: {"W_q": integers(np.uint8, 32, 64), "scale": positive(1, 64), "zero": positive(64)},
        ("scale", "zero"),
    ),
    "AQLM": (
        lambda: {
            "codes": integers(np.int8, 64, 8, 2),
            "codebooks": positive(2, 256, 1, 8),
            "scales": positive(64, 1, 1, 1),
        },
        ("scales", "codebooks"),
    ),
    "QuIP#": (
        lambda: {
            "Qidxs": integers(np.int16, 64, 8),
            "SU": positive(64),
            "SV": positive(64),
            "Wscale": np.float32(0.7),
        },
        ("Wscale", "SU"),
    ),
    "EXL2": (
        lambda: {
            "q_weight": integers(np.int32, 10, 64),
            "q_scale": integers(np.int32, 2, 8),
            "q_scale_max": positive(2),
            "q_groups": integers(np.int16, 4),
        },
        ("q_scale", "q_scale_max"),
    ),
    "EXL3": (
        lambda: {
            "trellis": integers(np.int16, 4, 4, 64),
            "suh": positive(64),
            "svh": positive(64),
        },
        ("suh",),
    ),
    "Marlin": (
        lambda: {
            "B": integers(np.int32, 4, 128),
            "s": positive(1, 64),
            "workspace": np.zeros(16, np.int32),
        },
        ("s",),
    ),
    "BitNet": (
        lambda: {"weight": integers(np.uint8, 16, 64), "weight_scale": positive(1)},
        ("weight_scale",),
    ),
    "VPTQ": (
        lambda: {
            "indices": integers(np.int32, 1, 8, 64),
            "centroids.weight": positive(1, 2048),
            "weight_scale": positive(64),
        },
        ("centroids.weight", "weight_scale"),
    ),
    "one's own, below the weight": (
        lambda: {"weight.q": integers(np.int8, 64, 64), "weight.scale": positive(64)},
        ("weight.scale",),
    ),
    "one's own, beside it": (
        lambda: {"weight_int8": integers(np.int8, 64, 64), "weight_int8_scale": positive(64)},
        ("weight_int8_scale",),
    ),
    "quanto, 4 bits": (
        lambda: {
            "weight._data._data": integers(np.uint8, 32, 128),
            "weight._scale": positive(64, 1),
            "weight._shift": positive(64, 1),
        },
        ("weight._scale", "weight._shift"),
    ),
}
PARTS = [(scheme, part) for scheme, (_, parts) in UNKNOWN.items() for part in parts]


def packed(scheme: str, count: int = 3) -> Tensors:
    names = (f"model.layers.{i}.{m}" for i in range(count) for m in ("attn.o_proj", "mlp.up_proj"))
    return {f"{n}.{part}": t for n in names for part, t in UNKNOWN[scheme][0]().items()}


@pytest.mark.parametrize("scheme", UNKNOWN)
def test_sound_layers_of_a_scheme_that_is_not_known_are_quiet(scheme: str, tmp_path: Path) -> None:
    report = gradscope.analyze_weights(write(tmp_path / "model.safetensors", packed(scheme)))

    assert report.gate.exit_code == 0
    assert [f for f in report.findings if f.severity.rank > Severity.LOW.rank] == []


@pytest.mark.parametrize(("scheme", "part"), PARTS)
def test_what_codes_lack_that_their_likes_have_is_told_of_any_scheme(
    scheme: str, part: str, tmp_path: Path
) -> None:
    tensors = packed(scheme)
    without(part)(tensors)
    (found,) = (
        f
        for f in findings(write(tmp_path / "model.safetensors", tensors))
        if f.severity.rank > Severity.LOW.rank
    )

    assert (found.name, found.severity) == ("scale-missing", Severity.HIGH)
    assert found.subject.startswith(HURT)
    assert part.rpartition(".")[2] in found.message


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_a_single_scale_of_an_unknown_scheme_must_be_positive(value: float, tmp_path: Path) -> None:
    tensors = packed("BitNet")
    tensors[f"{HURT}.weight_scale"] = np.array([value], np.float16)
    (found,) = findings(write(tmp_path / "model.safetensors", tensors))

    assert (found.name, found.subject) == ("scale-missing", f"{HURT}.weight_scale")


def test_integers_of_a_layer_that_are_no_codes_need_nothing(tmp_path: Path) -> None:
    places = np.subtract.outer(np.arange(49), np.arange(49)).astype(np.int32) + 48
    windows = {f"layers.{i}.attn.relative_position_index": places for i in range(4)}
    tables = {
        f"layers.{i}.attn.relative_position_bias_table": gaussian(169, 4, seed=i) for i in range(3)
    }
    path = write(tmp_path / "model.safetensors", {**windows, **tables})

    assert [f.name for f in findings(path)] == []


def test_ragged_blocks_round_up(tmp_path: Path) -> None:
    """DeepSeek's grids: 300 × 200 in blocks of 128 are 3 × 2 scales, never 2 × 1."""
    tensors = {
        f"{m}.{part}": tensor
        for m in ("layers.0.up", "layers.1.up", "layers.2.up")
        for part, tensor in {
            "weight": fp8(DRAWN.normal(0, 1, (300, 200))),
            "weight_scale_inv": positive(3, 2).astype(np.float32),
        }.items()
    }
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    assert findings(write(tmp_path / "model.safetensors", tensors)) == []

    tensors["layers.1.up.weight_scale_inv"] = positive(2, 1).astype(np.float32)
    (found,) = findings(write(tmp_path / "model.safetensors", tensors))
    assert (found.name, found.subject) == ("scale-missing", "layers.1.up.weight_scale_inv")


@pytest.mark.parametrize("value", [0.0, -0.03, np.nan])
def test_scales_of_a_cache_are_positive(value: float, tmp_path: Path) -> None:
    tensors, *_ = layers("fp8 a tensor")
    for i in range(3):
        tensors[f"model.layers.{i}.self_attn.attn.k_scale"] = np.full(4, 0.03, np.float32)
    assert findings(write(tmp_path / "model.safetensors", tensors)) == []

    tensors["model.layers.1.self_attn.attn.k_scale"][2] = value
    (found,) = findings(write(tmp_path / "model.safetensors", tensors))
    assert found.subject == "model.layers.1.self_attn.attn.k_scale"
    assert found.name == "scale-missing"


def test_an_order_of_inputs_that_was_never_set_is_the_usual_one(tmp_path: Path) -> None:
    tensors, header, _ = layers("gptq, 4 bits", count=1)
    usual = gradscope.analyze_weights(write(tmp_path / "a.safetensors", tensors, **header))
    for name in tensors:
        if name.endswith("g_idx"):
            tensors[name] = np.zeros_like(tensors[name])
    unset = gradscope.analyze_weights(write(tmp_path / "b.safetensors", tensors, **header))

    assert usual.result is not None
    assert unset.result is not None
    assert [t.statistics for t in usual.result.tensors if t.name.endswith("qweight")] == [
        t.statistics for t in unset.result.tensors if t.name.endswith("qweight")
    ]


def test_codes_without_values_make_no_expert_dead(tmp_path: Path) -> None:
    tensors: Tensors = {"mlp.gate.weight": gaussian(4, 64)}
    for e in range(4):
        tensors[f"mlp.experts.{e}.up_proj.weight"] = fp8(gaussian(64, 64, seed=e) * 100)
        tensors[f"mlp.experts.{e}.up_proj.weight_scale"] = np.float32(1e-5)
    del tensors["mlp.experts.2.up_proj.weight_scale"]
    (found,) = findings(write(tmp_path / "model.safetensors", tensors))

    assert found.name == "scale-missing"
