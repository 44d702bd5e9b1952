"""What training keeps beside a model is read under its own names and told apart from the model."""

from __future__ import annotations

import argparse
import collections
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradscope.checkpoints.tensors import Checkpoint
from gradscope.checkpoints.torchfile import read_torch


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))


def stepped(make: Any, model: torch.nn.Module) -> dict[str, Any]:
    """The state of an optimizer after two steps."""
    optimizer = make(model)
    for _ in range(2):
        model(torch.randn(5, 4)).pow(2).sum().backward()
        optimizer.step()
    found: dict[str, Any] = optimizer.state_dict()
    return found


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def read(path: Path, value: object, key: str | None = None) -> Checkpoint:
    torch.save(value, path / "a.pt")
    return read_torch(str(path / "a.pt"), key)


def parts(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """The tensors' names by what they belong to."""
    found: dict[str, set[str]] = {}
    for ref in checkpoint.tensors:
        found.setdefault(ref.part, set()).add(ref.name)
    return found


@pytest.fixture
def model() -> torch.nn.Module:
    return net()


OPTIMIZERS = {
    "adam": (adam, {"exp_avg", "exp_avg_sq", "step"}),
    "sgd": (
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
        {"momentum_buffer"},
    ),
    "rmsprop": (lambda m: torch.optim.RMSprop(m.parameters()), {"square_avg", "step"}),
    "adafactor": (
        lambda m: torch.optim.Adafactor(m.parameters()),
        {"row_var", "col_var", "variance", "step"},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_state_is_read_beside_the_model(tmp_path, model, name):
    make, leaves = OPTIMIZERS[name]
    state = model.state_dict()
    checkpoint = read(tmp_path, {"model": state, "optimizer": stepped(make, model), "epoch": 1})
    found = parts(checkpoint)
    assert found["model"] == set(state)
    assert {n.rpartition(".")[2] for n in found["optimizer"]} == leaves
    assert all(n.startswith("optimizer.state.") for n in found["optimizer"])
    assert {n.split(".")[2] for n in found["optimizer"]} == {"0", "1", "2", "3"}
    assert checkpoint.skipped == ()
    assert "judged apart from the model: optimizer" in checkpoint.notes[1]
    assert [ref.name for ref in checkpoint.model().tensors] == list(state)


def test_moments_bear_their_parameters_names_where_the_optimizer_knows_them(tmp_path, model):
    state = stepped(lambda m: torch.optim.Adam(m.named_parameters()), model)
    names = parts(read(tmp_path, {"model": model.state_dict(), "optimizer": state}))["optimizer"]
    assert "optimizer.state.0.weight.exp_avg" in names
    assert "optimizer.state.2.bias.exp_avg_sq" in names


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: [s, s], lambda s: {"gen": s, "disc": s}])
def test_an_optimizer_alone_is_no_model(tmp_path, model, wrap):
    checkpoint = read(tmp_path, wrap(stepped(adam, model)))
    assert set(parts(checkpoint)) == {"optimizer"}
    assert "the state of an optimizer" in checkpoint.notes[0]
    assert "no model" in checkpoint.notes[0]
    assert checkpoint.model().tensors == ()


@pytest.mark.parametrize("name", ["optimizer", "optimizers", "optim", "last_optimizer_state"])
def test_an_entry_that_is_called_an_optimizer_is_one(tmp_path, name):
    checkpoint = read(tmp_path, {name: {"anything": {"moment": torch.ones(2, 2)}}})
    assert parts(checkpoint) == {"optimizer": {f"{name}.anything.moment"}}
    assert "no model in it" in checkpoint.notes[-1]


def test_an_optimizer_by_key_is_none_the_less(tmp_path, model):
    value = {"model": model.state_dict(), "optimizer": stepped(adam, model)}
    checkpoint = read(tmp_path, value, key="optimizer")
    assert "state.0.exp_avg" in parts(checkpoint)["optimizer"]
    assert set(parts(checkpoint)) == {"optimizer"}
    assert "as --key asks" in checkpoint.notes[0]


def test_a_layer_that_is_called_like_an_optimizer_is_a_layer(tmp_path):
    state = {"optimizer_net.weight": torch.ones(2, 2), "ema.weight": torch.ones(2, 2)}
    assert parts(read(tmp_path, state)) == {"model": set(state)}


AVERAGES = ["ema", "model_ema", "ema_state_dict", "state_dict_ema", "swa_model", "ema_model"]


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_beside_the_model_are_told_apart(tmp_path, model, name):
    state = model.state_dict()
    checkpoint = read(tmp_path, {name: {k: v + 1 for k, v in state.items()}, "model": state})
    assert parts(checkpoint) == {"model": set(state), "average": {f"{name}.{k}" for k in state}}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_alone_are_the_model(tmp_path, model, name):
    state = model.state_dict()
    assert parts(read(tmp_path, {name: state, "epoch": 3})) == {"model": set(state)}


@pytest.mark.parametrize("name", ["email_encoder", "schema", "emancipated"])
def test_other_names_are_no_averages(tmp_path, model, name):
    checkpoint = read(tmp_path, {name: {"w": torch.ones(2, 2)}, "model": model.state_dict()})
    assert set(parts(checkpoint)) == {"model"}
    assert checkpoint.skipped[0].subject == name


def test_shadow_parameters_in_a_list_are_averages(tmp_path, model):
    shadow = [p.detach().clone() for p in model.parameters()]
    value = {"model": model.state_dict(), "ema": {"decay": 0.9, "shadow_params": shadow}}
    assert parts(read(tmp_path, value))["average"] == {f"ema.shadow_params.{i}" for i in range(4)}


def test_a_lightning_checkpoint_is_read_with_all_its_states(tmp_path, model):
    state = {f"net.{name}": value for name, value in model.state_dict().items()}
    first, second = stepped(adam, model), stepped(OPTIMIZERS["sgd"][0], model)
    value = {
        "epoch": 1,
        "global_step": 7,
        "state_dict": state,
        "loops": {"fit_loop": {"state": 1}},
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)},
            "EMACallback": {"shadow": {k: v.clone() for k, v in state.items()}},
        },
        "optimizer_states": [first, second],
        "hyper_parameters": argparse.Namespace(lr=1),
    }
    checkpoint = read(tmp_path, value)
    found = parts(checkpoint)
    assert found["model"] == set(state)
    assert found["average"] == {f"callbacks.EMACallback.shadow.{name}" for name in state}
    assert {"optimizer_states.0.state.0.exp_avg", "optimizer_states.1.state.0.momentum_buffer"} <= (
        found["optimizer"]
    )
    assert [n.endswith("best_model_score") for n in found["other"]] == [True]
    assert checkpoint.skipped == ()
    assert checkpoint.metadata["global_step"] == 7


