"""The configuration: what a project asks, how severe it is, when a run fails, what is allowed.

A document (a TOML file, an environment variable, an option) is checked by itself, so that an error
names its origin, and becomes a ``Layer``; ``merged`` puts layers on top of each other.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gradscope.errors import UsageError
from gradscope.report.model import Record
from gradscope.report.rules import Rule, load_rules, select
from gradscope.report.severity import Severity
from gradscope.text import escaped, meant, quoted
from gradscope.version import DISTRIBUTION, __version__, release

#: What a preset sets unless the configuration does.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "recommended": {},
    "strict": {"fail-on": "medium"},
    "lenient": {"fail-on": "critical"},
}


def _words(value: object) -> object:
    """``"A, B"`` as a list, for variables and options."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]


class Part(Record):
    """Base of the configuration's parts: keys have hyphens."""

    model_config = ConfigDict(
        alias_generator=lambda name: name.replace("_", "-"), populate_by_name=True
    )

    @classmethod
    def keys(cls) -> list[str]:
        """The names that a document may use."""
        return [field.alias or name for name, field in cls.model_fields.items()]


class Allowance(Part):
    """Findings that are known and allowed, and why."""

    rules: Words = Field(
        min_length=1,
        description="Codes, prefixes or names of rules.",
        json_schema_extra={"minItems": 1},
    )
    subjects: Words = Field(
        default=("*",), description="Shell patterns of tensors' or layers' names."
    )
    reason: str = Field(min_length=1, description="Why they are allowed.")
    expires: date | None = Field(
        default=None, description="The first day on which they count again."
    )


class Config(Part):
    """What ``gradscope.toml`` or ``[tool.gradscope]`` of pyproject.toml may hold."""

    preset: Literal["recommended", "strict", "lenient"] = Field(
        default="recommended",
        description="Defaults: strict fails on medium, lenient on critical alone.",
    )
    required_version: str | None = Field(
        default=None,
        pattern=r"^>=\d+(\.\d+)*$",
        description="The least version of gradscope that this is written for, such as >=0.3.",
    )
    select: Words = Field(default=(), description="Only these rules: codes, prefixes or names.")
    ignore: Words = Field(default=(), description="Not these rules.")
    fail_on: Literal["info", "low", "medium", "high", "critical", "never"] = Field(
        default="high", description="The least severity of a finding that fails the run."
    )
    allow_empty: bool = Field(
        default=False, description="Whether a run that analyses nothing passes."
    )
    baseline: str | None = Field(
        default=None,
        min_length=1,
        description="The file of accepted findings, relative to this one.",
    )
    rules: Mapping[str, Mapping[str, Any]] = Field(
        default={}, description="By a rule's code or name: its severity and thresholds."
    )
    allow: tuple[Allowance, ...] = Field(default=(), description="Findings that are allowed.")

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        preset = PRESETS.get(str(given.get("preset")), {})
        return {k: v for k, v in preset.items() if k.replace("-", "_") not in given} | {**given}


@dataclass(frozen=True, slots=True)
class Layer:
    """One checked document, and where it comes from."""

    origin: str
    values: Mapping[str, Any]


#: Where each value comes from, by the names on the way to it.
Origins = Mapping[tuple[str, ...], str]


def layer(document: Mapping[str, Any], origin: str) -> Layer:
    """A document that holds what a configuration may. Raises UsageError naming the origin."""
    try:
        _check_version(document.get("required-version"))
        _check_keys(document, Config, "")
        allow = document.get("allow")
        for place, entry in enumerate(allow if isinstance(allow, list) else ()):
            if isinstance(entry, Mapping):
                _check_keys(entry, Allowance, f"allow.{place}.")
        _check_rules(Config.model_validate(document))
    except ValidationError as error:
        raise UsageError(f"{origin}: {_wrong(error)}") from error
    except UsageError as error:
        raise UsageError(f"{origin}: {error}") from error
    if "rules" not in document:
        return Layer(origin, document)
    # By name, so that a later layer that says W105 is of the same rule as one that says dead-units.
    return Layer(origin, {**document, "rules": _by_name(document["rules"], load_rules().values())})


def _check_keys(document: Mapping[str, Any], part: type[Part], place: str) -> None:
    for key in document:
        if key not in part.keys():  # noqa: SIM118  no mapping
            raise UsageError(
                f"unknown key {quoted(place + key)}{meant(key, part.keys())} "
                f"(there are {', '.join(part.keys())})"
            )


def _wrong(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{place} is missing"
    choices = f"one of {first.get('ctx', {}).get('expected')}"
    wanted = choices if first["type"] == "literal_error" else _WANTED.get(first["type"])
    given = escaped(repr(first["input"]), 100)
    return f"{place} is {given}; it is {wanted}" if wanted else f"{place}: {first['msg'].lower()}"


#: What pydantic's types of errors ask for.
_WANTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "date_from_datetime_inexact": "a date such as 2027-01-31",
    "date_from_datetime_parsing": "a date such as 2027-01-31",
    "date_type": "a date such as 2027-01-31",
    "dict_type": "a table",
    "mapping_type": "a table",
    "model_type": "a table",
    "string_pattern_mismatch": "a least version, such as >=0.3",
    "string_too_short": "a text that says something",
    "string_type": "a text",
    "too_short": "a list with something in it",
    "tuple_type": "a list",
}


