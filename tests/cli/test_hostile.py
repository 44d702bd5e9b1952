"""Damaged and hostile checkpoints end in exit 3 or in findings: never in 70, a hang or a lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradscope import analyze_weights

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
SMALL = {
    name: (FIXTURES / name).read_bytes() for name in ("digits.safetensors", "digits.pt", "pnet.pt")
}

mutations = st.lists(
    st.tuples(st.integers(0, 40_000), st.binary(min_size=0, max_size=8), st.integers(0, 64)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", SMALL)
@settings(
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(edits=mutations)
def test_a_mutated_file_is_refused_or_analysed_but_never_a_bug(
    name: str, edits: list[tuple[int, bytes, int]], tmp_path: Path
) -> None:
    data = bytearray(SMALL[name])
    for at, new, removed in edits:
        at %= len(data) + 1
        data[at : at + removed] = new
    path = tmp_path / name
    path.write_bytes(data)

    report = analyze_weights(path)

    assert report.gate.exit_code in (0, 1, 3)
    assert report.gate.exit_code == 3 or report.coverage.analyzed > 0


@pytest.mark.parametrize("share", [0, 1, 7, 8, 9, 300, 0.1, 0.3, 0.5, 0.9, 0.99, 0.99999])
@pytest.mark.parametrize("name", SMALL)
def test_a_truncated_file_is_never_healthy(name: str, share: float, tmp_path: Path) -> None:
    whole = SMALL[name]
    path = tmp_path / name
    path.write_bytes(whole[: int(share if share >= 1 or share == 0 else share * len(whole))])

    report = analyze_weights(path)

    assert report.gate.exit_code == 3
    assert report.errors


def test_what_a_truncated_safetensors_still_holds_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(SMALL["digits.safetensors"][:-9000])

    report = analyze_weights(path)

    assert [f.name for f in report.findings if f.severity == "critical"] == ["truncated-file"]
    assert 0 < report.coverage.analyzed < report.coverage.total
    assert report.result.health.status == "critical"
