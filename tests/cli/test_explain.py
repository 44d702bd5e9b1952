"""``gradscope explain`` and its company as people and scripts see them."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gradscope.attribution.methods import methods
from gradscope.cli.schema import report_schema

PREPROCESS = ("--preprocess", "image_mean=0.5/0.5/0.5,image_std=0.25/0.25/0.25,size=16x16")


LOUD = """
from torch import nn

print("imported")

class Loud(nn.Sequential):
    def forward(self, x):
        print("called")
        return super().forward(x)

def net():
    return Loud(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
                nn.Flatten(), nn.Linear(8 * 36, 4))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("explain")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 4),
    ).eval()  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, torch.randn(1, 3, 16, 16)), made / "model.pt")
    torch.save(net, made / "whole.pt")
    torch.save(net.state_dict(), made / "state.pt")
    pixels = np.random.default_rng(0).integers(0, 255, (30, 47, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(made / "photo.png")
    (made / "labels.txt").write_text("ant\nbee\ncat\ndog\n")
    (made / "bad.png").write_bytes(b"nothing")
    return made


def gradscope(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradscope", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_a_map_is_drawn_told_and_written(folder: Path) -> None:
    done = gradscope(
        "explain", "--method", "gradcam", "model.pt", "photo.png", *PREPROCESS, cwd=folder
    )

    assert done.returncode == 0, done.stderr
    assert "photo.png  47×30 RGB" in done.stdout
    assert "gradcam" in done.stdout
    assert "PASSED" in done.stdout
    assert "wrote 3 files to explanations" in done.stderr
    assert len(list((folder / "explanations").glob("photo.gradcam.*"))) == 3


def test_the_json_report_matches_its_schema_and_is_the_same_every_time(folder: Path) -> None:
    arguments = (
        "explain", "-m", "gradcam,integrated-gradients", "--steps", "8", "model.pt", "photo.png",
        "--target", "cat", "--evaluate", "-f", "json", *PREPROCESS,
    )  # fmt: skip
    first, second = (gradscope(*arguments, cwd=folder) for _ in range(2))

    assert first.stdout == second.stdout
    report = json.loads(first.stdout)
    jsonschema.validate(report, report_schema())
    cam, integrated = report["result"]["explanations"]
    assert cam["target"]["label"] == "cat"
    assert set(cam["map"]) >= {"shape", "min", "max", "sum"}
    assert set(cam["files"]) == {"heatmap", "overlay", "array", "figure"}
    known = integrated["diagnostics"]
    for key in ("completeness_delta", "relative_delta", "insertion_auc", "deletion_auc"):
        assert isinstance(known[key], float)
    assert 3 <= known["random_control"]["rankings"] <= 8  # until the side is settled


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["model.pt", "bad.png", *PREPROCESS], 3, "not a picture"),
        (["model.pt", "photo.png", "bad.png", *PREPROCESS], 3, "not a picture"),
        (["model.pt", "none.png", *PREPROCESS], 3, "file not found"),
        (["none.pt", "photo.png"], 3, "file not found"),
        (["whole.pt", "photo.png"], 3, "--trust pickle"),
        (["photo.png", "photo.png"], 3, "PNG image"),
        (["state.pt", "photo.png"], 2, "name the architecture"),
        (["state.pt", "photo.png", "--arch", "nothing:here"], 2, "module nothing not found"),
        (["model.pt", "photo.png", "-m", "gradcamm"], 2, "did you mean gradcam"),
        (["model.pt", "photo.png", "-O", "steps=3"], 2, "no option 'steps'"),
        (["model.pt", "photo.png", "--layer", "9", *PREPROCESS], 2, "no layer '9'"),
        (["model.pt", "photo.png", "--device", "cuda:9"], 2, "cuda"),
        (["model.pt", "photo.png", "-m", "attention", *PREPROCESS], 2, "no self-attention"),
    ],
)
def test_a_wrong_request_or_input_has_its_exit_code(
    folder: Path, arguments: list[str], code: int, said: str
) -> None:
    done = gradscope("explain", *arguments, "-o", "out", cwd=folder)

    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_trusted_module_and_a_gate(folder: Path) -> None:
    arguments = ("explain", "whole.pt", "photo.png", "--trust", "pickle", "-m", "saliency", "-q",
                 "--target", "3", *PREPROCESS)  # fmt: skip

    assert gradscope(*arguments, cwd=folder).returncode == 0
    gate = gradscope(
        "explain", "model.pt", "photo.png", "-m", "integrated-gradients", "--steps", "1",
        "--fail-on", "medium", *PREPROCESS, cwd=folder,
    )  # fmt: skip
    assert gate.returncode == 1
    assert "incomplete-attribution" in gate.stdout


