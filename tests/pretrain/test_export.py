"""`trivit export`: every format of a small MAE, and what it says when it cannot."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from pretrain.cli import main
from tests.tasks.test_encoder_files import SMALL, lightning_file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run of MAE leaves; its encoder pools the class token and the mean, which timm cannot."""
    lightning_file(tmp_path / "run" / "checkpoints" / "last.ckpt")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("format", "name", "more"),
    [("safetensors", "out.safetensors", []), ("safetensors", "whole.safetensors", ["--whole"]), ("timm", "out", []),
     ("safetensors", "new/folder/out.safetensors", []), ("timm", "new/out", [])],
)  # fmt: skip
def test_what_was_exported_was_read_back(
    format: str, name: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lightning_file(tmp_path / "last.ckpt", replace(SMALL, pool="cls"))
    out = tmp_path / name
    assert main(["export", str(tmp_path / "last.ckpt"), str(out), "--format", format, *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(out) and len(lines) == 2
    assert lines[1].startswith("reloaded: largest difference ") and lines[1].endswith(" features on 4 random images")
    assert float(lines[1].split()[3]) < 1e-5
    if format == "timm":
        model = timm.create_model(f"local-dir:{out}", pretrained=True)
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 32)


def test_what_does_not_fit_is_one_line_and_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "noise.ckpt").write_bytes(b"noise")
    for arguments, says in (
        ((run, tmp_path / "out", "--format", "timm"), "timm cannot pool cls+mean"),
        ((run, tmp_path / "out", "--format", "open_clip"), "not with CLIP"),
        ((run, tmp_path / "taken", "--format", "timm"), "give another name"),
        ((run, tmp_path / "out.onnx"), "ends in .safetensors"),
        ((run, tmp_path / "out", "--format", "timm", "--whole"), "--whole is for"),
        ((tmp_path / "gone", tmp_path / "out.safetensors"), "no such checkpoint"),
        ((tmp_path / "noise.ckpt", tmp_path / "out.safetensors", "--whole"), "cannot read"),
    ):
        assert main(["export", *map(str, arguments)]) == 2
        told = capsys.readouterr()
        assert not told.out and len(told.err.splitlines()) == 1 and says in told.err, told.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noise.ckpt", "run", "taken"]
