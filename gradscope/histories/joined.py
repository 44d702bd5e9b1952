"""Histories of ``gradscope.grads``: the files of one run, joined by the names of their layers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.checkpoints.tensors import Failure
from gradscope.errors import InputError
from gradscope.histories.format import FORMAT, KEYS
from gradscope.histories.history import KINDS, Exact, History, Layer, Sketches, Status, Topology
from gradscope.histories.native import Shard, read_shard
from gradscope.histories.steps import ordered
from gradscope.text import escaped, listed


def read_native(path: str) -> History:
    """The history in one file. Raises InputError when it breaks the format."""
    return _history(path, [read_shard(path)], [])


def read_shards(folder: str, files: Sequence[str]) -> History:
    """A history from the files of one run, in the order given; a damaged one costs its own records.

    Layers that appear later (unfrozen, added) are joined by name. Raises InputError when no file
    can be read.
    """
    shards: list[Shard] = []
    failures: list[InputError] = []
    for file in files:
        try:
            shards.append(read_shard(file))
        except InputError as error:
            failures.append(error)
    if not shards:
        raise failures[0]
    return _history(folder, _by_run(shards), failures)


def _by_run(shards: Sequence[Shard]) -> list[Shard]:
    """Runs in the order in which they began, each with its shards as they are.

    Two recorders in one folder write shards in turn; the run that began later supersedes the other
    as a restart does, not record by record.
    """
    runs = [shard.meta.get("run_id") for shard in shards]
    began = {run: str(s.meta.get("started") or "") for run, s in zip(runs, shards, strict=True)}
    known = all(began.values())
    order = sorted(began, key=lambda run: began[run] if known else "")
    return [s for run in order for s, of in zip(shards, runs, strict=True) if of == run]


def _history(path: str, shards: Sequence[Shard], failures: Sequence[InputError]) -> History:
    names = _names(shards)
    places = [_places(shard, names) for shard in shards]
    steps = np.concatenate([shard.arrays["steps"].astype(np.int64) for shard in shards])
    chosen, notes = ordered(steps)
    joined = _Joined(shards, names, places, chosen, steps)
    last = shards[-1]
    topology = last.meta.get("topology")
    source = topology.get("source") if isinstance(topology, Mapping) else None
    edges = joined.edges()
    return History(
        path=path,
        format=FORMAT,
        nbytes=sum(os.path.getsize(shard.path) for shard in shards),
        steps=steps[chosen],
        layers=joined.layers(),
        l2=joined.cells("grad/l2", np.nan),
        status=joined.status(),
        sketches=joined.sketches(),
        exact=joined.exact(),
        edges=edges,
        topology=_topology(edges is not None, source),
        meta=last.meta,
        notes=(*notes, *_unknown(shards)),
        failures=tuple(
            Failure(e.kind, f"{os.path.basename(e.path)}: {e.message}") for e in failures
        ),
        **joined.fields(),
    )


def _topology(known: bool, source: object) -> Topology:
    if not known:
        return "assumed-chain"
    return "recorded" if source == "recorded" else "given" if source != "assumed-chain" else source


def _names(shards: Sequence[Shard]) -> list[str]:
    """Every layer of every shard: in execution order where a shard has it, else as they appear."""
    order: dict[str, float] = {}
    for shard in shards:
        names = shard.arrays["layer/name"].tolist()
        places = shard.arrays.get("layer/order", np.full(len(names), -1)).tolist()
        for name, place in zip(names, places, strict=True):
            if place >= 0 or name not in order:
                order[name] = place if place >= 0 else math.inf
    return sorted(order, key=lambda name: order[name])


def _places(shard: Shard, names: Sequence[str]) -> np.ndarray[Any, Any]:
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[n] for n in shard.arrays["layer/name"].tolist()], dtype=np.int64)


def _unknown(shards: Sequence[Shard]) -> list[str]:
    unknown = dict.fromkeys(name for shard in shards for name in shard.unknown)
    named = listed(map(escaped, unknown), len(unknown), most=5)
    return [f"ignored keys that this version does not know: {named}"] if unknown else []


_ABSENT = {"n_nan": -1, "n_inf": -1, "skipped": 0, "micro_count": 0}


@dataclass(frozen=True, eq=False, slots=True)
class _Joined:
    """Several shards as one set of arrays: rows by name, records in order."""

    shards: Sequence[Shard]
    names: Sequence[str]
    places: Sequence[np.ndarray[Any, Any]]
    chosen: np.ndarray[Any, Any]
    steps: np.ndarray[Any, Any]

    @property
    def _plain(self) -> bool:
        """One shard, all records and rows in its own order: nothing needs copying."""
        return (
            len(self.shards) == 1 and self._in_order and bool(np.all(np.diff(self.places[0]) > 0))
        )

    @property
    def _in_order(self) -> bool:
        """Whether every record was kept where it was."""
        return np.array_equal(self.chosen, np.arange(len(self.steps)))

    @property
    def _last_is_whole(self) -> bool:
        """Whether the last shard has every layer, in this order; it then knows the units."""
        return bool(np.array_equal(self.places[-1], np.arange(len(self.names))))

    def _row(self, name: str, absent: Any) -> list[Any]:
        values: list[Any] = [absent] * len(self.names)
        for shard, place in zip(self.shards, self.places, strict=True):
            if name in shard.arrays:
                for at, value in zip(place.tolist(), shard.arrays[name].tolist(), strict=True):
                    values[at] = value
        return values

    def layers(self) -> tuple[Layer, ...]:
        kinds, modules = self._row("layer/kind", "other"), self._row("layer/module", "")
        sizes, groups = self._row("layer/numel", -1), self._row("layer/group", -1)
        owners, tied = self._row("layer/optimizer", -1), self._tied()
        return tuple(
            Layer(
                name=name,
                kind=kind if kind in KINDS else "other",
                numel=size if size >= 0 else None,
                module=module,
                tied_to=tie,
                group=group if group >= 0 else None,
                optimizer=owner if owner >= 0 else None,
            )
            for name, kind, module, size, group, owner, tie in zip(
                self.names, kinds, modules, sizes, groups, owners, tied, strict=True
            )
        )

    def _tied(self) -> list[int | None]:
        tied: list[int | None] = [None] * len(self.names)
        for shard, place in zip(self.shards, self.places, strict=True):
            for row, other in enumerate(shard.arrays.get("layer/tied_to", np.empty(0)).tolist()):
                if other >= 0 and other != row:
                    tied[int(place[row])] = int(place[int(other)])
        return tied

    def cells(self, name: str, absent: Any) -> np.ndarray[Any, Any]:
        """A [T, L] array over all shards, ``absent`` where one does not have it."""
        if self._plain:
            return self.shards[0].arrays[name]
        dtype = np.result_type(*(s.arrays[name].dtype for s in self.shards if name in s.arrays))
        parts = []
        for shard, place in zip(self.shards, self.places, strict=True):
            part = np.full((len(shard.arrays["steps"]), len(self.names)), absent, dtype)
            if name in shard.arrays:
                part[:, place] = shard.arrays[name]
            parts.append(part)
        result: np.ndarray[Any, Any] = np.concatenate(parts)[self.chosen]
        return result

    def records(self, name: str, absent: Any) -> np.ndarray[Any, Any]:
        """A [T, …] array over all shards; columns are padded to the widest."""
        found = [shard.arrays.get(name) for shard in self.shards]
        first = next(array for array in found if array is not None)
        width = (
            max(array.shape[1] for array in found if array is not None) if first.ndim == 2 else 0
        )
        parts = []
        for shard, array in zip(self.shards, found, strict=True):
            count = len(shard.arrays["steps"])
            part = np.full((count, width) if width else count, absent, first.dtype)
            if array is not None:
                part[(slice(None), slice(array.shape[1])) if width else slice(None)] = array
            parts.append(part)
        result: np.ndarray[Any, Any] = np.concatenate(parts)[self.chosen]
        return result

    def status(self) -> np.ndarray[Any, Any]:
        """The file's own; without one, everything in it was recorded."""
        parts = []
        for shard, place in zip(self.shards, self.places, strict=True):
            part = np.zeros((len(shard.arrays["steps"]), len(self.names)), np.uint8)
            part[:, place] = shard.arrays.get("grad/status", Status.RECORDED)
            parts.append(part)
        result: np.ndarray[Any, Any] = np.concatenate(parts)[self.chosen]
        return result

    def fields(self) -> dict[str, Any]:
        """The optional arrays that are fields of a history."""
        found: dict[str, Any] = {}
        for name, key in KEYS.items():
            if key.field is None or not any(name in shard.arrays for shard in self.shards):
                continue
            absent = _ABSENT.get(key.field, np.nan)
            if key.shape == ("T", "L"):
                found[key.field] = self.cells(name, absent)
            elif name == "edge/flow":
                found[key.field] = self._edge_flow()
            elif key.shape[0] == "T":
                found[key.field] = self.records(name, absent)
            elif self._last_is_whole and name in self.shards[-1].arrays:
                found[key.field] = self.shards[-1].arrays[name]
        return found

    def _edge_flow(self) -> np.ndarray[Any, Any] | None:
        """Flows of the joined edges; NaN where a shard lacks that edge."""
        edges = self.edges()
        if edges is None:
            return None
        column = {edge: i for i, edge in enumerate(map(tuple, edges.tolist()))}
        parts = []
        for shard, place in zip(self.shards, self.places, strict=True):
            part = np.full((len(shard.arrays["steps"]), len(edges)), np.nan, np.float32)
            flow = shard.arrays.get("edge/flow")
            if flow is not None and "graph/edges" in shard.arrays:
                own = map(tuple, self._renumbered(shard, place).tolist())
                for at, edge in enumerate(own):
                    if edge in column:
                        part[:, column[edge]] = flow[:, at]
            parts.append(part)
        result: np.ndarray[Any, Any] = np.concatenate(parts)[self.chosen]
        return result

    def _renumbered(self, shard: Shard, place: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A shard's edges, its rows in the joined numbering."""
        full = np.append(place, [len(self.names), -1])
        result: np.ndarray[Any, Any] = full[shard.arrays["graph/edges"].astype(np.int64)]
        return result

    def sketches(self) -> Sketches | None:
        """All sketches, with the place of their records in the joined history."""
        having = [s for s in self.shards if "grad/sketch" in s.arrays]
        if not having:
            return None
        width = having[-1].arrays["grad/sketch"].shape[2]
        new = {int(old): i for i, old in enumerate(self.chosen)}
        values, index, offset = [], [], 0
        for shard, place in zip(self.shards, self.places, strict=True):
            found = shard.arrays.get("grad/sketch")
            if found is not None and found.shape[2] == width:
                at = [new.get(offset + int(t)) for t in shard.arrays["grad/sketch_index"]]
                kept = [i for i, t in enumerate(at) if t is not None]
                part = np.zeros((len(kept), len(self.names), width), found.dtype)
                part[:, place] = found[kept]
                values.append(part)
                index += [at[i] for i in kept]
            offset += len(shard.arrays["steps"])
        order = np.argsort(np.array(index, dtype=np.int64), kind="stable")
        return Sketches(np.concatenate(values)[order], np.array(index, dtype=np.int64)[order])

    def exact(self) -> Exact | None:
        """Exact cosines; the first records of a shard have none to the shard before."""
        if not all(
            "grad/prev_cos" in s.arrays and "grad/prev_lag" in s.arrays for s in self.shards
        ):
            return None
        lag = self.cells("grad/prev_lag", 0)
        return Exact(self.cells("grad/prev_cos", np.nan), self._moved(lag))

    def _moved(self, lag: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """How many records before, now that some were sorted or dropped; 0 where it is gone."""
        if self._in_order:
            return lag
        kept = self.chosen.astype(np.int64)
        now = np.full(len(self.steps), -1)
        now[kept] = np.arange(len(kept))
        other = kept[:, None] - lag.astype(np.int64)
        place = np.where((lag > 0) & (other >= 0), now[np.maximum(other, 0)], -1)
        moved = np.arange(len(kept))[:, None] - place
        return np.where((place >= 0) & (moved > 0), moved, 0)

    def edges(self) -> np.ndarray[Any, Any] | None:
        """The edges of the last shard that has any."""
        for shard, place in reversed(list(zip(self.shards, self.places, strict=True))):
            if len(shard.arrays.get("graph/edges", ())):
                return self._renumbered(shard, place)
        return None


def by_number(files: Sequence[str]) -> list[str]:
    """Files named by a number in its order, then the others by name."""

    def key(path: str) -> tuple[bool, int, str]:
        stem = os.path.splitext(os.path.basename(path))[0]
        numbered = stem.isascii() and stem.isdigit()
        return not numbered, int(stem[:18]) if numbered else 0, path

    return sorted(files, key=key)
