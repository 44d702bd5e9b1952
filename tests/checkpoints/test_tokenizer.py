"""Names of tokens from the files of a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradscope.checkpoints.tokenizer import reserved_beside, tokens_beside

ADDED = [{"id": 3, "content": "<|reserved_0|>", "special": True}, {"id": 4, "content": "<pad>"}]


@pytest.mark.parametrize(
    "vocabulary", [{"a": 0, "b": 1, "ab": 2}, [["a", -1.0], ["b", -2.0], ["ab", -3.5]]]
)
def test_tokenizer_json_names_its_vocabulary_and_its_added_tokens(
    vocabulary: object, tmp_path: Path
) -> None:
    written = {"model": {"vocab": vocabulary}, "added_tokens": ADDED}
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))

    assert tokens_beside(str(tmp_path)) == {
        0: "a", 1: "b", 2: "ab", 3: "<|reserved_0|>", 4: "<pad>",
    }  # fmt: skip


def test_vocab_json_and_added_tokens_stand_in_for_it(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 2}')

    assert tokens_beside(str(tmp_path)) == {0: "a", 1: "b", 2: "<pad>"}


def test_vocab_txt_has_a_token_a_line(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[unused0]\n\u4eba\n")

    assert tokens_beside(str(tmp_path)) == {0: "[PAD]", 1: "[unused0]", 2: "\u4eba"}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"model": 3}', '{"model": {"vocab": {"a": "0", "b": -1, "c": true}}}',
     '{"added_tokens": [{"id": "x"}, 4]}'],
)  # fmt: skip
def test_a_tokenizer_that_says_nothing_names_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)

    assert tokens_beside(str(tmp_path)) == {}


def test_reserved_tokens_are_known_by_the_words_in_their_names(tmp_path: Path) -> None:
    names = {"7": "<|reserved_special_token_1|>", "8": "<s>", "9": "<unused3>", "x": "<pad>"}
    decoder = {key: {"content": name} for key, name in names.items()} | {"10": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))

    assert reserved_beside(str(tmp_path)) == (7, 9)
    assert reserved_beside(str(tmp_path / "nowhere")) == ()
