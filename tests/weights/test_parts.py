"""The law of shares: the parts of a run, merged in any order, are the bytes of one run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradscope
from gradscope.checkpoints.open import open_checkpoint
from gradscope.errors import InputError, UsageError
from gradscope.report.accepting import created
from gradscope.report.config import Config
from gradscope.report.formats.json_ import render
from gradscope.report.partial import digest, packed
from gradscope.report.rules import load_rules
from gradscope.weights import examining, masters
from gradscope.weights.parts import Found
from gradscope.weights.result import Examined, Need
from gradscope.weights.shares import Share, balanced, owned, share

from ..quantization.made import LAYOUTS
from ..quantization.test_layouts import matrix, saved
from .checkpoints import bf16, conv_net, gaussian, lora, transformer, write, write_sharded
from .test_experts import copy, mixture, split, stacked, zero
from .test_rules import CASES
from .test_tables import reserved, vocabulary, with_rows, zeros
from .test_training_state import mixed, state

Run = tuple[Sequence[Path], dict[str, Any]]


def parts(folder: Path, run: Run, jobs: int) -> list[Path]:
    """The files that the jobs write, shuffled."""
    paths, options = run
    written = []
    for job in range(jobs):
        report = gradscope.analyze_weights(*paths, **options, shard=f"{job}/{jobs}")
        written.append(folder / f"part-{job}.json")
        written[-1].write_text(render(report))
    random.Random(jobs).shuffle(written)
    return written


def same(folder: Path, run: Run, jobs: int) -> None:
    paths, options = run
    (folder / "parts").mkdir(exist_ok=True)
    merged = gradscope.merge(*parts(folder / "parts", run, jobs))
    assert render(merged) == render(gradscope.analyze_weights(*paths, **options))


# -- what may be shared ---------------------------------------------------------------------------


def plain(folder: Path) -> Run:
    return [write(folder / "a.safetensors", transformer())], {}


def folder_of_shards(folder: Path) -> Run:
    return [write_sharded(folder / "model", transformer())], {}


def several(folder: Path) -> Run:
    """Two that share names and findings, and the first once more."""
    first, second = transformer(), conv_net()
    first["lm_head.weight"][0, 0] = second["classifier.weight"][0, 0] = np.nan
    one = write(folder / "a.safetensors", first | {"classifier.weight": gaussian(8, 8)})
    two = write(folder / "b.safetensors", second)
    return [one, two, one], {}


def missing(folder: Path) -> Run:
    paths, _ = plain(folder)
    return [*paths, folder / "nowhere.safetensors"], {}


def nothing_there(folder: Path) -> Run:
    return [folder / "nowhere.safetensors"], {}


def nothing_in_it(folder: Path) -> Run:
    return [write(folder / "a.safetensors", {})], {}


def truncated(folder: Path) -> Run:
    path = write(folder / "a.safetensors", transformer())
    path.write_bytes(path.read_bytes()[:-50_000])
    return [path], {}


def without_a_shard(folder: Path) -> Run:
    write_sharded(folder / "model", transformer())
    (folder / "model" / "model-00002-of-00003.safetensors").unlink()
    return [folder / "model"], {}


def damaged_archive(folder: Path) -> Run:
    made = {name.replace("model.", "m."): value for name, value in transformer().items()}
    np.savez(folder / "a.npz", **made)
    content = bytearray((folder / "a.npz").read_bytes())
    for part in (5, 9):
        content[len(content) * part // 10] ^= 1
    (folder / "a.npz").write_bytes(content)
    return [folder / "a.npz"], {}


def tied(folder: Path) -> Run:
    made = transformer()
    made["lm_head.weight"] = made["model.embed_tokens.weight"]
    made["model.layers.2.mlp.up_proj.weight"] = made["model.layers.1.mlp.up_proj.weight"]
    return [write(folder / "a.safetensors", made)], {}


def left_out(folder: Path) -> Run:
    return plain(folder)[0], {"include": ["*.weight"], "exclude": ["*norm*", "nothing*"]}


def cast(folder: Path) -> Run:
    return plain(folder)[0], {"cast": ["fp8_e4m3:row", "int8", "bf16"], "snr": "30dB"}


def spectral(folder: Path) -> Run:
    (folder / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 4}')
    return plain(folder)[0], {"spectral": True, "bootstrap": 3}


def norms(folder: Path) -> Run:
    return plain(folder)[0], {"spectral": True, "norms_only": True}


def no_time(folder: Path) -> Run:
    return spectral(folder)[0], {"spectral": True, "budget": "0s"}


def adapter(folder: Path) -> Run:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    alphas = {
        f"base_model.model.layers.{n}.q_proj.alpha": np.float32(n) * np.ones(()) for n in range(3)
    }
    return [write(folder / "adapter_model.safetensors", lora(trained=3) | alphas)], {}


def tokens(folder: Path) -> Run:
    vocabulary(folder, 1024, range(900, 1000))
    made = with_rows(reserved(900, 1000))
    made["lm_head.weight"][10:30] = 0
    return [write(folder / "a.safetensors", made)], {}


def padded(folder: Path) -> Run:
    return [write(folder / "a.safetensors", with_rows(zeros(0, 512)))], {}


def experts(folder: Path) -> Run:
    model = mixture(8)
    zero(model, 3)
    copy(model, 5, 6)
    return [write(folder / "a.safetensors", dict(split(model)))], {}


def stacked_experts(folder: Path) -> Run:
    model = mixture(8)
    copy(model, 5, 6)
    return [write(folder / "a.safetensors", dict(stacked(model)))], {"spectral": True}


def training(folder: Path) -> Run:
    masters = list(reversed(state().values()))
    masters[1] = masters[1] + 1e-2
    torch.save(mixed(torch.bfloat16, masters), folder / "a.pt")
    return [folder / "a.pt"], {}


def types(folder: Path) -> Run:
    """Types whose extremes are told in integers and in floats, in one pool of each role."""
    made = {
        "a.weight": gaussian(40, 30),
        "b.weight": gaussian(40, 30).astype(np.float64) * 1e200,
        "c.weight": bf16(gaussian(40, 30)),
        "position_ids": np.arange(64)[None] + (np.arange(64) == 9),
        "mask": np.tri(8, dtype=bool),
        "ids": np.arange(8, dtype=np.int32),
        "empty.weight": np.zeros((0, 4), np.float32),
        "scalar": np.float32(3) * np.ones(()),
        "pairs": gaussian(8, 8).astype(np.complex64),
        "bad\ud800name\n.weight": gaussian(8, 8),
        "infinite.mask": np.where(np.tri(8) > 0, 0, -np.inf).astype(np.float32),
    }
    return [write(folder / "a.safetensors", made)], {}


RUNS: list[Callable[[Path], Run]] = [
    plain, folder_of_shards, several, missing, nothing_there, nothing_in_it, truncated,
    without_a_shard, damaged_archive, tied, left_out, cast, spectral, norms, no_time, adapter,
    tokens, padded, experts, stacked_experts, training, types,
]  # fmt: skip


@pytest.mark.parametrize("jobs", [3, 50])
@pytest.mark.parametrize("made", RUNS, ids=lambda made: made.__name__)
def test_merged_parts_are_the_report_of_one_run(made, jobs, tmp_path):
    same(tmp_path, made(tmp_path), jobs)


def test_one_part_is_the_whole(tmp_path: Path) -> None:
    same(tmp_path, plain(tmp_path), 1)


@pytest.mark.parametrize("rule", CASES)
def test_every_rule_says_the_same_of_merged_parts(rule, tmp_path):
    needs = {r.name: r.needs for r in load_rules().values()}[rule]
    same(tmp_path, ([CASES[rule].fires(tmp_path)], {"spectral": needs is Need.SPECTRA}), 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_scales_are_shared_together(layout, tmp_path):
    layers = [LAYOUTS[layout](matrix(n), f"model.layers.{n}.mlp.up_proj") for n in range(3)]
    lone = {f"lone.{n}.weight_scale": n + gaussian(40 + n, seed=n) for n in range(1, 4)}
    path = saved(tmp_path, *layers, **{"model.norm.weight": 1 + gaussian(192)}, **lone)
    same(tmp_path, ([path], {}), 3)
    same(tmp_path, ([path], {"exclude": ["*.1.*scale*", "*.1.*absmax"]}), 3)


def test_a_file_that_changed_while_it_was_read_costs_what_it_costs_one_job(tmp_path, monkeypatch):
    folder = write_sharded(tmp_path / "model", transformer())

    def check(path: str, before: object) -> None:
        if "00002" in path:
            raise InputError(path, "changed", "changed")

    monkeypatch.setattr(examining, "check_unchanged", check)
    same(tmp_path, ([folder], {}), 3)


def test_a_job_whose_second_look_fails_costs_what_it_would_have_seen(tmp_path, monkeypatch) -> None:
    run = training(tmp_path)

    def fails(*_: object, **__: object) -> None:
        raise InputError("a.pt", "changed", "changed")

    found = parts(tmp_path, run, 2)
    monkeypatch.setattr(masters, "_digests", fails)
    part(tmp_path, "part-1", run, "1/2")
    report = gradscope.merge(*found)
    assert report.gate.exit_code == 3
    assert [e.message for e in report.errors] == ["changed"]
    assert report.coverage.analyzed == report.coverage.total
    assert "master-mismatch" not in {f.name for f in report.findings}


def test_what_merge_is_asked_is_what_one_run_would_have_been_asked(tmp_path: Path) -> None:
    made = transformer()
    made["lm_head.weight"][0, 0] = np.nan
    path = write(tmp_path / "a.safetensors", made)
    found = parts(tmp_path, ([path], {"select": ["skewed"], "fail_on": "never"}), 3)
    asked: list[dict[str, Any]] = [
        {},
        {"select": ["W101"]},
        {"ignore": ["non-finite"], "fail_on": "low"},
        {"fail_on": "never", "config": Config.model_validate({"rules": {"W107": {"limit": 0.01}}})},
    ]
    for options in asked:
        whole = gradscope.analyze_weights(path, **options)
        assert render(gradscope.merge(*found, **options)) == render(whole)
        assert whole.gate.exit_code == (0 if "ignore" in options or "config" in options else 1)


def test_every_fact_that_rules_read_travels_in_a_part() -> None:
    """A field that this test does not know also belongs into ``parts.Found`` and ``joining``."""
    made_anew = {"checkpoint", "tensors", "measured", "adapters", "masters", "lost", "attention"}
    travel = {f.name for f in fields(Examined)} - made_anew
    assert travel == {
        "tables", "codebooks", "tokens", "quantization", "indices", "left_out"
    }  # fmt: skip
    assert travel <= set(Found.model_fields)


# -- who measures what ----------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**12), max_size=60), st.integers(1, 12))
def test_shares_are_balanced(sizes: list[int], jobs: int) -> None:
    loads = [0] * jobs
    for size, job in zip(sizes, balanced(sizes, jobs), strict=True):
        loads[job] += size
    assert sum(loads) == sum(sizes)
    assert max(loads) * jobs <= sum(sizes) + max(sizes, default=0) * (jobs - 1)


@pytest.mark.parametrize("jobs", [1, 2, 5, 100])
@pytest.mark.parametrize("made", [plain, spectral, several, experts, adapter, training])
def test_every_tensor_has_one_job(made, jobs, tmp_path):
    paths, _ = made(tmp_path)
    opened = [open_checkpoint(str(path)) for path in paths]
    shares = [owned(opened, Share(job, jobs), heads=True) for job in range(jobs)]
    for place, checkpoint in enumerate(opened):
        held = [name for own in shares for name in own[place]]
        assert sorted(held) == sorted(ref.name for ref in checkpoint.tensors)


def test_jobs_have_about_as_many_bytes_each(tmp_path: Path) -> None:
    opened = open_checkpoint(str(plain(tmp_path)[0][0]))
    sizes = {ref.name: ref.nbytes for ref in opened.tensors}
    loads = [sum(sizes[n] for n in owned([opened], Share(j, 4), heads=False)[0]) for j in range(4)]
    assert max(loads) < 1.1 * min(loads)


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "1/0", "0/0", "1/2/3", "a/b", "0.5/2", ""])
def test_a_shard_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--shard takes i/n"):
        share(text)


# -- a part by itself -----------------------------------------------------------------------------


def test_a_part_is_no_verdict(tmp_path: Path) -> None:
    report = gradscope.analyze_weights(plain(tmp_path)[0][0], shard="1/3")
    assert report.verdict == "part 1/3"
    assert report.coverage.narrowed == ("--shard 1/3",)
    assert 0 < report.coverage.analyzed < report.coverage.total == 31
    assert len(report.result.tensors) == report.coverage.analyzed
    assert report.result.health is None
    assert all(t.health is None for t in report.result.tensors)
    waiting = {n.rule for n in report.coverage.not_evaluated if "gradscope merge" in n.reason}
    assert {"duplicate-tensors", "missing-layer", "dead-expert", "dead-units"} <= waiting
    assert "non-finite" not in waiting
    assert "no verdict of the whole" in report.gate.notes[0]


def test_what_one_tensor_shows_is_found_by_the_job_that_has_it(tmp_path: Path) -> None:
    made = transformer()
    made["lm_head.weight"][0, 0] = np.nan
    path = write(tmp_path / "a.safetensors", made)
    codes = []
    for job in range(3):
        report = gradscope.analyze_weights(path, shard=f"{job}/3")
        codes.append(report.gate.exit_code)
        assert [f.name for f in report.findings] == ["non-finite"] * codes[-1]
        assert report.verdict == ("failed" if codes[-1] else f"part {job}/3")
    assert sorted(codes) == [0, 0, 1]


def test_a_job_without_a_tensor_is_not_empty_and_one_of_an_empty_checkpoint_is(tmp_path) -> None:
    path = write(tmp_path / "one.safetensors", {"w": gaussian(8, 8)})
    assert gradscope.analyze_weights(path, shard="1/2").gate.exit_code == 0
    empty = nothing_in_it(tmp_path)[0][0]
    assert gradscope.analyze_weights(empty, shard="0/2").gate.exit_code == 4


def test_headers_are_not_shared(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--shard shares out the data"):
        gradscope.analyze_weights(plain(tmp_path)[0][0], shard="0/2", headers_only=True)


def test_a_baseline_is_not_made_of_a_part(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="part 0/2"):
        created(gradscope.analyze_weights(plain(tmp_path)[0][0], shard="0/2"))


# -- what is not merged ---------------------------------------------------------------------------


def refused(*paths: Path) -> str:
    with pytest.raises(InputError) as caught:
        gradscope.merge(*paths)
    assert caught.value.exit_code == 3
    return str(caught.value)


def part(folder: Path, name: str, run: Run, shard: str, **changed: Any) -> Path:
    paths, options = run
    path = folder / f"{name}.json"
    path.write_text(render(gradscope.analyze_weights(*paths, **options | changed, shard=shard)))
    return path


def test_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    found = sorted(parts(tmp_path, plain(tmp_path), 5))
    assert "4 parts of 5 given; part 3/5 is missing" in refused(*found[:3], found[4])
    assert "1 part of 5 given; 4 parts are missing: 0/5, 2/5, 3/5, 4/5" in refused(found[1])


def test_a_part_that_is_there_twice_is_named(tmp_path: Path) -> None:
    first, second = sorted(parts(tmp_path, plain(tmp_path), 2))
    message = refused(first, second, first)
    assert "is part 0/2, and so is" in message
    assert message.count("part-0.json") == 2


def test_a_whole_report_is_no_part(tmp_path: Path) -> None:
    first, second = sorted(parts(tmp_path, plain(tmp_path), 2))
    second.write_text(render(gradscope.analyze_weights(plain(tmp_path)[0][0])))
    assert "part-1.json: is a whole report" in refused(first, second)


def test_parts_of_other_divisions_options_and_inputs_are_refused(tmp_path: Path) -> None:
    run = plain(tmp_path)
    other = write(tmp_path / "b.safetensors", conv_net())
    first = part(tmp_path, "first", run, "0/2")
    cases = {
        "is one of 3 parts": part(tmp_path, "n", run, "1/3"),
        """spectral is 'true', and 'false' there""": part(tmp_path, "o", run, "1/2", spectral=True),
        "checkpoints is": part(tmp_path, "p", ([other], {}), "1/2"),
        "exclude is": part(tmp_path, "e", run, "1/2", exclude=["*norm*"]),
    }
    for message, second in cases.items():
        assert message in refused(first, second)
        assert second.name in refused(first, second)


def test_a_checkpoint_that_became_another_between_the_jobs_is_told_apart(tmp_path: Path) -> None:
    run = plain(tmp_path)
    path = run[0][0]
    first, before = part(tmp_path, "first", run, "0/2"), path.read_bytes()
    path.write_bytes(before[:-4000] + bytes(2000) + before[-2000:])
    assert "saw another content of" in refused(first, part(tmp_path, "c", run, "1/2"))
    write(path, transformer(vocabulary=300))
    assert "bytes, " in refused(first, part(tmp_path, "b", run, "1/2"))
    path.write_bytes(before)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 5}')
    assert "config.json, differ" in refused(first, part(tmp_path, "d", run, "1/2"))
    path.unlink()
    assert "did not" in refused(first, part(tmp_path, "m", run, "1/2"))


def test_parts_of_another_version_are_refused(tmp_path: Path) -> None:
    first, second = sorted(parts(tmp_path, plain(tmp_path), 2))
    said = json.loads(second.read_text())
    said["tool"]["version"] = "0.0.1"
    second.write_text(json.dumps(said))
    assert "written by gradscope 0.0.1" in refused(first, second)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("how", ["state", "shorter", "digest", "tensors", "empty"])
def test_a_damaged_part_is_refused_and_never_merged(how, which, tmp_path):
    found = sorted(parts(tmp_path, plain(tmp_path), 2))
    said = json.loads(found[which].read_text())
    text = said["partial"]["state"]
    if how == "state":
        said["partial"]["state"] = text[:100] + ("A" if text[100] != "A" else "B") + text[101:]
    elif how == "shorter":
        said["partial"]["state"] = text[:-8]
        said["partial"]["digest"] = digest(text[:-8])
    elif how == "digest":
        said["partial"]["digest"] = "0" * 32
    elif how == "tensors":
        del said["result"]["tensors"][0]
    else:
        said["partial"] |= {"state": packed({}), "digest": digest(packed({}))}
    found[which].write_text(json.dumps(said))
    assert "is damaged" in refused(*found)


def test_a_file_cut_off_is_no_report(tmp_path: Path) -> None:
    first, second = sorted(parts(tmp_path, plain(tmp_path), 2))
    second.write_text(second.read_text()[:-500])
    assert "not JSON" in refused(first, second)
