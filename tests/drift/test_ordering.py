"""The order of a series, as the names of its checkpoints tell it."""

from __future__ import annotations

import random

import pytest

from gradscope.drift.ordering import distinct, in_order

SERIES = {
    "plain": ["ckpt-9.pt", "ckpt-20.pt", "ckpt-1000.pt"],
    "folders of a trainer": [f"runs/7/checkpoint-{n}" for n in (500, 1000, 10000)],
    "files in folders": [f"runs/7/checkpoint-{n}/model.safetensors" for n in (500, 1000, 10000)],
    "final is last": ["ckpt-500.pt", "ckpt-1000.pt", "ckpt-final.pt"],
    "last of Lightning": ["epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt", "last.ckpt"],
    "the first of a training": ["init.pt", "step_10.pt", "step_200.pt", "last.pt"],
    "a version": ["epoch=0-step=100.ckpt", "epoch=0-step=200-v1.ckpt", "epoch=0-step=1000.ckpt"],
    "a loss before the step": ["loss0.9-step5.pt", "loss0.31-step50.pt", "loss0.4-step100.pt"],
    "a loss behind the epoch": ["e-epoch=2-val=0.9.ckpt", "e-epoch=10-val=0.1.ckpt", "e-last.ckpt"],
    "thousands": ["model-500.pt", "model-1k.pt", "model-2.5k.pt", "model-10k.pt", "model-1M.pt"],
    "powers of ten": ["step=1000.pt", "step=2e4.pt", "step=100000.pt"],
    "tokens beside": ["step1000-tokens4B", "step5000-tokens21B", "step10000-tokens42B"],
    "a size that all have": ["olmo-7b-step10", "olmo-7b-step200", "olmo-7b-step1000"],
    "zeros before": ["global_step0020", "global_step0100", "global_step3000"],
    "a word that holds last": ["blast-1.pt", "blast-2.pt", "blast-10.pt"],
}


@pytest.mark.parametrize("name", SERIES)
def test_checkpoints_are_ordered_by_their_steps(name: str) -> None:
    for seed in range(4):
        given = random.Random(seed).sample(SERIES[name], len(SERIES[name]))
        assert in_order(given) == SERIES[name]


def test_names_without_steps_and_pairs_stay_as_they_were_given() -> None:
    assert in_order(["b.pt", "a.pt", "c.pt"]) == ["b.pt", "a.pt", "c.pt"]
    assert in_order(["b-1.pt", "a.pt", "c-0.pt"]) == ["b-1.pt", "a.pt", "c-0.pt"]
    assert in_order(["ckpt-20.pt", "ckpt-9.pt"]) == ["ckpt-20.pt", "ckpt-9.pt"]


def test_checkpoints_are_called_by_what_tells_them_apart() -> None:
    files = [f"runs/7/checkpoint-{n}/model.safetensors" for n in (5, 6, 7)]
    assert distinct(files) == ["checkpoint-5", "checkpoint-6", "checkpoint-7"]
    assert distinct(["a/x.pt", "a/y.pt", "a/z.pt"]) == ["x.pt", "y.pt", "z.pt"]
    assert distinct(["a/x.pt", "b/c/x.pt"]) == ["a", "b/c"]
    assert distinct(["a/x.pt", "a/x.pt"]) == ["x.pt", "x.pt"]
