"""What is found in folders and tars, and what their folders mean."""

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from datamodules.errors import DataError
from datamodules.sources import SourceReader, is_image, list_source
from tests.datamodules.tar_builders import image_folders, picture, write_tar


def tar_of(folder: Path, path: Path, arcname: str = "") -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname or folder.name)
    return path


def test_class_folders_and_their_tar_are_the_same(tmp_path: Path) -> None:
    folder = image_folders(tmp_path / "photos")
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "cat" / ".hidden.jpg").write_bytes(picture())
    for source in (list_source(folder), list_source(tar_of(folder, tmp_path / "a.tar", "some/where/photos"))):
        assert source.classes == ("cat", "dog", "owl")
        assert [source.inner_name(image) for image in source.images[:2]] == ["cat/cat_0.JPEG", "cat/cat_1.JPEG"]
        assert source.labels() == [0] * 5 + [1] * 5 + [2] * 5
        assert dict(source.ignored) == {".txt": 1, ".jpg": 1} or dict(source.ignored) == {".txt": 1}
        reader = SourceReader(source.path)
        assert [reader.read(image) for image in source.images] == [
            (folder / source.inner_name(image)).read_bytes() for image in source.images
        ]
        reader.close()


def test_deep_folders_take_their_class_from_the_top(tmp_path: Path) -> None:
    for name in ("a/train/n1/images", "a/train/n2/images"):
        image_folders(tmp_path / name, ["x"], 1)
    source = list_source(tmp_path / "a")
    assert (source.prefix, source.classes) == ("train/", ("n1", "n2"))


def test_flat_single_and_mixed_folders_have_no_labels(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(3):
        (flat / f"{i}.png").write_bytes(picture(i, kind="PNG"))
    assert (list_source(flat).classes, list_source(flat).labels()) == ((), [-1] * 3)
    only = list_source(image_folders(tmp_path / "one", ["cat"]))
    assert (only.classes, only.prefix) == ((), "cat/")
    mixed = list_source(image_folders(flat, ["cat", "dog"]))
    assert (mixed.classes, len(mixed.images)) == ((), 13)
    assert "3 images lie beside the folders" in mixed.notes[0]


def test_links_in_folders_are_followed_once(tmp_path: Path) -> None:
    folder = image_folders(tmp_path / "real", ["cat", "dog"], 2)
    (folder / "cat" / "loop").symlink_to(folder)
    (folder / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "cat").symlink_to(folder / "cat")
    (linked / "one.jpg").symlink_to(folder / "dog" / "dog_0.JPEG")
    source = list_source(folder)
    assert len(source.images) == 4
    assert source.skipped == (("dog/gone.jpg", "the link leads nowhere"),) and not source.notes
    assert sum(image.name.startswith("cat/") for image in list_source(linked).images) >= 2


def test_what_is_no_file_is_named_and_never_opened(tmp_path: Path) -> None:
    folder = image_folders(tmp_path / "real", ["cat"], 2)
    os.mkfifo(folder / "cat" / "fifo.jpg")
    os.mkfifo(folder / "cat" / "fifo.txt")
    (folder / "cat" / ".hidden").mkdir()
    (folder / "cat" / "zero.png").symlink_to("/dev/zero")
    source = list_source(folder)
    assert len(source.images) == 2
    assert source.skipped == (("cat/fifo.jpg", "a FIFO, not a file"), ("cat/zero.png", "a device, not a file"))
    for path in (folder / "cat").glob("*.JPEG"):
        path.unlink()
    with pytest.raises(DataError, match=r"holds no images that can be read \(first: cat/fifo\.jpg: a FIFO, not a file"):
        list_source(folder)
    for name in ("t.csv", "t.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=rf"{name} is a FIFO, not a file"):
            list_source(tmp_path / name)


def test_links_in_tars_are_never_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="holds no images, it is empty"):
        list_source(tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", [("../../x.jpg", b"1"), ("/etc/y.jpg", b"2")])
    assert len(list_source(tmp_path / "b.tar").images) == 2


def test_damage_of_a_tar_is_noted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes(600)) for i in range(9)])
    os.truncate(path, 5200)
    source = list_source(path)
    assert len(source.images) == 3
    assert source.notes[0].startswith("a.tar: 1 x truncated, first: 3.jpg")
    write_tar(path, [("0.jpg", b"1"), ("0.jpg", b"22")])
    assert [image.size for image in list_source(path).images] == [2]
    assert "1 files have the name of another" in list_source(path).notes[0]


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    first = list_source(image_folders(tmp_path / "a")).digest()
    assert first == list_source(image_folders(tmp_path / "b")).digest()
    (tmp_path / "b" / "cat" / "new.jpg").write_bytes(b"1")
    assert first != list_source(tmp_path / "b").digest()


@pytest.mark.parametrize("name", ["a.jpg", "a/b.JPEG", "x.y.Png", "a.webp", "a.tiff"])
def test_images_by_suffix(name: str) -> None:
    assert is_image(name)


@pytest.mark.parametrize("name", ["jpg", "a.txt", "._a.jpg", "b/.a.jpg", "a.jpg/b", "a.jpg.gz", ""])
def test_no_images_by_suffix(name: str) -> None:
    assert not is_image(name)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        list_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no images, it is empty; names of images end in"):
        list_source(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"holds no images, only other files \(1 \.txt\)"):
        list_source(tmp_path)
    with pytest.raises(DataError, match=r"neither a folder nor a \.tar"):
        list_source(tmp_path / "a.txt")
    with pytest.raises(DataError, match="does not exist"):
        list_source(tmp_path / "a.txt" / "b")
    for split in ("train", "val"):
        image_folders(tmp_path / "both" / split)
    with pytest.raises(DataError, match="holds the splits train and val: pack each"):
        list_source(tmp_path / "both")


@pytest.fixture
def powerless() -> Iterator[Path]:
    """A folder that an ordinary user owns, and to be that user for a while: root may read everything."""
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    if root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)


def test_without_permission(powerless: Path) -> None:
    folder = image_folders(powerless / "a")
    (folder / "dog").chmod(0)
    with pytest.raises(DataError, match="dog may not be read: ask its owner"):
        list_source(folder)
    (folder / "dog").chmod(0o700)
    path = write_tar(powerless / "a.tar", [("a.jpg", b"1")])
    path.chmod(0)
    with pytest.raises(DataError, match=r"a\.tar may not be read"):
        list_source(path)
