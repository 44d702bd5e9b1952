"""What people save is loaded as it was; what is not a model is refused in words, and never run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradscope.models.load import Loaded, load_model
from gradscope.models.probe import held, run

PICKLE = frozenset({"pickle"})

CODE = """
from torch import nn


class Small(nn.Module):
    def __init__(self, classes=5, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def small(num_classes=5, *, width=4):
    return Small(num_classes, width)
"""

Save = Callable[[nn.Module, Path], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the code of a network, importable as ``nets_of_load_tests``."""
    found = tmp_path_factory.mktemp("load")
    (found / "nets_of_load_tests.py").write_text(CODE)
    return found


@pytest.fixture(scope="module")
def net(folder: Path) -> Iterator[nn.Module]:
    """A network of five classes, with batch statistics that matter."""
    sys.path.insert(0, str(folder))
    import nets_of_load_tests as nets  # type: ignore[import-not-found]

    torch.manual_seed(1)
    made = nets.small()
    with torch.no_grad():
        made.norm.running_mean.normal_()
        made.norm.running_var.uniform_(0.5, 2)
    yield made.eval()
    sys.path.remove(str(folder))


@pytest.fixture(autouse=True)
def in_folder(folder: Path, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in (str(folder), "")])


ARCH = "nets_of_load_tests:small"
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def logits(loaded: Loaded, images: Tensor = IMAGES) -> Tensor:
    with held(loaded.model.module):
        return run(loaded.model, images).logits.detach()


def eager(net: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return net(images)


def assert_is(loaded: Loaded, net: nn.Module) -> None:
    torch.testing.assert_close(logits(loaded), eager(net), rtol=1e-6, atol=1e-6)


def traced(net: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, IMAGES), path)


def scripted(net: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net), path)


def exported(net: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(net, (IMAGES[:1],)), path)


def dynamic(net: nn.Module, path: Path) -> None:
    h, w = (torch.export.Dim(name, min=4) for name in "hw")
    shapes = ({0: torch.export.Dim("batch"), 2: h, 3: w},)
    torch.export.save(torch.export.export(net, (IMAGES,), dynamic_shapes=shapes), path)


def legacy(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


PROGRAMS: dict[str, tuple[str, Save]] = {
    "traced": ("torchscript", traced),
    "scripted": ("torchscript", scripted),
    "exported": ("export", exported),
    "dynamic": ("export", dynamic),
}
WEIGHTS: dict[str, Save] = {
    "torch": lambda net, path: torch.save(net.state_dict(), path),
    "legacy": lambda net, path: legacy(net.state_dict(), path),
    "safetensors": lambda net, path: save_file(net.state_dict(), path),
    "nested": lambda net, path: torch.save({"epoch": 3, "state_dict": net.state_dict()}, path),
    "parallel": lambda net, path: torch.save(
        {f"module.{name}": value for name, value in net.state_dict().items()}, path
    ),
    "lightning": lambda net, path: torch.save(
        {"state_dict": {f"model.{name}": value for name, value in net.state_dict().items()}}, path
    ),
}  # fmt: skip
MODULES: dict[str, Save] = {
    "whole": lambda net, path: torch.save(net, path),
    "whole legacy": legacy,
    "whole in a dictionary": lambda net, path: torch.save({"model": net, "epoch": 3}, path),
    "whole in parallel": lambda net, path: torch.save(nn.DataParallel(net), path),
}


@pytest.fixture(scope="module")
def file(folder: Path, net: nn.Module) -> Callable[[str], str]:
    """The path of the network as saved in a form; made once, with a suffix that says nothing."""
    forms = {**{k: save for k, (_, save) in PROGRAMS.items()}, **WEIGHTS, **MODULES}

    def made(form: str) -> str:
        path = folder / f"{form} saved.bin"
        if not path.exists():
            forms[form](net, path)
        return str(path)

    return made


# Everything that is a model gives the logits of the network that was saved.


@pytest.mark.parametrize("form", PROGRAMS)
def test_a_program_answers_as_the_network_did(file, net, form):
    loaded = load_model(file(form))

    assert_is(loaded, net)
    assert loaded.format == PROGRAMS[form][0]
    assert loaded.architecture is None


@pytest.mark.parametrize("form", WEIGHTS)
def test_weights_in_their_architecture_answer_as_the_network_did(file, net, form):
    loaded = load_model(file(form), arch=ARCH)

    assert_is(loaded, net)
    assert (loaded.format, loaded.architecture) == ("state-dict", ARCH)
    assert not loaded.model.module.training


@pytest.mark.parametrize("form", MODULES)
def test_a_pickled_module_that_is_trusted_answers_as_the_network_did(file, net, form):
    loaded = load_model(file(form), trust=PICKLE)

    assert_is(loaded, net)
    assert loaded.format == "module"
