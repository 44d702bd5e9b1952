"""The law of shares for two checkpoints: the parts of a run, merged, are the bytes of one run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import State, adapter, drawn, model, of_layers, products, walk, written

import gradscope
from gradscope.drift.analysis import analyze_drift
from gradscope.errors import InputError, UsageError
from gradscope.report.formats.json_ import render
from gradscope.report.partial import digest, packed

Run = tuple[list[str], dict[str, Any]]


def pair(folder: Path, base: State, new: State) -> list[str]:
    return [written(folder / "base.safetensors", base), written(folder / "new.safetensors", new)]


def moved(folder: Path) -> Run:
    """Trained on, with an expectation that fails and a tensor that is not finite."""
    new = {name: t + 0.02 * t.std() * drawn(*t.shape, seed=n)
           for n, (name, t) in enumerate(model().items())}  # fmt: skip
    new["layers.1.mlp.weight"][0, 0] = torch.nan
    options = {"expect_frozen": ["layers.0.*"], "expect_changed": ["layers.2.*"],
               "max_drift": {"*": 0.01}}  # fmt: skip
    return pair(folder, model(), new), options


def set_changed(folder: Path) -> Run:
    """Added, removed, renamed, reshaped, tied otherwise, cast."""
    base, new = model(), {n: t.to(torch.bfloat16) for n, t in model().items()}
    base["lm_head.weight"] = base["embed_tokens.weight"].clone()
    base["old.weight"], new["newer.weight"] = drawn(3, 4), drawn(5, 4)
    base["here.weight"] = new["there.weight"] = drawn(6, 6, seed=3)
    new["layers.0.mlp.bias"] = drawn(40)
    return pair(folder, base, new), {}


def misplaced(folder: Path) -> Run:
    """Layers in another order: what a matrix of one job shows concerns the others' biases."""
    return pair(folder, model(), of_layers(2, 0, 1)), {"expect": "converted"}


def unrelated(folder: Path) -> Run:
    """One matrix begun anew, and gains that the base has elsewhere."""
    new = model() | {"layers.0.mlp.weight": drawn(32, 32, seed=9)}
    new["layers.1.norm.weight"] = model()["layers.2.norm.weight"].clone()
    return pair(folder, model(), new), {}


def gains_elsewhere(folder: Path) -> Run:
    """The same without the matrix: nothing is looked for elsewhere."""
    new = model() | {"layers.1.norm.weight": model()["layers.2.norm.weight"].clone()}
    return pair(folder, model(), new), {}


def adapted(folder: Path) -> Run:
    """A merge of which one module was forgotten, and that names one that is not there."""
    path = adapter(folder, {"base_model.model.nowhere.lora_A.weight": drawn(4, 32),
                            "base_model.model.nowhere.lora_B.weight": drawn(32, 4)})  # fmt: skip
    new, added = model(), products(folder)
    for name in new.keys() & added.keys() - {"layers.1.mlp.weight"}:
        new[name] = (new[name].double() + 2 * added[name]).float()
    return pair(folder, model(), new), {"expect": "merge", "adapter": path}


def mixed(folder: Path) -> Run:
    other = model(seed=4)
    new = {n: 0.3 * t + 0.7 * other[n] for n, t in model().items()}
    parent = written(folder / "other.safetensors", other)
    return pair(folder, model(), new), {"expect": "merge", "parents": [parent]}


def followed(folder: Path) -> Run:
    """A series in which one cannot be read."""
    paths = [written(folder / f"ckpt-{n}.safetensors", s) for n, s in enumerate(walk(4))]
    (folder / "ckpt-9.safetensors").write_bytes(b"no checkpoint")
    return [*reversed(paths), str(folder / "ckpt-9.safetensors")], {}


def absent(folder: Path) -> Run:
    return [written(folder / "a.safetensors", model()), str(folder / "b.safetensors")], {}


def chosen(folder: Path) -> Run:
    return moved(folder)[0], {"include": ["layers.*"], "exclude": ["*.bias"]}


RUNS: dict[str, Callable[[Path], Run]] = {
    f.__name__: f
    for f in (
        moved, set_changed, misplaced, unrelated, gains_elsewhere, adapted, mixed, followed, absent,
        chosen,
    )
}  # fmt: skip


