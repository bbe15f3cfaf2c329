"""The manifest: what it says, when it is made anew, what damage does to it."""

import json
import logging
import os
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import manifest
from datamodules.errors import DataError
from datamodules.manifest import MANIFEST, Manifest, load_manifest
from datamodules.shard_reader import BadSampleError, ShardReader
from datamodules.shard_writer import ShardWriter
from datamodules.tar_index import read_index
from datamodules.verify import verify
from tests.datamodules.tar_builders import write_tar


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Three tars of another writer."""
    for shard in range(3):
        members = [(f"s{shard}k{i:02d}.{ext}", b"%d" % i) for i in range(10 + shard) for ext in ("jpg", "cls")]
        write_tar(tmp_path / f"part-{shard}.tar", members)
    return tmp_path


def test_counts_members_and_copies(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    manifest = load_manifest(foreign)
    assert [shard.name for shard in manifest.shards] == ["part-0.tar", "part-1.tar", "part-2.tar"]
    assert np.array_equal(manifest.counts, [10, 11, 12])
    assert (manifest.num_samples, manifest.members, manifest.classes) == (33, {"jpg": 33, "cls": 33}, ())
    assert manifest.path(1) == foreign / "part-1.tar"
    other = tmp_path_factory.mktemp("copy")
    for path in foreign.glob("*.tar"):
        (other / path.name).write_bytes(path.read_bytes())
    (other / "classes.txt").write_text("a\nb b\n")
    copy = load_manifest(other)
    assert copy.shards == manifest.shards
    assert copy.classes == ("a", "b b")
    assert copy.hash != manifest.hash
    assert Manifest(other, copy.shards).hash == manifest.hash


def test_many_shards_are_indexed_by_processes(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_manifest(foreign)
    for path in [*foreign.glob("*.idx"), foreign / MANIFEST]:
        path.unlink()
    monkeypatch.setattr("datamodules.manifest._SHARDS_FOR_PROCESSES", 2)
    assert load_manifest(foreign) == first
    assert len(list(foreign.glob("*.idx"))) == 3


def test_a_second_load_reads_no_tar_and_no_index(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_manifest(foreign)
    for path in foreign.glob("*.idx"):
        path.unlink()
    monkeypatch.setattr("datamodules.manifest.read_index", lambda path: pytest.fail(f"opened {path}"))
    assert load_manifest(foreign) == first


def test_new_and_replaced_shards_make_it_anew(foreign: Path) -> None:
    first = load_manifest(foreign)
    write_tar(foreign / "part-3.tar", [("x.jpg", b"1")])
    second = load_manifest(foreign)
    assert second.num_samples == 34
    write_tar(foreign / "part-3.tar", [(f"y{i}.jpg", bytes(5000)) for i in range(5)])
    third = load_manifest(foreign)
    assert third.num_samples == 38
    assert len({first.hash, second.hash, third.hash}) == 3


def test_names_of_classes_may_come_later(foreign: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = load_manifest(foreign)
    (foreign / "classes.txt").write_text("a\nb\n")
    named = load_manifest(foreign)
    assert (bare.classes, named.classes, named.shards) == ((), ("a", "b"), bare.shards)
    assert load_manifest(foreign) == named and not caplog.text


def test_replaced_by_one_of_the_same_size(foreign: Path, caplog: pytest.LogCaptureFixture) -> None:
    (foreign / "classes.txt").write_text("a\nb\n")
    first = load_manifest(foreign)
    (foreign / "classes.txt").unlink()
    path = foreign / "part-1.tar"
    size = path.stat().st_size
    write_tar(path, [(f"new{i}.jpg", b"12345") for i in range(3)])
    os.truncate(path, size)
    second = load_manifest(foreign)
    assert (second.num_samples, second.classes) == (25, first.classes)
    assert second.hash != first.hash
    assert "the tars have changed: 25 samples, before 33" in caplog.text
    assert read_index(path).key(2) == "new2"


def test_touched_tars_are_looked_at_once(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_manifest(foreign)
    for sidecar in (*foreign.glob("*.idx"), foreign / "manifest.json"):
        os.utime(sidecar, (0, 0))  # a touched tar may get the very time of a sidecar: file systems count in ticks
    assert load_manifest(foreign) == first
    monkeypatch.setattr("datamodules.manifest.read_index", lambda path: pytest.fail(f"opened {path}"))
    monkeypatch.setattr("datamodules.tar_index.scan_tar", lambda path: pytest.fail(f"walked {path}"))
    assert load_manifest(foreign) == first
    assert len(read_index(foreign / "part-0.tar")) == 10


def test_touched_tars_of_a_read_only_set_are_looked_at_once(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    first = load_manifest(foreign)
    for sidecar in (*foreign.glob("*.idx"), foreign / "manifest.json"):
        os.utime(sidecar, (0, 0))

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("datamodules.sidecars.os.utime", refuse)
    assert load_manifest(foreign) == first
    monkeypatch.setattr("datamodules.manifest.read_index", lambda path: pytest.fail(f"opened {path}"))
    monkeypatch.setattr("datamodules.tar_index.scan_tar", lambda path: pytest.fail(f"walked {path}"))
    assert load_manifest(foreign) == first
    assert len(read_index(foreign / "part-0.tar")) == 10


def test_a_classes_file_that_is_no_text(foreign: Path) -> None:
    (foreign / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8 text: one class name on each line"):
        load_manifest(foreign)


def test_cut_and_missing_shards_keep_their_place(foreign: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = load_manifest(foreign)
    os.truncate(foreign / "part-1.tar", 3000)
    (foreign / "part-2.tar").unlink()
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        assert load_manifest(foreign) == first
        (message,) = caplog.messages  # said once
        assert "1 of 3 shards are missing (first: part-2.tar)" in message
        assert "1 of 3 shards were cut off (first: part-1.tar)" in message
    assert len(read_index(foreign / "part-1.tar")) == 11


def test_a_missing_shard_has_a_fingerprint_of_its_own(foreign: Path) -> None:
    whole = load_manifest(foreign).fingerprint
    (foreign / "part-2.tar").rename(foreign / "part-2.gone")
    lost = load_manifest(foreign)
    assert lost.fingerprint not in (whole, lost.hash) and load_manifest(foreign).fingerprint == lost.fingerprint
    (foreign / "part-2.gone").rename(foreign / "part-2.tar")
    assert load_manifest(foreign).fingerprint == whole


def destroy_header(path: Path, sample: int, extension: str = "jpg") -> None:
    """One byte in the header of a member is another one, as after a bad copy: the tar keeps its size."""
    offset = read_index(path).members(sample)[extension].offset
    with path.open("r+b") as file:
        file.seek(offset - 500)
        file.write(b"\x99")


def test_damage_to_one_shard_does_not_drop_another(foreign: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, written = load_manifest(foreign), (foreign / MANIFEST).read_bytes()
    destroy_header(foreign / "part-0.tar", 4)
    destroy_header(foreign / "part-0.tar", 4, "cls")  # the whole sample
    (foreign / "part-2.tar").unlink()
    for _ in range(2):
        assert load_manifest(foreign) == first and (foreign / MANIFEST).read_bytes() == written
        assert [finding.kind for finding in verify(foreign, workers=1)].count("missing shard") == 1
    (message,) = caplog.messages
    assert "1 of 3 shards are damaged (first: part-0.tar) and 1 of 3 shards are missing (first: part-2.tar)" in message
    reader = ShardReader(first)
    assert [reader.key(0, i) for i in (3, 5, 9)] == ["s0k03", "s0k05", "s0k09"]
    with pytest.raises(BadSampleError, match="one of its headers is destroyed") as caught:
        reader.key(0, 4)
    assert caught.value.key == "s0k04" and caught.value.passing


@pytest.mark.parametrize("other", ["new", "replaced"])
def test_shards_that_are_lost_keep_their_count_when_others_make_it_anew(
    other: str, foreign: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_manifest(foreign)
    (foreign / "part-1.tar").unlink()
    (foreign / "part-2.tar").write_bytes(b"\x1f\x8b" + bytes(500))  # compressed over night
    name = {"new": "part-3.tar", "replaced": "part-0.tar"}[other]
    write_tar(foreign / name, [(f"y{i}.jpg", b"123") for i in range(5)])
    second = load_manifest(foreign)
    lost = first.shards[1:]
    assert tuple(shard for shard in second.shards if shard.name in ("part-1.tar", "part-2.tar")) == lost
    assert second.num_samples == {"new": 38, "replaced": 28}[other] and second.hash != first.hash
    assert f"{second.num_samples} samples, before 33 (1 {other}, {name})" in caplog.text
    if other == "new":
        assert "missing (first: part-1.tar) and 1 of 3 shards cannot be read (first: part-2.tar)" in caplog.text
    assert load_manifest(foreign) == second
    with pytest.raises(BadSampleError, match="does not exist"):
        ShardReader(second).key(1, 10)


@pytest.mark.parametrize("cut", [False, True])
def test_without_its_index_a_damaged_shard_keeps_its_count_only(cut: bool, foreign: Path) -> None:
    """What a manifest tells of a tar is not which samples were in it: later ones have moved up, hence another hash."""
    first, path = load_manifest(foreign), foreign / "part-1.tar"
    if cut:
        os.truncate(path, read_index(path).members(10)["jpg"].offset - 512)
    else:
        destroy_header(path, 4)
        destroy_header(path, 4, "cls")
    (foreign / "part-1.tar.idx").unlink()
    for _ in range(2):
        second = load_manifest(foreign)
        assert np.array_equal(second.counts, first.counts) and second.hash != first.hash
    assert ShardReader(second).key(1, 9) == ("s1k09" if cut else "s1k10")
    with pytest.raises(BadSampleError, match="the shard has only 10 samples left"):
        ShardReader(second).key(1, 10)


def test_another_set_in_the_same_folder(foreign: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_manifest(foreign)
    for name in ("part-0.tar", "part-2.tar"):
        (foreign / name).unlink()
    write_tar(foreign / "part-1.tar", [(f"y{i}.jpg", bytes(50)) for i in range(5)])
    assert load_manifest(foreign).num_samples == 5
    assert "5 samples, before 33 (1 replaced, part-1.tar, 2 dropped, part-0.tar)" in caplog.text


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"shards": 1}', "edit", "format"])
def test_a_damaged_manifest_is_made_anew(foreign: Path, damage: str) -> None:
    first = load_manifest(foreign)
    path = foreign / MANIFEST
    whole = path.read_text()
    if damage == "edit":
        about = json.loads(whole)
        about["shards"][0]["samples"] = 5
        path.write_text(json.dumps(about))
    elif damage == "format":
        path.write_text(whole.replace('"format": 1', '"format": 2'))
    else:
        path.write_text(damage)
    assert load_manifest(foreign) == first
    assert path.read_text() == whole


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no \.tar files$"):
        load_manifest(tmp_path)
    (tmp_path / "a.tar").touch()
    with pytest.raises(DataError, match="hold no samples"):
        load_manifest(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        load_manifest(tmp_path / "a.tar")
    (tmp_path / "below").mkdir()
    (tmp_path / "a.tar").rename(tmp_path / "below" / "a.tar")
    with pytest.raises(DataError, match=r"did you mean .*below\?"):
        load_manifest(tmp_path)


def test_an_unfinished_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "set", samples_per_shard=1, made_by="a test") as writer:
        writer.write("a", {"jpg": b"1"})
        raise RuntimeError
    with pytest.raises(DataError, match=r"is unfinished: run the command that began it again \(a test\)"):
        load_manifest(tmp_path / "set")


def _load_slowly(root: Path, started: Path, queue: Any) -> None:
    build = manifest.build_manifest

    def counted(*arguments: Any) -> Manifest:
        with started.open("a") as file:
            file.write("x")
        time.sleep(0.5)
        return build(*arguments)

    manifest.build_manifest = counted
    try:
        queue.put(load_manifest(root).hash)
    except DataError as error:
        queue.put(f"{error}")


@pytest.mark.parametrize("fault", [False, True])
def test_of_several_processes_one_makes_it_and_all_hear_of_a_fault(foreign: Path, tmp_path: Path, fault: bool) -> None:
    if fault:
        (foreign / "z.tar").write_bytes(b"\x1f\x8b" + bytes(100))
    context = get_context("fork")
    queue: Any = context.Queue()
    arguments = (foreign, tmp_path / "started", queue)
    ranks = [context.Process(target=_load_slowly, args=arguments) for _ in range(3)]
    for rank in ranks:
        rank.start()
    answers = {queue.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
    assert len(answers) == 1
    if fault:
        assert "z.tar is compressed" in answers.pop()
    else:
        assert answers == {load_manifest(foreign).hash}
        assert (tmp_path / "started").read_text() == "x"
