"""Dead zones: what is dead, for how long, and what the past says."""

from __future__ import annotations

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.dead_zones import dead
from gradscope.flow.joining import series
from gradscope.flow.records.regions import DeadZone
from gradscope.histories.history import History, Status
from gradscope.report.model import Finding

from .made import made, noise


def zones(history: History) -> tuple[DeadZone, ...]:
    return analyze_flow(history).result.dead_zones


def at_zero(layer: int, *spans: tuple[int, int], records: int = 100, layers: int = 5) -> np.ndarray:
    norms = noise(records, layers)
    for first, end in spans:
        norms[first:end, layer] = 0
    return norms


def test_zero_absent_and_almost_all_zero_are_dead_and_what_never_was_is_not() -> None:
    norms = noise(6, 5)
    status = np.full(norms.shape, Status.RECORDED, np.uint8)
    zeros = np.zeros(norms.shape)
    norms[1, 0] = 0
    status[2, 1] = Status.NONE
    zeros[3, 2], zeros[4, 2] = 0.999, 0.998
    status[:, 3] = Status.NONE
    status[5, 4] = Status.FROZEN

    found = dead(series(made(norms, status=status, zero_fraction=zeros)))

    assert np.argwhere(found).tolist() == [[1, 0], [2, 1], [3, 2]]


