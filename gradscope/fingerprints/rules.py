"""The rule about a checkpoint and its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gradscope.fingerprints.result import Need, Status, TensorVerified, Verified
from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import listed

#: In the words of a message, and how severe it is.
_WORDS: Mapping[Status, tuple[str, Severity]] = {
    "changed": ("does not hold the bits that the manifest recorded", Severity.HIGH),
    "rearranged": ("holds the manifest's values in another order", Severity.HIGH),
    "retyped": ("has another type than in the manifest", Severity.HIGH),
    "reshaped": ("has another shape than in the manifest", Severity.HIGH),
    "missing": ("is in the manifest and not in the checkpoint", Severity.HIGH),
    "added": ("is in the checkpoint and not in the manifest", Severity.MEDIUM),
}


@rule("D106", "manifest-mismatch", Severity.HIGH, reads=Verified, needs=Need.HASHES)
def manifest_mismatch(verified: Verified, *, several: int = 16) -> Iterator[Observation]:
    """A tensor is not what the manifest recorded: any flipped bit is told by its hash.

    Between data-parallel ranks, which must hold the same weights, such a tensor is silent
    corruption (torchtitan #4011, Automodel PR #3822). Above 16 tensors of one kind they are one
    finding: another version of the model, rather than damage.
    """
    for status, (words, severity) in _WORDS.items():
        found = [t for t in verified.tensors if t.status == status]
        if len(found) > several:
            yield _observed(found, words, severity, verified)
        else:
            for tensor in found:
                yield _observed([tensor], words, severity, verified)


def _observed(
    group: Sequence[TensorVerified], words: str, severity: Severity, verified: Verified
) -> Observation:
    first = group[0]
    where = "".join(f" (between elements {a:,} and {b:,})" for a, b in first.between[:1])
    many = (
        f"{len(group)} of {len(verified.tensors)} tensors, this one and "
        f"{listed((t.name for t in group[1:]), len(group) - 1)}: each {words}"
        if len(group) > 1
        else words
    )
    return Observation(
        first.name,
        f"{many}{where}",
        "this is another version of the model: take the manifest of this one, or fetch the file "
        "again"
        if len(group) > 1
        else "copy the file again from its source; between ranks of one run, do not go on: resume "
        "from a checkpoint on which all agree, and test memory",
        {"tensors": len(group), "status": first.status, "manifest": verified.manifest},
        severity=severity,
    )
