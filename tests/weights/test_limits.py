"""Where each rule about weights begins to speak: on its documented limits, from both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.quantization.weights import Quantization
from gradscope.report.rules import Observation
from gradscope.weights.result import ElementResult, Examined, Need, TensorResult
from gradscope.weights.roles import Role
from gradscope.weights.rules.copies import duplicate_tensors
from gradscope.weights.rules.empty import empty_tensor
from gradscope.weights.rules.numerics import dtype_headroom, redundant_precision
from gradscope.weights.rules.scales import scale_missing
from gradscope.weights.rules.shape import heavy_tails, high_sparsity, outliers, skewed
from gradscope.weights.rules.tables import undertrained_rows
from gradscope.weights.rules.training import negative_variance, untrained
from gradscope.weights.rules.units import dead_units, duplicate_units
from gradscope.weights.rules.values import all_zero, constant_tensor, extreme_value, non_finite

from .made import Fields, tensor

Rule = Callable[..., Iterable[Any]]


def found(rule: Rule, *tensors: TensorResult, **metadata: object) -> list[Observation]:
    checkpoint = Checkpoint("model.safetensors", "safetensors", 0, (), metadata=metadata)
    return list(rule(Examined(checkpoint, tensors, frozenset(Need))))


def severity(rule: Rule, *tensors: TensorResult) -> str | None:
    """None is silence, "own" the rule's own severity."""
    seen = found(rule, *tensors)
    assert len(seen) <= 1
    return str(seen[0].severity or "own") if seen else None


def top(*scores: float | None, index: tuple[int, ...] = (3, 4)) -> tuple[ElementResult, ...]:
    return tuple(ElementResult(index=index, value=1.0, score=score) for score in scores)


def peak(ratio: float) -> dict[str, Any]:
    return {"peak_ratio": ratio, "top": top(30.0)}


SMALL, ENOUGH = {"shape": (27, 37)}, {"shape": (40, 25)}  # 999 and 1,000 elements
KURTOSIS = {"statistics": {"trimmed_kurtosis": 30.0}}
SKEWNESS = {"statistics": {"trimmed_skewness": -3.0}}
TINY = {"shape": (3, 85)}  # 255

