"""The header walk against Python's tarfile, and on tars that lie."""

import io
import os
import random
import tarfile
from pathlib import Path

import pytest
import webdataset

from datamodules.tar_walk import Walk, walk_tar
from tests.datamodules.tar_builders import write_tar


def walk(path: Path) -> tuple[Walk, list[tuple[str, str, str]]]:
    notes: list[tuple[str, str, str]] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        return walk_tar(fd, path.stat().st_size, lambda *note: notes.append(note)), notes
    finally:
        os.close(fd)


def expected(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


def found(path: Path) -> list[tuple[str, int, int]]:
    result, notes = walk(path)
    assert notes == []
    return [(name.decode(), *rest) for name, *rest in zip(*result, strict=True)]


def random_members(seed: int, count: int, largest: int) -> list[tuple[str, bytes]]:
    pick = random.Random(seed)
    return [
        (f"folder{pick.randrange(3)}/sample{i:05d}.jpg", pick.randbytes(pick.randrange(largest))) for i in range(count)
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(("count", "largest"), [(0, 1), (1, 700), (500, 3000), (60, 90_000)])
def test_finds_what_tarfile_finds(tmp_path: Path, form: int, count: int, largest: int) -> None:
    path = write_tar(tmp_path / "a.tar", random_members(count, count, largest), format=form)
    assert found(path) == expected(path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_unicode_names(tmp_path: Path, form: int) -> None:
    names = ["x" * 300 + ".jpg", "a/" * 80 + "b.jpg", "y" * 100, "z" * 101, "größe 1.jpg", "図/写真.png", "short.jpg"]
    path = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names], format=form)
    assert found(path) == expected(path)


def test_ustar_prefix_and_pax_times(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("p" * 120 + "/" + "n" * 90, b"1")] * 5, format=tarfile.USTAR_FORMAT)
    assert found(path) == expected(path)
    with webdataset.TarWriter(str(tmp_path / "b.tar")) as writer:  # a PAX header with the time before every member
        for i in range(300):
            writer.write({"__key__": f"k{i}", "jpg": bytes(40 * i), "cls": b"1"})
    assert len(found(tmp_path / "b.tar")) == 600
    assert found(tmp_path / "b.tar") == expected(tmp_path / "b.tar")


def test_large_sizes_in_base_256_and_pax(tmp_path: Path) -> None:
    path = tmp_path / "sparse.tar"
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with path.open("wb") as file:
            file.write(info.tobuf(form))
            file.seek(info.size, os.SEEK_CUR)
            file.write(tarfile.TarInfo("after.jpg").tobuf() + bytes(1024))
        assert [(name, size) for name, _, size in found(path)] == [("big.jpg", 9 << 30), ("after.jpg", 0)]


def test_a_tar_inside_a_tar_is_data(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", random_members(1, 50, 900)).read_bytes()
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("inner.tar", inner), ("z.jpg", b"2")])
    assert [name for name, *_ in found(path)] == ["a.jpg", "inner.tar", "z.jpg"]


def test_old_tars_without_magic_and_with_signed_checksums(tmp_path: Path) -> None:
    headers = b""
    for number, name in enumerate([b"old.jpg", "ä.jpg".encode("latin-1")]):
        header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
        header[:100] = name.ljust(100, b"\0")
        header[257:265] = bytes(8)
        header[148:156] = b" " * 8
        total = sum(b - 256 if b > 127 and number else b for b in header)
        header[148:156] = b"%6o\0 " % total
        headers += bytes(header)
    (tmp_path / "a.tar").write_bytes(headers + bytes(1024))
    result, notes = walk(tmp_path / "a.tar")
    assert (result.names, notes) == ([b"old.jpg", b"\xe4.jpg"], [])


@pytest.mark.parametrize("count", [3, 900])
def test_corrupt_header_costs_one_member_and_is_told(tmp_path: Path, count: int) -> None:
    path = write_tar(tmp_path / "a.tar", random_members(3, count, 2000), format=tarfile.USTAR_FORMAT)
    members = expected(path)
    data = bytearray(path.read_bytes())
    data[members[1][1] - 512 + 20] ^= 0xFF
    path.write_bytes(data)
    result, notes = walk(path)
    assert [name.decode() for name in result.names] == [name for i, (name, *_) in enumerate(members) if i != 1]
    ((kind, _, detail),) = notes
    assert kind == "corrupt header"
    assert f"{members[2][1] - members[1][1]} bytes are lost" in detail


