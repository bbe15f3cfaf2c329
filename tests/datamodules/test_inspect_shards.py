"""What a look at a set says and draws."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.contact_sheet import displayable
from datamodules.errors import DataError
from datamodules.inspect_shards import inspect_command
from datamodules.manifest import load_manifest
from datamodules.shard_writer import ShardWriter
from datamodules.verify import verify_command
from tests.datamodules.deep_images import write_deep
from tests.datamodules.tar_builders import picture, write_tar


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "set", samples_per_shard=8, classes=["ant", "bee"], made_by="a test") as writer:
        for i in range(20):
            members = {"jpg": picture(i, (30, 20)), "cls": b"1" if i % 4 else b"0"}
            writer.write(f"k{i:02d}", members | ({"txt": f"number\n{i}".encode()} if i % 2 else {}))
    return tmp_path / "set"


def test_the_numbers(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_command(root) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert "20 samples in 3 shards" in out
    assert "samples per shard: 4 to 8; hash " + load_manifest(root).hash + "; made by: a test" in out
    assert "keys: k00, k01, k02, ..., k19" in out
    assert [".txt", "10", "50.0%", "8", "0.0"] in lines
    assert ["ant", "5", "#" * 10] in lines
    assert ["bee", "15", "#" * 30] in lines
    assert "2 classes" in out
    assert "  number 1\n" in out
    assert "20 images looked at: 30 x 20 pixels (median), shorter side 20 to 20" in out


def test_the_contact_sheet(root: Path, tmp_path: Path) -> None:
    inspect_command(root)
    sheet = Image.open(root / "contact_sheet.png")
    assert sheet.size == (8 * 134 + 6, 3 * 150 + 6)
    inspect_command(root, sheet=tmp_path / "elsewhere.png")
    again = Image.open(tmp_path / "elsewhere.png")
    assert np.array_equal(np.asarray(sheet), np.asarray(again))
    first = np.asarray(sheet)[6:134, 6:134].std()
    last = np.asarray(sheet)[-140:-20, -140:-10].std()  # 20 images leave the last places empty
    assert first > 10 > 1 > last


def test_damage_does_not_stop_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_manifest(root)
    os.truncate(root / "shard-000001.tar", 3000)
    (root / "shard-000002.tar").unlink()
    assert inspect_command(root) == 0
    assert "shard-000002.tar does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.tar", "shard-000000-more.tar", "z.tar"])
def test_a_tar_without_samples(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / name).touch()
    assert inspect_command(root) == 0
    out = capsys.readouterr().out
    assert "20 samples in 4 shards" in out and "samples per shard: 0 to 8" in out
    assert "keys: k00, k01, k02, ..., k19" in out


def test_many_unnamed_classes_and_hostile_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [(f"{i}.cls", b"%d" % (i // 2)) for i in range(300)]
    write_tar(tmp_path / "a.tar", [*members, ("z\x1b[2J.jpg", picture()), ("z\x1b[2J.txt", b"\x1b[31m")])
    assert inspect_command(tmp_path) == 0
    out = capsys.readouterr().out
    assert "150 classes" in out
    assert "median of 150" in out
    assert "\x1b" not in out


def test_a_sheet_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--sheet FILE puts the contact sheet elsewhere"):
        inspect_command(root, sheet=tmp_path / "nowhere" / "sheet.png")
    with pytest.raises(DataError, match="does not exist"):
        inspect_command(tmp_path / "nowhere")


@pytest.mark.parametrize(("c", "bits", "kind"), [(1, 8, "npy"), (2, 8, "tif"), (4, 16, "tif"), (3, 16, "png")])
def test_deep_images_are_shown(
    c: int, bits: int, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_deep(tmp_path / "set", c, bits, samples=9, kind=kind)
    assert inspect_command(tmp_path / "set") == 0
    assert f"; {c} channel{'s' if c > 1 else ''} of {bits} bits" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "set" / "contact_sheet.png"))
    assert sheet[30:110, 20:120].std() > 20 and verify_command(tmp_path / "set") == 0


def test_a_dark_deep_image_is_stretched() -> None:
    dark = torch.linspace(1, 3, 64).reshape(1, 1, 8, 8)
    shown = displayable(dark)
    assert shown.dtype == torch.uint8 and (int(shown.min()), int(shown.max())) == (0, 255)
    assert displayable(dark.repeat(1, 5, 1, 1)).shape == (1, 3, 8, 8)
    assert int(displayable(torch.full((1, 1, 2, 2), 7.0)).max()) == 0
    assert torch.equal(displayable(dark * 300, like=dark.byte()), (dark * 300).round().clamp(0, 255).byte())
