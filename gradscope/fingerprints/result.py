"""The ``result`` of ``gradscope verify`` (contract.md §4), and what its rule reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Literal

from gradscope.report.model import Record, Report

#: ``rearranged`` holds the manifest's values in another order.
Status = Literal["match", "changed", "rearranged", "retyped", "reshaped", "missing", "added"]


class TensorVerified(Record):
    """One tensor of a checkpoint or of the manifest."""

    name: str
    #: The checkpoint, as it was given.
    input: str
    status: Status
    dtype: str | None
    shape: tuple[int, ...] | None
    #: Elements between which the change lies, where the tensor was hashed in parts.
    between: tuple[tuple[int, int], ...] = ()

    @property
    def subject(self) -> str:
        """What findings about it name."""
        return self.name


class VerifyResult(Record):
    """Checkpoints (or manifests) held against a manifest."""

    tensors: tuple[TensorVerified, ...]
    manifest: str
    counts: Mapping[str, int]


VerifyReport = Report[VerifyResult]


class Need(StrEnum):
    """The kinds of facts that a rule about a verified checkpoint can need."""

    HASHES = "hashes"


@dataclass(frozen=True)
class Verified:
    """One checkpoint against the manifest, as the rules see it."""

    command: ClassVar[str] = "verify"
    Needs: ClassVar[type[StrEnum]] = Need

    path: str
    manifest: str
    tensors: tuple[TensorVerified, ...]
    measured: frozenset[Need] = frozenset(Need)
