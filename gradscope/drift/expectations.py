"""What someone says should have happened between two checkpoints, to be held against what did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from gradscope.drift.result import Expected, Merge, TensorDrift
from gradscope.errors import UsageError
from gradscope.text import quoted
from gradscope.weights.patterns import matcher, unmatched
from gradscope.weights.roles import Role


@dataclass(frozen=True)
class Expectations:
    """What was asked for; all of it may be empty."""

    kind: Expected | None = None
    #: Shell patterns of names: what may not change by a bit, and what must.
    frozen: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    #: Greatest relative drift by role; ``*`` is every role.
    most: Mapping[str, float] = field(default_factory=dict)
    #: What became of each module that the adapter changes.
    merges: tuple[Merge, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.kind or self.frozen or self.changed or self.most)


def expectations(
    expect: str | None,
    frozen: Sequence[str],
    changed: Sequence[str],
    max_drift: Mapping[str, float],
    adapted: bool = False,
    mixed: bool = False,
) -> Expectations:
    """The request, checked; ``adapted`` where adapters were given, ``mixed`` where parents were.

    Raises UsageError.
    """
    known = get_args(Expected)
    if expect is not None and expect not in known:
        raise UsageError(f"--expect {expect}: it is one of {', '.join(known)}")
    if adapted and expect != "merge":
        raise UsageError("--adapter is only used by --expect merge")
    if expect == "merge" and adapted == mixed:
        raise UsageError(
            "--expect merge needs --adapter DIR, the adapter that was merged, or --parent FILE, "
            "what the base was mixed with: one of them"
        )
    for role, limit in max_drift.items():
        if role not in ("*", *Role):
            raise UsageError(f"--max-drift {role}=…: a role is one of *, {', '.join(Role)}")
        if not limit >= 0:
            raise UsageError(f"--max-drift {role}={limit}: a relative drift is 0 or more")
    kind = next((k for k in known if k == expect), None)
    return Expectations(kind, tuple(frozen), tuple(changed), dict(max_drift))


def check_patterns(asked: Expectations, names: Iterable[str]) -> None:
    """Refuse a pattern that matches none of the tensors' names: what it asks for would pass.

    Raises UsageError.
    """
    names = list(dict.fromkeys(names))
    for option, patterns in (
        ("--expect-frozen", asked.frozen),
        ("--expect-changed", asked.changed),
    ):
        if message := next(unmatched(option, patterns, names), None):
            raise UsageError(message)


def names_of(tensor: TensorDrift) -> Iterator[str]:
    """What a tensor is called on either side."""
    yield tensor.name
    if tensor.base_name is not None:
        yield tensor.base_name


def matching(pattern: str, tensors: Sequence[TensorDrift]) -> list[TensorDrift]:
    """The tensors that either of whose names fits a pattern."""
    fits = matcher([pattern])
    return [t for t in tensors if any(map(fits, names_of(t)))]


def parse_limits(values: Sequence[str]) -> dict[str, float]:
    """``ROLE=X`` as the API takes it. Raises UsageError."""
    found = {}
    for value in values:
        role, equals, number = value.partition("=")
        try:
            found[role] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            message = f"--max-drift takes ROLE=X, e.g. linear=0.05 or *=0.2, not {quoted(value)}"
            raise UsageError(message)
    return found
