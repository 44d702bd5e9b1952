"""The severity scale."""

from __future__ import annotations

from enum import StrEnum


class Severity(StrEnum):
    """One scale everywhere, ascending; comparable by rank."""

    INFO = "info"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """0 for info to 4 for critical."""
        return list(Severity).index(self)
