"""The pages of reference, made from what the program registers: ``make docs`` writes them.

``tests/test_docs.py`` fails when one is not what its registry says.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin

from typer.models import ArgumentInfo, OptionInfo

from gradscope.attribution.methods import Method, methods
from gradscope.cli import app
from gradscope.docstrings import docstring
from gradscope.report.config import PRESETS, Allowance, Config, Part
from gradscope.report.formats import BUILT_IN
from gradscope.report.rules import BUILT_IN as RULE_PACKAGES
from gradscope.report.rules import Rule, load_rules

_MADE = "<!-- Made by docs/reference.py: change the program and run `make docs`. -->"


def pages() -> Mapping[str, str]:
    """Every page of reference by the name of its file."""
    made = {
        "rules.md": _rules,
        "methods.md": _methods,
        "commands.md": _commands,
        "configuration.md": _configuration,
    }
    return {name: "\n".join((_MADE, "", *page())) + "\n" for name, page in made.items()}


def _table(*rows: Sequence[str]) -> Iterator[str]:
    """A heading and rows; nothing where there are no rows."""
    for place, row in enumerate(rows if len(rows) > 1 else ()):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        if place == 0:
            yield "| " + " | ".join("---" for _ in row) + " |"


def _prose(text: str) -> str:
    """Docstring as Markdown: code in single ticks, nothing else that Markdown would take."""
    parts = text.replace("``", "`").split("`")
    parts[::2] = [re.sub(r"([*_<])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _links(titles: Iterable[str]) -> Iterator[str]:
    """Where GitHub puts headings: a second one of the same letters is numbered."""
    seen: Counter[str] = Counter()
    for title in titles:
        plain = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        yield f"#{plain}-{seen[plain]}" if seen[plain] else f"#{plain}"
        seen[plain] += 1


# --- rules ----------------------------------------------------------------------------------------


def _rules() -> Iterator[str]:
    yield "# Rules"
    yield ""
    yield (
        "What `gradscope rules NAME` prints, for every rule. A code and a name select a rule alike "
        "(`--select`, `--ignore`, `[rules.NAME]` of the [configuration](configuration.md)), and so "
        "does the beginning of a code. The severity is the rule's usual one; its findings say "
        "theirs."
    )
    known = [r for r in load_rules().values() if r.check.__module__.startswith(RULE_PACKAGES)]
    for command in (c.name for c in app.registered_commands):
        rules = [r for r in known if r.reads.command == command]
        heads = (
            (f"[{r.code}]({link})", f"`{r.name}`", str(r.severity), _prose(r.summary))
            for r, link in zip(rules, _links(f"{r.code} {r.name}" for r in rules), strict=True)
        )
        table = _table(("code", "name", "severity", "finds"), *heads)
        yield from _after(f"\n## {command}\n", table)
        for rule in rules:
            yield from _rule(rule)


def _rule(rule: Rule) -> Iterator[str]:
    yield from ("", f"### {rule.code} {rule.name}", "", _prose(rule.documentation), "")
    yield f"Usually {rule.severity}. Needs {rule.needs}."
    limits = ((f"`{name}`", f"{value:g}") for name, value in rule.thresholds.items())
    yield from _after("", _table(("threshold", "value"), *limits))


def _after(first: str, lines: Iterable[str]) -> Iterator[str]:
    """Lines behind another one, which is left out where there are none."""
    for place, line in enumerate(lines):
        if place == 0:
            yield first
        yield line


# --- methods --------------------------------------------------------------------------------------


def _methods() -> Iterator[str]:
    yield "# Methods"
    yield ""
    yield (
        "What `gradscope methods NAME` prints, for every attribution method of `explain` and "
        "`gradscope.attribute`. Options are given as `--option NAME=VALUE`, or as keywords from "
        "Python. Families differ in what a map is made of: gradients of the input, activations of "
        "a layer, answers to a changed input, attention between tokens. Which to take: "
        "[explain.md](explain.md)."
    )
    known = [m for m in methods().values() if m.home.startswith("gradscope.")]
    heads = (
        (f"[`{m.name}`]({link})", m.family, _prose(m.summary))
        for m, link in zip(known, _links(m.name for m in known), strict=True)
    )
    yield from ("", *_table(("method", "family", "map"), *heads))
    for method in known:
        yield from _method(method)


def _method(method: Method) -> Iterator[str]:
    summary = _prose(method.summary)
    yield from ("", f"## {method.name}", "", f"{summary[0].upper()}{summary[1:]}.")
    yield f"{method.reference}."
    if method.reads_layer:
        yield "Reads one layer: `--layer NAME` (see `gradscope layers MODEL`)."
    options = ((f"`{n}`", f"`{o.default}`", _prose(o.help + _among(o.choices)))
               for n, o in method.options.items())  # fmt: skip
    yield from _after("", _table(("option", "default", "what it is"), *options))


def _among(choices: Sequence[str]) -> str:
    return f": {', '.join(choices)}" if choices else ""


# --- commands -------------------------------------------------------------------------------------


class Given(NamedTuple):
    """An argument or option of a command, as a row shows it."""

    spelled: str
    what: str
    default: str
    is_option: bool


def _commands() -> Iterator[str]:
    found = {str(c.name): c.callback for c in app.registered_commands if c.callback is not None}
    taken = {name: list(_given(body)) for name, body in found.items()}
    gated = [
        rows for rows in taken.values() if any(r.spelled.startswith("`--fail-on") for r in rows)
    ]
    common = [row for row in gated[0] if all(row in rows for rows in gated)]
    yield "# Commands"
    yield ""
    yield (
        "What `gradscope COMMAND --help` prints, for every command. Exit codes, and what scripts "
        "may rely on: [contract.md](contract.md)."
    )
    heads = ((f"[`{name}`](#{name})", _prose(docstring(body).split("\n", 1)[0]))
             for name, body in found.items())  # fmt: skip
    yield from ("", *_table(("command", "does"), *heads))
    yield from ("", "## Options of every analysis", "")
    yield f"Formats are {', '.join(f'`{name}`' for name in BUILT_IN)}; see [gate.md](gate.md)."
    yield from ("", *_options(common))
    for name, body in found.items():
        shared = taken[name] in gated
        own = [row for row in taken[name] if not (shared and row in common)]
        yield from _one_command(name, docstring(body), own, shared)


def _one_command(name: str, said: str, rows: Sequence[Given], shared: bool) -> Iterator[str]:
    arguments = [row for row in rows if not row.is_option]
    words = " ".join(row.spelled.strip("`") for row in arguments)
    yield from ("", f"## {name}", "", f"    gradscope {name} {words}".rstrip(), "", _prose(said))
    heads = ((row.spelled, row.what) for row in arguments)
    yield from _after("", _table(("argument", "is"), *heads))
    yield from _after("", _options([row for row in rows if row.is_option]))
    if shared:
        yield from ("", "And the [options of every analysis](#options-of-every-analysis).")


def _options(rows: Iterable[Given]) -> Iterator[str]:
    return _table(("option", "does", "default"), *((r.spelled, r.what, r.default) for r in rows))


def _given(body: Callable[..., Any]) -> Iterator[Given]:
    for parameter in inspect.signature(body).parameters.values():
        kind, *marks = get_args(parameter.annotation)
        for mark in marks:
            if isinstance(mark, OptionInfo):
                shown = f"{', '.join(_spellings(parameter, mark))} {_metavar(kind, mark)}".rstrip()
                said, _, told = (mark.help or "").partition(" [default: ")
                default = f"`{told[:-1]}`" if told else _default(parameter)
                yield Given(f"`{shown}`", _prose(said), default, True)
            elif isinstance(mark, ArgumentInfo):
                name = (mark.metavar or "|".join(_values(kind))).removesuffix("...")
                many = "…" if get_origin(kind) is list else ""
                yield Given(f"`{name}{many}`", _prose(mark.help or ""), "", False)


def _spellings(parameter: inspect.Parameter, mark: OptionInfo) -> list[str]:
    """The names of an option; typer holds the first one of an annotation as its default."""
    given = [n for n in (mark.default, *(mark.param_decls or ())) if isinstance(n, str)]
    return sorted(given) or [f"--{parameter.name.replace('_', '-')}"]


def _metavar(kind: Any, mark: OptionInfo) -> str:
    if kind is bool:
        return ""
    return mark.metavar or "|".join(_values(kind)) or "N"


def _values(kind: Any) -> list[str]:
    """The choices of an enumeration, alone, as an optional one or in a list."""
    kinds = [kind, *get_args(kind), *(a for k in get_args(kind) for a in get_args(k))]
    found = [k for k in kinds if isinstance(k, type) and k is not NoneType and issubclass(k, Enum)]
    return [str(member.value) for k in found for member in k]


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value in (None, False, parameter.empty):
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


# --- configuration --------------------------------------------------------------------------------


def _configuration() -> Iterator[str]:
    yield "# Configuration"
    yield ""
    yield (
        "The keys of `gradscope.toml`, or of `[tool.gradscope]` in `pyproject.toml`. Which file "
        "counts, what wins, and an example: [gate.md](gate.md). `gradscope schema config` is the "
        "JSON Schema, `gradscope config` prints what is in force and where it comes from."
    )
    yield from ("", *_keys(Config))
    yield from ("", "Each key but `rules` and `allow` is also a variable: `fail-on` is "
                    "`GRADSCOPE_FAIL_ON`. `GRADSCOPE_CONFIG` names the file.")  # fmt: skip
    yield from ("", "## Presets", "")
    sets = ((f"`{name}`", ", ".join(f'`{k} = "{v}"`' for k, v in values.items()) or "the defaults")
            for name, values in PRESETS.items())  # fmt: skip
    yield from _table(("preset", "sets"), *sets)
    yield from ("", "## [[allow]]", "", *_keys(Allowance))
    yield from ("", "## [rules.NAME]", "")
    yield (
        "By a rule's name or code: `severity`, which is then that of all its findings, and its "
        "thresholds, as [rules.md](rules.md) lists them with their values."
    )


def _keys(part: type[Part]) -> Iterator[str]:
    rows = (
        (f"`{field.alias or name}`", field.description or "", _toml(field.get_default()))
        for name, field in part.model_fields.items()
    )
    return _table(("key", "is", "default"), *rows)


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple) and value:
        return f"`{list(value)}`".replace("'", '"')
    return "" if isinstance(value, tuple | Mapping) or value is None else "required"


if __name__ == "__main__":
    for file, page in pages().items():
        (Path(__file__).parent / file).write_text(page, encoding="utf-8")
