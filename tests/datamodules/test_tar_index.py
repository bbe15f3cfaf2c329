"""The index against webdataset's reading of the same tars, its sidecar, and what it reports."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from safetensors.numpy import save

from datamodules.errors import DataError
from datamodules.tar_index import INDEX_SUFFIX, ShardIndex, read_index, scan_tar
from tests.datamodules.tar_builders import write_tar


def samples(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """What our index says, read from the tar."""
    index, data = scan_tar(path), path.read_bytes()
    return [
        (index.key(i), {name: data[m.offset : m.offset + m.size] for name, m in index.members(i).items()})
        for i in range(len(index))
    ]


def webdataset_samples(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """What webdataset reads."""
    stream = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [(s["__key__"], {name: data for name, data in s.items() if name[:1] != "_"}) for s in stream]


def kinds(path: Path) -> list[tuple[str, str]]:
    return [(finding.kind, finding.key) for finding in scan_tar(path).findings]


ODD = [
    ("plain.jpg", b"1"), ("plain.cls", b"2"), ("plain.mask.png", b"3"), ("v1.2.final.JPG", b"4"), ("a b/c d.jpg", b"5"),
    ("größe.jpg", b"6"), ("図/写真.Png", b"7"), ("./dot.jpg", b"8"), ("d.o.t/x.jpg", b"9"), ("no_extension", b"10"),
    ("__meta__/a.jpg", b"11"), ("__index__", b"12"), ("_one.jpg", b"13"), ("__two.jpg", b"14"), ("trailing.", b"15"),
    ("plain.jpg", b"16"), ("last.cls", b"17"),
]  # fmt: skip


def test_the_same_samples_as_webdataset(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ODD)
    assert samples(path) == webdataset_samples(path)
    assert dict(samples(path))["v1"] == {"2.final.jpg": b"4"}


@pytest.mark.parametrize("size", [100, 40_000])
def test_tars_of_webdatasets_writer(tmp_path: Path, size: int) -> None:
    with webdataset.ShardWriter(str(tmp_path / "w-%06d.tar"), maxcount=30, verbose=0) as writer:
        for i in range(70):
            writer.write(
                {"__key__": f"dir/k{i:04d}", "jpg": os.urandom(size), "cls": str(i).encode(), "json": {"i": i}}
            )
    paths = sorted(tmp_path.glob("*.tar"))
    assert [len(scan_tar(path)) for path in paths] == [30, 30, 10]
    for path in paths:
        assert samples(path) == webdataset_samples(path)
        assert scan_tar(path).findings == ()


def test_members_counts_and_bytes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"123"), ("a.txt", b"4"), ("b.jpg", b"56")])
    index = scan_tar(path)
    assert (len(index), index.key(1), index.path, index.tar_bytes) == (2, "b", str(path), path.stat().st_size)
    assert index.extension_counts() == {"jpg": 2, "txt": 1}
    assert index.extension_bytes() == {"jpg": 5, "txt": 1}
    assert list(index.members(0)) == ["jpg", "txt"]
    assert index.members(1)["jpg"].crc32 is None


def test_findings_of_names(tmp_path: Path) -> None:
    names = [
        "../../x.jpg",
        "/etc/x.jpg",
        "a/../b.jpg",
        "new\nline.jpg",
        "back\\slash.jpg",
        "bare",
        ".hidden.jpg",
        "ok..x.jpg",
    ]
    path = write_tar(tmp_path / "a.tar", [(name, b"1") for name in names], format=tarfile.GNU_FORMAT)
    assert kinds(path) == [
        ("unsafe name", "../../x.jpg"), ("unsafe name", "/etc/x.jpg"), ("unsafe name", "a/../b.jpg"),
        ("odd name", "new\\nline.jpg"), ("odd name", "back\\\\slash.jpg"),
        ("no sample", "bare"), ("no sample", ".hidden.jpg"),
    ]  # fmt: skip
    assert [key for key, _ in samples(path)] == ["../../x", "/etc/x", "a/../b", "new\nline", "back\\slash", "ok"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    info = tarfile.TarInfo("caf\udce9.jpg")
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + bytes(1024))
    assert scan_tar(tmp_path / "a.tar").key(0) == "caf\\xe9"
    assert kinds(tmp_path / "a.tar") == [("odd name", "caf\\xe9.jpg")]


def test_findings_of_samples(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        [("two.jpg", b"1"), ("two.png", b"2"), ("twice.jpg", b"3"), ("twice.jpg", b"4"), ("twice.cls", b"5"),
         ("label.cls", b"6"), ("label.CLS", b"7"), ("two.txt", b"8"), ("depth.jpg", b"9"), ("depth.mask.png", b"10")],
    )  # fmt: skip
    assert sorted(kinds(path)) == [
        ("repeated key", "two"), ("repeated member", "label"), ("two images", "twice"), ("two images", "two"),
    ]  # fmt: skip
    assert samples(path) == [
        ("two", {"jpg": b"1", "png": b"2"}), ("twice", {"jpg": b"3", "cls": b"5"}), ("label", {"cls": b"6"}),
        ("two", {"txt": b"8"}), ("depth", {"jpg": b"9", "mask.png": b"10"}),
    ]  # fmt: skip


def test_very_many_findings_are_summed_up(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"bare{i}", b"") for i in range(1500)])
    findings = scan_tar(path).findings
    assert len(findings) == 1001
    assert findings[-1].detail == "and 500 more of this kind"


def test_links_never_lead_anywhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
        good = tarfile.TarInfo("good.jpg")
        good.size = 1
        tar.addfile(good, io.BytesIO(b"1"))
    assert samples(tmp_path / "a.tar") == [("good", {"jpg": b"1"})]
    assert kinds(tmp_path / "a.tar") == [("link", "link.jpg")]


def test_sidecar_is_written_once_and_used(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ODD)
    fresh = read_index(path)
    sidecar = tmp_path / f"a.tar{INDEX_SUFFIX}"
    before = sidecar.read_bytes()
    again = read_index(path)
    assert [again.key(i) for i in range(len(again))] == [fresh.key(i) for i in range(len(fresh))]
    assert [again.members(i) for i in range(len(again))] == [fresh.members(i) for i in range(len(fresh))]
    assert again.findings == fresh.findings
    assert fresh.to_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.idx"]


@pytest.mark.parametrize(
    "damage", [b"", b"x" * 100, b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"[]", "other", "format"]
)
def test_damaged_sidecars_are_made_anew(tmp_path: Path, damage: bytes | str) -> None:
    path = write_tar(tmp_path / "a.tar", ODD)
    good = read_index(path).to_bytes()
    sidecar = tmp_path / f"a.tar{INDEX_SUFFIX}"
    if damage == "other":
        sidecar.write_bytes(save({"first": np.zeros(3)}, metadata={"other": "1"}))
    elif damage == "format":
        sidecar.write_bytes(good.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
        assert sidecar.read_bytes() != good
    else:
        assert isinstance(damage, bytes)
        sidecar.write_bytes(damage)
    assert read_index(path).to_bytes() == good
    assert sidecar.read_bytes() == good


def test_another_tar_gets_another_index(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1")])
    read_index(path)
    write_tar(path, [(f"b{i}.jpg", bytes(1000)) for i in range(30)])
    assert read_index(path).key(29) == "b29"
    assert ShardIndex.from_bytes(str(path), (tmp_path / "a.tar.idx").read_bytes()).key(29) == "b29"
    write_tar(path, [("c.jpg", bytes(99))])
    assert (len(read_index(path)), read_index(path).key(0)) == (1, "c")


def test_a_cut_tar_keeps_its_index(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"b{i:02d}.jpg", bytes(1000)) for i in range(30)])
    whole = read_index(path)
    os.truncate(path, whole.members(20)["jpg"].offset + 10)
    for _ in range(2):
        cut = read_index(path)
        assert len(cut) == 30
        assert [finding.kind for finding in cut.findings] == ["truncated"]
        assert "20 samples of 30" in cut.findings[0].detail


@pytest.mark.parametrize("block", ["name", "long name", "nothing"])
def test_a_damaged_tar_keeps_its_index_and_tells_what_is_lost(tmp_path: Path, block: str) -> None:
    key = "ü" * 60 if block == "long name" else "b05"  # in a header of its own, before the member's
    names = [*(f"b{i:02d}.{end}" for i in range(5) for end in ("cls", "jpg")), f"{key}.cls", f"{key}.jpg", "c.jpg"]
    path = write_tar(tmp_path / "a.tar", [(name, b"7" * 30) for name in names])
    whole = read_index(path)
    at = whole.members(5)["jpg"].offset
    with path.open("r+b") as file:
        file.seek(at - (1536 if block == "long name" else 512))
        file.write(bytes(512) if block == "nothing" else b"\x99")  # zeros end a tar
    later = path.stat().st_mtime_ns + 10**9  # the clock of files may not have moved since the index was written
    os.utime(path, ns=(later, later))
    for _ in range(2):
        damaged = read_index(path)
        assert damaged.same_members(whole) and damaged.tar_bytes == path.stat().st_size
        assert damaged.lost == ({5, 6} if block == "nothing" else {5})
        assert [finding.kind for finding in damaged.findings] == ["damaged"]


def test_other_samples_of_the_same_sizes_are_another_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"b{i}.jpg", b"%d" % i) for i in range(9)])
    read_index(path)
    write_tar(path, [(f"c{i}.jpg", b"%d" % i) for i in range(9)])
    assert read_index(path).key(0) == "c0" and not read_index(path).lost


def test_read_only_folders_use_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", ODD)
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    write = Path.open

    def refuse(self: Path, mode: str = "r", *args: object, **options: object) -> object:
        if "x" in mode and self.parent == tmp_path:
            raise OSError(30, "Read-only file system")
        return write(self, mode, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    index = read_index(path)
    (cached,) = (tmp_path / "cache").rglob("*.idx")
    assert cached.read_bytes() == index.to_bytes()
    stamp = cached.stat().st_mtime_ns
    assert read_index(path).to_bytes() == index.to_bytes()
    assert cached.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is not a file"),
        (lambda p: os.mkfifo(p), "is not a file"),
        (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(600)), "is compressed"),
    ],
)
def test_bad_paths(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "a.tar")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        scan_tar(tmp_path / "a.tar")
    with pytest.raises(DataError, match=message):
        read_index(tmp_path / "a.tar")


def test_an_empty_file_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    assert len(scan_tar(tmp_path / "a.tar")) == 0
    assert next(kind for kind, _ in kinds(tmp_path / "a.tar")) == "empty file"
