"""Tests of flow read the training runs of fixtures/runs.py."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _recorded(histories: None) -> None:
    """Have them recorded before the first test."""
