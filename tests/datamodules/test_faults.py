"""Each fault that data can have, and what comes of it: nothing hangs, nothing is lost without being counted or told.

FAULTS is a table: what is done to a data set; which samples then arrive; which are named as bad, with what reason; and
what `trivit shards verify` finds. Every row is read by the training stream, and by the command.
"""

import io
import json
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageOps

from datamodules.bad_samples import BadSamples
from datamodules.manifest import Manifest, load_manifest
from datamodules.order import Order
from datamodules.recipes import MAERecipe
from datamodules.shard_reader import ShardReader
from datamodules.shard_writer import ShardWriter
from datamodules.stream import StepLoader, TrainStream
from datamodules.tar_index import read_index
from pretrain.cli import main
from tests.datamodules.tar_builders import picture, write_tar

EPOCHS = 3  # what one leaves out, the next one has
S = "shard-000001.tar"  # the middle one of three; of the keys 00, 01, ... it holds 08 to 15
KEYS = [f"{i:02d}" for i in range(24)]


def read(folder: Path, batch: int = 4, workers: int = 0, **order: int) -> tuple[set[str], dict[tuple[str, str], str]]:
    """Some epochs of a set: the keys that arrived, and reasons by (shard, key) from bad_samples.jsonl."""
    manifest = load_manifest(folder)
    file = folder.parent / "bad_samples.jsonl"
    loader = loader_of(manifest, file, batch, workers, **order)
    arrived: set[str] = set()
    for step in loader:
        assert len(step["key"]) == batch and len(step["image"]) == batch  # a bad sample keeps its slot
        arrived |= {key.partition("/")[2] for key in step["key"]}
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert loader.bad_samples.count == len(lines)
    return arrived, {(line["shard"], line["key"]): line["reason"] for line in lines}


def loader_of(manifest: Manifest, file: Path | None, batch: int, workers: int = 0, **settings: int) -> StepLoader:
    order = Order(manifest.counts, seed=0, global_batch_size=batch, **settings)
    stream = TrainStream(order, ShardReader(manifest), MAERecipe(8))
    account = BadSamples(file, 1.0, manifest.num_samples, manifest.root)
    stop = EPOCHS * order.steps_per_epoch
    return StepLoader(stream, start=0, stop=stop, workers=workers, pin_memory=False, bad_samples=account)


def whole(folder: Path, **members: bytes) -> Path:
    """24 samples in three shards; `members` of sample 10, in the middle one, are others."""
    with ShardWriter(folder, samples_per_shard=8, classes=["cat", "dog"]) as writer:
        for i, key in enumerate(KEYS):
            sample = {"jpg": picture(i), "cls": b"%d" % (i % 2)}
            writer.write(key, sample | (members if i == 10 else {}))
    load_manifest(folder)
    return folder


def foreign(folder: Path, *members: tuple[str, bytes]) -> Path:
    """One tar of somebody else, without an index or a manifest."""
    folder.mkdir()
    write_tar(folder / "x.tar", [*((f"{key}.jpg", picture(i)) for i, key in enumerate(KEYS[:8])), *members])
    return folder


def begin_of(folder: Path, sample: int, extension: str = "cls") -> int:
    """Where the header of a member of the middle shard is; a sample's members are in the order of the alphabet."""
    return read_index(folder / S).members(sample)[extension].offset - 512


def cut(folder: Path, at: int, name: str = S) -> None:
    os.truncate(folder / name, at)


def overwrite(folder: Path, at: int, data: bytes, name: str = S) -> None:
    with (folder / name).open("r+b") as file:
        file.seek(at)
        file.write(data)


def cut_at_a_member_boundary(folder: Path) -> None:
    cut(whole(folder), begin_of(folder, 5))


def cut_inside_a_member(folder: Path) -> None:
    cut(whole(folder), begin_of(folder, 5, "jpg") + 700)


def foreign_cut_at_a_member_boundary(folder: Path) -> None:
    cut(foreign(folder), read_index(folder / "x.tar").members(5)["jpg"].offset - 512, "x.tar")
    (folder / "x.tar.idx").unlink()


def foreign_cut_inside_a_member(folder: Path) -> None:
    cut(foreign(folder), read_index(folder / "x.tar").members(5)["jpg"].offset + 100, "x.tar")
    (folder / "x.tar.idx").unlink()


