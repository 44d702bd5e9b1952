"""Names of classes, and targets by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradscope.errors import InputError, UsageError
from gradscope.models.labels import Ranked, beside, imagenet, parse_target, read_labels

NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane", 3: "Egyptian cat", 4: "crane"}


def test_imagenets_names_are_torchvisions() -> None:
    names = imagenet()

    assert len(names) == 1000
    assert [names[i] for i in (0, 281, 285, 967, 999)] == [
        "tench", "tabby", "Egyptian cat", "espresso", "toilet tissue",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "tench\ngoldfish\n",
        "0: tench\n1: goldfish",
        "1\tgoldfish\n0\ttench\n",
        "0,tench\n1,goldfish\n",
        "n01440764 tench\nn01443537 goldfish\n\n",
        "\ufefftench\r\ngoldfish\r\n",
        '["tench", "goldfish"]',
        '{"0": "tench", "1": "goldfish"}',
        '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}',
        '{"id2label": {"0": "tench", "1": "goldfish"}, "label2id": {}}',
        '{"tench": 0, "goldfish": 1}',
    ],
)
def test_every_common_form_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels"
    path.write_text(text, encoding="utf-8")

    found = read_labels(str(path))

    assert {0: found[0], 1: found[1]} == {0: "tench", 1: "goldfish"}
    assert len(found) == 2


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": {}}', b"\xff\xfe\x00\x01"])
def test_what_holds_no_labels_is_malformed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content)

    with pytest.raises(InputError):
        read_labels(str(path))


def test_names_beside_the_model_are_found(tmp_path: Path) -> None:
    assert beside(str(tmp_path / "m.pt")) is None
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "cat"}}))
    assert beside(str(tmp_path / "m.pt")) == {0: "cat"}
    (tmp_path / "labels.txt").write_text("dog\n")
    assert beside(str(tmp_path)) == {0: "dog"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3", 3),
        ("top1", Ranked(1)),
        ("top-5", Ranked(5)),
        ("Egyptian cat", 3),
        ("egyptian CAT", 3),
        ("tinca tinca", 0),
        ("gold", 1),
    ],
)
def test_a_target_is_an_index_a_rank_or_a_name(text: str, wanted: object) -> None:
    assert parse_target(text, NAMES, 5) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5", "from 0 to 4"),
        ("-1", "from 0 to 4"),
        ("top9", "has 5 classes"),
        ("crane", r"several classes fit.*2 \(crane\), 4 \(crane\)"),
        ("goldfisch", "did you mean goldfish"),
        ("zebra", "no class has this name"),
    ],
)
def test_what_names_no_class_says_which_there_are(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_target(text, NAMES, 5)


def test_a_name_needs_names() -> None:
    with pytest.raises(UsageError, match="--labels"):
        parse_target("cat", None, 5)