#: rule: what is just quiet, what just speaks.
LIMITS: list[tuple[Rule, Fields, Fields]] = [
    (heavy_tails, {"statistics": {"trimmed_kurtosis": 10.0}},
     {"statistics": {"trimmed_kurtosis": 10.1}}),
    (heavy_tails, {"role": Role.DEPTHWISE, "statistics": {"trimmed_kurtosis": 25.0}},
     {"role": Role.DEPTHWISE, "statistics": {"trimmed_kurtosis": 25.1}}),
    (heavy_tails, {**SMALL, **KURTOSIS}, {**ENOUGH, **KURTOSIS}),
    (heavy_tails, {"role": Role.EMBEDDING, **KURTOSIS}, {"role": Role.CONV, **KURTOSIS}),
    (skewed, {"statistics": {"trimmed_skewness": 2.0}}, {"statistics": {"trimmed_skewness": 2.1}}),
    (skewed, {**SMALL, **SKEWNESS}, {**ENOUGH, **SKEWNESS}),
    (skewed, {"statistics": {"trimmed_skewness": 3.0, "min": 0.0}},
     {"statistics": {"trimmed_skewness": 3.0, "min": -1e-9}}),
    (outliers, {"outliers": peak(50.0)}, {"outliers": peak(50.1)}),
    (outliers, {"outliers": peak(10_001.0)}, {"outliers": peak(10_000.0)}),
    (outliers, {**SMALL, "outliers": peak(60.0)}, {**ENOUGH, "outliers": peak(60.0)}),
    (outliers, {"role": Role.EMBEDDING, "outliers": peak(60.0)},
     {"role": Role.LORA_A, "outliers": peak(60.0)}),
    (high_sparsity, {"statistics": {"zero_count": 2000}}, {"statistics": {"zero_count": 2001}}),
    (high_sparsity, {"statistics": {"zero_count": 2500}, "units": {"dead_rows": 10}},
     {"statistics": {"zero_count": 2501}, "units": {"dead_rows": 10}}),
    (high_sparsity, {"statistics": {"zero_count": 3999}, "units": {"dead_rows": 40}},
     {"statistics": {"zero_count": 3999}, "units": {"dead_rows": 39}}),
    (extreme_value, {"outliers": peak(1e4)}, {"outliers": peak(1.01e4)}),
    (extreme_value, {**SMALL, "outliers": peak(2e4)}, {**ENOUGH, "outliers": peak(2e4)}),
    (extreme_value, {"role": Role.RUNNING_VAR, "outliers": peak(2e4)},
     {"role": Role.RUNNING_MEAN, "outliers": peak(2e4)}),
    (extreme_value, {"role": Role.OPTIMIZER, "outliers": peak(2e4)},
     {"role": Role.VECTOR, "outliers": peak(2e4)}),
    (extreme_value, {"statistics": {"abs_max": 1e6}}, {"statistics": {"abs_max": 1.01e6}}),
    (extreme_value, {"role": Role.VECTOR, "statistics": {"abs_max": 2e6}},
     {"role": Role.BIAS, "statistics": {"abs_max": 2e6}}),
    (extreme_value, {"outliers": {"top": top(5000.0, 50.0)}},
     {"outliers": {"top": top(5001.0, 50.0)}}),
    (extreme_value, {"outliers": {"top": top(50.0, 0.1)}}, {"outliers": {"top": top(51.0, 0.1)}}),
    (extreme_value, {"role": Role.BIAS, "outliers": {"top": top(1e6, 100.0)}},
     {"role": Role.BIAS, "outliers": {"top": top(1.001e6, 100.0)}}),
    (extreme_value, {"outliers": {"top": top(49.0, 0.0)}}, {"outliers": {"top": top(51.0, 0.0)}}),
    (constant_tensor, {"shape": (3, 5), "statistics": {"min": 0.5, "max": 0.5}},
     {"shape": (4, 4), "statistics": {"min": 0.5, "max": 0.5}}),
    (constant_tensor, {"statistics": {"min": 0.0, "max": 0.0}},
     {"statistics": {"min": -0.1, "max": -0.1}}),
    (constant_tensor, {"statistics": {"min": 0.5, "max": 0.5, "nan_count": 1}},
     {"statistics": {"min": 0.5, "max": 0.5, "nan_count": 0}}),
    (constant_tensor, {"role": Role.RUNNING_VAR, "statistics": {"min": 0.5, "max": 0.5}},
     {"role": Role.VECTOR, "statistics": {"min": 0.5, "max": 0.5}}),
    (all_zero, {"statistics": {"zero_count": 3999}}, {"statistics": {"zero_count": 4000}}),
    (dead_units, {"shape": (1, 9), "units": {"dead_rows": 1}},
     {"shape": (2, 9), "units": {"dead_rows": 1}}),
    (dead_units, {"role": Role.EMBEDDING, "units": {"dead_rows": 40}},
     {"role": Role.CONV, "units": {"dead_rows": 1}}),
    (duplicate_units, {"shape": (40, 7), "units": {"duplicate_rows": 5, "duplicates": ((0, 1),)}},
     {"shape": (40, 8), "units": {"duplicate_rows": 5, "duplicates": ((0, 1),)}}),
    (undertrained_rows, {"role": Role.EMBEDDING, "shape": (15, 9), "units": {"dead_rows": 4}},
     {"role": Role.EMBEDDING, "shape": (16, 9), "units": {"dead_rows": 4}}),
    (undertrained_rows, {"role": Role.EMBEDDING, "shape": (10, 9), "units": {"dead_rows": 3}},
     {"role": Role.EMBEDDING, "shape": (10, 9), "units": {"dead_rows": 4}}),
    (dtype_headroom, {"dtype": "F16", "numerics": {"headroom_bits": 1.0}},
     {"dtype": "F16", "numerics": {"headroom_bits": 0.99}}),
    # extreme-value judges weights that no training reaches
    (dtype_headroom, {"numerics": {"headroom_bits": 0.5}},
     {"role": Role.VECTOR, "numerics": {"headroom_bits": 0.5}}),
    (dtype_headroom, {"statistics": {"subnormal_count": 40}},
     {"statistics": {"subnormal_count": 41}}),
    (dtype_headroom, {**TINY, "statistics": {"subnormal_count": 99}},
     {"shape": (2, 128), "statistics": {"subnormal_count": 99}}),
    (dtype_headroom, {"role": Role.OPTIMIZER, "statistics": {"subnormal_count": 99}},
     {"role": Role.BIAS, "statistics": {"subnormal_count": 99}}),
    (dtype_headroom, {"dtype": "F8_E4M3", "numerics": {"saturated_fraction": 1e-3}},
     {"dtype": "F8_E4M3", "numerics": {"saturated_fraction": 1.1e-3}}),
    (redundant_precision, {**TINY, "numerics": {"payload": "F16"}},
     {"shape": (2, 128), "numerics": {"payload": "F16"}}),
    (redundant_precision, {"numerics": {"payload": "BF16"}, "statistics": {"min": 1.0}},
     {"numerics": {"payload": "BF16"}}),
    (untrained, {"role": Role.NORM_GAIN, "shape": (1,), "statistics": {"min": 1.0}},
     {"role": Role.NORM_GAIN, "shape": (2,), "statistics": {"min": 1.0}}),
    (untrained, {"role": Role.NORM_GAIN, "shape": (8,), "statistics": {"min": 0.0, "max": 0.0}},
     {"role": Role.NORM_GAIN, "shape": (8,), "statistics": {"min": 1.0, "max": 1.0}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "quiet", "loud"),
    LIMITS,
    ids=[f"{rule.__name__}{i}" for i, (rule, *_) in enumerate(LIMITS)],
)
def test_a_rule_speaks_beyond_its_limit_and_not_on_it(
    rule: Rule, quiet: Fields, loud: Fields
) -> None:
    assert found(rule, tensor(**quiet)) == []
    assert [seen.subject for seen in found(rule, tensor(**loud))] == ["a.weight"]


DEAD, TWINS = "dead_rows", "duplicate_rows"


@pytest.mark.parametrize(
    ("rule", "role", "units", "expected", "limit"),
    [
        (dead_units, Role.LINEAR, {DEAD: 4}, "info", 0.10),
        (dead_units, Role.LINEAR, {DEAD: 5}, "medium", 0.10),
        (dead_units, Role.LINEAR, {DEAD: 12}, "medium", 0.10),
        (dead_units, Role.LINEAR, {DEAD: 13}, "own", 0.30),
        (duplicate_units, Role.LINEAR, {TWINS: 4, "duplicates": ((0, 1),)}, "info", 0.10),
        (duplicate_units, Role.LINEAR, {TWINS: 5, "duplicates": ((0, 1),)}, "own", 0.10),
        (undertrained_rows, Role.EMBEDDING, {DEAD: 5, TWINS: 3}, "info", 0.20),
        (undertrained_rows, Role.EMBEDDING, {DEAD: 5, TWINS: 4}, "own", 0.20),
    ],
)
def test_a_share_of_forty_rows_decides_the_severity(
    rule: Rule, role: Role, units: Fields, expected: str, limit: float
) -> None:
    (seen,) = found(rule, tensor(role=role, units=units))

    assert str(seen.severity or "own") == expected
    assert seen.threshold == limit
    assert seen.evidence["affected_fraction"] == sum(units.get(k, 0) for k in (DEAD, TWINS)) / 40


@pytest.mark.parametrize(
    ("scores", "apart"),
    [((9e4, 60.0, 50.0), 1), ((9e4, 8e4, 70.0, 60.0), 2), ((9e4, 8e4, 7e4, 1.0), 3)],
)
def test_extreme_values_affect_as_many_elements_as_stand_apart(
    scores: tuple[float, ...], apart: int
) -> None:
    (seen,) = found(extreme_value, tensor(outliers={"top": top(*scores), "peak_ratio": 9.0}))

    assert seen.evidence["affected_fraction"] == apart / 4000
    assert seen.evidence["robust_score"] == 9e4
    assert seen.evidence["peak_ratio"] == 9.0


def test_an_extreme_magnitude_that_stands_in_a_crowd_affects_one_element() -> None:
    crowd = {"top": top(60.0, 59.0)}

    (seen,) = found(extreme_value, tensor(statistics={"abs_max": 2e6}, outliers=crowd))

    assert seen.evidence["affected_fraction"] == 1 / 4000


def test_values_that_are_not_finite_affect_their_share() -> None:
    bad = {"nan_count": 1, "posinf_count": 2, "neginf_count": 5}

    (seen,) = found(non_finite, tensor(statistics=bad))

    assert seen.evidence["affected_fraction"] == 8 / 4000
    assert seen.message.startswith("8 of 4,000")


@pytest.mark.parametrize(("hit", "score", "expected"), [(3, 20.1, 2), (3, 20.0, 0), (2, 30.0, 0)])
def test_an_outlier_dimension_takes_three_tensors_beyond_a_score_of_twenty(
    hit: int, score: float, expected: int
) -> None:
    layers = [
        tensor(name=f"layers.{i}.weight", outliers={"top": top(score, index=(7, i % hit))})
        for i in range(hit)
    ]
    same = [tensor(name="b.weight", outliers={"top": top(score, index=(1, 9))})]

    rows = [seen.subject for seen in found(outliers, *layers, *same)]

    assert rows == (["layers.*.weight[row 7]"] if expected else [])


def test_an_outlier_column_is_counted_from_the_last_dimension() -> None:
    layers = [
        tensor(
            name=f"layers.{i}.weight", role=Role.EXPERTS, shape=(2, 40, 50),
            outliers={"top": top(30.0, index=(0, i, 49))},
        )
        for i in range(4)
    ]  # fmt: skip

    (seen,) = found(outliers, *layers)

    assert seen.subject == "layers.*.weight[column 49]"
    assert seen.message.startswith("column 49 of 50 holds outliers in 4 tensors")
    assert "more" not in seen.message


def test_heavy_tails_are_one_finding_a_model_that_names_the_heaviest() -> None:
    layers = [
        tensor(name=f"{name}.weight", role=role, statistics={"trimmed_kurtosis": value})
        for name, role, value in (
            ("a", Role.LINEAR, 11.0), ("b", Role.DEPTHWISE, 24.0), ("c", Role.CONV, 90.0),
            ("d", Role.DEPTHWISE, 26.0), ("e", Role.EMBEDDING, 99.0), ("f", Role.LINEAR, 1.0),
        )
    ]  # fmt: skip

    (seen,) = found(heavy_tails, *layers)

    assert seen.subject == "c.weight"
    assert "c.weight (90), d.weight (26), a.weight (11)" in seen.message
    assert (seen.evidence["heavy_tensors"], seen.evidence["tensors"]) == (3, 5)


@pytest.mark.parametrize(("gone", "expected"), [(8, "info"), (9, "own")])
def test_more_matrices_gone_than_left_were_not_gathered(gone: int, expected: str) -> None:
    """A flat weight with elements, as e3nn has, counts as three matrices that are left."""
    empty = [tensor(name=f"{'abcdefghi'[i]}.weight", shape=(0,)) for i in range(gone)]
    left = [tensor(name=f"{'klmno'[i]}.weight", shape=(4, 4)) for i in range(5)]
    flat = [tensor(name="tp.weight", shape=(9,))]

    assert severity(empty_tensor, *empty, *left, *flat) == expected


@pytest.mark.parametrize(("shape", "copies"), [((9, 7), []), ((8, 8), ["b.weight"])])
def test_equal_matrices_of_sixty_four_elements_are_no_chance(
    shape: tuple[int, ...], copies: list[str]
) -> None:
    twins = [tensor(name=f"{name}.weight", shape=shape, content_hash="same") for name in "ab"]

    assert [seen.subject for seen in found(duplicate_tensors, *twins)] == copies


def bare(*tensors: TensorResult) -> list[Observation]:
    """What is said of matrices of codes in a file without a scale."""
    refs = tuple(TensorRef(t.name, t.dtype, t.shape, t.file, 0) for t in tensors)
    checkpoint = Checkpoint("model.safetensors", "safetensors", 0, refs)
    return list(
        scale_missing(
            Examined(checkpoint, tensors, frozenset(Need), quantization=Quantization(bare=refs))
        )
    )


@pytest.mark.parametrize(
    ("count", "headroom", "expected"), [(4, 0.0, "own"), (3, 0.0, "info"), (4, 0.1, "info")]
)
def test_four_matrices_at_the_end_of_their_type_were_scaled(
    count: int, headroom: float, expected: str
) -> None:
    made = [
        tensor(name=f"{i}.weight", dtype="F8_E4M3", numerics={"headroom_bits": headroom})
        for i in range(count)
    ]
    (seen,) = bare(*made)

    assert str(seen.severity or "own") == expected


@pytest.mark.parametrize(("peak_value", "expected"), [(99, 0), (100, 1)])
def test_integers_of_a_hundred_and_more_are_codes(peak_value: int, expected: int) -> None:
    assert len(bare(tensor(dtype="I8", statistics={"abs_max": peak_value}))) == expected


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"step": 0}, "own"),
        ({"step": "0"}, "own"),
        ({"step": 1}, "info"),
        ({"step": False}, "info"),
        ({"num_updates": 0}, "own"),
        ({"global_step": 3, "step": 0}, "info"),
    ],
)
def test_unit_norms_are_judged_by_the_step_that_the_checkpoint_tells(
    metadata: dict[str, object], expected: str
) -> None:
    gain = tensor(role=Role.NORM_GAIN, shape=(8,), statistics={"min": 1.0, "max": 1.0})

    (seen,) = found(untrained, gain, **metadata)

    assert str(seen.severity or "own") == expected


