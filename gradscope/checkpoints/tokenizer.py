"""The names of tokens, from the tokenizer that lies beside a checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from gradscope.checkpoints.documents import document
from gradscope.containers.files import read_start
from gradscope.containers.strict_json import MalformedError
from gradscope.errors import InputError

_CAP, _SMALL = 100_000_000, 8_000_000
_RESERVED = re.compile(r"reserved|unused|extra|dummy|placeholder|pad", re.IGNORECASE)


def tokens_beside(folder: str) -> Mapping[int, str]:
    """Names of the token ids of the tokenizer in a folder; empty where there is none to read.

    ``tokenizer.json`` (its vocabulary and added tokens), else ``vocab.json`` or ``vocab.txt`` with
    ``added_tokens.json``.
    """
    for read in (_tokenizer_json, _vocab_json, _vocab_txt):
        if found := read(folder):
            return found
    return {}


def reserved_beside(folder: str) -> tuple[int, ...]:
    """Ids that ``tokenizer_config.json`` names as reserved, unused or padding."""
    added = _object(folder, "tokenizer_config.json", _SMALL).get("added_tokens_decoder")
    entries = added.items() if isinstance(added, dict) else ()
    return tuple(
        int(key)
        for key, token in entries
        if key.isascii() and key.isdigit() and len(key) < 10
        if isinstance(token, dict) and _RESERVED.search(str(token.get("content", "")))
    )


def _tokenizer_json(folder: str) -> dict[int, str]:
    whole = _object(folder, "tokenizer.json", _CAP)
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return dict(_by_id(vocabulary)) | dict(_added(whole.get("added_tokens")))


def _vocab_json(folder: str) -> dict[int, str]:
    found = dict(_by_id(_object(folder, "vocab.json", _CAP)))
    return found | dict(_by_id(_object(folder, "added_tokens.json", _SMALL))) if found else {}


def _vocab_txt(folder: str) -> dict[int, str]:
    try:
        text = read_start(os.path.join(folder, "vocab.txt"), _SMALL).decode("utf-8", "replace")
    except InputError:
        return {}
    found = dict(enumerate(text.removesuffix("\n").split("\n")))
    return found | dict(_by_id(_object(folder, "added_tokens.json", _SMALL)))


def _by_id(vocabulary: object) -> Iterator[tuple[int, str]]:
    """A vocabulary as token -> id (BPE, WordPiece), or as a list of [token, score] (Unigram)."""
    if isinstance(vocabulary, dict):
        for token, number in vocabulary.items():
            if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
                yield number, str(token)
    elif isinstance(vocabulary, list):
        for number, entry in enumerate(vocabulary):
            if isinstance(entry, list) and entry:
                yield number, str(entry[0])


def _added(tokens: object) -> Iterator[tuple[int, str]]:
    for token in tokens if isinstance(tokens, list) else ():
        if isinstance(token, dict) and isinstance(number := token.get("id"), int) and number >= 0:
            yield number, str(token.get("content", ""))


def _object(folder: str, name: str, cap: int) -> Mapping[str, object]:
    try:
        return document(os.path.join(folder, name), cap) or {}
    except MalformedError:
        return {}
