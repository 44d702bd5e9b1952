"""Why a tensor changed: each explanation with its twin that only looks like it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pairs import drawn, drift, model, only
from pairs import found as findings

from gradscope.drift.result import Explanation, TensorDrift

NAME = "layers.1.q_proj.weight"


def changed(folder: Path, new: torch.Tensor, name: str = NAME) -> TensorDrift:
    """What is said of one tensor that became another."""
    return only(drift(folder, model(), model() | {name: new}), name)


def why(folder: Path, new: torch.Tensor, name: str = NAME) -> Explanation | None:
    return changed(folder, new, name).explanation


def kind(folder: Path, new: torch.Tensor, name: str = NAME) -> str | None:
    told = why(folder, new, name)
    return None if told is None else told.kind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_cast_is_rounding_and_no_finding(tmp_path: Path, dtype: torch.dtype) -> None:
    report = drift(tmp_path, model(), {n: t.to(dtype) for n, t in model().items()})

    assert report.result is not None
    assert {t.status for t in report.result.tensors} == {"rounding"}
    assert findings(report) == {}
    assert report.result.affected_layers == ()


def test_a_cast_that_was_trained_on_is_a_change(tmp_path: Path) -> None:
    new = (model()[NAME] * (1 + 0.01 * drawn(32, 32, seed=5))).bfloat16()

    told = changed(tmp_path, new)

    assert (told.status, told.explanation) == ("changed", None)
    assert (told.base_dtype, told.dtype) == ("F32", "BF16")


def test_more_precision_of_the_same_values_is_retyped(tmp_path: Path) -> None:
    base = {n: t.bfloat16() for n, t in model().items()}
    report = drift(tmp_path, base, {n: t.float() for n, t in base.items()})

    assert report.result is not None
    assert {t.status for t in report.result.tensors} == {"retyped"}
    assert only(report, NAME).changed_fraction == 0


def test_a_base_that_is_the_rounded_new_tensor_is_told_so(tmp_path: Path) -> None:
    report = drift(tmp_path, {n: t.bfloat16() for n, t in model().items()}, model())

    told = only(report, NAME).explanation
    assert told is not None
    assert told.text == "the base is the new tensor rounded to BF16 to nearest"


def test_rounding_on_the_way_is_seen_in_the_wider_type(tmp_path: Path) -> None:
    told = why(tmp_path, model()[NAME].bfloat16().float())

    assert told is not None
    assert told.text == "rounded to BF16 to nearest, and stored as F32"


def test_truncation_is_told_from_rounding(tmp_path: Path) -> None:
    low = (model()[NAME].view(torch.int32) & -65536).view(torch.float32)

    told = why(tmp_path, low.bfloat16())

    assert told is not None
    assert told.text == "rounded to BF16 towards zero"


def test_elements_beyond_the_range_of_a_cast_are_a_finding(tmp_path: Path) -> None:
    large = model()[NAME].clone()
    large[0, :3] = 1e6
    base = model() | {NAME: large}
    report = drift(tmp_path, base, {n: t.half() for n, t in base.items()})

    told = only(report, NAME).explanation
    assert told is not None
    assert told.text == "rounded to F16 to nearest; 3 elements beyond its range"
    assert findings(report) == {"weight-drift": ["high"]}


def test_a_tensor_below_the_range_of_its_cast_is_a_finding(tmp_path: Path) -> None:
    base = model() | {NAME: model()[NAME] * 1e-9}
    report = drift(tmp_path, base, {n: t.half() for n, t in base.items()})

    assert findings(report) == {"weight-drift": ["medium"]}
    assert "became zero" in report.findings[0].message


@pytest.mark.parametrize("bit", [0, 22, 23, 30, 31])
def test_one_flipped_bit_is_named(tmp_path: Path, bit: int) -> None:
    new = model()[NAME].clone()
    flip = torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    new.view(torch.int32)[3, 7] ^= flip

    told = why(tmp_path, new)

    assert told is not None
    assert told.text.startswith(f"one bit differs: bit {bit} of element [3, 7]")
    new[3, 8] += 1
    assert kind(tmp_path, new) != "bit-flip"


def test_a_flipped_bit_of_a_narrow_type_is_named(tmp_path: Path) -> None:
    base = {NAME: model()[NAME].to(torch.float8_e4m3fn)}
    new = base[NAME].clone()
    new.view(torch.uint8)[31, 31] ^= 8

    told = only(drift(tmp_path, base, {NAME: new}), NAME).explanation

    assert told is not None
    assert told.text == "one bit differs: bit 3 of element [31, 31] (exponent)"


def test_swapped_bytes_are_told(tmp_path: Path) -> None:
    new = torch.from_numpy(model()[NAME].numpy().byteswap().copy())

    report = drift(tmp_path, model(), model() | {NAME: new})

    assert only(report, NAME).explanation is not None
    assert "critical" in findings(report)["weight-drift"]
    assert kind(tmp_path, new + 1) != "byte-swapped"


def test_zeros_that_came_and_went_are_told(tmp_path: Path) -> None:
    assert kind(tmp_path, torch.zeros(32, 32)) == "zeroed"
    report = drift(tmp_path, model() | {NAME: torch.zeros(32, 32)}, model())
    told = only(report, NAME)
    assert told.explanation is not None
    assert told.explanation.kind == "from-zero"
    assert told.relative_drift is None


@pytest.mark.parametrize("factor", [0.5, 2.0, 1.07, -1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_is_told_with_its_factor(tmp_path: Path, factor: float, dtype: torch.dtype) -> None:
    base = {n: t.to(dtype) for n, t in model().items()}
    scaled = (base[NAME].float() * factor).to(dtype)

    told = only(drift(tmp_path, base, base | {NAME: scaled}), NAME).explanation

    assert told is not None
    assert told.kind == "scaled"
    assert told.facts["factor"] == pytest.approx(factor, rel=2e-3)
    assert told.residual is not None
    assert told.residual < 2.0**-8


def test_a_scaling_with_something_added_is_no_scaling(tmp_path: Path) -> None:
    assert kind(tmp_path, model()[NAME] * 0.5 + 1e-3 * drawn(32, 32, seed=9)) != "scaled"


def test_pruning_is_told(tmp_path: Path) -> None:
    mask = drawn(32, 32, seed=4) > 0

    told = why(tmp_path, model()[NAME] * mask)

    assert told is not None
    assert told.kind == "pruned"
    assert told.facts["elements"] == int((~mask).sum())
    assert kind(tmp_path, model()[NAME] * mask + 1e-4 * ~mask) != "pruned"


def test_permuted_rows_heads_and_columns_are_told(tmp_path: Path) -> None:
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    w = model()[NAME]
    heads = w.reshape(4, 8, 32)[[2, 0, 3, 1]].reshape(32, 32)
    rotary = w.reshape(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)  # as conversions to rotate_half

    rows, blocks, halves, columns = (
        why(tmp_path, t) for t in (w[order], heads, rotary, w[:, order])
    )

    assert rows is not None
    assert rows.text.endswith("32 rows are permuted")
    assert blocks is not None
    assert blocks.text == "the rows are permuted in blocks of 8 (heads)"
    assert halves is not None
    assert "heads of 8" in halves.text
    assert "interleaved" in halves.text
    assert columns is not None
    assert columns.text.endswith("32 columns are permuted")
    scaled = why(tmp_path, w[order] * 1.01)
    assert scaled is not None
    assert scaled.text.endswith("32 rows are permuted, and moved by 0.0099 of their norm")


def test_channels_in_another_order_are_permuted_columns(tmp_path: Path) -> None:
    base = {"conv.weight": drawn(16, 3, 3, 3)}

    told = only(drift(tmp_path, base, {"conv.weight": base["conv.weight"].flip(1)}), "conv.weight")

    assert told.explanation is not None
    assert told.explanation.kind == "permuted"
    assert "columns" in told.explanation.text


def test_transposition_is_told_in_the_same_and_in_another_shape(tmp_path: Path) -> None:
    assert kind(tmp_path, model()[NAME].T) == "transposed"
    base = {"w": drawn(24, 48), "conv": drawn(5, 4, 3, 3)}
    new = {"w": base["w"].T, "conv": base["conv"].permute(2, 3, 1, 0)}

    report = drift(tmp_path, base, new)

    assert [only(report, n).status for n in base] == ["reshaped", "reshaped"]
    assert [only(report, n).explanation.kind for n in base] == ["transposed", "transposed"]


def test_other_shapes_are_told(tmp_path: Path) -> None:
    base = {"flat": drawn(4, 6), "table.weight": drawn(10, 4), "head.weight": drawn(10, 4)}
    new = {
        "flat": base["flat"].reshape(24),
        "table.weight": torch.cat([base["table.weight"], drawn(2, 4, seed=3)]),
        "head.weight": drawn(7, 4, seed=8),
    }

    report = drift(tmp_path, base, new)

    assert only(report, "flat").explanation.kind == "reshaped"
    assert only(report, "table.weight").explanation.text == (
        "2 rows added; the first 10 are the same"
    )
    assert "drifted by" in only(report, "head.weight").explanation.text
    assert findings(report) == {"tensor-set-changed": ["medium"]}


def test_a_few_rows_that_changed_are_named(tmp_path: Path) -> None:
    new = model()["embed_tokens.weight"].clone()
    new[[3, 4, 40]] += 0.1

    told = changed(tmp_path, new, "embed_tokens.weight")

    assert told.explanation is not None
    assert told.explanation.text == "only rows 3-4, 40 of 50 changed"
    assert told.rows is not None
    assert (told.rows.changed, told.rows.which) == (3, "3-4, 40")
    assert {r.row for r in told.rows.top} == {3, 4, 40}


def test_an_unrelated_matrix_is_replaced_and_a_far_one_is_not(tmp_path: Path) -> None:
    new = model(seed=7)[NAME]

    report = drift(tmp_path, model(), model() | {NAME: new})

    assert only(report, NAME).status == "replaced"
    assert findings(report)["reinitialized"] == ["high"]
    assert changed(tmp_path, new + model()[NAME]).status == "changed"


def test_two_different_models_are_one_finding(tmp_path: Path) -> None:
    report = drift(tmp_path, model(), model(seed=7))

    (finding,) = [f for f in report.findings if f.name == "reinitialized"]
    assert "two different models" in finding.recommendation


def test_training_leaves_a_change_without_a_cause(tmp_path: Path) -> None:
    new = {n: t + 0.02 * t.norm() / t.numel() ** 0.5 * drawn(*t.shape, seed=3)
           for n, t in model().items()}  # fmt: skip

    report = drift(tmp_path, model(), new)

    assert report.result is not None
    assert {t.status for t in report.result.tensors} == {"changed"}
    assert {t.explanation for t in report.result.tensors} == {None}
    assert findings(report) == {"weight-drift": ["low"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "shape"), [(1, (64, 96)), (4, (96, 64)), (16, (300, 280))])
def test_an_update_of_low_rank_is_told_with_its_rank(
    tmp_path: Path, dtype: torch.dtype, rank: int, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    base = (drawn(rows, columns) * 0.05).to(dtype)
    update = drawn(rows, rank, seed=1) @ drawn(rank, columns, seed=2)
    new = (base.double() + 0.02 * update.double() / rank**0.5).to(dtype)

    told = only(drift(tmp_path, {"w.weight": base}, {"w.weight": new}), "w.weight").explanation

    assert told is not None
    assert told.kind == "low-rank"
    sigma = torch.linalg.svdvals(new.double() - base.double()).square()
    held = float(sigma[: told.facts["rank"]].sum() / sigma.sum())
    assert held - 1e-3 < told.facts["energy"] <= held + 1e-12  # a sketch holds a little less
    assert rank - 1 <= told.facts["rank"] <= rank  # 99 % of the energy may need one fewer
    assert told.residual is not None
    assert told.residual < 0.1


def test_an_update_of_full_rank_or_of_low_rank_and_noise_is_not_of_low_rank(
    tmp_path: Path,
) -> None:
    base = 0.05 * drawn(96, 96)
    update = 0.02 * drawn(96, 4, seed=1) @ drawn(4, 96, seed=2)

    for new in (base + 0.02 * drawn(96, 96, seed=3), base + update + 0.02 * drawn(96, 96, seed=3)):
        told = only(drift(tmp_path, {"w.weight": base}, {"w.weight": new}), "w.weight")
        assert told.explanation is None


def test_only_a_corner_of_low_rank_is_not_enough(tmp_path: Path) -> None:
    base = 0.05 * drawn(600, 600)
    update = 0.02 * drawn(600, 2, seed=1) @ drawn(2, 600, seed=2)
    update[300:, 300:] = 0.02 * drawn(300, 300, seed=3)

    told = only(drift(tmp_path, {"w.weight": base}, {"w.weight": base + update}), "w.weight")

    assert told.explanation is None


@pytest.mark.parametrize("turned", [False, True])
def test_two_halves_of_one_original_are_roundings_of_it(tmp_path: Path, turned: bool) -> None:
    types = (torch.float16, torch.bfloat16) if turned else (torch.bfloat16, torch.float16)
    base, new = ({n: t.to(d) for n, t in model().items()} for d in types)
    apart = {n: (t + 1e-4 * drawn(*t.shape, seed=8)).to(types[1]) for n, t in model().items()}

    report = drift(tmp_path, base, new, expect="converted")

    assert findings(report) == {}
    assert {t.status for t in report.result.tensors} == {"rounding"}
    assert "the same values" in only(report, "layers.0.mlp.weight").explanation.text
    trained = drift(tmp_path, base, apart, expect="converted")
    assert findings(trained)["unexpected-change"] == ["high"]
