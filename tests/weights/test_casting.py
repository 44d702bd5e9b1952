"""``--cast``: which tensors are cast, what a model saves by it, and what would be best."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import gradscope
from gradscope.errors import UsageError
from gradscope.report.formats import Display, renderer
from gradscope.report.panels import panels_of
from gradscope.weights.result import CastResult, WeightsResult

from .checkpoints import Array, bf16, conv_net, gaussian, transformer, write

UP = "model.layers.1.mlp.up_proj.weight"
GAIN = "model.layers.1.input_layernorm.weight"


def cast(path: Path, *types: str, **options: object) -> WeightsResult:
    report = gradscope.analyze_weights(path, cast=types, **options)
    assert report.result is not None
    assert not report.errors
    return report.result


def of(result: WeightsResult, name: str) -> dict[str, CastResult]:
    (tensor,) = (t for t in result.tensors if t.name == name)
    return {c.format: c for c in tensor.casts}


def snr(exact: Array, cast_: Array) -> float:
    error = (exact.astype(np.float64) - cast_) ** 2
    return 10 * math.log10(float((exact.astype(np.float64) ** 2).sum() / error.sum()))


def int8(x: Array, axis: int) -> Array:
    """One scale for each index of ``axis``."""
    others = tuple(a for a in range(x.ndim) if a != axis)
    scale = np.abs(x).max(axis=others, keepdims=True) / np.float32(127)
    return np.rint(x / scale) * scale.astype(np.float64)


def test_half_precision_is_for_all_that_is_wider_and_halves_it(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", conv_net())

    result = cast(path, "fp16")

    (summary,) = result.casting.formats
    floats = [t for t in result.tensors if t.dtype == "F32"]
    counters = sum(8 for t in result.tensors if t.dtype == "I64")
    assert [t.name for t in result.tensors if t.casts] == [t.name for t in floats]
    assert summary.bytes == counters + sum(2 * t.numel for t in floats)
    assert result.casting.stored_bytes == counters + sum(4 * t.numel for t in floats)
    assert summary.saved_fraction == 1 - summary.bytes / result.casting.stored_bytes


def test_types_of_a_byte_and_less_are_for_matrices(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", transformer())

    result = cast(path, "fp8_e4m3", "bf16", "nvfp4")

    assert list(of(result, UP)) == ["fp8_e4m3", "bf16", "nvfp4"]
    assert list(of(result, GAIN)) == ["bf16"]


def test_what_is_smaller_already_is_left_alone(tmp_path: Path) -> None:
    narrow = {name: bf16(x) for name, x in transformer().items()}
    path = write(tmp_path / "m.safetensors", narrow | {"step": np.array(3)})

    result = cast(path, "fp16", "fp8_e4m3")

    assert of(result, UP)["fp16"].bytes == 2 * 128 * 32
    fp16, fp8 = result.casting.formats
    assert fp16.saved_fraction == 0
    assert 0.4 < fp8.saved_fraction < 0.5


def test_what_training_keeps_beside_the_model_is_not_cast(tmp_path: Path) -> None:
    weights = {k: torch.from_numpy(v) for k, v in transformer().items()}
    state = {i: {"exp_avg": v, "exp_avg_sq": v**2} for i, v in enumerate(weights.values())}
    path = tmp_path / "ckpt.pt"
    torch.save({"model": weights, "optimizer": {"state": state, "param_groups": []}}, path)

    result = cast(path, "fp16")

    assert {t.name for t in result.tensors if t.casts} <= {
        t.name for t in result.tensors if "exp_avg" not in t.name
    }
    assert result.casting.stored_bytes == sum(4 * v.numel() for v in weights.values())


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("h.0.mlp.c_fc.weight", (48, 192), 1),  # GPT-2's Conv1D: the bias tells
        ("blocks.0.conv.weight", (24, 8, 3, 3), 0),
        ("up.0.deconv.weight", (24, 8, 3, 3), 1),
        ("fc.weight", (24, 40), 0),
    ],
)
def test_rows_that_share_a_scale_are_output_units(
    name: str, shape: tuple[int, ...], axis: int, tmp_path: Path
) -> None:
    x = gaussian(*shape, seed=4)
    x *= (
        (10 ** np.linspace(-2, 0, shape[axis]))
        .reshape([-1 if a == axis else 1 for a in range(len(shape))])
        .astype(np.float32)
    )
    bias = name.replace("weight", "bias")
    path = write(tmp_path / "m.safetensors", {name: x, bias: gaussian(shape[axis], seed=5)})

    result = cast(path, "int8")

    assert of(result, name)["int8"].snr_db == pytest.approx(snr(x, int8(x, axis)), abs=1e-6)
    assert of(result, name)["int8"].bytes == x.size + 4 * shape[axis]


def test_the_units_of_each_stacked_expert_have_scales_of_their_own(tmp_path: Path) -> None:
    x = gaussian(4, 32, 64, seed=6) * np.float32([[[1]], [[10]], [[0.1]], [[1]]])
    router = {"model.layers.0.mlp.router.weight": gaussian(4, 32, seed=7)}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    down = {"model.layers.0.mlp.experts.down_proj": gaussian(4, 32, 32, seed=8)}
    path = write(tmp_path / "m.safetensors", {name: x, **down, **router})

    result = cast(path, "int8")

    rows = {snr(x, int8_of_experts(x, axis)) for axis in (1, 2)}
    assert any(of(result, name)["int8"].snr_db == pytest.approx(r, abs=1e-6) for r in rows)


def int8_of_experts(x: Array, axis: int) -> Array:
    return np.stack([int8(expert, axis - 1) for expert in x])


def test_the_plan_takes_the_fewest_bits_that_keep_enough(tmp_path: Path) -> None:
    tensors = transformer()
    tensors[UP][0, 0] = 300.0  # the one scale of the tensor leaves nothing for the others
    path = write(tmp_path / "m.safetensors", tensors)

    result = cast(path, "bf16", "int8:tensor", "nvfp4", "fp16", snr="35dB")

    plan = result.casting.plan
    chosen = {t.name: t.cast_plan for t in result.tensors}
    assert chosen["model.layers.0.mlp.up_proj.weight"] == "int8:tensor"
    assert chosen[UP] == "fp16"
    assert chosen[GAIN] == "fp16"  # of as many bits as bf16, and more exact
    for tensor in result.tensors:
        best = {c.format: c for c in tensor.casts}[tensor.cast_plan]
        assert min(best.snr_db, best.bulk_snr_db) >= 35
        smaller = [c for c in tensor.casts if c.bytes < 0.9 * best.bytes]
        assert all(min(c.snr_db, c.bulk_snr_db) < 35 or c.overflow_count for c in smaller)
    assert plan.bytes == sum(
        c.bytes for t in result.tensors for c in t.casts if c.format == t.cast_plan
    )


def test_the_expert_that_needs_more_than_the_others_is_named(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": gaussian(
            32, 64, seed=10 * layer + expert
        )
        for layer in range(2)
        for expert in range(4)
    }
    odd = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[odd][:, 5] *= 300  # a column of outliers: what a scale of the row cannot serve
    path = write(tmp_path / "m.safetensors", tensors)

    report = gradscope.analyze_weights(path, cast=["int8", "bf16"], snr=35)

    assert report.result.casting.plan.exceptions == {odd: "bf16"}
    shown = renderer("table")(report, Display())
    assert f"need more than their like: {odd} (bf16)" in shown


def with_outliers(columns: tuple[int, ...], axis: int = 1) -> dict[str, Array]:
    tensors = transformer(width=128)
    np.moveaxis(tensors[UP], axis, 1)[:, columns] *= 300
    return tensors


def kept_exactly(x: Array, columns: tuple[int, ...], cast_: Callable[[Array], Array]) -> float:
    """The ratio of all elements where some columns are kept and the others cast without them."""
    rest = x.copy()
    rest[:, columns] = 0
    error = (cast_(rest) - rest.astype(np.float64))[np.abs(x) <= np.abs(rest).max()]
    bulk = np.abs(rest) <= np.quantile(np.abs(x), 0.998)
    least = [float((x.astype(np.float64) ** 2).sum() / (error**2).sum())]
    noise = (cast_(rest) - rest.astype(np.float64))[bulk]
    least += [float((rest[bulk].astype(np.float64) ** 2).sum() / (noise**2).sum())]
    return 10 * math.log10(min(least))


def by_tensor(x: Array) -> Array:
    scale = np.abs(x).max() / np.float32(127)
    return np.rint(x / scale) * scale.astype(np.float64)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(
    ("kind", "cast_"), [("int8", lambda x: int8(x, 0)), ("int8:tensor", by_tensor)]
)
@pytest.mark.parametrize("columns", [(5,), (5, 77)])
def test_the_columns_are_named_without_which_fewer_bits_would_do(
    columns: tuple[int, ...], kind: str, cast_: Callable[[Array], Array], dtype: str, tmp_path: Path
) -> None:
    tensors = with_outliers(columns)
    drawn = torch.from_numpy(tensors[UP])
    x = (drawn.bfloat16().float() if dtype == "BF16" else drawn).numpy()
    made = {n: bf16(t) for n, t in tensors.items()} if dtype == "BF16" else tensors
    path = write(tmp_path / "m.safetensors", made)

    result = cast(path, kind, "fp16", snr=33)

    having = {t.name: t.kept_columns for t in result.tensors if t.kept_columns is not None}
    assert list(having) == [UP]
    assert (having[UP].format, having[UP].columns) == (kind, columns)
    assert having[UP].cast_snr_db < 33 <= having[UP].snr_db
    assert having[UP].snr_db == pytest.approx(kept_exactly(x, columns, cast_), abs=0.5)
    stored = 2 if dtype == "BF16" else 4
    scales = 4 * len(x) if kind == "int8" else 4
    wanted = x.size - len(x) * len(columns) + scales + stored * len(x) * len(columns)
    assert having[UP].bytes == wanted


def test_columns_are_inputs_in_every_layout(tmp_path: Path) -> None:
    """GPT-2's Conv1D [in, out], and stacked experts."""
    conv1d = gaussian(128, 512, seed=4)
    conv1d[9] *= 300
    experts = gaussian(4, 64, 128, seed=6)
    experts[2, :, 7] *= 300
    tensors = {
        "h.0.mlp.c_fc.weight": conv1d, "h.0.mlp.c_fc.bias": gaussian(512, seed=5),
        "model.layers.0.mlp.experts.gate_up_proj": experts,
        "model.layers.0.mlp.experts.down_proj": gaussian(4, 128, 32, seed=8),
        "model.layers.0.mlp.router.weight": gaussian(4, 128, seed=7),
    }  # fmt: skip

    result = cast(write(tmp_path / "m.safetensors", tensors), "int8", "bf16", snr=33)

    having = {t.name: t.kept_columns for t in result.tensors if t.kept_columns is not None}
    assert having["h.0.mlp.c_fc.weight"].columns == (9,)
    assert having["model.layers.0.mlp.experts.gate_up_proj"].columns == (7,)


