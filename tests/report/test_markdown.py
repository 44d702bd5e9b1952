"""Markdown that a comment on GitHub can hold, whatever the report."""

from __future__ import annotations

import re

import pytest

from gradscope.report.formats import renderer
from gradscope.report.formats.markdown_ import MOST_BYTES
from gradscope.report.model import InputFailure, Skip


def markdown(report) -> str:
    text = renderer("markdown")(report)
    assert len(text.encode()) <= MOST_BYTES
    return text


def rows(text: str) -> list[list[str]]:
    """The cells of the table's rows, split where GitHub does."""
    table = [line for line in text.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table]


def test_the_verdict_comes_first_and_then_the_findings(report_of, finding) -> None:
    text = markdown(report_of(finding(), finding("low", "b.weight")))

    assert text.startswith("## gradscope weights: FAILED\n\n**1 high, 1 low** · 3 of 3 tensors")
    assert "1 finding at or above high" in text
    assert rows(text)[0] == [
        "HIGH", "W105 dead-units", "`fc.weight`", "5 of 10 rows are dead<br>→ prune them"
    ]  # fmt: skip


def test_a_clean_run_has_no_table(report_of) -> None:
    text = markdown(report_of())

    assert "PASSED" in text
    assert "| severity" not in text
    assert "not evaluated: skewed (needs statistics)" in text


def test_it_says_what_could_not_be_read_what_is_known_and_what_is_noted(report_of, finding) -> None:
    text = markdown(
        report_of(
            finding(state="unchanged"), finding(subject="b", state="unchanged", allowed="constant"),
            errors=(InputFailure(input="x.pt", kind="missing", message="file not found"),),
            notes=["an entry is stale"],
        )
    )  # fmt: skip

    assert "- **not read in full** `x.pt`: file not found" in text
    assert "- an entry is stale" in text
    assert [row[0] for row in rows(text)] == ["HIGH<br>unchanged", "HIGH<br>allowed: constant"]


def test_what_does_not_fit_is_counted_and_no_row_is_cut(report_of, finding) -> None:
    names = ["".join("abcdefghij"[int(digit)] for digit in str(i)) for i in range(3_000)]
    long = [finding(subject=name, message="word " * 40) for name in names]

    text = markdown(report_of(*long))

    (rest,) = re.findall(r"… and ([\d,]+) findings more", text)
    assert int(rest.replace(",", "")) > 1_000
    assert all(len(row) == 4 for row in rows(text))
    assert len(text.encode()) > MOST_BYTES // 2


def test_nor_do_many_inputs_or_skipped_tensors_burst_it(report_of, finding) -> None:
    report = report_of(
        finding(),
        errors=tuple(
            InputFailure(input=f"{i}.pt", kind="missing", message="x" * 500) for i in range(999)
        ),
    )
    skipped = tuple(Skip(subject=f"t{i}", reason=f"reason {i}" * 20) for i in range(999))
    report = report.model_copy(
        update={"coverage": report.coverage.model_copy(update={"skipped": skipped})}
    )

    text = markdown(report)

    assert "HIGH" in text
    assert text.count("<details>") == text.count("</details>") == 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a|b", "`a\\|b`"),
        ("a`b", "``a`b``"),
        ("`", "`` ` ``"),
        ("layers.*.w_*", "`layers.*.w_*`"),
        ("<img src=x>", "`<img src=x>`"),
        ("a\nb", "`a\\nb`"),
    ],
)
def test_a_name_is_code_in_one_cell(report_of, finding, name: str, shown: str) -> None:
    ((_, _, where, _),) = rows(markdown(report_of(finding(subject=name))))

    assert where == shown


def test_a_message_is_text_without_markup_links_or_mentions(report_of, finding) -> None:
    text = markdown(report_of(finding(message="<b> *x* _y_ [z](http://e) @team www.e.org #1 $k$")))

    ((*_, cell),) = rows(text)
    assert cell.startswith(
        r"\<b\> \*x\* \_y\_ \[z\](http://&#8288;e) @&#8288;team www.&#8288;e.org \#1 \$k\$"
    )
