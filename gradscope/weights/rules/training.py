"""Rules about traces of training: running statistics, master weights, norms."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity
from gradscope.text import listed, plural
from gradscope.weights.names import common_pattern
from gradscope.weights.result import Examined, Need
from gradscope.weights.roles import Role, split
from gradscope.weights.rules.tensors import is_constant, measured
from gradscope.weights.steps import step_count


@rule("W111", "negative-variance", Severity.HIGH, reads=Examined, needs=Need.TENSOR)
def negative_variance(examined: Examined) -> Iterator[Observation]:
    """A running variance or a second moment is below zero, which an average of squares cannot be.

    Its square root is NaN: at inference (detectron2 #2413), or in the optimizer's next step.
    """
    for tensor, s in measured(examined):
        moment = _SECOND_MOMENT.search(tensor.name) is not None
        if tensor.role is not Role.RUNNING_VAR and not moment:
            continue
        if s.min is not None and s.min < 0:
            what = "an average of squares" if moment else "a variance"
            yield Observation(
                tensor.name,
                f"its smallest element is {s.min:.6g}; {what} cannot be negative",
                "go back to an earlier checkpoint, or start the optimizer's state anew; check what "
                "converted or merged it"
                if moment
                else "recompute the statistics on training data; check the conversion for tensors "
                "in the wrong order",
                {"min": float(s.min), "affected_fraction": 1.0},
                threshold=0,
            )


#: Adam's, AMSGrad's, Adafactor's, RMSprop's and Adadelta's averages of squares.
_SECOND_MOMENT = re.compile(r"(^|[._])((max_)?exp_avg_sqs?(_row|_col)?|square_avg|acc_delta)$")


@rule("W121", "master-mismatch", Severity.MEDIUM, reads=Examined, needs=Need.STATISTICS)
def master_mismatch(examined: Examined) -> Iterator[Observation | Unknown]:
    """Float32 master weights that do not round to the model's 16-bit weights.

    Mixed precision rounds the masters to the model after every step. Where they differ, weights and
    optimizer are of different steps or one of them was edited, and a resumed run jumps: it goes on
    from the masters. Masters are matched by content, whatever their order. Those that are zero or
    not finite belong to `all-zero` and `non-finite`.
    """
    if examined.masters is None:
        return
    if not examined.masters.compared:
        yield Unknown("no master weight has the size of a 16-bit tensor of the model")
    astray = [
        t
        for t in map(examined.by_name.get, examined.masters.astray)
        if t and t.statistics and t.statistics.finite_count == t.numel != t.statistics.zero_count
    ]
    if astray:
        compared = examined.masters.compared
        yield Observation(
            astray[0].name,
            f"{len(astray)} of {plural(compared, 'master weight')} round to no tensor of the "
            f"model: {listed([t.name for t in astray], len(astray))}",
            "find out which of both is right before resuming: weights and optimizer state were "
            "saved at different steps, or the weights were changed (merged, averaged) afterwards",
            {"astray": len(astray), "compared": compared},
        )


@rule("W112", "untrained", Severity.HIGH, reads=Examined, needs=Need.STATISTICS)
def untrained(examined: Examined) -> Iterator[Observation]:
    """Norms that are exactly as they were initialised.

    High where the checkpoint itself says so: batch norms with unit gain, mean 0 and variance 1
    whose `num_batches_tracked` is 0, or unit norms beside a step count of 0. Unit norm gains
    without such evidence are info. Adapters are judged by `idle-adapter`.
    """
    yield from _untrained_batch_norms(examined)
    yield from _untrained_norms(examined)


def _untrained_batch_norms(examined: Examined) -> Iterator[Observation]:
    for tensor, _ in measured(examined, {Role.RUNNING_VAR}):
        module, _leaf = split(tensor.name)
        mean = examined.by_name.get(f"{module}.running_mean")
        batches = examined.by_name.get(f"{module}.num_batches_tracked")
        if is_constant(tensor, 1) and is_constant(mean, 0) and is_constant(batches, 0):
            yield Observation(
                tensor.name,
                "this batch norm has never seen a batch: mean 0, variance 1, num_batches_tracked 0",
                "load the trained checkpoint, or train; in evaluation mode this layer does not "
                "normalise anything",
                {"num_batches_tracked": 0, "affected_fraction": 1.0},
            )


def _untrained_norms(examined: Examined) -> Iterator[Observation]:
    gains = [t for t, _ in measured(examined, {Role.NORM_GAIN}) if t.numel > 1]
    untouched = [t for t in gains if is_constant(t, 1) or (is_constant(t, 0) and len(gains) > 1)]
    if not untouched:
        return
    steps = step_count(examined)
    subject = untouched[0].name if len(untouched) == 1 else common_pattern(untouched)
    yield Observation(
        subject,
        f"{len(untouched)} of {len(gains)} norm gains are exactly as initialised"
        + ("" if steps is None else f", in a checkpoint of step {steps}"),
        "load the trained checkpoint, or train"
        if steps == 0
        else "nothing to do if these norms were frozen or folded into the next layer",
        {"untouched": len(untouched), "norm_gains": len(gains)}
        | ({} if steps is None else {"step": steps}),
        severity=None if steps == 0 else Severity.INFO,
    )
