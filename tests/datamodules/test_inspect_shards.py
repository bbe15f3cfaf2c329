"""What a look at a set says and draws."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import DataError
from datamodules.inspect_shards import inspect_command
from datamodules.manifest import load_manifest
from datamodules.shard_writer import ShardWriter
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
