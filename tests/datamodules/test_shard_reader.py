import errno
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch

from datamodules import shard_reader
from datamodules.decode import decode_image
from datamodules.manifest import load_manifest
from datamodules.shard_reader import BadSampleError, ShardReader
from tests.datamodules.pictures import jpeg


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(shard_reader, "_RETRY_AFTER", (0.0, 0.0))


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def first_image(reader: ShardReader, shard: int) -> tuple[Path, int, int]:
    path = reader.manifest.path(shard)
    member = shard_reader.read_index(path).members(0)["jpg"]
    return path, member.offset, member.size


def test_every_sample_is_read(picture_set):
    reader = ShardReader(load_manifest(picture_set))
    number = 0
    for shard, count in enumerate(reader.manifest.counts):
        for sample in range(count):
            key, image = reader.image(shard, sample)
            assert key == f"{number:05d}"
            assert torch.equal(image, decode_image(jpeg(number), "jpg"))
            assert reader.label(shard, sample) == number % 3
            number += 1
    assert number == 100


def test_few_files_stay_open_and_none_after_it(picture_set):
    before = open_descriptors()
    reader = ShardReader(load_manifest(picture_set), open_shards=2)
    for shard in (0, 1, 2, 0, 3, 0, 6):
        reader.image(shard, 0)
        assert open_descriptors() <= before + 2
    del reader
    assert open_descriptors() == before


def test_never_more_files_than_the_system_allows(picture_set, monkeypatch):
    monkeypatch.setattr(shard_reader.resource, "getrlimit", lambda _: (6, 100))
    assert ShardReader(load_manifest(picture_set), open_shards=1000).open_shards == 3


def test_a_reader_can_be_sent_to_a_worker(picture_set):
    reader = ShardReader(load_manifest(picture_set))
    reader.image(0, 0)
    again = pickle.loads(pickle.dumps(reader))
    assert again.image(0, 1)[0] == "00001"


def test_damaged_image_names_the_checksum(own_pictures):
    reader = ShardReader(load_manifest(own_pictures))
    path, offset, _ = first_image(reader, 1)
    overwrite(path, offset, b"nothing")
    with pytest.raises(BadSampleError) as caught:
        reader.image(1, 0)
    assert (caught.value.shard, caught.value.key) == ("shard-000001.tar", "00010")
    assert "known format" in caught.value.reason and "checksum differs" in caught.value.reason
    assert reader.image(1, 1)[0] == "00011"


def test_missing_shard(own_pictures):
    manifest = load_manifest(own_pictures)
    reader = ShardReader(manifest)
    manifest.path(2).unlink()
    with pytest.raises(BadSampleError, match="does not exist") as caught:
        reader.image(2, 4)
    assert caught.value.key == "#4"
    assert reader.image(1, 0)[0] == "00010"


def test_shard_deleted_while_it_is_open_can_still_be_read(own_pictures):
    reader = ShardReader(load_manifest(own_pictures))
    reader.image(2, 0)
    reader.manifest.path(2).unlink()
    assert reader.image(2, 1)[0] == "00021"


@pytest.mark.parametrize("opened", [False, True])
def test_shard_cut_inside_a_member(own_pictures, opened):
    reader = ShardReader(load_manifest(own_pictures))
    if opened:
        reader.image(1, 0)
    path = reader.manifest.path(1)
    member = shard_reader.read_index(path).members(4)["jpg"]
    os.truncate(path, member.offset + 100)
    assert reader.image(1, 3)[0] == "00013"
    for sample in range(4, 10):
        with pytest.raises(BadSampleError, match=r"cut off|only|left"):
            reader.image(1, sample)


def test_a_hiccup_of_the_file_system_is_retried(own_pictures, monkeypatch):
    reader, calls, real = ShardReader(load_manifest(own_pictures)), [], os.preadv

    def stale(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", stale)
    assert reader.image(0, 0)[0] == "00000"
    assert len(calls) == 2


def test_a_broken_disk_ends_in_a_bad_sample(own_pictures, monkeypatch):
    reader = ShardReader(load_manifest(own_pictures))

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(BadSampleError, match="Input/output error"):
        reader.image(0, 0)


def make_tar(folder: Path, members: dict[str, bytes]) -> ShardReader:
    import io

    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return ShardReader(load_manifest(folder))


def test_caption_without_image_and_code_are_bad_samples(tmp_path):
    members = {"a.txt": b"a dog", "b.jpg": jpeg(0), "c.pickle": b"cos\nsystem\n.", "d.mask.png": b"x"}
    reader = make_tar(tmp_path, members)
    assert reader.image(0, 1)[0] == "b"
    for sample, only in ((0, "txt"), (2, "pickle"), (3, "mask.png")):
        with pytest.raises(BadSampleError, match=f"no image, only {only}"):
            reader.image(0, sample)


def test_upper_case_and_odd_keys(tmp_path):
    names = ["dir.with.dots/a.JPEG", "../../x.jpg", "/etc/x.jpg", "with space.jpg", "größe.jpg"]
    reader = make_tar(tmp_path, {name: jpeg(i) for i, name in enumerate(names)})
    assert [reader.image(0, i)[0] for i in range(5)] == [name.rsplit(".", 1)[0] for name in names]
    assert list(tmp_path.parent.glob("x.jpg")) == []


@pytest.mark.parametrize("text", [b"-1", b"", b"3.5", b"a\nb", b"\xff", b"9" * 30])
def test_labels_that_are_no_index(tmp_path, text):
    reader = make_tar(tmp_path, {"a.jpg": jpeg(0), "a.cls": text})
    if text == b"9" * 30:
        assert reader.label(0, 0) > 0  # no class list to compare with
        return
    with pytest.raises(BadSampleError, match="no index of a class"):
        reader.label(0, 0)


def test_label_outside_of_the_class_list(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    reader = make_tar(tmp_path, {"a.jpg": jpeg(0), "a.cls": b"1\n", "b.jpg": jpeg(1), "b.cls": b"2", "c.jpg": jpeg(2)})
    assert reader.label(0, 0) == 1
    assert reader.label(0, 2) == -1
    with pytest.raises(BadSampleError, match="no index of a class"):
        reader.label(0, 1)


def test_huge_members_are_refused(own_pictures, monkeypatch):
    monkeypatch.setattr(shard_reader, "MAX_BYTES", 10)
    with pytest.raises(BadSampleError, match="refused"):
        ShardReader(load_manifest(own_pictures)).image(0, 0)