def corrupt_header(folder: Path) -> None:
    overwrite(whole(folder), begin_of(folder, 2, "jpg") + 10, b"\x99")


def corrupt_header_and_a_missing_shard(folder: Path) -> None:
    overwrite(whole(folder), read_index(folder / "shard-000000.tar").members(2)["jpg"].offset - 502, b"\x99",
              "shard-000000.tar")  # fmt: skip
    (folder / S).unlink()


def zeros_over_a_header(folder: Path) -> None:
    overwrite(whole(folder), begin_of(folder, 5), bytes(512))


def corrupt_header_of_a_whole_sample(folder: Path) -> None:
    overwrite(foreign(folder), read_index(folder / "x.tar").members(5)["jpg"].offset - 500, b"\x99", "x.tar")
    (folder / "x.tar.idx").unlink()


def flipped_bytes_in_a_jpeg(folder: Path) -> None:
    overwrite(whole(folder), begin_of(folder, 2, "jpg") + 512 + 2, b"\x00\x11\x22")


def empty_shard(folder: Path) -> None:
    cut(whole(folder), 0)


def foreign_empty_shard(folder: Path) -> None:
    (foreign(folder) / "y.tar").write_bytes(b"")


def missing_shard(folder: Path) -> None:
    (whole(folder) / S).unlink()


def empty_member(folder: Path) -> None:
    whole(folder, jpg=b"")


def text_named_jpg(folder: Path) -> None:
    whole(folder, jpg=b"a photograph of a cat")