def parts(folder: Path, run: Run, jobs: int) -> list[Path]:
    """The files that the jobs write, shuffled."""
    paths, options = run
    written_ = []
    for job in range(jobs):
        report = analyze_drift(*paths, **options, shard=f"{job}/{jobs}")
        written_.append(folder / f"part-{job}.json")
        written_[-1].write_text(render(report))
    random.Random(jobs).shuffle(written_)
    return written_


@pytest.mark.parametrize("jobs", [1, 2, 5, 40])
@pytest.mark.parametrize("name", RUNS)
def test_the_parts_of_a_run_merged_are_its_bytes(name: str, jobs: int, tmp_path: Path) -> None:
    run = RUNS[name](tmp_path)
    whole = analyze_drift(*run[0], **run[1])

    merged_ = gradscope.merge(*parts(tmp_path, run, jobs))

    assert render(merged_) == render(whole)


def test_every_pair_is_compared_by_one_job_and_no_part_passes(tmp_path: Path) -> None:
    run = moved(tmp_path)
    read = [json.loads(p.read_text()) for p in parts(tmp_path, run, 3)]

    names = [t["name"] for part in read for t in part["result"]["tensors"]]
    assert sorted(names) == sorted(model())
    for part in read:
        assert part["findings"] == []
        assert {n["rule"] for n in part["coverage"]["not_evaluated"]} == set(
            part["coverage"]["rules"]
        )
        assert part["coverage"]["total"] == len(model())
        assert part["gate"]["exit_code"] == 0
        assert "no verdict of the whole" in part["gate"]["notes"][0]


def test_bytes_are_shared_out(tmp_path: Path) -> None:
    read = [json.loads(p.read_text()) for p in parts(tmp_path, moved(tmp_path), 3)]

    loads = [part["coverage"]["bytes"] for part in read]
    assert max(loads) < 4 / 3 * min(loads)  # no more for whole tensors (Graham 1969)


def test_what_jobs_cannot_do_alike_is_refused(tmp_path: Path) -> None:
    paths, _ = moved(tmp_path)
    for options, said in (
        ({"headers_only": True}, "--headers-only"),
        ({"keep_going": True}, "--keep-going"),
        ({"expect_frozen": ["nothing.*"]}, "nothing"),
    ):
        with pytest.raises(UsageError, match=said):
            analyze_drift(*paths, shard="0/2", **options)
    with pytest.raises(UsageError, match="i/n"):
        analyze_drift(*paths, shard="2/2")


def test_parts_of_other_files_options_or_commands_are_not_merged(tmp_path: Path) -> None:
    paths, _ = moved(tmp_path)
    first, second = sorted(parts(tmp_path, (paths, {}), 2))
    third = tmp_path / "third.json"

    third.write_text(render(analyze_drift(*paths, shard="1/2", expect="identical")))
    with pytest.raises(InputError, match="expect is"):
        gradscope.merge(first, third)
    third.write_text(render(gradscope.analyze_weights(paths[0], shard="1/2")))
    with pytest.raises(InputError, match="weights"):
        gradscope.merge(first, third)
    written(Path(paths[1]), model(seed=8))
    third.write_text(render(analyze_drift(*paths, shard="1/2")))
    with pytest.raises(InputError, match="another content"):
        gradscope.merge(first, third)
    with pytest.raises(InputError, match="1/2 is missing"):
        gradscope.merge(first)
    assert second.exists()


def test_a_part_whose_rows_and_state_differ_is_damaged(tmp_path: Path) -> None:
    first, second = sorted(parts(tmp_path, moved(tmp_path), 2))
    report = json.loads(first.read_text())
    report["result"]["tensors"].pop()
    first.write_text(json.dumps(report))
    with pytest.raises(InputError, match="not of these tensors"):
        gradscope.merge(first, second)

    report["partial"]["state"] = text = packed({"rows": "none"})
    report["partial"]["digest"] = digest(text)
    first.write_text(json.dumps(report))
    with pytest.raises(InputError, match="not what this version writes"):
        gradscope.merge(first, second)