def test_layers_show_what_auto_takes_and_why(folder: Path) -> None:
    done = gradscope("layers", "model.pt", *PREPROCESS, cwd=folder)

    assert done.returncode == 0, done.stderr
    assert "→ 3" in done.stdout
    assert "auto: 3, the last layer with maps that the score's gradient reaches" in done.stdout
    found = json.loads(gradscope("layers", "model.pt", *PREPROCESS, "-f", "json", "--all",
                                 cwd=folder).stdout)  # fmt: skip
    assert found["auto"] == "3"
    assert [row["name"] for row in found["layers"]] == ["0", "1", "2", "3", "4", "5"]
    assert found["layers"][2]["shape"] == [1, 8, 6, 6]


def test_methods_are_listed_without_torch(folder: Path) -> None:
    done = gradscope("methods", "integrated-gradients", cwd=folder)

    assert "arXiv:1703.01365" in done.stdout
    assert "tolerance = 0.0" in done.stdout
    rows = json.loads(gradscope("methods", "-f", "json", cwd=folder).stdout)
    assert [row["name"] for row in rows] == list(methods())
    code = (
        "import sys; sys.argv = ['gradscope', 'methods']\n"
        "from gradscope.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'numba', 'PIL'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_an_image_is_synthesised_with_its_trajectory(folder: Path) -> None:
    arguments = ("visualize", "model.pt", "--target", "cat", "--steps", "20", "-o", "seen",
                 "-f", "json", *PREPROCESS)  # fmt: skip
    first, second = (gradscope(*arguments, cwd=folder) for _ in range(2))

    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    report = json.loads(first.stdout)
    jsonschema.validate(report, report_schema())
    result = report["result"]
    assert len(result["objective"]) == 21
    assert result["objective"][-1] > result["objective"][0]
    with Image.open(folder / result["image"]) as image:
        assert image.size == (16, 16)
    lines = (folder / "seen" / "class-2.csv").read_text().splitlines()
    assert (lines[0], len(lines)) == ("step,objective", 22)
    channel = gradscope("visualize", "model.pt", "--layer", "2", "--channel", "5", "--steps", "5",
                        "-o", "seen", *PREPROCESS, cwd=folder)  # fmt: skip
    assert channel.returncode == 0
    assert (folder / "seen" / "2-5.png").is_file()
    wrong = gradscope("visualize", "model.pt", "--layer", "2", *PREPROCESS, cwd=folder)
    assert wrong.returncode == 2
    assert "either a target class, or a layer" in wrong.stderr


def test_a_model_that_prints_does_not_spoil_the_report(folder: Path) -> None:
    (folder / "loud.py").write_text(LOUD)
    arguments = ("state.pt", "--arch", "loud:net", *PREPROCESS, "-f", "json")

    done = gradscope("explain", arguments[0], "photo.png", *arguments[1:], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"] == "explain"
    assert "imported" in done.stderr
    assert json.loads(gradscope("layers", *arguments, cwd=folder).stdout)["auto"] == "3"


@pytest.mark.parametrize("format_", ["csv", "jsonl", "table"])
def test_every_format_carries_the_report(folder: Path, format_: str) -> None:
    done = gradscope("explain", "model.pt", "photo.png", "-f", format_, "--target", "1",
                     *PREPROCESS, cwd=folder)  # fmt: skip

    assert done.returncode == 0
    if format_ == "csv":
        header, row = done.stdout.splitlines()
        assert "target.label" in header
        assert "bee" in row


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["model.pt", "a" * 300 + ".png", *PREPROCESS], 3),
        (["model.pt", "photo.png", "-m", "integrated-gradients", "--reference", "a" * 300], 2),
        (["state.pt", "photo.png", "--arch", "a" * 300 + ".py:f"], 2),
        (["model.pt", "photo.png", "--labels", "a" * 300, *PREPROCESS], 3),
    ],
)
def test_a_name_that_no_file_system_takes_is_not_a_bug(
    folder: Path, arguments: list[str], code: int
) -> None:
    assert gradscope("explain", *arguments, cwd=folder).returncode == code