def bomb(folder: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")]
    whole(folder, jpg=b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


ODD_KEYS = ["a b", "größe", "画像", "dir.v2/x", "deep/er/x"]


def odd_keys(folder: Path) -> None:
    foreign(folder, *((f"{key}.jpg", picture(50 + i)) for i, key in enumerate(ODD_KEYS)))


def two_dots_in_a_name(folder: Path) -> None:
    foreign(folder, ("p.v2.jpg", picture(50)))  # the key ends at the first dot: webdataset's rule


def two_images_under_one_key(folder: Path) -> None:
    foreign(folder, ("both.jpg", picture(50)), ("both.png", picture(51, kind="PNG")))


def no_caption(folder: Path) -> None:
    captioned = [(f"{i}.{end}", data) for i in "abcdefghi" for end, data in (("jpg", picture(ord(i))), ("txt", b"x"))]
    foreign(folder, *captioned)


def caption_without_image(folder: Path) -> None:
    foreign(folder, ("words.txt", b"a cat"))


def names_that_leave_the_folder(folder: Path) -> None:
    foreign(folder, ("../../x.jpg", picture(50)), ("/etc/x.jpg", picture(51)))


def links_and_devices(folder: Path) -> None:
    foreign(folder)
    with tarfile.open(folder / "x.tar", "a") as tar:
        for name, kind in (("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)


def code_alone(folder: Path) -> None:
    foreign(folder, *((f"{name}.{name}", b"\x80\x04cos\nsystem\n.") for name in ("pyd", "pth", "pickle")))


def code_beside_an_image(folder: Path) -> None:
    foreign(folder, ("z.jpg", picture(50)), ("z.pickle", b"\x80\x04cos\nsystem\n."))


class Row(NamedTuple):
    """`lost`: of the keys of the set; `more`: keys beyond 00, 01, ...; `bad`: (shard, key) -> reason (a pattern)."""

    make: Callable[[Path], None]
    lost: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    bad: Mapping[tuple[str, str], str] = MappingProxyType({})
    found: tuple[str, ...] = ()


def of_middle(samples: range, pattern: str, known: bool = True) -> dict[tuple[str, str], str]:
    return {(S, f"{8 + i:02d}" if known else f"#{i}"): pattern for i in samples}


FAULTS = [
    Row(cut_at_a_member_boundary, tuple(KEYS[13:16]), bad=of_middle(range(5, 8), "cut off"),
        found=("no end marker", "cut off", "differs from manifest")),
    Row(cut_inside_a_member, tuple(KEYS[13:16]), bad=of_middle(range(5, 8), "cut off"),
        found=("truncated", "cut off", "differs from manifest", "no image")),
    # What was in a tar that nobody had indexed cannot be known; that it was cut can.
    Row(foreign_cut_at_a_member_boundary, tuple(KEYS[5:8]), found=("no end marker",)),
    Row(foreign_cut_inside_a_member, tuple(KEYS[5:8]), found=("truncated",)),
    Row(corrupt_header, ("10",), bad={(S, "10"): "one of its headers is destroyed"},
        found=("corrupt header", "lost sample", "differs from manifest", "no image")),
    Row(corrupt_header_and_a_missing_shard, ("02", *KEYS[8:16]),
        bad={("shard-000000.tar", "02"): "one of its headers", **of_middle(range(8), "does not exist", known=False)},
        found=("corrupt header", "lost sample", "differs from manifest", "no image", "missing shard")),
    Row(zeros_over_a_header, tuple(KEYS[13:16]), bad=of_middle(range(5, 8), "one of its headers is destroyed"),
        found=("data after the end", "lost sample", "differs from manifest")),
    Row(corrupt_header_of_a_whole_sample, ("05",), found=("corrupt header",)),
    Row(flipped_bytes_in_a_jpeg, ("10",), bad={(S, "10"): r"jpg: .*checksum differs: damaged after it was packed"},
        found=("bad image", "wrong checksum")),
    Row(empty_shard, tuple(KEYS[8:16]), bad=of_middle(range(8), "cut off"),
        found=("empty file", "no end marker", "cut off", "differs from manifest")),
    Row(foreign_empty_shard, found=("empty file", "no end marker")),
    Row(missing_shard, tuple(KEYS[8:16]), bad=of_middle(range(8), "does not exist", known=False),
        found=("missing shard",)),
    Row(empty_member, ("10",), bad={(S, "10"): "jpg: empty"}, found=("bad image",)),
    Row(text_named_jpg, ("10",), bad={(S, "10"): "jpg: no image in a known format"}, found=("bad image",)),
    Row(bomb, ("10",), bad={(S, "10"): "60000 x 60000 pixels are more than|exceeds limit"}, found=("bad image",)),
    Row(odd_keys, more=tuple(ODD_KEYS)),
    Row(two_dots_in_a_name, bad={("x.tar", "p"): r"no image, only v2\.jpg"}, found=("no image",)),
    Row(two_images_under_one_key, more=("both",), found=("two images",)),
    Row(no_caption, more=tuple("abcdefghi"), found=("no caption",)),
    Row(caption_without_image, bad={("x.tar", "words"): "no image, only txt"}, found=("no image",)),
    Row(names_that_leave_the_folder, more=("../../x", "/etc/x"), found=("unsafe name",)),
    Row(links_and_devices, found=("link", "device")),
    Row(code_alone, bad={("x.tar", name): f"no image, only {name}" for name in ("pyd", "pth", "pickle")},
        found=("code", "no image")),
    Row(code_beside_an_image, more=("z",), found=("code",)),
]  # fmt: skip


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row.make.__name__)
def test_fault(row: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    row.make(folder)
    before = {path.name for path in folder.iterdir()}
    keys = KEYS if (folder / "shard-000000.tar").exists() else KEYS[:8]

    assert main(["shards", "verify", str(folder)]) == bool(row.found)
    out = capsys.readouterr().out
    kinds = [line.rstrip() for line in out.rpartition("\n\n")[2].splitlines()[1:]]
    assert sorted(re.sub(r"\s+\d+$", "", kind) for kind in kinds) == sorted(row.found), out

    arrived, bad = read(folder)
    assert arrived == (set(keys) - set(row.lost)) | set(row.more)
    assert bad.keys() == row.bad.keys()
    for place, pattern in row.bad.items():
        assert re.search(pattern, bad[place]), (place, bad[place])
    # Nothing is lost in silence: each sample arrived, is named as bad, or its tar's damage is a finding of the index.
    assert len(arrived) + len(bad) == load_manifest(folder).num_samples
    unnamed = set(row.lost) - {key for _, key in bad} - {f"{8 + i:02d}" for i in range(8) if (S, f"#{i}") in bad}
    assert not unnamed or sum(shard.findings for shard in load_manifest(folder).shards) > 0

    made = {path.name for path in folder.iterdir()} - before
    assert all(name.endswith(".idx") or name == "manifest.json" for name in made)
    assert not (tmp_path / "x.jpg").exists() and not (tmp_path.parent / "x.jpg").exists()


def pixels(generator: np.random.Generator, *shape: int) -> np.ndarray:
    coarse = generator.integers(0, 256, (6, 7, *shape[2:]), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(shape[1::-1], Image.Resampling.BICUBIC))


def images() -> Iterator[tuple[str, str, bytes]]:
    """Name, extension and bytes of each kind of image that is not simply RGB."""
    generator = np.random.default_rng(0)
    photograph, alpha = Image.fromarray(pixels(generator, 30, 40, 3)), Image.fromarray(pixels(generator, 30, 40))
    with_alpha = photograph.copy()
    with_alpha.putalpha(alpha)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    wide = Image.fromarray(generator.integers(0, 1 << 16, (30, 40), np.uint16))
    palette = photograph.convert("P")
    palette.info["transparency"] = bytes(range(256))
    other = {"save_all": True, "append_images": [ImageOps.invert(photograph)]}
    for name, image, kind, options in (
        ("grey", photograph.convert("L"), "JPEG", {}), ("palette", palette, "PNG", {}),
        ("cmyk", photograph.convert("CMYK"), "JPEG", {}), ("wide", wide, "PNG", {}),
        ("alpha", with_alpha, "PNG", {}), ("grey_alpha", with_alpha.convert("LA"), "PNG", {}),
        ("animated", photograph, "GIF", other), ("animated", photograph, "WEBP", other | {"lossless": True}),
        ("rotated", photograph, "JPEG", {"exif": rotated}), ("rotated", photograph, "PNG", {"exif": rotated}),
    ):  # fmt: skip
        file = io.BytesIO()
        image.save(file, kind, **options)
        yield f"{name}_{kind.lower()}", {"JPEG": "jpg"}.get(kind, kind.lower()), file.getvalue()


def test_every_kind_of_image_arrives_upright_and_in_rgb(tmp_path: Path) -> None:
    """As Pillow turns and converts it; 16 bits are scaled, where Pillow would make everything white."""
    kinds = list(images())
    with ShardWriter(tmp_path / "set", samples_per_shard=4) as writer:
        for name, extension, data in kinds:
            writer.write(name, {extension: data})
    reader = ShardReader(load_manifest(tmp_path / "set"))
    places = [(shard, i) for shard, count in enumerate(reader.manifest.counts) for i in range(count)]
    for place, (name, _, data) in zip(places, kinds, strict=True):
        key, image = reader.image(*place)
        assert key == name
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if "wide" in name:
            expected = Image.fromarray((np.asarray(expected).astype(np.uint32) >> 8).astype(np.uint8))
        expected = np.asarray(expected.convert("RGB")).astype(int)
        assert image.shape == (3, *expected.shape[:2])
        assert expected.shape[:2] == ((40, 30) if "rotated" in name else (30, 40))
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= (2 if "jpeg" in name else 0), name
    arrived, bad = read(tmp_path / "set", batch=2)
    assert arrived == {name for name, *_ in kinds} and not bad


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_deleted_while_running(workers: int, tmp_path: Path) -> None:
    """Who holds it open reads on, who does not counts its samples as bad; every batch is whole."""
    folder, file = whole(tmp_path / "set"), tmp_path / "bad_samples.jsonl"
    loader, arrived = loader_of(load_manifest(folder), file, 4, workers), set()
    for i, step in enumerate(loader):
        if i == 7:  # in the second epoch
            (folder / S).unlink()
            loader.stream.reader._open.clear()
            arrived.clear()
        arrived |= {key.partition("/")[2] for key in step["key"]}
        assert len(step["key"]) == len(step["image"]) == 4
    bad = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert {line["shard"] for line in bad} <= {S} and all("does not exist" in line["reason"] for line in bad)
    assert arrived | {KEYS[8 + int(line["key"][1:])] for line in bad} == set(KEYS)
    assert workers or len(bad) == 8


@pytest.mark.parametrize("workers", [0, 3])
def test_fewer_shards_than_lanes_ranks_and_workers(workers: int, tmp_path: Path) -> None:
    folder = foreign(tmp_path / "set")
    assert read(folder, 8, workers, lanes=8) == (set(KEYS[:8]), {})
    order = Order([8], seed=0, global_batch_size=8, lanes=8)
    reader = ShardReader(load_manifest(folder))
    ranks = [TrainStream(order, reader, MAERecipe(8), rank=rank, world_size=8)[0]["key"] for rank in range(8)]
    assert sorted(key for keys in ranks for key in keys) == [f"x.tar/{key}" for key in KEYS[:8]]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_sample_in_all(workers: int, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "x.tar", [("only.jpg", picture())])
    assert read(tmp_path / "set", 1, workers) == ({"only"}, {})
