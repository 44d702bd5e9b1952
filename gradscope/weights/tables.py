"""Which rows of the tables look untrained, by id and by token: looked at again after the pass."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tokenizer import reserved_beside
from gradscope.statistics.dtypes import FORMATS
from gradscope.statistics.records import CodeUse, TableRows, Units
from gradscope.weights.result import TensorResult
from gradscope.weights.roles import Role

if TYPE_CHECKING:
    from gradscope.statistics import Engine
    from gradscope.statistics.table_rows import Centre
    from gradscope.statistics.table_rows import Rows as TableSample

#: Rows of these follow one another smoothly: near-equal neighbours were trained.
_ORDERED = re.compile(r"(^|[._])(wpe|pos|position|relative|time|temporal|age|year)", re.IGNORECASE)

#: What quantisers call their moving counts of assignments.
_COUNTS = ("cluster_size", "cluster_usage", "ema_cluster_size", "_ema_cluster_size")


def table_rows(
    refs: Mapping[str, TensorRef],
    tensors: Sequence[TensorResult],
    folder: str,
    engine: Engine[Any, Any],
) -> dict[str, TableRows]:
    """The rows of each table of tokens that look untrained; tables without any are left out.

    Of a healthy table some 3,500 rows are read; one with untrained rows is read once more.
    Raises InputError when a file changes or ends while it is read.
    """
    from gradscope.statistics.engine import one_blas_thread
    from gradscope.statistics.table_rows import centre_of_cluster

    tables = list(_tables(refs, tensors))
    if not tables:
        return {}
    hints = reserved_beside(folder)
    with one_blas_thread():
        # Rows are read here, a few thousand at a time: threads would wait for one another.
        centres = list(engine(centre_of_cluster, (_sample(ref, hints) for ref, _ in tables)))
    found = {
        ref.name: _rows(ref, units, centre, engine)
        for (ref, units), centre in zip(tables, centres, strict=True)
    }
    return {name: rows for name, rows in found.items() if rows.all}


def _tables(
    refs: Mapping[str, TensorRef], tensors: Sequence[TensorResult]
) -> Iterator[tuple[TensorRef, Units]]:
    for tensor in tensors:
        if tensor.role not in (Role.EMBEDDING, Role.UNEMBEDDING) or tensor.dtype not in FORMATS:
            continue
        if tensor.units is not None and len(tensor.shape) == 2 and tensor.units.norm_max > 0:
            yield refs[tensor.name], tensor.units


def _sample(ref: TensorRef, hints: Sequence[int]) -> TableSample:
    from gradscope.statistics.table_rows import NO_ROWS, sampled

    return NO_ROWS if _ORDERED.search(ref.name) else sampled(ref, hints)


def _rows(
    ref: TensorRef, units: Units, centre: Centre | None, engine: Engine[Any, Any]
) -> TableRows:
    from gradscope.statistics.table_rows import rows_by_id

    if centre is None and _listed_whole(units):
        repeated = sorted({second for _, second in units.duplicates})
        return TableRows(units.dead, tuple(repeated))
    return rows_by_id(ref, centre, units.dead_rows, engine)


def _listed_whole(units: Units) -> bool:
    return len(units.dead) == units.dead_rows and len(units.duplicates) == units.duplicate_rows


def codebooks(
    refs: Mapping[str, TensorRef], tensors: Sequence[TensorResult]
) -> dict[str, tuple[CodeUse, ...]]:
    """Which codes of each codebook are in use; codebooks of zeros are left out.

    Raises InputError when a file changes or ends while it is read.
    """
    from gradscope.statistics.codes import code_use

    found = {}
    for tensor in tensors:
        s = tensor.statistics
        plain = tensor.role is Role.CODEBOOK and tensor.dtype in FORMATS and s is not None
        if plain and s is not None and s.zero_count < s.count == s.finite_count:
            found[tensor.name] = code_use(refs[tensor.name], _counts(tensor.name, refs))
    return found


def _counts(name: str, refs: Mapping[str, TensorRef]) -> TensorRef | None:
    """The moving counts of assignments beside a codebook, or beside its module."""
    parts = name.removesuffix(".weight").split(".")
    modules = (".".join(parts[:end]) for end in range(len(parts), max(len(parts) - 3, -1), -1))
    names = (f"{module}.{leaf}".lstrip(".") for module in modules for leaf in _COUNTS)
    return next(
        (refs[name] for name in names if name in refs and refs[name].dtype in FORMATS), None
    )
