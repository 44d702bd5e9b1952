"""The methods, by name: a function, its family and its reference, in one place each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal

from gradscope.errors import UsageError

Family = Literal["input", "activation"]


@dataclass(frozen=True, slots=True)
class Method:
    """One method. Its options are its function's keyword-only parameters."""

    name: str
    #: "input": values [N, C, H, W] or maps [N, H, W] of the input; "activation": of a layer.
    family: Family
    reference: str
    compute: Callable[..., Any]

    @property
    def options(self) -> dict[str, Any]:
        """Name and default of each option."""
        parameters = inspect.signature(self.compute).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


METHODS: dict[str, Method] = {}
_BUILT_IN = (
    "gradscope.explain.gradients",
    "gradscope.explain.cams",
    "gradscope.explain.perturbation",
)


def method(name: str, family: Family, reference: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as a method."""

    def register(compute: Callable[..., Any]) -> Callable[..., Any]:
        METHODS[name] = Method(name, family, reference, compute)
        return compute

    return register


def methods() -> Mapping[str, Method]:
    """Every method by name."""
    for module in _BUILT_IN:
        import_module(module)
    return METHODS


def method_named(name: str, options: Mapping[str, object]) -> Method:
    """A method, its options checked. Raises UsageError naming what there is."""
    known = methods()
    if name not in known:
        close = get_close_matches(name, known, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else f"; there are {', '.join(known)}"
        raise UsageError(f"no method is called {name!r}{hint}")
    wrong = [option for option in options if option not in known[name].options]
    if wrong:
        offered = ", ".join(known[name].options) or "none"
        raise UsageError(f"{name} has no option {wrong[0]!r}; its options: {offered}")
    return known[name]