def ratio_of(x: Array, cast_: Callable[[Array], Array], limit: float) -> float:
    """The lower of both ratios, of all elements and of those within a limit."""
    error, x64 = cast_(x) - x.astype(np.float64), x.astype(np.float64)
    bulk = np.abs(x) <= limit
    least = min((x64[at] ** 2).sum() / (error[at] ** 2).sum() for at in (bulk, np.abs(x) < np.inf))
    return 10 * math.log10(least)


@pytest.mark.parametrize(("odd", "named"), [((3,), (3,)), ((0, 6), (0, 6)), ((1, 2, 4), None),
                                            ((), None)])  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "cast_"), [("int8", lambda x: int8(x, 0)), ("int8:tensor", by_tensor)]
)
def test_the_experts_are_named_without_which_fewer_bits_would_do(
    odd: tuple[int, ...], named: tuple[int, ...] | None, kind: str,
    cast_: Callable[[Array], Array], tmp_path: Path,
) -> None:  # fmt: skip
    experts = gaussian(8, 64, 128, seed=6)
    for number in odd:  # in every row, and in another column: no column can be kept for all
        experts[number, np.arange(64), np.arange(64) + number] *= 300
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {name: experts, "model.layers.0.mlp.router.weight": gaussian(8, 128, seed=7),
               "model.layers.0.mlp.experts.down_proj": gaussian(8, 128, 32, seed=8)}  # fmt: skip
    path = write(tmp_path / "m.safetensors", tensors)

    result = cast(path, kind, "fp16", snr=33)

    having = {t.name: t.kept_experts for t in result.tensors if t.kept_experts is not None}
    assert {n: kept.experts for n, kept in having.items()} == ({name: named} if named else {})
    if named:
        kept = having[name]
        limit = np.abs(np.quantile(experts, [0.001, 0.999])).max()
        each = [ratio_of(x, cast_, limit) for x in experts]
        assert kept.cast_snr_db == pytest.approx(min(each), abs=0.05)
        assert kept.snr_db == pytest.approx(
            min(r for n, r in enumerate(each) if n not in named), abs=0.05
        )
        scales = 4 * 64 if kind == "int8" else 4
        rest = 8 - len(named)
        assert kept.bytes == rest * (64 * 128 + scales) + len(named) * 64 * 128 * 4


