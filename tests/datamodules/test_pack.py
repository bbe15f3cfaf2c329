"""Packing: every image once, the same bytes, shuffled, continued after an interruption, refused where it must be."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datamodules.pack as pack_module
from datamodules.errors import DataError
from datamodules.manifest import MANIFEST, load_manifest
from datamodules.native_pixels import native_pixels
from datamodules.pack import SKIPPED, pack
from datamodules.pack_shard import pack_shard
from datamodules.shard_writer import ShardFile
from tests.datamodules.deep_images import npy, png, tiff, values
from tests.datamodules.set_files import files, read
from tests.datamodules.tar_builders import image_folders, picture, write_tar


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return image_folders(tmp_path / "photos", ["cat", "dog", "owl"], 20)


@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_labels_and_classes(folders: Path, tmp_path: Path, workers: int) -> None:
    manifest = pack(folders, tmp_path / "set", samples_per_shard=16, workers=workers)
    assert manifest == load_manifest(tmp_path / "set")
    assert manifest.classes == ("cat", "dog", "owl")
    assert manifest.counts.tolist() == [16, 16, 16, 12]
    assert manifest.members == {"cls": 60, "jpeg": 60}
    expected = {
        f"{name}/{name}_{i}": {"jpeg": (folders / name / f"{name}_{i}.JPEG").read_bytes(), "cls": b"%d" % label}
        for label, name in enumerate(manifest.classes)
        for i in range(20)
    }
    assert read(tmp_path / "set") == expected


def test_shuffled_the_same_way_by_everyone(folders: Path, tmp_path: Path) -> None:
    pack(folders, tmp_path / "a", samples_per_shard=16, workers=1)
    pack(folders, tmp_path / "b", samples_per_shard=16, workers=3)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    keys = list(read(tmp_path / "a"))
    assert keys[:3] == ["dog/dog_17", "cat/cat_13", "dog/dog_18"]  # this order is for ever
    assert len({key.split("/")[0] for key in keys[:16]}) == 3


def test_a_tar_gives_the_same_shards_as_its_folder(folders: Path, tmp_path: Path) -> None:
    members = [(f"some/top/{path.relative_to(folders)}", path.read_bytes()) for path in sorted(folders.rglob("*.JPEG"))]
    (tmp_path / "tar").mkdir()
    source = write_tar(tmp_path / "tar" / "photos.tar", members)
    assert pack(folders, tmp_path / "a", workers=1).shards == pack(source, tmp_path / "b", workers=1).shards


def test_flat_folder_and_formats(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, kind in enumerate(["png", "webp", "jpg", "bmp", "gif", "tiff"]):
        (flat / f"{i}.{kind}").write_bytes(picture(i, kind={"jpg": "JPEG"}.get(kind, kind.upper())))
    manifest = pack(flat, tmp_path / "set", workers=1)
    assert (manifest.classes, "cls" in manifest.members) == ((), False)
    assert read(tmp_path / "set") == {path.stem: {path.suffix[1:]: path.read_bytes()} for path in flat.iterdir()}


def test_odd_names_become_safe_and_stay_unique(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    names = ["a b.jpg", "a_b.jpg", "a.b.jpg", "a.jpg", "a.png", "größe.jpg", "__meta__.jpg", "x" * 200 + ".jpg",
             "x" * 201 + ".jpg", "図" * 50 + ".jpg", "new\nline.jpg", "..jpg"]  # fmt: skip
    for i, name in enumerate(names):
        (flat / name).write_bytes(picture(i, kind="PNG" if name.endswith("png") else "JPEG"))
    manifest = pack(flat, tmp_path / "set", workers=1)
    packed = read(tmp_path / "set")
    assert len(packed) == manifest.num_samples == len(names) - 1  # "..jpg" is a hidden file
    assert {"a_b", "a_b-2", "a_b-3", "a", "a-2", "größe", "_meta__", "new_line"} <= set(packed)
    assert all(len(key.encode()) <= 84 for key in packed)
    assert {data for members in packed.values() for data in members.values()} == {
        (flat / name).read_bytes() for name in names[:-1]
    }


def test_names_that_are_not_utf8(folders: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(b"gr\xfc\xdfe.jpg"))
    (folders / "cat" / odd).write_bytes(picture(1))
    (folders / "cat" / Path(os.fsdecode(b"\xff" * 100 + b".jpg"))).write_bytes(picture(2))
    (folders / "dog" / odd).write_bytes(b"no")
    pack(folders, tmp_path / "set", workers=2)
    assert pack(folders, tmp_path / "set", extend=True, workers=1).num_samples == 62
    assert read(tmp_path / "set")["cat/gr__e"]["jpg"] == picture(1)
    assert (tmp_path / "set" / SKIPPED).read_text().startswith("dog/gr e.jpg\t")


def test_resize_shrinks_only_what_is_larger(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "wide.png").write_bytes(picture(0, (100, 50), "PNG"))
    (flat / "tall.jpg").write_bytes(picture(1, (41, 80)))
    (flat / "small.jpg").write_bytes(picture(2, (90, 40)))
    turned = Image.open(io.BytesIO(picture(3, (120, 60))))
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to look at it
    turned.save(flat / "turned.jpg", exif=exif)
    pack(flat, tmp_path / "set", resize=40, quality=95, workers=1)
    packed = read(tmp_path / "set")
    assert packed["small"]["jpg"] == (flat / "small.jpg").read_bytes()
    sizes = {key: Image.open(io.BytesIO(members["jpg"])).size for key, members in packed.items()}
    assert sizes == {"wide": (80, 40), "tall": (40, 78), "small": (90, 40), "turned": (40, 80)}
    pack(flat, tmp_path / "low", resize=40, quality=10, workers=1)
    assert len(read(tmp_path / "low")["wide"]["jpg"]) < len(packed["wide"]["jpg"])


def test_captions(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["file,caption", "cat/cat_0.JPEG,a cat", "dog_1.JPEG,ein Hündchen", "cat_0,no", "dog_1.JPEG,two", ""]
    (tmp_path / "c.csv").write_text("\n".join(rows))
    pack(folders, tmp_path / "set", captions=tmp_path / "c.csv", workers=1)
    packed = read(tmp_path / "set")
    assert packed["cat/cat_0"]["txt"] == b"a cat"
    assert packed["dog/dog_1"]["txt"].decode() == "ein Hündchen"
    assert packed["dog/dog_1"]["json"].decode() == '{"captions": ["ein Hündchen", "two"]}'
    assert sum("txt" in members for members in packed.values()) == 2
    assert "2 of 60 images have a caption" in capsys.readouterr().err


def test_unreadable_images_are_left_out_and_named(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (folders / "cat" / "cat_0.JPEG").read_bytes()
    (folders / "cat" / "cat_0.JPEG").write_bytes(whole[: len(whole) // 2])
    (folders / "cat" / "cat_1.JPEG").write_bytes(b"")
    (folders / "dog" / "text.jpg").write_text("this is text")
    (folders / "dog" / "readme.md").write_text("no image at all")
    manifest = pack(folders, tmp_path / "set", workers=1)
    assert manifest.num_samples == 58
    rows = [line.split("\t") for line in (tmp_path / "set" / SKIPPED).read_text().splitlines()]
    assert sorted(name for name, _ in rows) == ["cat/cat_0.JPEG", "cat/cat_1.JPEG", "dog/text.jpg"]
    said = capsys.readouterr().err
    assert "left out 3 images that cannot be read" in said
    assert "dog/text.jpg" in said
    assert "passed over 1 files that are no images (1 .md)" in said


def test_a_shard_without_readable_images(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(6):
        (flat / f"{i}.jpg").write_bytes(picture(i) if i % 2 else b"no")
    manifest = pack(flat, tmp_path / "set", samples_per_shard=1, workers=2)
    assert manifest.counts.tolist() == [1, 1, 1]
    assert load_manifest(tmp_path / "set") == manifest
    for path in flat.iterdir():
        path.write_bytes(b"no")
    with pytest.raises(DataError, match=r"none of the 6 images in .*flat can be read \(first: .\.jpg: "):
        pack(flat, tmp_path / "none", workers=1)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, shards: int, error: BaseException) -> None:
    count = [0]

    def counting(job: object, tick: object) -> object:
        count[0] += 1
        if count[0] > shards:
            raise error
        return pack_shard(job, tick)  # type: ignore[arg-type]

    monkeypatch.setattr(pack_module, "pack_shard", counting)


def test_interrupted_and_continued(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folders / "dog" / "dog_3.JPEG").write_bytes(b"bad")
    pack(folders, tmp_path / "whole", samples_per_shard=8, workers=1)
    interrupt_after(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match="set is unfinished; the same command goes on from here"):
        pack(folders, tmp_path / "set", samples_per_shard=8, workers=1)
    with pytest.raises(DataError, match="unfinished"):
        load_manifest(tmp_path / "set")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.tar")}
    assert len(done) == 3
    with (tmp_path / "set" / "unfinished.jsonl").open("a") as journal:
        journal.write('{"number": 5, "pac')  # killed while writing
    (tmp_path / "set" / ".shard-000004.tar.99.partial").write_bytes(b"half")
    os.truncate(min(done), 5000)
    interrupt_after(monkeypatch, 6, AssertionError("too many shards are done again"))
    pack(folders, tmp_path / "set", samples_per_shard=8, workers=1)
    assert files(tmp_path / "set") == files(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in sorted(done.items())[1:])


def test_other_settings_do_not_continue(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(folders, tmp_path / "set", samples_per_shard=8, workers=1)
    for change in ({"samples_per_shard": 9}, {"samples_per_shard": 8, "resize": 10}):
        with pytest.raises(DataError, match="begun by another command or from other files"):
            pack(folders, tmp_path / "set", workers=1, **change)  # type: ignore[arg-type]
    (folders / "cat" / "new.jpg").write_bytes(picture(77))
    with pytest.raises(DataError, match="begun by another command or from other files"):
        pack(folders, tmp_path / "set", samples_per_shard=8, workers=1)


def test_sets_are_not_mixed(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = pack(folders, tmp_path / "set", workers=1)
    before = files(tmp_path / "set")
    with pytest.raises(DataError, match="already holds shards"):
        pack(folders, tmp_path / "set", workers=1, resize=10)
    assert pack(folders, tmp_path / "set", workers=1) == first
    assert files(tmp_path / "set") == before
    assert "holds these 60 samples already, nothing to do" in capsys.readouterr().err
    os.truncate(tmp_path / "set" / first.shards[0].name, 3000)
    with pytest.raises(DataError, match="already holds shards"):
        pack(folders, tmp_path / "set", workers=1)


def test_bad_values_and_places(folders: Path, tmp_path: Path) -> None:
    for bad, message in (
        ({"resize": 0}, "--resize must be at least 1"),
        ({"samples_per_shard": -1}, "--samples-per-shard must be at least 1"),
        ({"quality": 101}, "--quality goes from 1 to 100"),
    ):
        with pytest.raises(DataError, match=message):
            pack(folders, tmp_path / "set", **bad)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="lies inside of"):
        pack(folders, folders / "set")
    with pytest.raises(DataError, match="is a file"):
        pack(folders, write_tar(tmp_path / "a.tar", []))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "photos"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_can_be_continued(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    write = ShardFile.write

    def full(self: ShardFile, key: str, members: dict[str, bytes]) -> None:
        if self.path.name == "shard-000002.tar" and self.samples == 3:
            raise OSError(28, "No space left on device")
        write(self, key, members)

    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "write", full)
        with pytest.raises(DataError, match=r"the disk of .*set is full: free some space and run the same") as raised:
            pack(folders, tmp_path / "set", samples_per_shard=8, workers=workers)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "set" / MANIFEST).exists()
    assert not (tmp_path / "set" / "shard-000002.tar").exists()
    assert pack(folders, tmp_path / "set", samples_per_shard=8, workers=1).num_samples == 60


def start(folders: Path, dst: Path) -> "subprocess.Popen[str]":
    code = (
        "import sys, time\nimport datamodules.pack_shard as p\nread = p.SourceReader.read\n"
        "def slow(self, image):\n    time.sleep(0.02)\n    return read(self, image)\n"
        "p.SourceReader.read = slow\nfrom datamodules.pack import pack\n"
        f"pack({str(folders)!r}, {str(dst)!r}, samples_per_shard=5, workers=2)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_pack_is_continued(folders: Path, tmp_path: Path, how: signal.Signals) -> None:
    whole = pack(folders, tmp_path / "whole", samples_per_shard=5, workers=1)
    dst = tmp_path / "set"
    with start(folders, dst) as process:
        while len(list(dst.glob("*.tar"))) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.kill()
        errors = process.communicate()[1]
    if how == signal.SIGINT:
        assert "the same command goes on from here" in errors
    done = {path: path.stat().st_mtime_ns for path in sorted(dst.glob("*.tar"))[:2]}
    assert 3 <= len(list(dst.glob("*.tar"))) < 12
    assert not (dst / MANIFEST).exists()
    assert pack(folders, dst, samples_per_shard=5, workers=2).hash == whole.hash
    assert files(dst) == files(tmp_path / "whole")
    if how == signal.SIGINT:
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())


@pytest.mark.parametrize(
    ("c", "bits", "kind"), [(1, 16, "png"), (3, 16, "png"), (5, 8, "tif"), (4, 16, "tif"), (2, 16, "npy")]
)
def test_deep_images_are_packed_as_they_are_and_resized_without_loss(
    tmp_path: Path, c: int, bits: int, kind: str
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    pixels = values(c, bits, (40, 60))
    (flat / f"a.{kind}").write_bytes({"png": png, "tif": tiff, "npy": npy}[kind](pixels))
    pack(flat, tmp_path / "set", workers=1)
    assert read(tmp_path / "set") == {"a": {kind: (flat / f"a.{kind}").read_bytes()}}
    pack(flat, tmp_path / "small", resize=20, workers=1)
    (members,) = read(tmp_path / "small").values()
    small = native_pixels(members["npy"], "npy").values
    assert small.shape == (20, 30, c) and small.dtype == pixels.dtype
    halves = pixels.reshape(20, 2, 30, 2, c).mean(axis=(1, 3))
    assert np.abs(small - halves).mean() < 0.02 * np.iinfo(pixels.dtype).max
    if bits == 16:
        assert (small % 257).any(), "not 8 bits in disguise"


def test_arrays_beside_pictures_are_embeddings(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(picture())
    (tmp_path / "flat" / "a.npy").write_bytes(npy(values(1)))
    assert pack(tmp_path / "flat", tmp_path / "set", workers=1).members == {"jpg": 1}


def test_transparency_is_dropped_on_resizing(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for mode in ("RGBA", "LA", "L", "P"):
        Image.open(io.BytesIO(picture(1, (60, 40)))).convert(mode).save(tmp_path / "flat" / f"{mode}.png")
    pack(tmp_path / "flat", tmp_path / "set", resize=20, workers=1)
    modes = {key: Image.open(io.BytesIO(members["jpg"])).mode for key, members in read(tmp_path / "set").items()}
    assert modes == {"RGBA": "RGB", "LA": "L", "L": "L", "P": "RGB"}
