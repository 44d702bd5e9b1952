"""Rules about the container: what its headers say of its tensors. They need no data."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise

from gradscope.checkpoints.tensors import ProblemKind
from gradscope.report.model import Severity
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.text import listed
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


@rule("C004", "empty-tensor", Severity.HIGH, reads=Examined, needs=Need.HEADERS)
def empty_tensor(examined: Examined) -> Iterator[Observation]:
    """A weight or bias has no elements.

    ZeRO-3 and FSDP leave such placeholders when a checkpoint is saved without gathering the
    parameters (transformers #20082, DeepSpeed #2413). Other tensors may be empty: low.
    """
    empty = [t for t in examined.tensors if t.numel == 0]
    parameters = [
        t for t in empty if re.search(r"(^|[._])(weight|bias|kernel|gamma|beta)$", t.name)
    ]
    for tensor in empty:
        yield Observation(
            tensor.name,
            f"has shape {list(tensor.shape)}: no elements "
            f"({len(empty)} of {len(examined.tensors)} tensors are empty)",
            "save again with the parameters gathered: DeepSpeed's zero_to_fp32.py or "
            "stage3_gather_16bit_weights_on_model_save, FSDP's full state dict",
            {"empty_tensors": len(empty), "tensors": len(examined.tensors)},
            severity=None if tensor in parameters else Severity.LOW,
        )


@rule("C005", "truncated-file", Severity.CRITICAL, reads=Examined, needs=Need.HEADERS)
def truncated_file(examined: Examined) -> Iterator[Observation]:
    """The file ends before the data that its header describes."""
    yield from _problems(examined, "truncated-file")


_NUMBERED = re.compile(
    r"^(.*?(?:^|\.)(?:layers?|blocks?|h|resblocks|encoder_layers?))\.(\d+)\.(.+)$"
)


@rule("C006", "missing-layer", Severity.HIGH, reads=Examined, needs=Need.HEADERS)
def missing_layer(
    examined: Examined, *, least_members: int = 4, least_contiguous: float = 0.75
) -> Iterator[Observation | Unknown]:
    """A numbered series of equal layers has a gap, or ends before config.json says.

    Judged only of series called layers, blocks or h whose members have the same four or more
    tensors each and most of whose neighbours are present, so the numbering of nn.Sequential (where
    activations take numbers but hold no tensors) is left alone.
    """
    expected = _configured_layers(examined)
    for stack, members in _series(examined).items():
        numbers = sorted(members)
        if len(numbers) < least_members or not _uniform(members):
            continue
        steps = [b - a for a, b in pairwise(numbers)]
        if sum(step == 1 for step in steps) < least_contiguous * len(steps):
            continue
        promised = expected if _is_main(stack) else 0
        start = 0 if numbers[-1] < promised else numbers[0]  # some series count from 1
        end = max(numbers[-1] + 1, promised)
        if missing := sorted(set(range(start, end)) - set(numbers)):
            yield _missing(stack, missing, len(numbers), end - start)


def _missing(stack: str, missing: list[int], present: int, expected: int) -> Observation:
    return Observation(
        f"{stack}.{missing[0]}",
        f"layer {listed(missing, len(missing), 8)} of {stack} is missing: "
        f"{present} of {expected} layers found",
        "find the file or the conversion step that lost it; a non-strict loader initialises the "
        "layer at random",
        {"missing_layers": len(missing), "present_layers": present, "first_missing": missing[0]},
    )


def _series(examined: Examined) -> Mapping[str, Mapping[int, frozenset[str]]]:
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for tensor in examined.tensors:
        if match := _NUMBERED.match(tensor.name):
            found[match[1]][int(match[2])].add(match[3])
    return {stack: {n: frozenset(names) for n, names in m.items()} for stack, m in found.items()}


def _uniform(members: Mapping[int, frozenset[str]]) -> bool:
    """Whether most members hold the same tensors, at least four each."""
    ((commonest, count),) = Counter(members.values()).most_common(1)
    return len(commonest) >= 4 and count >= 0.5 * len(members)


def _configured_layers(examined: Examined) -> int:
    value = examined.document("config").get("num_hidden_layers")
    return value if isinstance(value, int) and not isinstance(value, bool) and value < 10_000 else 0


def _is_main(stack: str) -> bool:
    """Whether config.json's num_hidden_layers refers to this stack."""
    return stack in (
        "model.layers",
        "layers",
        "transformer.h",
        "h",
        "encoder.layer",
        "bert.encoder.layer",
    )
