"""Rules about tables of vectors: tokens and codes that were not trained."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.statistics.records import CodeUse, TableRows, Units
from gradscope.text import listed, plural, quoted, runs
from gradscope.weights.result import Examined, Need, TensorResult
from gradscope.weights.roles import Role
from gradscope.weights.rules.tensors import LOST, with_units


@rule("W114", "undertrained-rows", Severity.MEDIUM, reads=Examined, needs=Need.STATISTICS)
def undertrained_rows(
    examined: Examined, *, medium: float = 0.20, codes: float = 0.50
) -> Iterator[Observation]:
    """Rows of an embedding that were hardly trained: nearly zero, equal, or never told apart.

    The third kind are near-equal rows of ordinary norm with empty space around them: tokens that
    training moved together, because the loss never saw them apart (Land and Bartolo 2024, arXiv
    2405.05417). Reserved and padding tokens are such rows in most released models; a prompt that
    contains one gives undefined output. Above 20 %, rows beyond the tokenizer's size aside:
    medium. It is the only rule about the rows of a table.

    Codes of a vector quantiser are unused by its moving counts, or where it keeps none, if they are
    nearly zero, repeat another, or never left their initialisation. More than half of a codebook,
    alone or in a stack: medium.
    """
    for tensor, units in with_units(examined, {Role.EMBEDDING, Role.UNEMBEDDING}):
        found = _Found.of(examined.tables.get(tensor.name), units)
        if found.count and (units.rows >= 16 or found.near_zero > LOST * units.rows):
            yield _untrained(tensor, found, _vocabulary(examined, tensor), medium)
    for name, books in examined.codebooks.items():
        if any(book.unused for book in books):
            yield _unused(name, books, codes)


@dataclass(frozen=True, slots=True)
class _Found:
    """How many rows of each kind, and the ids that are known of them, ascending."""

    near_zero: int
    repeated: int
    together: int
    ids: Sequence[int]

    @classmethod
    def of(cls, rows: TableRows | None, units: Units) -> _Found:
        """From the ids where they were looked up, else from the counts of the pass."""
        if rows is not None:
            return cls(len(rows.near_zero), len(rows.repeated), len(rows.together), rows.all)
        ids = sorted({*units.dead, *(second for _, second in units.duplicates)})
        return cls(units.dead_rows, units.duplicate_rows, 0, ids)

    @property
    def count(self) -> int:
        return self.near_zero + self.repeated + self.together

    @property
    def kinds(self) -> str:
        kinds = {
            "nearly zero": self.near_zero,
            "equal to another": self.repeated,
            "nearly equal to each other": self.together,
        }
        return ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What the rows of a table stand for: names by id, and where padding begins."""

    names: Mapping[int, str]
    size: int

    def named(self, ids: Sequence[int], total: int) -> str:
        """The first few of some ids, by name where there is one."""
        if not any(i in self.names for i in ids[:10]):
            return runs(ids, total)
        words = (f"{i} {quoted(self.names[i], 40)}" if i in self.names else str(i) for i in ids)
        return listed(words, total, 5)


def _vocabulary(examined: Examined, tensor: TensorResult) -> _Vocabulary:
    """The tokenizer's, or the size that config.json tells, where the table has about that size."""
    rows = tensor.shape[0]
    size = max(examined.tokens, default=-1) + 1
    if examined.tokens and size <= rows <= size + max(1024, size // 8):
        return _Vocabulary(examined.tokens, size)
    told = examined.document("config").get("vocab_size")
    if isinstance(told, int) and rows - 1024 <= told < rows:
        return _Vocabulary({}, told)
    return _Vocabulary({}, rows)


def _untrained(
    tensor: TensorResult, found: _Found, vocabulary: _Vocabulary, medium: float
) -> Observation:
    rows = tensor.shape[0]
    beyond = len(found.ids) - bisect_left(found.ids, vocabulary.size)
    share = (found.count - beyond) / rows
    padding = (
        f"; {plural(beyond, 'row')} from {vocabulary.size} on {_are(beyond)} padding, beyond the "
        f"vocabulary of {vocabulary.size:,}"
        if beyond
        else ""
    )
    return Observation(
        tensor.name,
        f"{found.count:,} of {rows:,} rows look untrained ({found.count / rows:.1%}; "
        f"{found.kinds}): {vocabulary.named(found.ids, found.count)}{padding}",
        "nothing to do: no token has these ids"
        if beyond == found.count
        else "keep these token ids out of prompts and of the tokenizer's special tokens",
        {
            "dead_rows": found.near_zero,
            "duplicate_rows": found.repeated,
            "near_equal_rows": found.together,
            "padding_rows": beyond,
            "rows": rows,
            "ids": runs(found.ids, found.count, 20),
            "affected_fraction": share,
        },
        threshold=medium,
        severity=None if share > medium else Severity.INFO,
    )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _unused(name: str, books: Sequence[CodeUse], limit: float) -> Observation:
    worst = max(range(len(books)), key=lambda b: len(books[b].unused) / books[b].codes)
    book = books[worst]
    share = len(book.unused) / book.codes
    which = "" if len(books) == 1 else f" of codebook {worst} of {len(books)}"
    over = sum(len(b.unused) > limit * b.codes for b in books)
    more = f"; more than half of {over} codebooks" if over > 1 else ""
    return Observation(
        name,
        f"{len(book.unused):,} of {book.codes:,} codes{which} are not in use ({share:.1%}, "
        f"{book.told}): {runs(book.unused, len(book.unused))}{more}",
        "if training goes on, draw unused codes again from encoder outputs (k-means "
        "initialisation, a threshold for dead codes) or use fewer, narrower codes",
        {
            "unused_codes": len(book.unused),
            "codes": book.codes,
            "codebooks": len(books),
            "affected_fraction": sum(len(b.unused) for b in books) / sum(b.codes for b in books),
        },
        threshold=limit,
        severity=None if share > limit else Severity.INFO,
    )