def _check_version(required: object) -> None:
    """Before anything else: what an old version does not know is no mistake of the file's."""
    if isinstance(required, str) and release(required.removeprefix(">=")) > release(__version__):
        raise UsageError(
            f"it requires gradscope {required}, and this is {__version__}: "
            f"pip install --upgrade {DISTRIBUTION}"
        )


def _check_rules(config: Config) -> None:
    named = (*config.select, *config.ignore, *(r for each in config.allow for r in each.rules))
    if not named and not config.rules:
        return  # rules of all commands take a while to import
    known = list(load_rules().values())
    configured(known, config)
    select(known, named)


def merged(layers: Iterable[Layer]) -> tuple[Config, Origins]:
    """Layers, the weightiest last, as one configuration; thresholds are merged one by one."""
    values: dict[str, Any] = {}
    rules: dict[str, dict[str, Any]] = {}
    origins: dict[tuple[str, ...], str] = {}
    for each in layers:
        for key, value in each.values.items():
            if key != "rules":
                values[key] = value
                origins[(key,)] = each.origin
                continue
            for rule, given in value.items():
                rules.setdefault(rule, {}).update(given)
                origins |= {("rules", rule, name): each.origin for name in given}
    config = Config.model_validate(values | {"rules": rules})
    for key in PRESETS[config.preset]:
        origins.setdefault((key,), f"preset {config.preset}")
    return config, origins


def read_config(path: str | Path) -> Layer:
    """A configuration file: all of a TOML file, ``[tool.gradscope]`` of a pyproject.toml.

    Raises UsageError for one that is missing, malformed or without that table.
    """
    document = read_toml(path)
    if Path(path).name == "pyproject.toml":
        document = _table(document, path)
    found = layer(document, str(path))
    if "baseline" not in document:
        return found
    beside = Path(path).parent / document["baseline"]
    return replace(found, values={**document, "baseline": str(beside)})


def _table(document: Mapping[str, Any], path: str | Path) -> Mapping[str, Any]:
    tool = document.get("tool", {})
    table = tool.get("gradscope") if isinstance(tool, Mapping) else None
    if table is None:
        raise UsageError(f"{path} has no table [tool.gradscope]")
    if not isinstance(table, Mapping):
        raise UsageError(f"{path}: tool.gradscope is {escaped(repr(table), 100)}; it is a table")
    return table


def read_toml(path: str | Path) -> Mapping[str, Any]:
    """A TOML file, with or without the mark that Windows begins files with. Raises UsageError."""
    try:
        return tomllib.loads(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"the configuration {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error


#: How callers of the Python API may give a configuration: as such, as a document, as its file.
ConfigLike = Config | Mapping[str, Any] | str | Path | None


def given_config(config: ConfigLike) -> Config:
    """What was given, checked; the defaults where nothing was. Raises UsageError."""
    if isinstance(config, Config):
        _check_rules(config)
        return config
    if config is None:
        return Config()
    found = layer(config, "config") if isinstance(config, Mapping) else read_config(config)
    return merged([found])[0]


# --- rules ----------------------------------------------------------------------------------------


def configured(rules: Iterable[Rule], config: Config) -> list[Rule]:
    """The rules with the severity and the thresholds that the configuration gives.

    Raises UsageError for an unknown rule or threshold, and for a value that it cannot have.
    """
    known = list(rules)
    given = _by_name(config.rules, known)
    return [_changed(r, {**given[r.name]}) if r.name in given else r for r in known]


def _by_name(
    given: Mapping[str, Mapping[str, Any]], rules: Iterable[Rule]
) -> dict[str, Mapping[str, Any]]:
    """What is given by the names of rules. Raises UsageError for a rule that is given twice."""
    known = list(rules)
    names = {key: _named(key, known).name for key in given}
    for key, name in names.items():
        if key != name and name in given:
            raise UsageError(f"rules.{key} and rules.{name} are one rule; keep one of them")
    return {names[key]: values for key, values in given.items()}


def _named(key: str, rules: Sequence[Rule]) -> Rule:
    found = next((r for r in rules if key in (r.code, r.name)), None)
    if found is None:
        names = [word for r in rules for word in (r.name, r.code)]
        raise UsageError(f"no rule is called {quoted(key)}{meant(key, names)}")
    return found


def _changed(rule: Rule, values: dict[str, Any]) -> Rule:
    severity = values.pop("severity", None)
    if severity is not None and severity not in list(Severity):
        known = ", ".join(Severity)
        raise UsageError(f"rules.{rule.name}.severity is {severity!r}; it is one of {known}")
    for name, value in values.items():
        _check_threshold(rule, name, value)
    return replace(rule, given=values, always=None if severity is None else Severity(severity))


def _check_threshold(rule: Rule, name: str, value: object) -> None:
    thresholds = rule.thresholds
    place = f"rules.{rule.name}.{name}"
    if name not in thresholds:
        known = ["severity", *thresholds]
        raise UsageError(
            f"unknown key {quoted(place)}{meant(name, known)} (there are {', '.join(known)})"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise UsageError(f"{place} is {value!r}; it is a number")
    if isinstance(thresholds[name], int) and not float(value).is_integer():
        raise UsageError(f"{place} is {value!r}; it is a whole number")
