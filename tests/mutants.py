"""Which small mistakes would the tests miss? Mutates a sample of places and prints the survivors.

    python tests/mutants.py --number 30 --seed 1 flow weights/rules

Each mutation (``<`` for ``<=``, ``and`` for ``or``, another number, …) is made in a copy of the
tree, and the tests of its folder run there until one fails. mutmut and cosmic-ray mutate the
checkout in place and keep a database; a seeded sample needs neither.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

#: The parts that are mutated. Tests mirror the tree; these say something of a part as well.
ALSO = {
    "statistics": ["tests/weights"], "weights": ["tests/cli/test_cli.py"],
    "flow": ["tests/cli/test_flow.py"], "attribution": ["tests/cli/test_explain.py"],
    "report": ["tests/weights/test_table.py", "tests/cli/test_cli.py"],
}  # fmt: skip

SWAPS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"), ast.In: ("in", "not in"), ast.NotIn: (r"not\s+in", "in"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
    ast.Add: (r"\+", "-"), ast.Sub: ("-", "+"), ast.Mult: (r"\*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"), ast.Pow: (r"\*\*", "*"),
}  # fmt: skip


class Mutation(NamedTuple):
    """Bytes ``start`` to ``end`` of a file become ``text``."""

    file: str
    start: int
    end: int
    text: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def described(self, source: bytes) -> str:
        """The place, and its line before and after."""
        row = source.count(b"\n", 0, self.start)
        lines = [text.decode().split("\n")[row].strip() for text in (source, self.apply(source))]
        return f"{self.file}:{row + 1}\n    {lines[0]}\n -> {lines[1]}"


def mutations(file: str, source: bytes) -> Iterator[Mutation]:
    """Every mutation of a file."""
    starts = [0, *(match.end() for match in re.finditer(rb"\n", source))]

    def span(node: Any) -> tuple[int, int]:
        first = starts[node.lineno - 1] + node.col_offset
        return first, starts[node.end_lineno - 1] + node.end_col_offset

    def between(left: ast.expr, operator: ast.AST, right: ast.expr) -> Iterator[Mutation]:
        """The operator stands between two operands; the tree does not say where."""
        pattern, text = SWAPS.get(type(operator), ("$^", ""))
        place = re.compile(pattern.encode()).search(source, span(left)[1], span(right)[0])
        if place:
            yield Mutation(file, *place.span(), text)

    for node in expressions(ast.parse(source)):
        match node:
            case ast.Compare():
                operands = pairwise([node.left, *node.comparators])
                for (left, right), operator in zip(operands, node.ops, strict=True):
                    yield from between(left, operator, right)
            case ast.BoolOp():
                for left, right in pairwise(node.values):
                    yield from between(left, node.op, right)
            case ast.BinOp():
                yield from between(node.left, node.op, node.right)
            case ast.UnaryOp(op=ast.Not()):
                yield Mutation(file, span(node)[0], span(node)[0] + len("not "), "")
            case ast.Constant(value=bool(value)):
                yield Mutation(file, *span(node), repr(not value))
            case ast.Constant(value=int(value)):
                yield Mutation(file, *span(node), repr(value + 1))
            case ast.Constant(value=float(value)):
                yield Mutation(file, *span(node), repr(1.5 * value or 1.0))
            case ast.Name(id="min" | "max" as name):
                yield Mutation(file, *span(node), "max" if name == "min" else "min")


def expressions(node: ast.AST) -> Iterator[ast.expr]:
    """What is computed: no annotation, decorator or assertion, no f-string (3.11 misplaces it)."""
    for name, field in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in field if isinstance(field, list) else [field]:
            match child:
                case ast.Assert() | ast.JoinedStr() | ast.keyword(arg="strict"):
                    continue
                case ast.expr():
                    yield child
            yield from expressions(child) if isinstance(child, ast.AST) else ()


def sampled(root: Path, parts: Sequence[str], number: int, seed: int) -> list[Mutation]:
    """A sample of the mutations of ``gradscope/PART``, a folder or a module, for all parts."""
    globs = [how for part in parts for how in (f"{part}.py", f"{part}/**/*.py")]
    files = sorted({file for how in globs for file in (root / "gradscope").glob(how)})
    every = [m for f in files for m in mutations(f.relative_to(root).as_posix(), f.read_bytes())]
    return random.Random(seed).sample(every, min(number, len(every)))


def copied(root: Path, tree: Path) -> None:
    """Copy what tests need; what was downloaded or recorded is linked."""
    large = ("fetched", "recorded")
    others = shutil.ignore_patterns(".*", "__pycache__", "benchmarks", *large)
    shutil.copytree(root, tree, ignore=others)
    for folder in (root / "fixtures" / name for name in large):
        if folder.is_dir():
            (tree / "fixtures" / folder.name).symlink_to(folder.resolve())


def tests_of(tree: Path, file: str) -> list[str]:
    """The module's own tests first, then those of its folder, then those of ``ALSO``."""
    part = Path(file).parts[1]
    own = sorted((tree / "tests" / part).rglob(f"test_{Path(file).stem}.py"))
    first = [path.relative_to(tree).as_posix() for path in own]
    return [*first, f"tests/{part}", *ALSO.get(part, [])]


def run(tree: Path, tests: Sequence[str], compiled: Path, limit: float | None = None) -> int | None:
    """Pytest's exit code, or None beyond the limit of seconds; its processes end with it."""
    # Tests of downloaded models take most of the time and guard hardly a line alone.
    command = [sys.executable, "-m", "pytest", "-xqpno:cacheprovider", "-mnot fetched", *tests]
    command[3:3] = ["-p", "no:gradscope"]  # the installed plug-in; the tests bring the tree's own
    # Without bytecode: two mutations of one length within a second would share it.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["NUMBA_CACHE_DIR"] = str(compiled)
    options: Any = {"cwd": tree, "env": environment, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, **options, start_new_session=True) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def survivors(root: Path, sample: Sequence[Mutation], folder: Path) -> Iterator[Mutation]:
    """The mutations with which no test fails, each told as soon as it is known."""
    tree, compiled = folder / "tree", folder / "compiled"
    copied(root, tree)
    seconds: dict[str, float] = {}
    for mutation in sample:
        target, tests = tree / mutation.file, tests_of(tree, mutation.file)
        if (part := Path(mutation.file).parts[1]) not in seconds:
            began = time.monotonic()
            if run(tree, tests, compiled) != 0:
                raise SystemExit(f"{' '.join(tests)}: a test fails without any mutation")
            seconds[part] = time.monotonic() - began
        source = target.read_bytes()
        target.write_bytes(mutation.apply(source))
        # numba misses a change to a function that was compiled into one of another file.
        kept = folder / str(mutation.start) if b"numba" in source else compiled
        if run(tree, tests, kept, limit=3 * seconds[part] + 60) == 0:
            yield mutation
        target.write_bytes(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(ALSO), help="under gradscope/")
    parser.add_argument("--number", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sample = sampled(ROOT, arguments.parts, arguments.number, arguments.seed)
    if not sample:
        parser.error(f"gradscope/ has no {' or '.join(arguments.parts)}")
    told = {m: m.described((ROOT / m.file).read_bytes()) for m in sample}
    alive = 0
    with tempfile.TemporaryDirectory() as folder:
        for mutation in survivors(ROOT, sample, Path(folder)):
            print("survived", told[mutation], flush=True)
            alive += 1
    print(f"{alive} of {len(sample)} mutations survived, {alive / len(sample):.0%}")


if __name__ == "__main__":
    main()
