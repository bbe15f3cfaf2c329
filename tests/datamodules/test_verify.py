"""Verification: nothing on a clean set, and each kind of damage by its name and place."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.errors import DataError
from datamodules.manifest import MANIFEST, load_manifest
from datamodules.shard_writer import ShardWriter
from datamodules.tar_index import Finding, read_index
from datamodules.verify import verify, verify_command
from datamodules.verify_shard import ShardToVerify, verify_shard
from tests.datamodules.tar_builders import picture, write_tar


def write_set(dst: Path, samples: int = 12, per_shard: int = 4, **changes: object) -> Path:
    """Shards with everything in them; `changes` replaces members of sample 5."""
    with ShardWriter(dst, samples_per_shard=per_shard, classes=["a", "b", "c"]) as writer:
        for i in range(samples):
            members: dict[str, bytes | None] = {
                "jpg": picture(i), "cls": b"%d" % (i % 3), "txt": b"caption", "json": b"{}",
                "mask.png": picture(i, kind="PNG"),
            }  # fmt: skip
            if i == 5:
                members |= {name.replace("_", "."): data for name, data in changes.items()}  # type: ignore[misc]
            writer.write(f"k{i:02d}", {name: data for name, data in members.items() if data is not None})
    return dst


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


def found(root: Path) -> list[tuple[str, str, str]]:
    return [(finding.shard, finding.key, finding.kind) for finding in verify(root, workers=1)]


def test_a_clean_set(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert verify(whole, workers=2) == []
    assert verify_command(whole) == 0
    assert "clean" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_progress_counts_every_byte(whole: Path) -> None:
    tar, ticks = whole / S, list[int]()
    verify_shard(ShardToVerify(tar, None, {}), ticks.append)
    assert sum(ticks) == tar.stat().st_size


def test_a_clean_set_of_another_writer(tmp_path: Path) -> None:
    members = [(f"{i}.{ext}", data) for i in range(3) for ext, data in (("jpg", picture(i)), ("cls", b"7"))]
    write_tar(tmp_path / "a.tar", members)
    assert verify(tmp_path, workers=1) == []
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]  # it only reads


def test_labels_that_are_names(tmp_path: Path) -> None:
    labels = {"a": b"cat", "b": b"x" * 999}
    members = [(f"{k}.{end}", data) for k in labels for end, data in (("jpg", picture(ord(k))), ("cls", labels[k]))]
    write_tar(tmp_path / "a.tar", members)
    assert found(tmp_path) == [("a.tar", "b", "bad label")]
    load_manifest(tmp_path)
    assert found(tmp_path) == [("a.tar", "b", "bad label")]
    (tmp_path / "classes.txt").write_text("dog\n")
    (tmp_path / "manifest.json").unlink()
    load_manifest(tmp_path)
    assert found(tmp_path) == [("a.tar", "a", "bad label"), ("a.tar", "b", "bad label")]


@pytest.mark.parametrize(
    ("changes", "kind", "detail"),
    [
        ({"jpg": b"no image"}, "bad image", ".jpg: no image in a known format"),
        ({"jpg": picture(5)[:200]}, "bad image", ".jpg: "),
        ({"jpg": None}, "no image", "only .cls, .json, .mask.png, .txt"),
        ({"cls": b"3"}, "bad label", "b'3' is none of the 3 classes"),
        ({"cls": b"-1"}, "bad label", "b'-1' is none of the 3 classes"),
        ({"cls": b"cat"}, "bad label", "b'cat' is none of the 3 classes"),
        ({"cls": b"\xff\xff"}, "bad label", ""),
        ({"cls": None}, "no label", "most samples have a .cls"),
        ({"txt": b" \n"}, "bad caption", "empty"),
        ({"txt": b"\xff"}, "bad caption", "not UTF-8"),
        ({"txt": None}, "no caption", "most samples have a .txt"),
        ({"json": b"{"}, "bad JSON", "b'{'"),
        ({"mask_png": picture(1, (9, 9), "PNG")}, "bad mask", "9 x 9 for an image 24 x 20"),
        ({"mask_png": b""}, "bad mask", "empty"),
        ({"pth": b"\x80\x04."}, "code", ".pth can run code in other programs; it is never read here"),
    ],
)
def test_samples(tmp_path: Path, changes: dict[str, bytes], kind: str, detail: str) -> None:
    (finding,) = verify(write_set(tmp_path / "set", **changes), workers=1)
    assert finding[:3] == ("shard-000001.tar", "k05", kind)
    assert detail in finding.detail


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def member_offset(path: Path, sample: int, extension: str) -> int:
    return read_index(path).members(sample)[extension].offset


def cut_inside(root: Path) -> None:
    path = root / "shard-000001.tar"
    os.truncate(path, member_offset(path, 2, "jpg") + 100)


def cut_between(root: Path) -> None:
    path = root / "shard-000001.tar"
    os.truncate(path, member_offset(path, 2, "cls") - 512)


def corrupt_header(root: Path) -> None:
    path = root / "shard-000001.tar"
    flip(path, member_offset(path, 2, "jpg") - 512 + 10)


def flip_caption(root: Path) -> None:
    path = root / "shard-000001.tar"
    flip(path, member_offset(path, 2, "txt"))


def remove_shard(root: Path) -> None:
    (root / "shard-000001.tar").unlink()


def add_shard(root: Path) -> None:
    write_tar(root / "x.tar", [("x.jpg", picture(99)), ("x.cls", b"0"), ("x.txt", b"x")])


def swap_shard(root: Path) -> None:
    (root / "shard-000001.tar").write_bytes((root / "shard-000002.tar").read_bytes())


def damage_manifest(root: Path) -> None:
    (root / MANIFEST).write_text("{")


def damage_index(root: Path) -> None:
    (root / "shard-000001.tar.idx").write_bytes(b"x" * 50)


def empty_shard(root: Path) -> None:
    os.truncate(root / "shard-000001.tar", 0)


S = "shard-000001.tar"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut_inside, [(S, "k06.jpg", "truncated"), (S, "", "cut off"), (S, "", "differs from manifest"),
                      (S, "k06", "no image"), (S, "k06", "no caption")]),
        (cut_between, [(S, "", "no end marker"), (S, "", "cut off"), (S, "", "differs from manifest")]),
        (corrupt_header, [(S, "", "corrupt header"), (S, "k06", "lost sample"), (S, "", "differs from manifest"),
                          (S, "k06", "no image")]),
        (flip_caption, [(S, "k06", "wrong checksum")]),
        (remove_shard, [(S, "", "missing shard")]),
        (add_shard, [("x.tar", "", "differs from manifest")]),
        (damage_manifest, [(MANIFEST, "", "damaged manifest")]),
        (damage_index, [(S, "", "damaged index")]),
        (empty_shard, [(S, "", "empty file"), (S, "", "no end marker"), (S, "", "cut off"),
                       (S, "", "differs from manifest")]),
    ],
)  # fmt: skip
def test_shards(
    whole: Path,
    damage: Callable[[Path], None],
    expected: list[tuple[str, str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(whole)
    assert found(whole) == expected
    assert verify_command(whole) == 1
    assert all(kind in capsys.readouterr().out for kind in {expected[0][2]})


def test_flipped_bytes_in_an_image_are_seen_by_checksum(whole: Path) -> None:
    path = whole / S
    member = read_index(path).members(2)["jpg"]
    flip(path, member.offset + member.size // 2)
    assert (S, "k06", "wrong checksum") in found(whole)


def test_repeated_samples(whole: Path) -> None:
    swap_shard(whole)
    kinds = {kind for *_, kind in found(whole)}
    assert {"repeated key", "repeated sample", "wrong index", "differs from manifest"} >= kinds >= {"repeated key"}
    repeated = [finding for finding in verify(whole, workers=2) if finding.kind == "repeated sample"]
    assert [(finding.shard, finding.key, finding.detail) for finding in repeated][:1] == [
        ("shard-000002.tar", "k08", "the same content as shard-000001.tar/k08")
    ]
    assert len(repeated) == 4


def test_one_content_under_two_keys(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", picture()), ("b.jpg", picture(1)), ("c.jpg", picture())])
    assert verify(tmp_path, workers=1) == [Finding("a.tar", "c", "repeated sample", "the same content as a.tar/a")]


def test_hostile_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert [finding.kind for finding in verify(tmp_path, workers=1)] == ["link"]
    write_tar(tmp_path / "a.tar", [("../../x.jpg", picture()), ("\x1b[2J.jpg", picture(1))])
    assert [finding.kind for finding in verify(tmp_path, workers=1)] == ["unsafe name", "odd name"]


def test_a_long_table_is_cut_and_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [(f"{i:03d}\x1b[2J.jpg", b"bad %d" % i) for i in range(150)])
    assert verify_command(tmp_path) == 1
    out = capsys.readouterr().out
    assert "... and 200 more" in out
    assert "\x1b" not in out
    assert [line.split() for line in out.splitlines()[-2:]] == [["odd", "name", "150"], ["bad", "image", "150"]]


def test_what_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.tar files"):
        verify(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        verify(tmp_path / "nowhere")
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    assert [finding.kind for finding in verify(tmp_path, workers=1)] == ["unreadable"]