def test_a_gain_of_zeros_is_untouched_only_beside_others() -> None:
    zero = tensor(name="n1", role=Role.NORM_GAIN, shape=(8,), statistics={"min": 0, "max": 0})
    other = tensor(name="n2", role=Role.NORM_GAIN, shape=(8,))

    (seen,) = found(untrained, zero, other)

    assert seen.evidence == {"untouched": 1, "norm_gains": 2}


@pytest.mark.parametrize(
    ("rule", "loud", "threshold"),
    [
        (non_finite, {"statistics": {"nan_count": 1}}, 0),
        (negative_variance, {"name": "n.running_var", "role": Role.RUNNING_VAR}, 0),
        (heavy_tails, KURTOSIS, 10),
        (heavy_tails, {"role": Role.DEPTHWISE, **KURTOSIS}, 25),
        (skewed, SKEWNESS, 2),
        (outliers, {"outliers": peak(60.0)}, 50),
        (high_sparsity, {"statistics": {"zero_count": 3000}}, 0.5),
        (extreme_value, {"outliers": peak(2e4)}, 100),
        (extreme_value, {"role": Role.VECTOR, "outliers": peak(2e4)}, 10_000),
        (dtype_headroom, {"dtype": "F16", "numerics": {"headroom_bits": 0.5}}, 1),
        (dtype_headroom, {"statistics": {"subnormal_count": 400}}, 0.01),
        (dtype_headroom, {"dtype": "F8_E5M2", "numerics": {"saturated_fraction": 0.5}}, 0.001),
    ],
)
def test_a_finding_tells_the_limit_that_it_was_judged_by(
    rule: Rule, loud: Fields, threshold: float
) -> None:
    assert [seen.threshold for seen in found(rule, tensor(**loud))] == [threshold]


