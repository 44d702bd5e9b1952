"""Names of classes, and targets by name."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.errors import InputError, UsageError
from gradscope.models.labels import Ranked, beside, imagenet, of_model, parse_target, read_labels

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
        "0 tench\n1 goldfish\n",
        "0 - tench\n1 - goldfish\n",
        "index,label\n0,tench\n1,goldfish\n",
        "n01440764\ttench\nn01443537\tgoldfish\n",
        "'tench',\n'goldfish'\n",
        "{0: 'tench',\n 1: \"goldfish\"}",
        '[["n01440764", "tench"], ["n01443537", "goldfish"]]',
        '{"id2label": ["tench", "goldfish"]}',
        '{"1": "goldfish", "0": "tench"}',
        '\ufeff["tench", "goldfish"]',
    ],
)
def test_every_common_form_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels"
    path.write_text(text, encoding="utf-8")

    found = read_labels(str(path))

    assert {0: found[0], 1: found[1]} == {0: "tench", 1: "goldfish"}
    assert len(found) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no labels found"),
        (b"\n \n", "no labels found"),
        (b"{", "begins like JSON"),
        (b'["tench", "goldfish"', "begins like JSON"),
        (b"[" * 99999, "begins like JSON"),
        (b"[]", "no labels found"),
        (b'{"a": {}}', "{} is not a class index"),
        (b'{"a": 1.5}', "1.5 is not a class index"),
        (b'{"a": true}', "True is not a class index"),
        (b'{"a": 1e400}', "inf is not a class index"),
        (b'{"-1": "a"}', "'a' is not a class index"),
        (b'{"0": null}', "None is not a class name"),
        (b'{"0": true}', "True is not a class name"),
        (b'{"0": []}', r"\[\] is not a class name"),
        (b'{"0": "a", "00": "b"}', "class 0 has two names"),
        (b"0: a\n1: b\n0: c", "class 0 has two names"),
        (b'{"id2label": null}', "it contains None"),
        (b"{'a', 'b'}", "it contains {"),
        (b"\xff\xfe\x00\x01", "UTF-8"),
    ],
)
def test_what_holds_no_labels_is_malformed(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content)

    with pytest.raises(InputError, match=said) as error:
        read_labels(str(path))
    assert error.value.kind == "malformed"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("7up\n10 downing street", ["7up", "10 downing street"]),
        ("0\n1\n2\n", ["0", "1", "2"]),
        ("1" * 5000 + ": a", ["1" * 5000 + ": a"]),
        ("[CLS]\n[SEP]\n", ["[CLS]", "[SEP]"]),
        ("cat\n\ndog", ["cat", "", "dog"]),
        ("d'or\n'a' or 'b'", ["d'or", "'a' or 'b'"]),
        ("a\u2028b\nc", ["a\u2028b", "c"]),
        ("0:\n1: b", ["0:", "1: b"]),
        ("{0: 'a\\d', 1: 'b'}", ["a\\d", "b"]),
    ],
)
def test_a_name_may_look_like_something_else(tmp_path: Path, text: str, wanted: list[str]) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(text, encoding="utf-8")

    assert read_labels(str(path)) == dict(enumerate(wanted))


NAME = st.text(st.characters(categories=("L",)), min_size=1)


@given(st.lists(NAME, min_size=1, max_size=8))
def test_the_same_names_are_read_from_every_form(names: list[str]) -> None:
    by_index = dict(enumerate(names))
    forms = (
        json.dumps(names),
        json.dumps(by_index),
        json.dumps({"id2label": by_index}),
        repr(by_index),
        "\n".join(names),
        "\n".join(f"{i}: {n}" for i, n in reversed(by_index.items())),
        "\n".join(f"{i} {n}" for i, n in by_index.items()),
        "\n".join(f"n{i:08} {n}" for i, n in by_index.items()),
    )
    with TemporaryDirectory() as folder:
        for form in forms:
            path = Path(folder) / "labels"
            path.write_text(form, encoding="utf-8")
            assert read_labels(str(path)) == by_index


@pytest.mark.parametrize("name", ["none.txt", "a\0b", "", "a" * 5000])
def test_names_that_cannot_be_read_are_missing(name: str) -> None:
    with pytest.raises(InputError) as error:
        read_labels(name)
    assert error.value.kind == "missing"


@pytest.mark.parametrize("content", ["{", '{"id2label": null}', '{"id2label": {}}', "[]", "{}"])
def test_a_configuration_without_names_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)

    assert beside(str(tmp_path / "m.pt")) is None


def test_a_models_own_names_come_before_imagenets() -> None:
    def module(names: object) -> object:
        return SimpleNamespace(config=SimpleNamespace(id2label=names))

    assert of_model(module({0: "cat", "1": "dog"}), 2) == {0: "cat", 1: "dog"}
    assert of_model(module({"a": "b"}), 2) is None
    assert of_model(module(None), 1000) is imagenet()
    assert of_model(object(), 999) is None


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
        (" 003 ", 3),
        ("+3", 3),
        ("TOP2", Ranked(2)),
    ],
)
def test_a_target_is_an_index_a_rank_or_a_name(text: str, wanted: object) -> None:
    assert parse_target(text, NAMES, 5) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5", "are 0 to 4"),
        ("-1", "are 0 to 4"),
        ("top9", "has 5 classes"),
        ("crane", r"several classes match.*2 \(crane\), 4 \(crane\)"),
        ("Goldfisch", r"did you mean goldfish \(1\)"),
        ("", "is empty"),
        ("top0", "has 5 classes"),
        ("9" * 5000, "are 0 to 4"),
        ("top" + "9" * 5000, "has 5 classes"),
        ("\u0663", "no such class; give an index"),
        ("zebra", "no such class"),
    ],
)
def test_what_names_no_class_says_which_there_are(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_target(text, NAMES, 5)


def test_a_whole_name_comes_before_part_of_another() -> None:
    names = {0: "a, b, c", 1: "a, b", 2: "A, b, d"}

    assert parse_target("a, b", names, 3) == 1
    assert parse_target("A, B", names, 3) == 1
    assert parse_target("C", names, 3) == 0


def test_a_name_needs_names() -> None:
    with pytest.raises(UsageError, match="--labels"):
        parse_target("cat", None, 5)
