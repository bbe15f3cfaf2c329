"""Shards as written: the same bytes every time, readable by webdataset, whole or absent."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import webdataset

from datamodules.errors import DataError
from datamodules.manifest import load_manifest
from datamodules.shard_writer import ShardFile, ShardWriter, check_sample
from datamodules.tar_index import read_index, scan_tar


def write_set(dst: Path, samples: int = 10, **options: object) -> ShardWriter:
    with ShardWriter(dst, samples_per_shard=4, classes=["a", "b"], **options) as writer:  # type: ignore[arg-type]
        for i in range(samples):
            writer.write(
                f"c/k{i:03d}", {"jpg": bytes([i]) * 100 * i, "cls": b"1", "mask.png": b"m", "txt": "ü".encode()}
            )
    return writer


def files(dst: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dst.iterdir()}


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    writer = write_set(tmp_path / "set", made_by="me")
    manifest = load_manifest(tmp_path / "set")
    assert manifest == writer.manifest
    assert manifest.classes == ("a", "b")
    assert manifest.made_by == "me"
    assert manifest.counts.tolist() == [4, 4, 2]
    assert manifest.members == {"cls": 10, "jpg": 10, "mask.png": 10, "txt": 10}
    index = read_index(tmp_path / "set" / "shard-000001.tar")
    data = (tmp_path / "set" / "shard-000001.tar").read_bytes()
    member = index.members(2)["jpg"]
    assert index.key(2) == "c/k006"
    assert data[member.offset : member.offset + member.size] == bytes([6]) * 600
    assert member.crc32 == zlib.crc32(bytes([6]) * 600)
    assert index.findings == ()
    assert sorted(files(tmp_path / "set")) == [
        "manifest.json", *(f"shard-{i:06d}.tar{end}" for i in range(3) for end in ("", ".idx"))
    ]  # fmt: skip


def test_webdataset_reads_it(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    urls = [str(path) for path in sorted((tmp_path / "set").glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"c/k{i:03d}" for i in range(10)]
    assert read[3]["jpg"] == bytes([3]) * 300
    assert {name for name in read[3] if name[0] != "_"} == {"jpg", "cls", "mask.png", "txt"}


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    write_set(tmp_path / "a")
    write_set(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_headers_are_plain_ustar_of_nobody(tmp_path: Path) -> None:
    write_set(tmp_path / "a")
    header = (tmp_path / "a" / "shard-000000.tar").read_bytes()[:512]
    assert header[156:157] == b"0"  # no extension header in front
    assert header[108:124] == b"0000000\0" * 2  # uid, gid
    assert header[136:147] == b"0" * 11  # time
    assert header[265:329] == bytes(64)  # user and group


@pytest.mark.parametrize(
    "key", ["", "a.b", "/a", "a//b", "../a", "a/../b", "a/", "a\nb", "a\\b", "x" * 97, "./a"]
)  # fmt: skip
def test_unsafe_keys_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=r"is no key|more than 100 bytes"):
        check_sample(key, {"jpg": b""})


@pytest.mark.parametrize("extension", ["", "JPG", "_a", "a/b"])
def test_odd_extensions_are_refused(extension: str) -> None:
    with pytest.raises(ValueError, match="is no extension"):
        check_sample("a", {extension: b""})
    with pytest.raises(ValueError, match="no members"):
        check_sample("a", {})


def test_keys_are_written_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="written before"), ShardWriter(tmp_path / "set") as writer:
        writer.write("a", {"jpg": b"1"})
        writer.write("a", {"jpg": b"2"})
    assert not list((tmp_path / "set").glob("*.tar"))


def test_an_interrupted_writer_begins_anew(tmp_path: Path) -> None:
    write_set(tmp_path / "whole", made_by="me")
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "set", samples_per_shard=1, made_by="me") as writer:
        writer.write("z", {"jpg": b"1"})
        writer.write("y", {"jpg": b"1"})
        raise KeyboardInterrupt
    assert {".lock", "unfinished.jsonl", "shard-000001.tar"} <= set(files(tmp_path / "set"))
    (tmp_path / "set" / ".shard-000007.tar.123.partial").touch()
    with pytest.raises(DataError, match=r"begun by another command or from other files \(me\)"):
        write_set(tmp_path / "set", made_by="you")
    write_set(tmp_path / "set", made_by="me")
    assert files(tmp_path / "set") == files(tmp_path / "whole")


def test_sets_are_not_mixed(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    before = files(tmp_path / "set")
    with pytest.raises(DataError, match="already holds shards"):
        write_set(tmp_path / "set")
    assert files(tmp_path / "set") == before
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        write_set(tmp_path / "file")
    with pytest.raises(DataError, match="at least 1 sample"):
        ShardWriter(tmp_path / "new", samples_per_shard=0)
    with pytest.raises(DataError, match="no sample was written"):
        write_set(tmp_path / "empty", samples=0)


def test_two_writers_do_not_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom datamodules.shard_writer import ShardWriter\n"
        f"with ShardWriter({str(tmp_path / 'set')!r}, made_by='me') as w:\n"
        "    w.write('a', {'jpg': b'1'}); print('in', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(DataError, match="another process is writing"), ShardWriter(tmp_path / "set", made_by="me"):
            pass
        other.communicate("")
    assert other.returncode == 0
    assert load_manifest(tmp_path / "set").num_samples == 1


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    left = [2]

    def full(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"disk of .* is full: free some space and run the same command again"):
        write_set(tmp_path / "set")
    assert sorted(files(tmp_path / "set")) == [".lock", "unfinished.jsonl"]


def test_an_abandoned_file_vanishes_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = ShardFile(tmp_path / "a.tar")
    file.write("a", {"jpg": bytes(100)})
    file.abort()
    del file
    assert files(tmp_path) == {}
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_really_full_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path], check=False)
    if mount.returncode:
        pytest.skip("no mounts here")
    try:
        with (
            pytest.raises(DataError, match="is full"),
            ShardWriter(tmp_path / "set", samples_per_shard=10, made_by="me") as writer,
        ):
            for i in range(100):
                writer.write(f"k{i:03d}", {"jpg": os.urandom(7000)})
        whole = sorted((tmp_path / "set").glob("*.tar"))
        assert 1 <= len(whole) < 10
        assert all(len(scan_tar(path)) == 10 and not scan_tar(path).findings for path in whole)
        assert not list((tmp_path / "set").glob(".*.partial"))
        with pytest.raises(DataError, match="is unfinished"):
            load_manifest(tmp_path / "set")
        assert "Exception ignored" not in capfd.readouterr().err
    finally:
        subprocess.run(["umount", tmp_path], check=True)