@pytest.mark.parametrize(
    ("rule", "loud"),
    [
        (negative_variance, {"name": "n.running_var", "role": Role.RUNNING_VAR}),
        (negative_variance, {"name": "state.exp_avg_sq", "role": Role.OPTIMIZER}),
        (all_zero, {"statistics": {"zero_count": 4000}}),
        (constant_tensor, {"statistics": {"min": 0.5, "max": 0.5}}),
    ],
)
def test_a_fault_of_the_whole_tensor_affects_all_of_it(rule: Rule, loud: Fields) -> None:
    (seen,) = found(rule, tensor(**loud))

    assert seen.evidence["affected_fraction"] == 1


def test_a_batch_norm_that_saw_no_batch_is_affected_as_a_whole() -> None:
    ones, zeros = {"min": 1.0, "max": 1.0}, {"min": 0.0, "max": 0.0}

    (seen,) = found(
        untrained,
        tensor(name="n.running_var", role=Role.RUNNING_VAR, shape=(8,), statistics=ones),
        tensor(name="n.running_mean", role=Role.RUNNING_MEAN, shape=(8,), statistics=zeros),
        tensor(name="n.num_batches_tracked", role=Role.COUNTER, shape=(), statistics=zeros),
    )

    assert seen.evidence == {"num_batches_tracked": 0, "affected_fraction": 1}


