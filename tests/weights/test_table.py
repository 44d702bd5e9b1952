"""The table of a small report, to the character."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import pytest

import gradscope.weights.table  # noqa: F401  registers its section
from gradscope.report.formats import Display, renderer
from gradscope.report.model import Coverage, Finding, Gate, Input, InputFailure, NotEvaluated, Skip
from gradscope.report.severity import Severity
from gradscope.statistics.records import Statistics
from gradscope.weights.result import Health, Overall, RolePool, WeightsReport, WeightsResult
from gradscope.weights.roles import Role

from .made import tensor

LONG = "model.decoder.transformer.layers.{}.attention.out_proj.weight"


def finding(severity: str, subject: str, state: str = "new") -> Finding:
    return Finding(
        rule="W101", name="non-finite", severity=Severity(severity), subject=subject,
        input="model.safetensors",
        message=f"{subject} is broken", evidence={}, threshold=None, recommendation="do not use it",
        fingerprint="", state=state,
    )  # fmt: skip


def drawn(numbers: dict[str, float], peak: float | None, **fields: Any) -> Any:
    outliers = {"peak_ratio": peak}
    return tensor(statistics=numbers, outliers=outliers, histogram=(0, 1, 4, 8, 2, 0), **fields)


PLAIN = {"mean": 0.001, "std": 0.25, "abs_max": 1.5, "zero_fraction": 0.0}
SPARSE = {"mean": -0.5, "std": 12345.678, "abs_max": 3, "zero_fraction": 0.1234}


def report(**fields: Any) -> WeightsReport:
    pool = Statistics(
        count=12_000, mean=0.5, std=1.25, min=-3.0, max=7, kurtosis=0.12345, zero_fraction=0.004
    )
    tensors = (
        drawn(PLAIN, 3.5, name=LONG.format(0), health=Health(score=100, status="excellent")),
        drawn(PLAIN, 2.5, name=LONG.format(1), health=Health(score=100, status="excellent")),
        drawn(SPARSE, None, name="head.weight", shape=(8, 100), dtype="BF16",
              health=Health(score=20, status="critical")),
        drawn(PLAIN, 1.0, name="norm", shape=(100,), role=Role.NORM_GAIN,
              health=Health(score=100, status="excellent")),
        tensor(name="step", shape=(), role=Role.COUNTER).model_copy(update={"statistics": None}),
    )  # fmt: skip
    given: dict[str, Any] = {
        "command": "weights",
        "inputs": (Input(path="model.safetensors", format="safetensors", bytes=1_500_000),),
        "coverage": Coverage(
            analyzed=5, total=9, unit="tensors", bytes=48_400,
            skipped=tuple(Skip(subject=f"x.{i}", reason="not read") for i in range(4)),
            not_evaluated=tuple(
                NotEvaluated(rule=rule, reason="needs a spectrum") for rule in ("alpha", "rank")
            ),
        ),
        "findings": (
            finding("critical", "head.weight"),
            *(finding("medium", f"layers.{i}.weight", "unchanged") for i in range(4)),
            *(finding("info", f"layers.{i}.bias") for i in range(2)),
        ),
        "result": WeightsResult(
            tensors=tensors,
            overall=Overall(
                tensors=5, parameters=8_900, statistics=pool,
                by_role={Role.LINEAR: RolePool(tensors=3, statistics=pool)},
            ),
            health=Health(score=20, status="critical"),
            notes=("a prefix was taken off",),
        ),
        "gate": Gate(fail_on="high", failed=True, exit_code=3,
                     reasons=("b.pt: not found", "1 finding at or above high")),
        "errors": (InputFailure(input="b.pt", kind="missing", message="not found"),),
    }  # fmt: skip
    return WeightsReport(**{**given, **fields})


def text_of(width: int | None = None, detail: int = 1, **fields: Any) -> str:
    return renderer("table")(report(**fields), Display(width=width, detail=detail))


def block(text: str, first: str, last: str) -> str:
    """The lines from one that begins with ``first`` up to one that begins with ``last``."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    end = next(i for i, line in enumerate(lines) if i > start and line.startswith(last))
    return "\n".join(lines[start:end]).strip()


def test_off_a_terminal_every_tensor_has_its_row() -> None:
    assert (
        block(text_of(), "tensor ", "Not analysed")
        == dedent("""\
        tensor                                                        shape   dtype   mean        std  abs max  peak   zeros         health  distribution
        model.decoder.transformer.layers.0.attention.out_proj.weight  40×100  F32    0.001       0.25      1.5   3.5       0  100 excellent   ▁▄█▂
        model.decoder.transformer.layers.1.attention.out_proj.weight  40×100  F32    0.001       0.25      1.5   2.5       0  100 excellent   ▁▄█▂
        head.weight                                                   8×100   BF16    -0.5  1.235e+04        3     –  12.34%    20 critical   ▁▄█▂
        norm                                                          100     F32    0.001       0.25      1.5     1       0  100 excellent   ▁▄█▂
        step                                                          scalar  F32        –          –        –     –       –              –
        """).strip()
    )


