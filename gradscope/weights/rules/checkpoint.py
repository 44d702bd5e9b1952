"""Rules about the container: what its headers say of its tensors. They need no data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from gradscope.checkpoints.tensors import ProblemKind
from gradscope.report.model import Severity
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.text import escaped, listed, plural
from gradscope.weights.adapter_config import adapter_configs
from gradscope.weights.configuration import configuration, is_main
from gradscope.weights.experts import missing_experts
from gradscope.weights.names import series
from gradscope.weights.result import Examined, Need
from gradscope.weights.roles import TRAINING


def _problems(examined: Examined, kind: ProblemKind) -> Iterator[Observation]:
    for problem in examined.checkpoint.problems:
        if problem.kind == kind:
            yield Observation(
                problem.subject, problem.message, problem.remedy, dict(problem.evidence)
            )


@rule("C001", "index-mismatch", Severity.HIGH, reads=Examined, needs=Need.HEADERS)
def index_mismatch(examined: Examined) -> Iterator[Observation]:
    """The index and the shards disagree about which tensor is where.

    A loader that trusts the index leaves the tensors it does not find uninitialised, and still
    serves the model (sglang #32279, huggingface_hub #4725). Each way is checked: names only in
    the index, names only in a shard, names that the index places in another shard.
    """
    yield from _problems(examined, "index-mismatch")


@rule("C002", "missing-shard", Severity.CRITICAL, reads=Examined, needs=Need.HEADERS)
def missing_shard(examined: Examined) -> Iterator[Observation]:
    """A file that the index or the numbering `-00003-of-00007` promises was not found."""
    yield from _problems(examined, "missing-shard")


@rule("C003", "duplicate-tensor-name", Severity.HIGH, reads=Examined, needs=Need.HEADERS)
def duplicate_tensor_name(examined: Examined) -> Iterator[Observation]:
    """A tensor name occurs twice: parsers differ on which one they load.

    The safetensors format forbids it and its reference reader takes the last one silently, so two
    programs may run two different models from one file.
    """
    yield from _problems(examined, "duplicate-tensor-name")


@rule("C005", "truncated-file", Severity.CRITICAL, reads=Examined, needs=Need.HEADERS)
def truncated_file(examined: Examined) -> Iterator[Observation]:
    """The file ends before the data that its header describes."""
    yield from _problems(examined, "truncated-file")


@rule("C006", "missing-layer", Severity.HIGH, reads=Examined, needs=Need.HEADERS)
def missing_layer(
    examined: Examined, *, least_members: int = 4, least_contiguous: float = 0.75
) -> Iterator[Observation | Unknown]:
    """A numbered series of equal layers or experts has a gap, or ends before it should.

    Layers: before config.json says. Experts, of which at least half are there: before the rows of
    their router do, and each must have the matrices that most have.

    Judged only of series called layers, blocks or h whose members have the same four or more
    tensors each and most of whose neighbours are present, so the numbering of nn.Sequential (where
    activations take numbers but hold no tensors) is left alone, and so are adapters whose layers
    were chosen.
    """
    configs = adapter_configs(examined.checkpoint) if examined.adapted else ()
    if any(config.chooses_layers for config in configs):
        return
    expected = _configured_layers(examined)
    for stack, members in series(
        t.name for t in examined.tensors if t.role not in TRAINING
    ).items():
        numbers = sorted(members)
        if len(numbers) < least_members or not _uniform(members):
            continue
        steps = [b - a for a, b in pairwise(numbers)]
        if sum(step == 1 for step in steps) < least_contiguous * len(steps):
            continue
        promised = expected if is_main(stack) else 0
        start = 0 if numbers[-1] < promised else numbers[0]  # some series count from 1
        end = max(numbers[-1] + 1, promised)
        if missing := sorted(set(range(start, end)) - set(numbers)):
            yield _missing(stack, missing, len(numbers), end - start)
    for path, lost, present, expected_experts in missing_experts(examined):
        yield _missing(path, lost, present, expected_experts, "expert")


def _missing(
    stack: str, missing: Sequence[int], present: int, expected: int, what: str = "layer"
) -> Observation:
    return Observation(
        f"{stack}.{missing[0]}",
        f"{what} {listed(missing, len(missing), 8)} of {escaped(stack)} is missing: "
        f"{present} of {plural(expected, what)} found",
        "find the file or the conversion step that lost it; a non-strict loader initialises the "
        f"{what} at random",
        {
            f"missing_{what}s": len(missing),
            f"present_{what}s": present,
            "first_missing": missing[0],
        },
    )


def _uniform(members: Mapping[int, frozenset[str]]) -> bool:
    """Whether most members hold the same tensors, at least four each."""
    ((commonest, count),) = Counter(members.values()).most_common(1)
    return len(commonest) >= 4 and count >= 0.5 * len(members)


def _configured_layers(examined: Examined) -> int:
    config = configuration(examined)
    promised = config.number("num_hidden_layers", "n_layer", "n_layers")
    if config.others(r"recurren|loop|repeat"):  # layers that run several times
        return 0
    return promised if promised is not None and promised < 10_000 else 0