def test_deepspeeds_two_files_are_told_apart(tmp_path, model):
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    weights = {"module": model.state_dict(), "optimizer": None, "ds_config": {}, "global_steps": 5}
    checkpoint = read(tmp_path, weights)
    assert parts(checkpoint) == {"model": set(model.state_dict())}
    assert checkpoint.metadata["global_steps"] == 5
    state = {
        "optimizer_state_dict": {
            "zero_stage": 2,
            "loss_scaler": argparse.Namespace(scale=1),
            "base_optimizer_state": {"state": {0: {"exp_avg": flat, "exp_avg_sq": flat**2}}},
            "single_partition_of_fp32_groups": [flat + 1],
        },
        "ds_version": "0.15",
    }
    checkpoint = read(tmp_path, state)
    inside = "optimizer_state_dict"
    assert parts(checkpoint) == {
        "optimizer": {
            f"{inside}.base_optimizer_state.state.0.{leaf}" for leaf in ("exp_avg", "exp_avg_sq")
        },
        "master": {f"{inside}.single_partition_of_fp32_groups.0"},
    }


def test_megatrons_file_is_read(tmp_path, model):
    nested = {"language_model": {"embedding": {"weight": torch.ones(3, 2)}, "extra": io.BytesIO()}}
    value = {
        "args": argparse.Namespace(a=1),
        "iteration": 5,
        "model": nested,
        "optimizer": {
            "optimizer": stepped(adam, model),
            "fp32_from_fp16_params": [[torch.ones(3, 2) * 2]],
        },
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
            }
        ],
    }
    checkpoint = read(tmp_path, value)
    found = parts(checkpoint)
    assert found["model"] == {"language_model.embedding.weight"}
    assert found["master"] == {"optimizer.fp32_from_fp16_params.0.0"}
    assert found["other"] == {"rng_state.0.torch_rng_state"}
    assert checkpoint.skipped == ()


def test_megatrons_distributed_optimizer_is_one(tmp_path):
    flat = torch.randn(6)
    value = {0: {torch.float32: {"param": flat, "exp_avg": flat + 1, "exp_avg_sq": flat**2}}}
    assert parts(read(tmp_path, value)) == {
        "master": {"0.torch.float32.param"},
        "optimizer": {"0.torch.float32.exp_avg", "0.torch.float32.exp_avg_sq"},
    }


def test_random_states_alone_are_no_model(tmp_path):
    value = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
        "cuda": [torch.zeros(16, dtype=torch.uint8)],
    }
    checkpoint = read(tmp_path, value)
    assert parts(checkpoint) == {"other": {"cpu", "cuda.0"}}
    assert checkpoint.skipped == ()
    assert "no model in it" in checkpoint.notes[-1]


def test_loose_tensors_beside_the_model_are_read(tmp_path, model):
    value = {"model": model.state_dict(), "step": torch.tensor(4), "history": torch.ones(9)}
    assert parts(read(tmp_path, value))["other"] == {"step", "history"}


def test_an_array_loose_beside_the_model_is_no_missing_weight(tmp_path, model):
    checkpoint = read(tmp_path, {"model": model.state_dict(), "losses": np.ones(3)})
    assert [(s.subject, s.deliberate) for s in checkpoint.skipped] == [("losses", True)]


def test_a_scheduler_holds_no_tensors(tmp_path):
    value = {"base_lrs": [0.1], "last_epoch": 3, "counter": collections.Counter("aab")}
    assert read(tmp_path, value).tensors == ()


def test_names_beside_the_model_that_collide_with_its_own_are_no_problem(tmp_path):
    value = {
        "model": {"ema.weight": torch.ones(2, 2), "b": torch.ones(2)},
        "ema": {"weight": torch.zeros(2, 2)},
    }
    checkpoint = read(tmp_path, value)
    assert parts(checkpoint) == {"model": {"ema.weight", "b"}, "average": {"ema.weight#2"}}
    assert checkpoint.problems == ()
