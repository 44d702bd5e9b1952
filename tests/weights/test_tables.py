"""Tables of tokens and of codes: names, padding, and what is one finding."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

import gradscope
from gradscope.report.model import Finding

from .checkpoints import Array, Tensor, bf16, gaussian, transformer, write

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def findings(path: Path) -> list[Finding]:
    return [f for f in gradscope.analyze_weights(path).findings if f.name != "redundant-precision"]


def vocabulary(folder: Path, size: int, reserved: range = range(0)) -> None:
    names = {f"t{i}" if i not in reserved else f"<|reserved_{i}|>": i for i in range(size)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": names}}))


def with_rows(change: Callable[[Array], object], rows: int = 1024) -> dict[str, Array]:
    made = transformer(vocabulary=rows)
    change(made[EMBED])
    return made


def reserved(first: int, last: int) -> Callable[[Array], object]:
    """Near-equal rows of ordinary norm."""

    def change(table: Array) -> None:
        place = gaussian(1, table.shape[1], seed=77)
        table[first:last] = place + gaussian(last - first, table.shape[1], seed=78) * 0.05

    return change


def zeros(first: int, last: int) -> Callable[[Array], object]:
    return lambda table: table.__setitem__(slice(first, last), 0)


# -- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [zeros(0, 512), reserved(512, 1024)])
def test_a_table_with_half_of_its_ids_unseen_is_one_finding(
    half: Callable[[Array], object], tmp_path: Path
) -> None:
    (seen,) = findings(write(tmp_path / "model.safetensors", with_rows(half)))

    assert (seen.name, seen.severity.value, seen.subject) == ("undertrained-rows", "medium", EMBED)
    assert "512 of 1,024 rows" in seen.message
    assert seen.evidence["affected_fraction"] == 0.5


def test_tokens_are_called_by_their_names(tmp_path: Path) -> None:
    vocabulary(tmp_path, 1024, reserved=range(900, 930))
    path = write(tmp_path / "model.safetensors", with_rows(reserved(900, 930)))

    (seen,) = findings(path)

    assert seen.severity.value == "info"
    assert "900 '<|reserved_900|>'" in seen.message
    assert "and 25 more" in seen.message
    assert seen.evidence["ids"] == "900-929"
    assert seen.evidence["near_equal_rows"] == 30


def test_names_of_strangers_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"\x1b[31m" + "x" * 300: 3, "last": 1023}}})
    )
    (seen,) = findings(write(tmp_path / "model.safetensors", with_rows(zeros(3, 4))))

    assert "\x1b" not in seen.message
    assert "\\x1b[31m" in seen.message
    assert len(seen.message) < 250


@pytest.mark.parametrize("told_by", ["tokenizer", "config"])
def test_rows_beyond_the_vocabulary_are_padding(told_by: str, tmp_path: Path) -> None:
    if told_by == "tokenizer":
        vocabulary(tmp_path, 970)
    else:
        (tmp_path / "config.json").write_text('{"vocab_size": 970}')
    (seen,) = findings(write(tmp_path / "model.safetensors", with_rows(zeros(970, 1024))))

    assert seen.severity.value == "info"
    assert seen.evidence["padding_rows"] == 54
    assert "54 rows from 970 on are padding" in seen.message
    assert seen.recommendation.startswith("nothing to do")


def test_padding_hides_no_untrained_tokens(tmp_path: Path) -> None:
    vocabulary(tmp_path, 700)
    made = with_rows(zeros(400, 1024))

    (seen,) = findings(write(tmp_path / "model.safetensors", made))

    assert seen.severity.value == "medium"
    assert seen.evidence["affected_fraction"] == 300 / 1024


def test_a_tokenizer_of_another_size_names_nothing(tmp_path: Path) -> None:
    vocabulary(tmp_path, 5000)
    (seen,) = findings(write(tmp_path / "model.safetensors", with_rows(zeros(3, 4))))

    assert "t3" not in seen.message
    assert seen.evidence["ids"] == "3"


def test_positions_that_follow_one_another_are_no_tokens(tmp_path: Path) -> None:
    smooth = np.cumsum(gaussian(1024, 32, seed=5, scale=1e-3), axis=0) + gaussian(1, 32)
    made = {**transformer(), "transformer.wpe.weight": smooth}

    assert findings(write(tmp_path / "model.safetensors", made)) == []


def test_a_tied_table_is_told_twice_as_the_two_tensors_it_is(tmp_path: Path) -> None:
    made = with_rows(reserved(0, 100))
    made[HEAD] = made[EMBED]

    seen = findings(write(tmp_path / "model.safetensors", made))

    assert [(f.name, f.subject) for f in seen if f.name == "undertrained-rows"] == [
        ("undertrained-rows", EMBED),
        ("undertrained-rows", HEAD),
    ]
    assert {f.severity.value for f in seen} == {"info"}


# -- codes ----------------------------------------------------------------------------------------

CODES, WIDTH = 256, 16


def codebook(seed: int = 0) -> Array:
    return gaussian(CODES, WIDTH, seed=seed, scale=1.0)


def initial(seed: int = 1) -> Array:
    rng = np.random.default_rng(seed)
    return rng.uniform(-1 / CODES, 1 / CODES, (CODES, WIDTH)).astype(np.float32)


def used(share: float, seed: int = 2) -> Array:
    """Which codes are in use, at random."""
    return np.random.default_rng(seed).permutation(CODES) < round(share * CODES)


def counts(alive: Array) -> Array:
    sizes = np.random.default_rng(3).uniform(5, 50, CODES).astype(np.float32)
    return np.where(alive, sizes, np.float32(1e-6))


#: How unused codes look, in the families of quantisers.
def by_counts(alive: Array) -> dict[str, Array]:
    return {
        "quantizer.vq.layers.0._codebook.embed": codebook(),
        "quantizer.vq.layers.0._codebook.cluster_size": counts(alive),
        "quantizer.vq.layers.0._codebook.embed_avg": codebook() * counts(alive)[:, None],
        "quantizer.vq.layers.0._codebook.inited": np.ones(1, np.float32),
    }


def lucidrains(alive: Array) -> dict[str, Array]:
    return {
        "vq._codebook.embed": codebook()[None],
        "vq._codebook.cluster_size": counts(alive)[None],
        "vq._codebook.embed_avg": (codebook() * counts(alive)[:, None])[None],
        "vq._codebook.initted": np.array([True]),
    }


def columns(alive: Array) -> dict[str, Array]:
    return {"quantize_t.embed": codebook().T.copy(), "quantize_t.cluster_size": counts(alive)}


def in_ema(alive: Array) -> dict[str, Array]:
    return {
        "_vq_vae._embedding.weight": codebook(),
        "_vq_vae._ema_cluster_size": counts(alive),
        "_vq_vae._ema_w": codebook(4),
    }


def untouched(alive: Array) -> dict[str, Array]:
    return {"quantize.embedding.weight": np.where(alive[:, None], codebook(), initial())}


def at_zero(alive: Array) -> dict[str, Array]:
    return {"quantizer.quantizers.0.codebook.weight": codebook() * alive[:, None]}


def in_a_list(alive: Array) -> dict[str, Array]:
    return {"quantizer.codebooks.0.weight": codebook() * alive[:, None]}


def summed(alive: Array) -> dict[str, Array]:
    return {"quantizer.vq.layers.0._codebook.embedding_sum": codebook() * alive[:, None]}


def the_same(alive: Array) -> dict[str, Array]:
    return {"model.codebook": np.where(alive[:, None], codebook(), codebook(9)[:1])}


QUANTISERS: dict[str, Callable[[Array], dict[str, Array]]] = {
    f.__name__: f
    for f in (
        by_counts,
        lucidrains,
        columns,
        in_ema,
        untouched,
        at_zero,
        in_a_list,
        summed,
        the_same,
    )
}


def told(tensors: Mapping[str, Tensor], folder: Path) -> list[tuple[str, str, str]]:
    path = write(folder / "model.safetensors", tensors)
    return [(f.name, f.severity.value, f.subject) for f in findings(path)]


@pytest.mark.parametrize("kind", QUANTISERS)
def test_a_codebook_more_than_half_unused_is_medium_and_nothing_else(
    kind: str, tmp_path: Path
) -> None:
    table = next(iter(QUANTISERS[kind](used(1.0))))
    for share, expected in ((1.0, []), (0.9, ["info"]), (0.4, ["medium"])):
        alive = used(share)
        seen = told(QUANTISERS[kind](alive), tmp_path)
        assert seen == [("undertrained-rows", severity, table) for severity in expected]


@pytest.mark.parametrize("kind", ["untouched", "at_zero", "the_same"])
@pytest.mark.parametrize("cast", [bf16, lambda values: values.astype(np.float16)])
def test_unused_codes_are_seen_in_sixteen_bits(
    kind: str, cast: Callable[[Array], Tensor], tmp_path: Path
) -> None:
    tensors = {n: cast(v.astype(np.float32)) for n, v in QUANTISERS[kind](used(0.4)).items()}
    seen = [s for s in told(tensors, tmp_path) if s[0] != "dtype-headroom"]

    assert seen == [("undertrained-rows", "medium", next(iter(tensors)))]


@pytest.mark.parametrize("kind", ["untouched", "at_zero", "the_same"])
def test_codebooks_are_judged_one_by_one_where_they_are_stacked(kind: str, tmp_path: Path) -> None:
    made = [next(iter(QUANTISERS[kind](used(share)).values())) for share in (1, 0.4, 1, 0.9)]
    healthy = next(iter(QUANTISERS[kind](used(1.0)).values()))

    assert told({"rvq.codebooks": np.stack([healthy + i for i in range(4)])}, tmp_path) == []
    assert told({"rvq.codebooks": np.stack(made)}, tmp_path) == [
        ("undertrained-rows", "medium", "rvq.codebooks")
    ]
    (seen,) = findings(tmp_path / "model.safetensors")
    unused = np.flatnonzero(~used(0.4)).size
    assert seen.message.startswith(
        f"{unused - (kind == 'the_same')} of 256 codes of codebook 1 of 4"
    )


def test_counts_in_a_stack_are_judged_a_codebook_at_a_time(tmp_path: Path) -> None:
    sizes = np.stack([counts(used(share)) for share in (1.0, 1.0, 0.4)])
    tensors = {"vq._codebook.embed": np.stack([codebook(s) for s in range(3)])}

    assert told({**tensors, "vq._codebook.cluster_size": sizes}, tmp_path) == [
        ("undertrained-rows", "medium", "vq._codebook.embed")
    ]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_counts_that_were_never_updated_say_nothing(value: float, tmp_path: Path) -> None:
    sizes = np.full(CODES, value, np.float32)
    tensors = {"vq._codebook.embed": codebook(), "vq._codebook.cluster_size": sizes}

    assert told(tensors, tmp_path) == []


def test_a_codebook_that_is_small_everywhere_was_not_left_behind(tmp_path: Path) -> None:
    assert told({"quantize.embedding.weight": initial()}, tmp_path) == []
    some = codebook() * np.where(used(0.4), 1.0, 1e-2)[:, None].astype(np.float32)
    assert told({"quantize.embedding.weight": some}, tmp_path) == []
