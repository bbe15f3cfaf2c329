"""Whatever the user has becomes a folder of shards, once."""

import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.errors import DataError
from datamodules.manifest import load_manifest
from datamodules.open_shards import open_shards
from datamodules.shard_writer import ShardWriter
from tests.datamodules.tar_builders import image_folders, picture, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_of_tars_is_taken_as_it_is(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "a.tar", [("a.jpg", picture())])
    assert open_shards(str(tmp_path / "set")) == tmp_path / "set"
    assert not cache.exists()


def test_a_plain_folder_is_packed_once(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folders(tmp_path / "my photos")
    packed = open_shards(folder)
    assert packed.parent == cache / "packed"
    assert packed.name.startswith("my_photos-")
    assert load_manifest(packed).classes == ("cat", "dog", "owl")
    assert f"packing 15 images, once, into {packed}" in capsys.readouterr().err
    stamps = {path: path.stat().st_mtime_ns for path in packed.iterdir()}
    assert open_shards(folder) == packed
    assert {path: path.stat().st_mtime_ns for path in packed.iterdir()} == stamps
    assert "packed before" in capsys.readouterr().err
    (folder / "cat" / "new.jpg").write_bytes(picture(9))
    assert open_shards(folder) != packed
    assert load_manifest(open_shards(folder)).num_samples == 16


def test_folders_of_one_name_do_not_collide(tmp_path: Path) -> None:
    one, two = image_folders(tmp_path / "a" / "x"), image_folders(tmp_path / "b" / "x")
    assert open_shards(one) != open_shards(two)


def test_a_tar_of_images(tmp_path: Path, cache: Path) -> None:
    path = write_tar(tmp_path / "val.tar", [(f"{c}/{i}.jpg", picture(i + 9 * ord(c))) for c in "ab" for i in range(3)])
    packed = open_shards(path)
    assert packed.name.startswith("val-")
    assert load_manifest(packed).classes == ("a", "b")


def test_a_single_shard_is_not_a_tar_of_images(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set") as writer:
        for i in range(4):
            writer.write(f"{i}", {"jpg": picture(i), "cls": b"0"})
    with pytest.raises(DataError, match="is a shard already: give the folder that it is in"):
        open_shards(tmp_path / "set" / "shard-000000.tar")


def test_bad_paths(tmp_path: Path, cache: Path) -> None:
    for path, message in (("nowhere", "does not exist"), ("empty", "holds no images, nothing")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=message):
            open_shards(tmp_path / path)
    cache.touch()
    with pytest.raises(DataError, match="cannot write"):
        open_shards(image_folders(tmp_path / "a"))


def test_an_unfinished_set_is_left_to_the_manifest(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "set"):
        raise KeyboardInterrupt
    with pytest.raises(DataError, match="unfinished"):
        load_manifest(open_shards(tmp_path / "set"))


@pytest.mark.slow
def test_several_processes_pack_it_once(tmp_path: Path) -> None:
    folder = image_folders(tmp_path / "photos", per_class=40)
    code = f"from datamodules.open_shards import open_shards\nprint(open_shards({str(folder)!r}))\n"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert sorted("packed before" in err for _, err in outputs) == [False, True, True]
    assert load_manifest(outputs[0][0].strip()).num_samples == 120
