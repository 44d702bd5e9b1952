"""Words and numbers in messages: one spelling of each, for every part of the program.

Names come from strangers' files. Whatever goes into a message or a table passes through
``escaped`` or ``quoted`` once; both leave text that is already escaped as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice


def escaped(text: str, longest: int | None = None) -> str:
    """Text on one line: control and direction characters escaped, cut after ``longest``."""
    short = text if longest is None or len(text) <= longest else text[:longest] + "…"
    if short.isprintable():
        return short
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def shortened(text: str, longest: int = 100) -> str:
    """A name for a table: escaped, and of one that is absurdly long the beginning and the end."""
    whole = escaped(text)
    if len(whole) <= 4 * longest:
        return whole
    return f"{whole[:longest]}…({len(whole) - 2 * longest:,} characters)…{whole[-longest:]}"


def quoted(name: str, longest: int = 200) -> str:
    """A name in quotation marks, with its length where it was cut."""
    size = "" if len(name) <= longest else f" ({len(name):,} characters)"
    return f"'{escaped(name, longest)}'{size}"


def listed(items: Iterable[object], total: int, most: int = 3) -> str:
    """The first few of ``total`` things, and how many more there are: ``a, b and 3 more``."""
    shown = [str(item) for item in islice(items, most)]
    more = f" and {total - len(shown):,} more" if total > len(shown) else ""
    return ", ".join(shown) + more


def meant(word: str, known: Iterable[str]) -> str:
    """``; did you mean a or b?``, the known words nearest to one that is not; empty without any."""
    close = get_close_matches(word, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def runs(numbers: Iterable[int], total: int, most: int = 10) -> str:
    """Ascending numbers with neighbours together: ``0, 3-17 and 40 more``."""
    spans: list[list[int]] = []
    shown = 0
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        elif len(spans) == most:
            break
        else:
            spans.append([number, number])
        shown += 1
    words = [str(a) if a == b else f"{a}-{b}" for a, b in spans]
    more = f" and {total - shown:,} more" if total > shown else ""
    return ", ".join(words) + more


def plural(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def size(count: float) -> str:
    """A number of bytes in decimal units: ``512 bytes``, ``1.2 GB``."""
    if count < 1000:
        return plural(int(count), "byte")
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:,.1f} PB"