def test_a_terminal_shows_what_multiplies_grouped_and_the_unhealthy_first() -> None:
    assert (
        block(text_of(130), "tensor ", "Not analysed")
        == dedent("""\
        tensor                                         shape   dtype   mean        std  abs max  peak   zeros         health  distribution
        head.weight                                    8×100   BF16    -0.5  1.235e+04        3     –  12.34%    20 critical   ▁▄█▂
        model.decoder.transformer.layers.*.attention.  40×100  F32    0.001       0.25      1.5   3.5       0  100 excellent   ▁▄█▂
        out_proj.weight  ×2
        … 2 more tensors; -v shows every one
        """).strip()
    )


def test_of_headers_alone_names_shapes_dtypes_and_roles_are_shown() -> None:
    result = report().result
    assert result is not None
    bare = [t.model_copy(update={"statistics": None}) for t in result.tensors[2:]]

    shown = text_of(result=result.model_copy(update={"tensors": tuple(bare)}))

    assert (
        block(shown, "tensor ", "Not analysed")
        == dedent("""\
        tensor       shape   dtype  role
        head.weight  8×100   BF16   linear
        norm         100     F32    norm-gain
        step         scalar  F32    counter
        """).strip()
    )


@pytest.mark.parametrize("width", [None, 130])
def test_codes_are_shown_by_their_scheme_and_grouped_by_it(width: int | None) -> None:
    result = report().result
    assert result is not None
    mixed = tuple(
        tensor(
            name=f"blk.{i}.attn_v.weight",
            dtype="U8",
            dequantized={"scheme": f"gguf {kind}", "stored_shape": (40, 50), "scales": 4},
        )
        for i, kind in enumerate(("Q4_K", "Q4_K", "Q6_K"))
    )

    shown = text_of(width, result=result.model_copy(update={"tensors": mixed}))

    rows = [line.split() for line in shown.splitlines() if line.startswith("blk.")]
    kinds = ["Q4_K", "Q6_K"] if width else ["Q4_K", "Q4_K", "Q6_K"]
    assert [row[row.index("gguf") + 1] for row in rows] == kinds


def test_a_narrow_terminal_keeps_the_end_of_a_name_and_leaves_the_mean_out() -> None:
    shown = block(text_of(110), "tensor ", "… 2 more").splitlines()

    assert shown == [
        "tensor                            shape   dtype        std  abs max  peak   zeros"
        "         health  distribution",
        "head.weight                       8×100   BF16   1.235e+04        3     –  12.34%"
        "    20 critical  ▁█▁",
        "…*.attention.out_proj.weight  ×2  40×100  F32         0.25      1.5   3.5       0"
        "  100 excellent  ▁█▁",
    ]


@pytest.mark.parametrize(
    ("width", "columns"),
    [(109, "peak zeros health"), (110, "health distribution"), (129, "dtype std abs"),
     (130, "dtype mean std abs")],
)  # fmt: skip
def test_columns_appear_with_the_room_for_them(width: int, columns: str) -> None:
    heading = next(line for line in text_of(width).splitlines() if line.startswith("tensor "))

    assert columns in " ".join(heading.split())
    assert ("distribution" in heading) is (width >= 110)


def test_elements_are_told_by_role() -> None:
    assert (
        block(text_of(), "role", "tensor ")
        == dedent("""\
        role    tensors  elements  mean   std  min  max  kurtosis  zeros
        linear        3    12,000   0.5  1.25   -3    7    0.1235  0.40%
        """).strip()
    )


def test_findings_of_one_kind_are_told_once() -> None:
    assert (
        block(text_of(), "Findings", "note")
        == dedent("""\
        Findings
          CRITICAL W101 non-finite  head.weight  in model.safetensors
                   head.weight is broken
                   → do not use it
          MEDIUM   W101 non-finite  layers.0.weight  (and 3 like it: layers.1.weight, layers.2.weight and 1 more)  in model.safetensors  known
                   layers.0.weight is broken
                   → do not use it
          INFO     W101 non-finite  layers.0.bias  (and 1 like it: layers.1.bias)  in model.safetensors
                   layers.0.bias is broken
                   → do not use it
        """).strip()
    )


