"""What one attribution method is: its row of facts, and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from gradscope.errors import UsageError

#: What the values are: "gradient" [N, C, H, W] of the input; "activation" [N, h, w] of a layer;
#: "perturbation" [N, H, W] of the input; "attention" [N, h, w] of the patch tokens.
Family = Literal["gradient", "activation", "perturbation", "attention"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its default, which also sets its type, and what it does."""

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    #: Whether a quarter of it gives a rougher map of the same kind, as repetitions are made.
    effort: bool = False
    #: Whether it is something to reach, for which work may go on.
    goal: bool = False
    #: Whether it may be an array, too.
    array: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """One method. ``home`` is the ``module:function`` that computes it."""

    name: str
    family: Family
    summary: str
    reference: str
    home: str
    options: Mapping[str, Option] = field(default_factory=dict)
    #: How a heatmap is drawn: both signs, or only positive values.
    sign: Literal["signed", "positive"] = "positive"
    #: How channels become one map: their sum, or the greatest magnitude.
    channels: Literal["sum", "max-abs"] = "sum"
    #: Whether it reads one layer.
    reads_layer: bool = False
    #: What to do where its values do not add up to the score.
    refine: str = "compare with integrated-gradients"
    #: What it differentiates the score by; None for methods that need no gradient.
    differentiates: Literal["input", "layer"] | None = None

    @property
    def compute(self) -> Callable[..., Any]:
        """The function that computes it; imports torch."""
        module, _, name = self.home.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found


def completed(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options, defaults filled in.

    Raises UsageError for an unknown option and for a value of the wrong type.
    """
    wrong = [option for option in given if option not in method.options]
    if wrong:
        offered = ", ".join(method.options) or "none"
        raise UsageError(f"{method.name} has no option {wrong[0]!r}; its options: {offered}")
    return {
        name: _checked(name, option, given.get(name, option.default))
        for name, option in method.options.items()
    }


def _checked(name: str, option: Option, value: Any) -> Any:
    if option.array and hasattr(value, "shape"):
        return value
    if option.choices and value not in option.choices:
        raise UsageError(f"{name} is one of {', '.join(option.choices)}, not {value!r}")
    if isinstance(option.default, bool) and not isinstance(value, bool):
        raise UsageError(f"{name} is true or false, not {value!r}")
    if isinstance(option.default, bool) or not isinstance(option.default, int | float):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} is a number, not {value!r}")
    return type(option.default)(value)