def test_a_size_that_lies_does_not_lead_astray(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", random_members(3, 40, 2000), format=tarfile.USTAR_FORMAT)
    members = expected(path)
    data = bytearray(path.read_bytes())
    data[members[7][1] - 512 + 124 : members[7][1] - 512 + 135] = b"77777777777"
    path.write_bytes(data)
    result, notes = walk(path)
    assert len(result.names) == 39
    assert [kind for kind, *_ in notes] == ["corrupt header"]


def test_noise_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(random.Random(0).randbytes(100_000))
    result, notes = walk(tmp_path / "a.tar")
    assert result.names == []
    assert [kind for kind, *_ in notes] == ["corrupt header"]


@pytest.mark.parametrize("largest", [2000, 60_000])
def test_every_cut_is_told(tmp_path: Path, largest: int) -> None:
    path = write_tar(tmp_path / "a.tar", random_members(5, 30, largest), format=tarfile.USTAR_FORMAT)
    members, data = expected(path), path.read_bytes()
    _, offset, size = members[20]
    for cut, kind, left in (
        (offset - 512, "no end marker", 20),
        (offset - 200, "truncated", 20),
        (offset, "truncated", 20),
        (offset + size // 2, "truncated", 20),
        (offset + size, "no end marker", 21),
    ):
        path.write_bytes(data[:cut])
        result, notes = walk(path)
        assert [note[0] for note in notes] == [kind], cut
        assert len(result.names) == left


def test_links_and_devices_are_told_and_left_out(tmp_path: Path) -> None:
    kinds = {tarfile.SYMTYPE: "link", tarfile.LNKTYPE: "link", tarfile.CHRTYPE: "device", tarfile.BLKTYPE: "device",
             tarfile.FIFOTYPE: "device", tarfile.GNUTYPE_SPARSE: "unreadable member",
             b"V": "unreadable member"}  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"odd{i}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
            folder = tarfile.TarInfo(f"folder{i}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            good = tarfile.TarInfo(f"good{i}.jpg")
            good.size = 5
            tar.addfile(good, io.BytesIO(b"12345"))
    result, notes = walk(tmp_path / "a.tar")
    assert result.names == [b"good%d.jpg" % i for i in range(len(kinds))]
    assert [note[:2] for note in notes] == [(kind, f"odd{i}.jpg") for i, kind in enumerate(kinds.values())]


def test_data_behind_the_end_is_told(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", [("a.jpg", b"1")]).read_bytes()
    (tmp_path / "b.tar").write_bytes(data + data)
    result, notes = walk(tmp_path / "b.tar")
    assert result.names == [b"a.jpg"]
    assert [kind for kind, *_ in notes] == ["data after the end"]


def test_hostile_extension_headers(tmp_path: Path) -> None:
    for payload in (b"9999999999 path=x\n", b"path=x", b"-5 path=x\n", b"0 path=x\n", b"12 size=-12\n", b"\xff" * 40):
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, len(payload)
        file = tarfile.TarInfo("real.jpg").tobuf(tarfile.USTAR_FORMAT)
        block = payload.ljust(512, b"\0")
        (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + block + file + bytes(1024))
        assert walk(tmp_path / "a.tar")[0].names == [b"real.jpg"], payload
    header.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + file + bytes(1024))
    result, notes = walk(tmp_path / "a.tar")
    assert result.names == [b"real.jpg"]
    assert [kind for kind, *_ in notes] == ["corrupt header", "corrupt header"]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_to_the_bytes_it_ends_and_stays_inside(tmp_path: Path, seed: int) -> None:
    pick = random.Random(seed)
    members = [*random_members(seed, 12, 1500), ("x" * 150 + ".jpg", b"long"), ("grün.jpg", b"pax")]
    form = pick.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    data = write_tar(tmp_path / "a.tar", members, format=form).read_bytes()
    for _ in range(20):
        damaged = bytearray(data)
        for _ in range(pick.randrange(1, 6)):
            at = pick.randrange(len(data) // 512) * 512 + pick.randrange(512)
            match pick.randrange(4):
                case 0:
                    damaged[at] = pick.randrange(256)
                case 1:
                    damaged[at : at + 512] = pick.randbytes(512)
                case 2:
                    del damaged[at:]
                    break
                case 3:
                    damaged[at:at] = bytes(pick.randrange(1024))
        (tmp_path / "a.tar").write_bytes(damaged)
        result, notes = walk(tmp_path / "a.tar")
        assert all(offset >= 0 and offset + size <= len(damaged) for _, offset, size in zip(*result, strict=True))
        assert notes or len(result.names) == 14
