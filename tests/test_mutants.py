"""The mutation script finds what tests miss, and only that."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .mutants import mutations, sampled, survivors

MODULE = """\
def large(x: int) -> bool:
    return x > 3


def small(x: int) -> bool:
    return x < 5
"""
TEST = """\
from gradscope.flow.sizes import large, small


def test_sizes() -> None:
    assert not large(3) and large(4)
    assert small(0)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {"gradscope/flow/sizes.py": MODULE, "tests/flow/test_sizes.py": TEST}
    for name, text in {**files, "gradscope/__init__.py": "", "tests/cli/test_flow.py": ""}.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    return tmp_path / "tree"


def test_a_guarded_line_kills_its_mutations_and_an_unguarded_one_does_not(
    tree: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}

    found = list(survivors(tree, sampled(tree, ["flow"], 9, seed=0), tmp_path / "copy"))

    assert sorted(m.described(MODULE.encode()) for m in found) == [
        "gradscope/flow/sizes.py:6\n    return x < 5\n -> return x < 6",
        "gradscope/flow/sizes.py:6\n    return x < 5\n -> return x <= 5",
    ]
    assert {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()} == before


def test_tests_that_fail_anyway_say_nothing_of_a_mutation(tree: Path, tmp_path: Path) -> None:
    (tree / "tests/flow/test_sizes.py").write_text("def test_sizes(): assert False")

    with pytest.raises(SystemExit, match="a test fails without any mutation"):
        list(survivors(tree, sampled(tree, ["flow"], 1, seed=0), tmp_path / "copy"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a < b <= c", ["a <= b <= c", "a < b < c"]),
        ("(a) and (b)", ["(a) or (b)"]),
        ("(a + 1) * 2.0", ["(a + 1) / 2.0", "(a - 1) * 2.0", "(a + 2) * 2.0", "(a + 1) * 3.0"]),
        ("min(é, a) is  not b", ["min(é, a) is b", "max(é, a) is  not b"]),
        ("not a", ["a"]),
        ("x = not (a or b)", ["x = (a or b)", "x = not (a and b)"]),
        ("b not in a ** True", ["b in a ** True", "b not in a * True", "b not in a ** False"]),
        ("x: tuple[0] = f'{1 + 1}', zip(a, strict=True)", []),
    ],
)
def test_each_operator_number_and_negation_is_changed_in_its_place(
    before: str, after: list[str]
) -> None:
    source = before.encode()

    found = [mutation.apply(source).decode() for mutation in mutations("m.py", source)]

    assert found == after
    assert all(ast.parse(text) for text in found)


def test_a_seed_fixes_the_sample(tree: Path) -> None:
    one, again, other = (sampled(tree, ["flow/sizes"], 2, seed) for seed in (1, 1, 2))

    assert one == again != other
