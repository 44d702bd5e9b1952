"""A history's rows as the layers that are analysed: the parameters of a module joined into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gradscope.flow.robust import Array
from gradscope.flow.series import Mask, Series
from gradscope.histories.history import Exact, History, Layer, Sketches, Status

By = Literal["layer", "param"]

#: A weight's RMS below this counts as this, so that zero-initialised parameters have no infinite
#: update ratio (the floor of adaptive gradient clipping, Brock et al. 2021).
WEIGHT_FLOOR = 1e-3
#: The name of the one row of a history that has only the total norm.
TOTAL = "(all parameters)"


def series(history: History, by: By = "layer") -> Series:
    """A history as it is analysed; ``by="layer"`` joins the parameters of each module.

    A history of the total norm alone is one row, so that what can be said of it is.
    """
    if not history.layers and history.total_l2 is not None:
        history = _total_alone(history)
    rows = [i for i, layer in enumerate(history.layers) if layer.tied_to is None]
    groups = _modules(history.layers, rows) if by == "layer" else [[row] for row in rows]
    return _Joined(history, groups, by).series()


def _total_alone(history: History) -> History:
    norms = np.asarray(history.total_l2, dtype=np.float64)[:, None]
    status = np.full(norms.shape, Status.RECORDED, np.uint8)
    return replace(history, layers=(Layer(TOTAL),), l2=norms, status=status)


def _modules(layers: Sequence[Layer], rows: Sequence[int]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(layers[row].module or module_of(layers[row].name), []).append(row)
    return list(found.values())


_PARAMETERS = (
    "weight",
    "bias",
    "weight_g",
    "weight_v",
    "in_proj_weight",
    "in_proj_bias",
    "gamma",
    "beta",
    "kernel",
)
_INDEXED = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def module_of(name: str) -> str:
    """The module of a parameter by its name: ``conv1.weight`` belongs to ``conv1``.

    So does ``conv1/kernel``, as JAX and nested objects write it.
    """
    module, _, last = name.rpartition("." if name.rfind(".") > name.rfind("/") else "/")
    return module if module and (last in _PARAMETERS or last.startswith(_INDEXED)) else name


@dataclass(frozen=True, eq=False)
class _Joined:
    """Rows of a history joined into layers; squares of norms add up."""

    history: History
    groups: list[list[int]]
    by: By

    def series(self) -> Series:
        layers = tuple(self._layer(group) for group in self.groups)
        nonfinite = self._any(_nonfinite(self.history))
        norm = self._norm(_finite_norms(self.history))
        norm[nonfinite] = np.nan
        sizes = [layer.numel for layer in layers]
        per_element = all(sizes)
        roots = np.sqrt(np.array([size or 1 for size in sizes], dtype=np.float64))
        return Series(
            history=self.history,
            layers=layers,
            steps=self.history.steps.astype(np.int64),
            norm=norm,
            rms=norm / roots if per_element else norm,
            per_element=per_element,
            status=self._status(),
            nonfinite=nonfinite,
            zero_fraction=self._zero_fraction(),
            update_ratio=self._update_ratio(roots, per_element),
            edges=self._edges(),
            sketches=self._sketches(norm),
            exact=self._exact(norm),
            parts=tuple(map(tuple, self.groups)),
        )

    @property
    def _alone(self) -> bool:
        return all(len(group) == 1 for group in self.groups)

    def _chosen(self, values: NDArray[Any]) -> NDArray[Any]:
        """The first row of each group; what has only those is not copied."""
        first = self._first
        return values if first == list(range(values.shape[1])) else values[:, first]

    @property
    def _first(self) -> list[int]:
        return [group[0] for group in self.groups]

    def _layer(self, group: list[int]) -> Layer:
        rows = [self.history.layers[row] for row in group]
        if self.by == "param":
            return rows[0]
        main = next((row for row in rows if row.kind not in ("bias",)), rows[0])
        sizes = [row.numel for row in rows]
        numel = None if None in sizes else sum(size or 0 for size in sizes)
        name = main.module or module_of(main.name)
        return replace(main, name=name, numel=numel, tied_to=None)

    def _norm(self, values: Array) -> Array:
        """Root of summed squares over each group; scaled, so that neither end overflows."""
        if self._alone:
            return self._chosen(values)
        out = np.empty((len(values), len(self.groups)))
        for i, group in enumerate(self.groups):
            part = values[:, group]
            top = np.fmax.reduce(np.abs(part), axis=1)
            safe = np.where((top > 0) & np.isfinite(top), top, 1.0)
            total = safe * np.sqrt(np.nansum((part / safe[:, None]) ** 2, axis=1))
            out[:, i] = np.where(np.isnan(part).all(axis=1), np.nan, total)
        return out

    def _any(self, flags: Mask) -> Mask:
        if self._alone:
            return self._chosen(flags)
        return (
            np.stack([flags[:, g].any(axis=1) for g in self.groups], axis=1).reshape(
                len(flags), len(self.groups)
            )
            if self.groups
            else np.zeros((len(flags), 0), bool)
        )

    def _status(self) -> NDArray[np.uint8]:
        """A module is recorded when any of its parameters is; else the strongest of the rest."""
        status = self.history.status
        if self._alone:
            return self._chosen(status).astype(np.uint8, copy=False)
        out = np.zeros((len(status), len(self.groups)), np.uint8)
        for i, group in enumerate(self.groups):
            part = status[:, group]
            recorded = (part == Status.RECORDED).any(axis=1)
            none = (part == Status.NONE).any(axis=1)
            out[:, i] = np.where(
                recorded, Status.RECORDED, np.where(none, Status.NONE, part.max(axis=1))
            )
        return out

    def _zero_fraction(self) -> Array | None:
        fraction = self.history.zero_fraction
        if fraction is None:
            return None
        if self._alone:
            return self._chosen(fraction).astype(np.float64)
        return np.stack([self._mean(fraction[:, g].astype(np.float64), g) for g in self.groups], 1)

    def _mean(self, part: Array, group: list[int]) -> Array:
        sizes = np.array([self.history.layers[row].numel or 1 for row in group], dtype=np.float64)
        weight = np.where(np.isnan(part), 0.0, sizes)
        with np.errstate(invalid="ignore"):
            mean: Array = np.nansum(part * weight, axis=1) / weight.sum(axis=1)
        return mean

    def _update_ratio(self, roots: Array, per_element: bool) -> Array | None:
        update, weights = self.history.update_l2, self.history.param_l2
        if update is None or weights is None:
            return None
        size = self._norm(weights.astype(np.float64))
        np.maximum(size, WEIGHT_FLOOR * roots if per_element else 0.0, out=size)
        ratio: Array = self._norm(update.astype(np.float64))
        with np.errstate(divide="ignore", invalid="ignore"):
            np.divide(ratio, size, out=ratio)
        ratio[np.isinf(ratio)] = np.nan
        return ratio

    def _edges(self) -> NDArray[np.int64] | None:
        """The edges between joined rows, each once; -1 stays the input, L becomes the new L."""
        if self.history.edges is None:
            return None
        place = {row: i for i, group in enumerate(self.groups) for row in group}
        for row, layer in enumerate(self.history.layers):
            if layer.tied_to is not None and layer.tied_to in place:
                place.setdefault(row, place[layer.tied_to])
        place |= {-1: -1, len(self.history.layers): len(self.groups)}
        pairs = [(place.get(int(u)), place.get(int(v))) for u, v in self.history.edges]
        kept = dict.fromkeys((u, v) for u, v in pairs if u is not None and v is not None and u != v)
        return np.array(list(kept), dtype=np.int64).reshape(-1, 2)

    def _sketches(self, norm: Array) -> Sketches | None:
        """A sketch is linear: that of a module's unit gradient is the weighted sum of its rows'."""
        found = self.history.sketches
        if found is None or not len(found.index):
            return None
        if self._alone:
            return Sketches(found.values[:, self._first], found.index)
        parts = _finite_norms(self.history)[found.index]
        out = np.zeros((len(found.index), len(self.groups), found.width), np.float32)
        for i, group in enumerate(self.groups):
            with np.errstate(divide="ignore", invalid="ignore"):
                weight = np.nan_to_num(parts[:, group] / norm[found.index, i][:, None])
            out[:, i] = np.einsum("sgk,sg->sk", found.values[:, group].astype(np.float32), weight)
        return Sketches(out, found.index)

    def _exact(self, norm: Array) -> Exact | None:
        """Cosines of joined rows from those of the parts, where all have one lag."""
        found = self.history.exact
        if found is None:
            return None
        cosine, lag = found.cosine.astype(np.float64), found.lag
        if self._alone:
            return Exact(cosine[:, self._first], lag[:, self._first])
        parts = np.nan_to_num(_finite_norms(self.history))
        joined, lags = np.full(norm.shape, np.nan), np.zeros(norm.shape, np.int64)
        for i, group in enumerate(self.groups):
            lags[:, i] = lag[:, group].max(axis=1)
            before = np.arange(len(norm)) - lags[:, i]
            valid = (before >= 0) & (lag[:, group] == lags[:, [i]]).all(axis=1) & (lags[:, i] > 0)
            before = np.where(valid, before, 0)
            products = parts[:, group] * parts[before][:, group]
            inner = np.nansum(np.where(products > 0, cosine[:, group] * products, 0.0), axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                joined[:, i] = np.where(valid, inner / (norm[:, i] * norm[before, i]), np.nan)
        return Exact(np.where(np.isfinite(joined), np.clip(joined, -1, 1), np.nan), lags)


def _nonfinite(history: History) -> Mask:
    """Where a gradient had NaN or Inf elements, by any sign of it.

    A norm of NaN has no other cause, whatever a count of zero says. A norm of Inf has one where no
    element is: it overflowed, which the greatest element or a count of Inf tells.
    """
    top, norm = history.max_abs, history.l2
    overflowed = np.zeros(norm.shape, bool)
    flags = np.isnan(norm)
    if history.n_inf is not None:
        overflowed |= history.n_inf == 0
    if top is not None:
        overflowed = (overflowed | np.isfinite(top)) & ~np.isinf(top)
        flags = flags | np.isinf(top)
    flags = flags | (np.isinf(norm) & ~overflowed)
    for count in (history.n_nan, history.n_inf):
        if count is not None:
            flags = flags | (count > 0)
    result: Mask = flags & (history.status == Status.RECORDED)
    return result


def _finite_norms(history: History) -> Array:
    """Norms, NaN where there is none; one that overflowed is at least the greatest element."""
    norms = history.l2.astype(np.float64)
    if history.max_abs is not None and (overflowed := np.isinf(norms)).any():
        norms[overflowed] = history.max_abs[overflowed]
    norms[(history.status != Status.RECORDED) | ~np.isfinite(norms)] = np.nan
    return norms
