"""Rules about the container: what its headers say of its tensors. They need no data."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.checkpoints.tensors import ProblemKind
from gradscope.report.model import Severity
from gradscope.report.rules import Observation, rule
from gradscope.weights.result import Examined, Need


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