def test_an_embedding_is_dead_when_every_element_is_and_a_gradient_of_nan_is_not() -> None:
    norms = noise(3, 2)
    norms[1, 0] = 0
    norms[2, 1] = np.nan
    zeros = np.ones(norms.shape)

    found = dead(series(made(norms, kinds=["embedding", "matrix"], zero_fraction=zeros)))

    assert np.argwhere(found).tolist() == [[0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(("records", "found"), [(4, 0), (5, 1)])
def test_a_zone_is_five_records_without_a_break(records: int, found: int) -> None:
    assert len(zones(made(at_zero(2, (50, 50 + records))))) == found
    broken = at_zero(2, (50, 54), (55, 59))
    assert zones(made(broken)) == ()


def test_a_zone_has_its_origin_next_to_the_loss_and_lasts_as_its_longest_stretch() -> None:
    norms = at_zero(2, (40, 60))
    norms[45:70, 3] = 0

    (zone,) = zones(made(norms, steps=np.arange(100) * 3))

    assert zone.affected_layers == ("layers.2", "layers.3")
    assert zone.origin == "layers.3"
    assert zone.dead_duration == 3 * 24
    assert zone.extent.records == 30
    assert zone.past_recoveries == 0
    assert (zone.recovery_potential, zone.intervention_required) == ("high", False)


def test_earlier_zones_of_the_same_layers_that_ended_are_recoveries() -> None:
    norms = at_zero(2, (10, 12), (20, 30), (90, 100))
    norms[50:60, 4] = 0

    last = zones(made(norms))[-1]

    assert last.affected_layers == ("layers.2",)
    assert last.facts.ended == (2, 10)
    assert last.past_recoveries == 2
    assert last.facts.age == 10
    # One of the two that could have lasted as long did end: as likely as not.
    assert last.recovery_potential == "high"


@pytest.mark.parametrize(("end", "age"), [(97, None), (98, 58), (100, 60)])
def test_a_zone_that_reaches_the_last_two_records_is_not_over(end: int, age: int | None) -> None:
    (zone,) = zones(made(at_zero(2, (40, end))))

    assert zone.facts.age == age
    assert zone.extent.ongoing is (age is not None)
    assert zone.intervention_required is (age is not None)


def test_some_elements_alive_at_the_last_record_make_recovery_likelier() -> None:
    zeros = np.zeros((100, 5))
    zeros[60:, 2] = 0.9995

    (zone,) = zones(made(noise(100, 5), zero_fraction=zeros))

    assert zone.facts.partly_alive
    assert (zone.recovery_potential, zone.intervention_required) == ("medium", False)


def test_what_was_not_finite_before_or_takes_the_whole_network_does_not_recover() -> None:
    lost = at_zero(2, (60, 100))
    lost[30, 2] = np.nan
    (zone,) = zones(made(lost))
    assert zone.facts.was_nonfinite
    assert zone.recovery_potential == "none"
    lost[30, 2], lost[30, 3] = 1, np.nan
    assert zones(made(lost))[0].recovery_potential == "low"

    everything = noise(100, 3)
    everything[60:] = 0
    (zone,) = zones(made(everything))
    assert zone.facts.everything
    assert (zone.recovery_potential, zone.intervention_required) == ("none", True)
    everything[90:] = 1
    (zone,) = zones(made(everything))
    assert not zone.facts.everything
    assert zone.recovery_potential == "high"


def test_a_bias_without_gradient_asks_for_nothing() -> None:
    kinds = ["matrix", "matrix", "bias", "matrix", "matrix"]

    (zone,) = zones(made(at_zero(2, (60, 100)), kinds=kinds))

    assert zone.recovery_potential == "low"
    assert not zone.intervention_required


def test_the_gradient_that_dies_is_dead_and_not_vanishing() -> None:
    report = analyze_flow(made(at_zero(2, (60, 100))))

    assert [f.name for f in report.findings] == ["dead-zone"]
    assert report.result.vanishing_regions == ()


# --- experts, and the loss ------------------------------------------------------------------------


def experts(count: int, silent: set[int], since: int = 20) -> History:
    """A stem, experts of two layers each, a head; the silent ones lose their gradient."""
    names = ["stem", *(f"moe.experts.{i}.{part}" for i in range(count) for part in ("w1", "w2"))]
    names.append("head")
    norms = noise(60, len(names))
    for column, name in enumerate(names):
        if name.startswith("moe") and int(name.split(".")[2]) in silent:
            norms[since:, column] = 0
    return made(norms, names=names)


@pytest.mark.parametrize("count", [4, 8, 64])
def test_idle_experts_are_one_finding_at_medium(count: int) -> None:
    (found,) = analyze_flow(experts(count, {1, 3})).findings

    assert (found.name, found.severity) == ("missing-gradient", "medium")
    assert found.message == (
        f"2 of {count} experts get no gradient at the end: moe.experts.1, moe.experts.3"
    )
    assert "load-balancing" in found.recommendation


@pytest.mark.parametrize(
    "pattern",
    [
        "block_sparse_moe.experts.{0}.w1", "moe.expert_{0}.fc", "mlp/experts/{0}/kernel",
        "moe.local_experts.{0}.up", "Expert{0}.linear",
    ],
)  # fmt: skip
def test_experts_are_known_under_many_names(pattern: str) -> None:
    norms = noise(60, 6)
    norms[:, 1:3] = 0
    names = ["stem", *(pattern.format(i) for i in range(4)), "head"]

    (found,) = analyze_flow(made(norms, names=names)).findings

    assert (found.name, found.severity) == ("missing-gradient", "medium")
    assert found.message.startswith("2 of 4 experts get no gradient at the end")


def test_a_mixture_all_of_whose_experts_are_dead_is_a_dead_zone() -> None:
    names = {f.name for f in analyze_flow(experts(4, {0, 1, 2, 3})).findings}

    assert names == {"dead-zone"}


def test_a_zone_under_a_loss_of_zero_is_told_by_the_loss() -> None:
    (found,) = analyze_flow(made(np.zeros((40, 3)), loss=np.zeros(40))).findings

    assert found.severity == "high"
    assert "the loss is 0" in found.message
    assert "labels" in found.recommendation


# --- one cause, one finding -----------------------------------------------------------------------


def dead_findings(history: History) -> list[Finding]:
    return [f for f in analyze_flow(history).findings if f.name == "dead-zone"]


@pytest.mark.parametrize(("before", "told"), [(3, True), (20, True), (60, False)])
def test_units_that_a_step_killed_are_told_with_that_step(before: int, told: bool) -> None:
    """A rate that is too high: one step replaces the weights, and nothing is left to learn."""
    norms, updates = noise(160, 3, 0.1), np.full((160, 3), 1e-3)
    norms[80:, :2] = 0
    norms[80 - before] *= 90
    updates[80 - before] = 4.0
    run = made(norms, param_l2=np.ones((160, 3)), update_l2=updates)

    report = analyze_flow(run)

    (zone,) = (f for f in report.findings if f.name == "dead-zone")
    others = [f.name for f in report.findings if f is not zone and f.severity.rank >= 2]
    assert zone.severity == "high"
    assert (f"the step of record {80 - before} had changed" in zone.message) is told
    assert zone.recommendation.startswith("lower the learning rate") is told
    assert (others == []) is told


@pytest.mark.parametrize("layers", [3, 6, 12])
def test_zones_that_pass_are_one_finding(layers: int) -> None:
    """Stochastic depth: any block is left out now and then."""
    norms = noise(200, layers)
    for row in range(1, layers - 1):
        norms[10 * row : 10 * row + 6, row] = norms[120 + row : 128 + row, row] = 0

    (found,) = dead_findings(made(norms))

    assert found.severity == "low"
    assert f"layers.{layers - 2}" in f"{found.subject} {found.message}"
    assert "now and then" in found.message


def weighed(weights: np.ndarray, kinds: list[str] | None = None, since: int = 60) -> History:
    """Three layers of which two get nothing from some record on, and the norms of their weights."""
    norms = noise(160, 3, 0.1)
    norms[since:, :2] = 0
    return made(norms, kinds=kinds, param_l2=weights, update_l2=1e-3 * np.ones((160, 3)))


@pytest.mark.parametrize(
    ("weights", "since", "said", "advice"),
    [
        (0.0, 0, "zero since the first record", "initialise these weights at random"),
        (0.95, 60, "shrunk to less than a thousandth", "lower the weight decay"),
        (1.0, 60, None, "units that died"),
        (0.99, 60, None, "units that died"),
    ],
)
def test_layers_whose_weights_are_nothing_are_told_by_that(
    weights: float, since: int, said: str | None, advice: str
) -> None:
    left = np.ones((160, 3)) * [[1.0, 1.0, 1.0]]
    left[:, :2] = 0.0 if weights == 0 else weights ** np.arange(160)[:, None]

    (found,) = dead_findings(weighed(left, since=since))

    assert found.severity == "high"
    assert advice in found.recommendation
    assert "their weights" not in found.message if said is None else said in found.message


def test_gains_and_biases_may_be_zero() -> None:
    left = np.ones((160, 3)) * [[0.0, 1.0, 1.0]]

    (found,) = dead_findings(weighed(left, kinds=["bias", "matrix", "matrix"]))

    assert "their weights" not in found.message


def test_layers_that_die_after_a_loss_diverged_are_told_with_it() -> None:
    loss = 2.0 * noise(160, 1, 0.05)[:, 0]
    norms = noise(160, 3, 0.1)
    norms[80:, :2] = 0
    after, before = loss.copy(), loss.copy()
    after[79:] *= 50
    before[120:] *= 50
    updates = {"param_l2": np.ones((160, 3)), "update_l2": np.full((160, 3), 1e-3)}
    updates["update_l2"][76:] *= 300

    one = analyze_flow(made(norms, loss=after, **updates)).findings
    two = analyze_flow(made(norms, loss=before, **updates)).findings

    assert "dead-zone" not in {f.name for f in one}
    (told,) = (f for f in one if f.name == "diverged")
    assert "no gradient is left in layers.0, layers.1" in told.message
    assert "dead-zone" in {f.name for f in two}


def test_a_layer_that_was_detached_midway_is_one_finding() -> None:
    norms = noise(120, 4)
    status = np.full(norms.shape, Status.RECORDED, np.uint8)
    status[50:, :2] = Status.NONE
    status[::7, 3] = Status.NONE

    found = {f.name: f for f in analyze_flow(made(norms, status=status)).findings}

    assert set(found) == {"dead-zone", "missing-gradient"}
    assert found["missing-gradient"].subject == "layers.3"


def vanishing_first(then: str) -> History:
    """Two layers lose their gradient; later one of them, or both, have none at all."""
    norms = noise(160, 6, 0.1)
    norms[40:, :2] *= 1e-7
    dead = {"one": slice(0, 1), "both": slice(0, 2), "another": slice(3, 4), "none": slice(0, 0)}
    norms[100:, dead[then]] = 0
    return made(norms)


@pytest.mark.parametrize(
    ("then", "told"),
    [
        ("none", ["vanishing-gradient"]),
        ("one", ["vanishing-gradient"]),
        ("another", ["dead-zone", "vanishing-gradient"]),
    ],
)
def test_what_vanishes_until_nothing_is_left_is_one_finding(then: str, told: list[str]) -> None:
    assert sorted(f.name for f in analyze_flow(vanishing_first(then)).findings) == told


def test_a_dead_zone_that_is_not_quite_dead_now_and_then_does_not_vanish_too() -> None:
    norms = noise(160, 5, 0.1)
    norms[60:, :2] = 0
    norms[60:64, 0] = norms[110:114, 0] = 1e-7

    assert [f.name for f in analyze_flow(made(norms)).findings] == ["dead-zone"]
    norms[40:64, 0] = 1e-7  # vanishes long before it dies
    names = [f.name for f in analyze_flow(made(norms)).findings]
    assert sorted(set(names)) == ["dead-zone", "vanishing-gradient"]


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("silent", [1, 3])
def test_gradients_that_no_layer_has_were_cleared_and_those_of_one_are_unused(
    silent: int, frozen: int
) -> None:
    norms = noise(60, 3 + frozen)
    status = np.full(norms.shape, Status.RECORDED, np.uint8)
    status[:, :silent] = Status.NONE
    status[:, 3:] = Status.FROZEN

    found = [f for f in analyze_flow(made(norms, status=status)).findings if f.severity != "info"]

    (advice,) = [f.recommendation for f in found if f.name == "missing-gradient"]
    assert ("before zero_grad()" in advice) == (silent == 3)
    assert ("detach()" in advice) == (silent == 1)


@pytest.mark.parametrize("alive", [(2,), (1, 2), ()])
def test_a_layer_without_a_unit_that_lives_is_not_revived_by_those_of_its_neighbour(
    alive: tuple[int, ...],
) -> None:
    """Layers 1 and 2 die; of some, a hundredth of the elements still have a gradient."""
    norms, zeros = noise(100, 5), np.zeros((100, 5))
    zeros[20:, 1:3] = 0.999
    for layer in (1, 2):
        norms[20:, layer] *= 0.01 if layer in alive else 0.0

    (zone,) = zones(made(norms, zero_fraction=zeros))

    assert zone.affected_layers == ("layers.1", "layers.2")
    assert zone.recovery_potential == ("medium" if alive == (1, 2) else "low")
    assert zone.intervention_required == (alive != (1, 2))