def test_no_column_is_named_where_none_would_help(tmp_path: Path) -> None:
    rows, many, convolution = with_outliers((3,), axis=0), with_outliers(tuple(range(0, 99, 7))), {}
    convolution["features.0.weight"] = gaussian(24, 64, 3, 3)
    convolution["features.0.weight"][:, 5] *= 300

    for number, tensors in enumerate((transformer(width=128), rows, many, convolution)):
        path = write(tmp_path / f"{number}.safetensors", tensors)
        result = cast(path, "int8", "fp16", snr=33)
        assert not any(t.kept_columns for t in result.tensors), number
    assert not any(t.kept_columns for t in cast(path, "int8").tensors)


def test_the_table_says_which_columns_to_keep(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", with_outliers((5, 77)))
    report = gradscope.analyze_weights(path, cast=["int8", "bf16"], snr=33)

    shown = renderer("table")(report, Display())

    assert f"would do with fewer bits if a few columns stayed as stored: {UP} (int8: " in shown
    assert "dB without columns 5, 77)" in shown


def test_a_type_that_overflows_is_never_planned_and_the_tensor_is_named(tmp_path: Path) -> None:
    tensors = transformer()
    tensors[UP][0, 0] = 1e5
    path = write(tmp_path / "m.safetensors", tensors)

    result = cast(path, "fp16", snr=20)

    assert of(result, UP)["fp16"].overflow_count == 1
    assert result.casting.plan.kept == (UP,)
    assert result.casting.formats[0].overflow_count == 1
    assert result.casting.formats[0].below == 1


def test_the_worst_tensor_of_a_type_is_named(tmp_path: Path) -> None:
    tensors = transformer()
    tensors[UP] *= np.float32(1e-7)  # subnormal in float16
    path = write(tmp_path / "m.safetensors", tensors)

    (summary,) = cast(path, "fp16").casting.formats

    assert summary.worst_tensor == UP
    assert summary.worst_snr_db == of(cast(path, "fp16"), UP)["fp16"].snr_db < 30 < summary.snr_db


def test_the_ratio_of_a_model_is_that_of_all_its_elements(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": gaussian(16, 32, seed=i) * np.float32(10**i) for i in range(3)}
    path = write(tmp_path / "m.safetensors", tensors)
    flat = np.concatenate([x.reshape(-1) for x in tensors.values()])

    (summary,) = cast(path, "fp16").casting.formats

    wanted = snr(flat, flat.astype(np.float16).astype(np.float64))
    assert summary.snr_db == pytest.approx(wanted, rel=1e-9)


def test_without_casts_there_is_nothing_of_them(tmp_path: Path) -> None:
    result = cast(write(tmp_path / "m.safetensors", transformer()))

    assert result.casting is None
    assert not any(t.casts for t in result.tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snr": "30dB"}, "give --cast"),
        ({"cast": ["fp16"], "snr": "much"}, "no number of decibels"),
        ({"cast": ["fp17"]}, "cannot cast to 'fp17'"),
        ({"cast": ["fp16"], "headers_only": True}, "--headers-only"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.safetensors", transformer())

    with pytest.raises(UsageError, match=message):
        gradscope.analyze_weights(path, **options)


@pytest.mark.parametrize("options", [["--cast", "fp17"], ["--snr", "30dB"], ["--headers-only"]])
def test_neither_wrong_requests_nor_headers_import_numerical_libraries(options: list[str]) -> None:
    file = Path(gradscope.__file__).parents[1] / "fixtures" / "digits.safetensors"
    command = [sys.executable, "-X", "importtime", "-m", "gradscope", "weights", str(file)]

    done = subprocess.run([*command, *options], capture_output=True, text=True)

    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "gradscope.cli" in imported
    assert not imported & {"numpy", "numba", "torch"}


def test_the_table_says_what_each_type_costs_and_what_to_take(tmp_path: Path) -> None:
    tensors = transformer()
    tensors[UP][0, 0] = 1e5
    path = write(tmp_path / "m.safetensors", tensors)
    report = gradscope.analyze_weights(path, cast=["fp16", "fp8_e4m3"], snr=20)

    shown = renderer("table")(report, Display())

    (fp16,) = (line.split() for line in shown.splitlines() if line.startswith("fp16"))
    assert fp16[:2] == ["fp16", "31"]
    assert fp16[-1] == UP
    assert "overflows" in fp16
    assert "At 20 dB or better, tensor by tensor:" in shown
    assert f"keep 1 tensor as stored: {UP}" in shown


def test_a_pull_request_shows_what_each_type_costs_and_what_to_take(tmp_path: Path) -> None:
    tensors = transformer()
    tensors[UP][0, 0] = 1e5
    tensors["a|b<img>.weight"] = tensors.pop(UP)
    path = write(tmp_path / "m.safetensors", tensors)
    report = gradscope.analyze_weights(path, cast=["fp16", "fp8_e4m3"], snr=20)

    shown = renderer("markdown")(report)

    (at,) = (i for i, line in enumerate(shown.splitlines()) if line.startswith("### Casts"))
    heading, signs, fp16, fp8 = shown.splitlines()[at + 2 : at + 6]
    assert heading.startswith("| type | tensors | size | saved | SNR dB |")
    assert signs.startswith("| :--- | ---: |")
    assert fp16.startswith("| fp16 | 31 | ")
    assert fp16.endswith("| overflows | 1 | 0 | 1 | a\\|b\\<img\\>.weight |")
    assert fp8.startswith("| fp8\\_e4m3 | ")
    assert all(r.replace("\\|", "").count("|") == heading.count("|") for r in (signs, fp16, fp8))
    assert "At 20 dB or better, tensor by tensor:" in shown


def test_a_page_has_the_costs_of_each_type(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", transformer())
    report = gradscope.analyze_weights(path, cast=["fp16", "int8"], snr=20)

    (grid,) = (p for p in panels_of(report) if p.title == "Casts")

    assert [row.cells[0] for row in grid.rows] == ["fp16", "int8"]
    assert grid.rows[1].cells[2] == report.result.casting.formats[1].bytes
    assert "At 20 dB or better" in grid.caption
    assert all(len(row.cells) == len(grid.columns) for row in grid.rows)


def test_the_same_bytes_come_out_for_any_number_of_threads(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", transformer())
    kinds = ["fp16", "fp8_e4m3:row", "int8", "nvfp4"]

    one, three = (gradscope.analyze_weights(path, cast=kinds, snr=30, jobs=j) for j in (1, 3))

    assert renderer("json")(one, Display()) == renderer("json")(three, Display())
