"""Where there is no file, what was meant is said, with the command that gets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradscope.checkpoints import open_checkpoint
from gradscope.containers.absent import absent
from gradscope.errors import InputError
from gradscope.weights.analysis import analyze_weights

HUB = "https://huggingface.co/org/name"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("-", "standard input is not read"),
        (
            "https://example.org/a/model.pt?x=1",
            "curl -L -o model.pt 'https://example.org/a/model.pt",
        ),
        (HUB, "`hf download org/name --local-dir name`, then `gradscope weights name`"),
        (f"{HUB}/tree/main", "`hf download org/name --local-dir name`"),
        (f"{HUB}/resolve/main/a/b.pt?download=true", "`hf download org/name a/b.pt --local-dir"),
        (f"{HUB}/blob/v2/b.pt", "--revision v2"),
        ("hf://org/name@v2", "`hf download org/name --revision v2 --local-dir name`"),
        ("s3://bucket/model", "aws s3 cp --recursive s3://bucket/model model"),
        ("gs://bucket/model/", "gcloud storage cp -r gs://bucket/model/ model"),
        ("hdfs://host/model", "nothing is downloaded"),
        ("none/*.pt", "a pattern that matches no file"),
        ("~/none.pt", "~ was not expanded by the shell"),
        ("none/at/all.pt", "there is no folder 'none/at'"),
        ("none.pt", "file not found"),
    ],
)
def test_a_path_without_a_file_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in absent(path)
    report = analyze_weights(path)
    assert report.gate.exit_code == 3
    assert report.errors[0].kind == "missing"


def test_a_name_that_is_nearly_there_is_offered(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "did you mean 'model.safetensors'?" in absent(str(tmp_path / "model.safetensor"))
    assert "without the space" in absent(str(tmp_path / "model.safetensors "))
    assert "it matches" in absent(str(tmp_path / "*.safetensors"))
    assert absent(str(tmp_path / "zzz")) == "file not found"


def test_a_name_of_tensorflows_is_known(tmp_path: Path) -> None:
    for ending in (".index", ".data-00000-of-00001"):
        (tmp_path / f"model.ckpt-9{ending}").write_bytes(b"")
    assert "TensorFlow" in absent(str(tmp_path / "model.ckpt-9"))


@pytest.mark.parametrize("path", ["org/name-8B", "org/name.v2"])
def test_a_models_name_on_the_hub_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"`hf download {path} --local-dir"):
        open_checkpoint(path)
    (tmp_path / "org").mkdir()
    with pytest.raises(InputError, match="file not found"):
        open_checkpoint(path)
    with pytest.raises(InputError, match="no folder 'runs'"):
        open_checkpoint("runs/model.safetensors")
