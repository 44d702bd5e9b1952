"""What a path may have meant where there is no such file, and what to do instead."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from glob import glob

from gradscope.text import listed, quoted

#: How to fetch what an address names; others are fetched with curl.
_FETCH = {
    "s3": "aws s3 cp --recursive {} {}",
    "gs": "gcloud storage cp -r {} {}",
    "az": "azcopy copy --recursive {} {}",
}
_HUB = re.compile(
    r"(?:hf://(?:models/)?|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)"
    r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<at>[\w.-]+))?"
    r"(?:/(?:resolve|blob|raw|tree)/(?P<revision>[^/?]+))?(?:/(?P<file>[^?]+))?/?(?:\?.*)?"
)


def absent(path: str) -> str:
    """What to say of a path at which there is no file: what it is instead, or what was meant."""
    return next((said for explain in _EXPLANATIONS for said in explain(path)), "file not found")


def _stdin(path: str) -> Iterator[str]:
    if path == "-":
        yield (
            "standard input is not read: tensors are found by their place in a file; save it "
            "first (`… > FILE`) and give FILE"
        )


def _address(path: str) -> Iterator[str]:
    scheme, colon, rest = path.partition("://")
    if not colon or not re.fullmatch(r"[A-Za-z][\w+.-]*", scheme):
        return
    if scheme == "file":
        yield f"is an address; give a path: {quoted(rest)}"
        return
    yield f"is an address, and nothing is downloaded; first {_fetched(path, scheme.lower(), rest)}"


def _fetched(path: str, scheme: str, rest: str) -> str:
    name = rest.partition("?")[0].rstrip("/").rpartition("/")[2] or "FILE"
    if match := _HUB.fullmatch(path):
        return hub_download(match["repo"], match["file"] or "", match["revision"] or match["at"])
    if scheme in _FETCH:
        return f"`{_FETCH[scheme].format(path, name)}`, then `gradscope weights {name}`"
    if scheme in ("http", "https", "ftp"):
        return f"`curl -L -o {name} '{path}'`, then `gradscope weights {name}`"
    return f"fetch it, then give the path of {quoted(name)}"


def hub_download(repo: str, file: str = "", revision: str | None = None) -> str:
    """The command that fetches a repository of the Hugging Face Hub, or one file of it."""
    folder = repo.rpartition("/")[2]
    what = f"{repo} {file}" if file else repo
    at = f" --revision {revision}" if revision and revision != "main" else ""
    place = os.path.join(folder, file) if file else folder
    return f"`hf download {what}{at} --local-dir {folder}`, then `gradscope weights {place}`"


def _home(path: str) -> Iterator[str]:
    whole = os.path.expanduser(path)
    if path.startswith("~") and whole != path:
        there = "" if os.path.exists(whole) else ", where there is no file either"
        yield f"file not found; ~ was not expanded by the shell: give {quoted(whole)}{there}"


def _spaces(path: str) -> Iterator[str]:
    if path != path.strip() and os.path.exists(path.strip()):
        yield f"file not found; without the space around its name there is {quoted(path.strip())}"


def _pattern(path: str) -> Iterator[str]:
    if not re.search(r"[*?\[]", path):
        return
    found = sorted(glob(path, recursive=True))
    if found:
        names = listed(map(quoted, found), len(found))
        yield f"is a pattern, which the shell expands where it is not quoted; it matches {names}"
    else:
        yield "is a pattern that matches no file"


def _prefix(path: str) -> Iterator[str]:
    """TensorFlow names a checkpoint by what its files' names begin with."""
    if os.path.exists(f"{path}.index") and glob(f"{glob_escaped(path)}.data-*"):
        yield (
            "a TensorFlow checkpoint (its files begin with this name); TensorFlow is not read: "
            "load it where it was made and save the weights with safetensors"
        )


def glob_escaped(path: str) -> str:
    """A path as a pattern that matches itself."""
    return re.sub(r"([*?[])", r"[\1]", path)


def _folder(path: str) -> Iterator[str]:
    folder, name = os.path.split(path)
    at = folder
    while at and not os.path.isdir(at):
        at = os.path.dirname(at)
    if folder and at != folder:
        yield f"file not found: there is no folder {quoted(folder)}"
        return
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for _, entry in zip(range(10_000), entries, strict=False)]
    except OSError:
        return
    close = get_close_matches(name, names, n=2, cutoff=0.8)
    if close:
        yield f"file not found; did you mean {' or '.join(map(quoted, close))}?"


_EXPLANATIONS: tuple[Callable[[str], Iterator[str]], ...] = (
    _stdin,
    _address,
    _spaces,
    _home,
    _pattern,
    _prefix,
    _folder,
)
