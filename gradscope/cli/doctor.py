"""``gradscope doctor``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from gradscope.cli.command import command
from gradscope.cli.options import ListFormat, Listing
from gradscope.cli.terminal import emit

if TYPE_CHECKING:
    from gradscope.environment import Fact


@command
def doctor(format_: ListFormat = Listing.TABLE) -> int:
    """Versions, extras, devices and plug-ins, and what is wrong with them."""
    from gradscope.environment import facts

    found = list(facts())
    if format_ is Listing.JSON:
        emit(json.dumps([asdict(fact) for fact in found], indent=1) + "\n")
    else:
        emit("".join(_lines(found)))
    return 2 if any(fact.problem for fact in found) else 0


def _lines(found: Sequence[Fact]) -> Iterator[str]:
    from gradscope.environment import verdict
    from gradscope.text import escaped

    width = max(len(escaped(fact.name)) for fact in found)
    about = ""
    for fact in found:
        heading = "" if fact.about == about else fact.about
        about = fact.about
        yield f"{heading:<10}{escaped(fact.name):<{width}}  {escaped(fact.value)}\n"
        if fact.problem:
            yield f"{'':<10}{'':<{width}}  ! {escaped(fact.problem)}\n"
    yield f"\n{verdict(list(found))}\n"
