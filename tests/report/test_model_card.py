"""The section of a model card: what it says, and that it replaces nothing but itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradscope.errors import OutputError
from gradscope.report.formats import renderer
from gradscope.report.formats.sections import placed
from gradscope.report.model import InputFailure, Skip

BEGIN, END = "<!-- gradscope:begin -->", "<!-- gradscope:end -->"
ROOT = Path(__file__).resolve().parents[2]


def card(report) -> str:
    return renderer("model-card")(report)


# --- what it says -------------------------------------------------------------------------------


def test_it_says_what_was_looked_at_what_was_found_and_what_was_not_asked(
    report_of, finding
) -> None:
    lines = card(report_of(finding(), finding("low", "b.weight"))).splitlines()

    assert lines[0] == BEGIN
    assert lines[-1] == END
    assert (
        "`m.safetensors` (3 of 3 tensors): **1 high, 1 low**. The gate at `high` failed."
        in (lines[3])
    )
    assert "| high | W105 dead-units | `fc.weight` | 5 of 10 rows are dead |" in lines
    assert "Not evaluated: skewed." in lines


def test_a_healthy_model_has_no_table(report_of) -> None:
    text = card(report_of())

    assert "**no findings**. The gate at `high` passed." in text
    assert "|" not in text


def test_it_names_no_folder_of_its_author(report_of, finding) -> None:
    text = card(report_of(finding(subject="runs/m.safetensors")))

    assert "runs/" not in text
    assert "| `m.safetensors` |" in text


def test_it_says_what_is_accepted_unread_and_skipped(report_of, finding) -> None:
    report = report_of(
        finding(state="unchanged", allowed="a table of constants"),
        errors=(InputFailure(input="a/x.pt", kind="missing", message="file not found"),),
    )
    skipped = (Skip(subject="t", reason="strings"),)
    coverage = report.coverage.model_copy(update={"skipped": skipped})

    text = card(report.model_copy(update={"coverage": coverage}))

    assert "accepted: a table of constants" in text
    assert "`x.pt`" in text
    assert "Not everything could be read: 1 failure." in text
    assert "Not analysed: `t`." in text


def test_many_findings_are_counted(report_of, finding) -> None:
    names = [a + b for a in "abcdefgh" for b in "klmnopqrst"]

    text = card(report_of(*(finding(subject=name) for name in names)))

    assert text.count("| high |") == 20
    assert "… and 60 findings more." in text


# --- where it is put ----------------------------------------------------------------------------


@pytest.fixture
def section(report_of, finding) -> str:
    return card(report_of(finding(subject=f"{END}", message=f"{BEGIN}\n{END}\n")))


@pytest.mark.parametrize("before", ["", "# A\n\ntext\n\n", "---\na: b\n---\n", "é\n\n\n"])
@pytest.mark.parametrize("after", ["", "\n## License\n", "  no newline at the end"])
@pytest.mark.parametrize("inside", ["", "old\n", "a\n\nb\n"])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_only_what_lies_between_the_marks_is_replaced(
    section: str, tmp_path: Path, before: str, after: str, inside: str, line: str
) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(f"{before}{BEGIN}\n{inside}{END}\n{after}".replace("\n", line).encode())

    once = placed(section, path)
    path.write_bytes(once.encode())

    assert once == f"{before}{section}{after}".replace("\n", line)
    assert placed(section, path) == once


@pytest.mark.parametrize("old", ["# A\n", "# A", "# A\n\n\n", "", "\n"])
def test_without_marks_it_stands_at_the_end_once(section: str, tmp_path: Path, old: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(old)

    once = placed(section, path)
    path.write_text(once)

    assert once == (old.rstrip() + "\n\n" if old.strip() else "") + section
    assert placed(section, path) == once


def test_a_mark_within_a_line_is_text(section: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"Put it between `{BEGIN}` and `{END}`.\n")

    assert placed(section, path).startswith(f"Put it between `{BEGIN}` and `{END}`.\n\n{BEGIN}\n")


@pytest.mark.parametrize(
    "old", [f"{BEGIN}\n", f"a\n{END}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n" * 2]
)
def test_a_file_whose_marks_are_no_pair_is_left_alone(
    section: str, tmp_path: Path, old: str
) -> None:
    path = tmp_path / "README.md"
    path.write_text(old)

    with pytest.raises(OutputError, match="leave one of each"):
        placed(section, path)


def test_what_is_no_text_is_left_alone(section: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(b"\xff\xfe")

    with pytest.raises(OutputError, match="not UTF-8"):
        placed(section, path)


def test_other_formats_replace_the_file(report_of, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"a\n{BEGIN}\n{END}\n")

    assert placed("text\n", path) == "text\n"


@pytest.mark.parametrize("fault", ["", f"{BEGIN}\n"])
def test_the_command_writes_into_a_card(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(before := f"---\nlicense: mit\n---\n{fault}{BEGIN}\nold\n{END}\n## Uses\n")
    words = ["render", str(ROOT / "fixtures" / "report-1.0.json"), f"--report=model-card={path}"]

    done = subprocess.run(
        [sys.executable, "-m", "gradscope", *words], capture_output=True, text=True, env=os.environ
    )

    text = path.read_text()
    if fault:
        assert done.returncode == 3
        assert "leave one of each" in done.stderr
        assert text == before
    else:
        assert done.returncode == 0
        assert text.startswith(f"---\nlicense: mit\n---\n{BEGIN}\n## Diagnostics\n")
        assert text.endswith(f"{END}\n## Uses\n")
        assert "old" not in text
