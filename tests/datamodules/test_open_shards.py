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
    for path, message in (("nowhere", "does not exist"), ("empty", "holds no images, it is empty")):
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


def braces(root: Path, samples: int = 12) -> str:
    """Three shards of four samples with classes; their pattern."""
    with ShardWriter(root, samples_per_shard=4, classes=["cat", "dog"]) as writer:
        for i in range(samples):
            writer.write(f"{i}", {"jpg": picture(i), "cls": b"1"})
    return f"{root}/shard-{{000000..000002}}.tar"


def test_tars_in_braces(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "set"
    folder = open_shards(braces(root))
    manifest = load_manifest(folder)
    assert manifest.hash == load_manifest(root).hash and manifest.classes == ("cat", "dog")
    assert folder.parent == cache / "named"
    assert load_manifest(open_shards(f"{root}/shard-{{000002,000000}}.tar")).num_samples == 8
    assert {path.name for path in root.iterdir()} == {
        "manifest.json", *(f"shard-00000{i}.tar{suffix}" for i in range(3) for suffix in ("", ".idx"))
    }  # fmt: skip


def test_tars_of_one_name_in_several_folders(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "x.tar", [(f"{name}{i}.jpg", picture(i)) for i in range(3)])
    manifest = load_manifest(open_shards(f"{tmp_path}/{{a,b}}/x.tar"))
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [("a__x.tar", 3), ("b__x.tar", 3)]


def test_a_tar_in_braces_that_is_replaced(tmp_path: Path) -> None:
    pattern = braces(tmp_path / "set")
    assert load_manifest(open_shards(pattern)).num_samples == 12
    write_tar(tmp_path / "set" / "shard-000001.tar", [("new.jpg", picture(50))])
    assert load_manifest(open_shards(pattern)).num_samples == 9


def test_bad_braces(tmp_path: Path) -> None:
    braces(tmp_path / "set")
    for pattern, message in (
        ("shard-{000000..000004}.tar", r"shard-000003.tar does not exist: 2 of the 5 tars"),
        ("shard-{000000..00.tar", "a brace is not closed"),
        ("shard-{0..3}", "is no .tar"),
    ):
        with pytest.raises(DataError, match=message):
            open_shards(tmp_path / "set" / pattern)


def test_a_folder_with_braces_in_its_name_is_a_folder(tmp_path: Path) -> None:
    image_folders(tmp_path / "{a,b}")
    assert load_manifest(open_shards(tmp_path / "{a,b}")).num_samples == 15
