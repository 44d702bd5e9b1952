"""Rules about traces of training: running statistics, norms, copied layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.weights.names import common_pattern
from gradscope.weights.result import Examined, Need, TensorResult
from gradscope.weights.roles import MATRICES, TABLES, Role, split
from gradscope.weights.rules.tensors import is_constant, measured
from gradscope.weights.steps import step_count


@rule("W111", "negative-variance", Severity.HIGH, reads=Examined, needs=Need.STATISTICS)
def negative_variance(examined: Examined) -> Iterator[Observation]:
    """A running variance or a second moment is below zero, which an average of squares cannot be.

    Its square root is NaN at inference (detectron2 #2413).
    """
    second = r"(exp_avg_sq|square_avg)$"
    for tensor, s in measured(examined):
        if tensor.role is not Role.RUNNING_VAR and not re.search(second, tensor.name):
            continue
        if s.min is not None and s.min < 0:
            yield Observation(
                tensor.name,
                f"its smallest element is {s.min:.6g}; a variance cannot be negative",
                "recompute the statistics on training data; check the conversion for tensors in "
                "the wrong order",
                {"min": float(s.min), "affected_fraction": 1.0},
                threshold=0,
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


@rule("W113", "duplicate-tensors", Severity.MEDIUM, reads=Examined, needs=Need.STATISTICS)
def duplicate_tensors(examined: Examined, *, least: int = 64) -> Iterator[Observation]:
    """Matrices of different layers that are equal bit for bit.

    Two layers never train to the same weights: one was copied over the other, by a merge, a
    wrong conversion or a failed restart. Equal embeddings and output layers are tied weights
    saved twice: info.
    """
    groups: dict[str, list[TensorResult]] = defaultdict(list)
    for tensor, s in measured(examined, MATRICES | {Role.QUANTIZED}):
        if tensor.content_hash and tensor.numel >= least and s.min != s.max:
            groups[tensor.content_hash].append(tensor)
    copies: dict[tuple[str, str], list[tuple[TensorResult, TensorResult]]] = defaultdict(list)
    for original, *others in groups.values():
        for other in others:
            copies[_differing(original.name, other.name)].append((original, other))
    for (first, second), pairs in copies.items():
        yield _copied(first, second, pairs)


def _copied(
    first: str, second: str, pairs: Sequence[tuple[TensorResult, TensorResult]]
) -> Observation:
    tied = all(t.role in TABLES for pair in pairs for t in pair)
    original, copy = pairs[0]
    return Observation(
        copy.name,
        f"{copy.name} equals {original.name}"
        if len(pairs) == 1
        else f"{len(pairs)} matrices of {second} equal those of {first}, e.g. {copy.name}",
        "store tied weights once"
        if tied
        else "compare with the source of the checkpoint; retrain or restore the copied layer",
        {"equal_tensors": len(pairs), "original": original.name, "affected_fraction": 1.0},
        severity=Severity.INFO if tied else None,
    )


def _differing(first: str, second: str) -> tuple[str, str]:
    """Two names up to where they last differ: the layers that they belong to."""
    a, b = first.split("."), second.split(".")
    while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return ".".join(a), ".".join(b)
