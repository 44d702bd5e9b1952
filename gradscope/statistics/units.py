"""Which units of a tensor are dead and which repeat another, from their norms and hashes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gradscope.statistics import codings, extremes
from gradscope.statistics.layout import UnitLayout
from gradscope.statistics.records import UnitPart, Units
from gradscope.statistics.tally import Tally

Norms = npt.NDArray[np.float64]
Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.intp]

#: How many of anything are listed.
LISTED = 10
#: A unit is dead when its L2 norm is below this share of the reference.
DEAD = 1e-3


def units(whole: Tally) -> Units | None:
    """The units of a complete tally's tensor; None below two dimensions."""
    norms = extremes.unit_norms(whole)
    if norms is None:
        return None
    layout = whole.layout or UnitLayout.along(whole.ref.shape, 0)
    hashes = None if whole.ref.dtype in codings.COMPLEX else whole.unit_hashes()
    members = layout.members if layout.parts else (np.arange(len(norms)),)
    references = _references([norms[m] for m in members])
    limits = np.empty(len(norms))
    for m, measure in zip(members, references, strict=True):
        limits[m] = DEAD * measure
    dead = (norms < limits) | (norms == 0)
    repeats = [] if hashes is None else _repeats(hashes, norms)
    heads = None if layout.parts else _heads(layout, len(norms))
    return Units(
        rows=len(norms),
        dead_rows=int(dead.sum()),
        dead=_listed(dead),
        duplicate_rows=len(repeats),
        duplicates=tuple(repeats[:LISTED]),
        norm_min=float(norms.min()),
        norm_median=float(np.median(norms)),
        norm_max=float(norms.max()),
        reference=reference(np.array(references)),
        axis=layout.axis,
        parts=_parts(whole, layout, norms, dead, hashes, references),
        heads=heads,
        dead_heads=_dead_heads(dead, heads) if heads else (),
    )


def _references(parts: Sequence[Norms]) -> list[float]:
    """What each part's units are measured by: its own, or, where it is dead whole, the others'."""
    own = [reference(norms) for norms in parts]
    shared = reference(np.array(own))
    return [shared if single < DEAD * shared else single for single in own]


def reference(norms: Norms) -> float:
    """The norm that dead units are told by, which neither a dead majority nor a few giants move.

    That is the norm a tenth of the units (at least one) exceed. Units above a thousand times that
    are giants among the living, or the living among the dead: theirs are norms nearest to 1, which
    training keeps within a factor of a thousand (medians of 594 released matrices: 0.002 to 320).
    """
    ranked = np.sort(norms)[::-1]
    exceeding = min(len(ranked) - 1, max(1, len(ranked) // 10))
    common, above = ranked[exceeding], ranked[:exceeding]
    candidates = np.array([common, *above[above * DEAD > common]])
    living = candidates[candidates > 0]
    return float(living[np.argmin(np.abs(np.log(living)))]) if len(living) else 0.0


def _parts(
    whole: Tally,
    layout: UnitLayout,
    norms: Norms,
    dead: npt.NDArray[np.bool_],
    hashes: Hashes | None,
    references: Sequence[float],
) -> tuple[UnitPart, ...] | None:
    """The parts one by one; None where there is only one."""
    if not layout.parts:
        return None
    found = []
    for part, m, measure in zip(layout.parts, layout.members, references, strict=True):
        heads = _heads(layout, len(m))
        found.append(
            UnitPart(
                name=part.name,
                rows=len(m),
                dead_rows=int(dead[m].sum()),
                dead=_listed(dead[m]),
                duplicate_rows=0 if hashes is None else len(_repeats(hashes[m], norms[m])),
                reference=measure,
                norm=math.hypot(*norms[m]),
                content_hash=None if hashes is None else _content(whole, layout, hashes[m]),
                heads=heads,
                dead_heads=_dead_heads(dead[m], heads) if heads else (),
            )
        )
    return tuple(found)


def _heads(layout: UnitLayout, rows: int) -> int | None:
    return rows // layout.head if layout.head and rows % layout.head == 0 else None


def _dead_heads(dead: npt.NDArray[np.bool_], heads: int) -> tuple[int, ...]:
    """All of them: there are few heads, and as many are worth their names."""
    return tuple(map(int, np.flatnonzero(dead.reshape(heads, -1).all(axis=1))))


def _content(whole: Tally, layout: UnitLayout, hashes: Hashes) -> str:
    """As ``Tally.content_hash`` of the part as a matrix of its own, a unit a row."""
    digest = hashlib.blake2b(hashes.tobytes(), digest_size=16)
    digest.update(f"{whole.ref.dtype}{(len(hashes), layout.unit_numel)}".encode())
    return digest.hexdigest()


def _listed(flags: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(map(int, np.flatnonzero(flags)[:LISTED]))


def _repeats(hashes: Hashes, norms: Norms) -> list[tuple[int, int]]:
    """(earlier unit, unit that repeats it bit by bit), units of zeros aside."""
    candidates = np.flatnonzero(norms > 0)
    order = candidates[np.argsort(hashes[candidates], kind="stable")]
    same = hashes[order[1:]] == hashes[order[:-1]]
    if not same.any():
        return []
    runs = np.concatenate([[0], np.cumsum(~same)])
    first = order[np.searchsorted(runs, runs)]
    pairs = zip(first[1:][same], order[1:][same], strict=True)
    return sorted(((int(a), int(b)) for a, b in pairs), key=lambda pair: pair[1])