def test_the_verdict_counts_findings_tensors_and_failed_inputs() -> None:
    assert text_of().splitlines()[-1] == (
        "FAILED  1 critical, 4 medium, 2 info (4 known) · 5 of 9 tensors, 48.4 kB · 2 rules not "
        "evaluated (-v tells why) · exit 3: "
        "1 input could not be read in full: 1 finding at or above high"
    )
    passed = Gate(fail_on="high", failed=False, exit_code=0, reasons=())
    assert text_of(findings=(), errors=(), gate=passed).splitlines()[-1] == (
        "PASSED  no findings · 5 of 9 tensors, 48.4 kB · 2 rules not evaluated (-v tells why)"
        " · exit 0"
    )


@pytest.mark.parametrize(
    ("width", "detail", "listed"),
    [(None, 1, "x.0, x.1, x.2, x.3  not read"), (80, 1, "x.0, x.1, x.2 and 1 more  not read"),
     (80, 2, "x.0, x.1, x.2, x.3  not read")],
)  # fmt: skip
def test_what_was_not_analysed_is_listed_in_full_off_a_terminal_or_when_asked(
    width: int | None, detail: int, listed: str
) -> None:
    lines = text_of(width, detail).splitlines()

    assert lines[lines.index("Not analysed") + 1].strip() == listed


def test_rules_that_were_not_evaluated_are_counted_and_named_when_asked() -> None:
    brief, whole = text_of(None, 1), text_of(None, 2)

    assert "Not evaluated" not in brief
    assert " · 2 rules not evaluated (-v tells why) · exit " in brief.splitlines()[-1]
    assert "Not evaluated: alpha, rank (needs a spectrum)" in whole.splitlines()
    assert " · 2 rules not evaluated · exit " in whole.splitlines()[-1]


@pytest.mark.parametrize(
    ("width", "detail", "shown"), [(None, 1, 26), (200, 2, 26), (200, 1, 24), (200, 0, 24)]
)
def test_a_terminal_shows_two_dozen_findings_unless_all_are_asked_for(
    width: int | None, detail: int, shown: int
) -> None:
    many = [finding("low", f"module_{chr(97 + i)}") for i in range(26)]

    text = text_of(width, detail, findings=(*many, many[-1]))

    assert text.count("LOW ") == shown
    assert ("… 3 more findings, less severe or known; -v shows them all" in text) is (shown == 24)
    assert ("Health" in text) is (detail > 0)


def test_a_terminal_shows_two_dozen_groups_of_tensors() -> None:
    result = report().result
    assert result is not None
    many = tuple(drawn(PLAIN, 1.0, name=f"m_{chr(97 + i)}.weight") for i in range(26))
    grown = result.model_copy(update={"tensors": many})

    brief, whole = text_of(200, result=grown), text_of(200, 2, result=grown)

    assert (brief.count(".weight  40×100"), whole.count(".weight  40×100")) == (24, 26)
    assert "… 2 more tensors; -v shows every one" in brief
    assert "more tensors" not in whole


def test_the_worst_tensor_of_a_group_stands_for_it_and_groups_are_worst_first() -> None:
    result = report().result
    assert result is not None
    scores = {"a.0": 99, "a.1": 91, "b.0": 95, "b.1": 94, "c.0": 100, "d.0": 100}
    tensors = tuple(
        drawn({**PLAIN, "std": score}, 1.0, name=f"{name}.weight", shape=(4 + 4 * (name > "d"), 9),
              health=Health(score=score, status="excellent"))
        for name, score in scores.items()
    )  # fmt: skip

    shown = block(
        text_of(200, result=result.model_copy(update={"tensors": tensors})), "tensor ", "Not"
    )

    cells = [(row[0], row[-3]) for row in map(str.split, shown.splitlines()[1:])]
    assert cells == [
        ("a.*.weight", "91"), ("b.*.weight", "94"), ("d.0.weight", "100"), ("c.0.weight", "100")
    ]  # fmt: skip


@pytest.mark.parametrize(("inputs", "errors", "named"), [(1, 0, False), (2, 0, True), (1, 1, True)])
def test_a_finding_names_its_input_where_there_are_several(
    inputs: int, errors: int, named: bool
) -> None:
    text = text_of(inputs=report().inputs * inputs, errors=report().errors * errors)

    assert ("head.weight  in model.safetensors\n" in text) is named


def test_severities_are_coloured_where_colour_is_wanted() -> None:
    coloured, plain = (renderer("table")(report(), Display(colour=c)) for c in (True, False))

    assert "\x1b[1;37;41mCRITICAL\x1b[0m" in coloured  # bold, white, on red
    assert "\x1b" not in plain