def test_equal_matrices_of_two_layers_are_one_finding_however_short_their_names() -> None:
    twins = [
        tensor(name=f"{side}.{leaf}.weight", content_hash=leaf)
        for side in ("enc", "dec")
        for leaf in "qk"
    ]

    (seen,) = found(duplicate_tensors, *twins)

    assert seen.message.startswith("2 matrices of dec equal those of enc")
    assert seen.evidence["equal_tensors"] == 2
    assert seen.evidence["affected_fraction"] == 1


def test_equal_matrices_without_a_layer_in_their_names_are_findings_of_their_own() -> None:
    copied = [tensor(name=name, content_hash=name[-1]) for name in ("enc.q", "enc.k", "q", "k")]

    messages = [seen.message for seen in found(duplicate_tensors, *copied)]

    assert messages == ["q equals enc.q", "k equals enc.k"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("online_encoder.a", "target_encoder.a", ("target_encoder", "online_encoder")),
        ("net.0", "ema.net.0", ("ema", "the model")),
        ("model.net.0", "model_ema.net0weight", ("model_ema", "model")),
        ("critic.q.0", "critic_target.q.0", ("critic_target", "critic")),
        ("agent.actor.0", "agent.actorTarget.0", ("agent.actorTarget", "agent.actor")),
        ("student.backbone.0", "teacher.backbone.0", ("teacher", "student")),
        ("query_encoder.0", "key_encoder.0", ("key_encoder", "query_encoder")),
        ("layers.0", "layers.3", None),
        ("teacher.layers.0", "teacher.layers.3", None),
        ("attn.query", "attn.key", None),
        ("encoder", "decoder", None),
        ("cinema.0", "theatre.0", None),
    ],
)
def test_networks_that_follow_another_are_equal_on_purpose(
    first: str, second: str, expected: tuple[str, str] | None
) -> None:
    twins = [
        tensor(name=f"{side}.{leaf}.weight", content_hash=leaf)
        for side in (first, second)
        for leaf in "qk"
    ]

    seen = found(duplicate_tensors, *twins)

    if expected is None:
        assert [s.severity for s in seen] == [None]
    else:
        assert [str(s.severity) for s in seen] == ["info"]
        copy, original = expected
        assert seen[0].message.startswith(f"2 matrices of {copy} equal those of {original}, e.g.")


@pytest.mark.parametrize(("table", "expected"), [(True, "info"), (False, None)])
def test_a_head_is_tied_to_a_table_of_its_shape_whatever_it_is_called(
    table: bool, expected: str | None
) -> None:
    role = Role.EMBEDDING if table else Role.LINEAR
    group = [
        tensor(name="input.lut.weight", role=role, content_hash="same"),
        tensor(name="generator.proj.weight", content_hash="same"),
        tensor(name="output.weight", content_hash="same"),
    ]
    for order in (group, group[::-1]):
        severities = [s.severity and str(s.severity) for s in found(duplicate_tensors, *order)]
        assert severities == [expected, expected]


@pytest.mark.parametrize(
    ("role", "repeated", "expected"),
    [
        (Role.DEPTHWISE, 39, "info"),
        (Role.DEPTHWISE, 38, "own"),
        (Role.CONV, 39, "own"),
    ],
)
def test_a_depthwise_convolution_of_one_filter_is_a_constant(
    role: Role, repeated: int, expected: str
) -> None:
    rows = {"duplicate_rows": repeated, "duplicates": ((0, 1),)}

    assert severity(duplicate_units, tensor(role=role, units=rows)) == expected
