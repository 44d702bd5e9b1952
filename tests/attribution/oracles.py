"""Which methods are tested against something that is not our own code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., object])

#: The names of the tests, by the method that each has another derivation of.
ORACLES: dict[str, set[str]] = defaultdict(set)


def oracle(*methods: str) -> Callable[[Test], Test]:
    """Mark a test that compares these methods with a closed form, NumPy or captum."""

    def register(test: Test) -> Test:
        for method in methods:
            ORACLES[method].add(test.__name__)
        return test

    return register
