"""Texts beside images: packed into their samples from folders and tars, or left out and named."""

import json
import tarfile
from pathlib import Path

import pytest

from datamodules.manifest import load_manifest
from datamodules.open_shards import open_shards
from datamodules.pack import SKIPPED, pack
from datamodules.sample_captions import CaptionConfig, SampleCaptions
from datamodules.shard_reader import ShardReader
from datamodules.text_files import SKIPPED_TEXTS
from pretrain.cli import main
from tests.datamodules.set_files import read
from tests.datamodules.tar_builders import image_folders, picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """cat/cat_0 .. 4 and dog/dog_0 .. 4, with all kinds of texts."""
    folder = image_folders(tmp_path / "photos", ["cat", "dog"], 5)
    (folder / "cat/cat_0.txt").write_bytes("\ufeffa cat on a mat\n".encode())
    (folder / "cat/cat_0.json").write_text('{"colour": "red", "captions": ["a", "b"]}')
    (folder / "cat/cat_1.TXT").write_text("größer")
    (folder / "dog/dog_0.json").write_text('{"captions": ["one dog", "a dog"]}')
    (folder / "dog/dog_1.txt").write_bytes(b"caf\xe9")
    (folder / "dog/dog_2.txt").write_text(" \n")
    (folder / "dog/dog_2.json").write_text("{not json")
    (folder / "dog/dog_3.json").write_text('["a list"]')
    (folder / "dog/gone.txt").write_text("its image is not there")
    (folder / "README.txt").write_text("about it all")
    (folder / "dog/._dog_4.txt").write_text("of a Mac")
    return folder


LEFT = {
    "README.txt": "no image of this name lies beside it",
    "dog/gone.txt": "no image of this name lies beside it",
    "dog/dog_1.txt": "not UTF-8 (byte 3)",
    "dog/dog_2.txt": "empty",
    "dog/dog_3.json": "not a JSON object",
}


def left(folder: Path) -> dict[str, str]:
    lines = (folder / SKIPPED_TEXTS).read_text().splitlines()
    return dict(line.split("\t") for line in lines)  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_texts_go_with_their_images(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder
    if kind == "tar":
        source = tmp_path / "photos.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(folder, "photos")
    assert main(["shards", "pack", str(source), str(tmp_path / "set")]) == 0
    said = capsys.readouterr().err
    samples = read(tmp_path / "set")
    assert len(samples) == 10 and not (tmp_path / "set" / SKIPPED).exists()
    assert samples["cat/cat_0"]["txt"] == b"a cat on a mat\n"
    assert json.loads(samples["cat/cat_0"]["json"]) == {"colour": "red", "captions": ["a", "b"]}
    assert samples["cat/cat_1"]["txt"] == "größer".encode()
    assert [key for key, members in samples.items() if "txt" in members or "json" in members] == [
        key for key in samples if key in ("cat/cat_0", "cat/cat_1", "dog/dog_0")
    ]
    named = {name.removeprefix("photos/"): reason for name, reason in left(tmp_path / "set").items()}
    assert named.pop("dog/dog_2.json").startswith("not JSON (") and named == LEFT
    assert "6 of 10 images have texts beside them (4 .json, 4 .txt), which are packed with them" in said
    assert "left out 6 texts" in said
    manifest = load_manifest(tmp_path / "set")
    assert (manifest.classes, manifest.members["txt"], manifest.members["json"]) == (("cat", "dog"), 2, 2)
    assert manifest.members["cls"] == 10


def test_captions_of_a_flat_folder_are_read(tmp_path: Path) -> None:
    """As `trivit pretrain --data.train FOLDER` packs it, once: again when a text is added."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(4):
        (flat / f"{i}.jpg").write_bytes(picture(i))
        (flat / f"{i}.txt").write_text(f"picture {i}")
    (flat / "3.png").write_bytes(picture(9, kind="PNG"))  # shares the text of the other 3
    for added in (False, True):
        if added:
            (flat / "0.json").write_text('{"captions": ["other words", "more"]}')
        reader = ShardReader(load_manifest(open_shards(flat)))
        captions = SampleCaptions(reader, CaptionConfig("captions" if added else None))
        found = {}
        for shard, part in enumerate(reader.manifest.shards):
            for i in range(part.samples):
                if not added or reader.key(shard, i) == "0":
                    found[reader.key(shard, i)] = captions.all(shard, i)
        one_each = {f"{i}": [f"picture {i}"] for i in range(4)} | {"3-2": ["picture 3"]}
        assert found == ({"0": ["other words", "more"]} if added else one_each)


def test_a_table_of_captions_comes_first(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "captions.tsv").write_text("file\tcaption\ncat_0.JPEG\tfrom the table\n")
    pack(folder, tmp_path / "set", captions=tmp_path / "captions.tsv", workers=1)
    samples = read(tmp_path / "set")
    assert samples["cat/cat_0"]["txt"] == b"from the table" and "json" not in samples["cat/cat_0"]
    assert sum("txt" in members for members in samples.values()) == 1
    assert not (tmp_path / "set" / SKIPPED_TEXTS).exists()
    assert "which are not packed: " in capsys.readouterr().err


def test_an_extended_set_names_the_texts_of_both(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "set", workers=1)
    more = image_folders(tmp_path / "more", ["owl"], 2)
    (more / "owl/owl_0.txt").write_text("an owl")
    (more / "owl/owl_1.txt").write_bytes(b"\xff")
    pack(more, tmp_path / "set", extend=True, workers=1)
    samples = read(tmp_path / "set")
    assert samples["owl_0"]["txt"] == b"an owl" and samples["cat/cat_1"]["txt"] == "größer".encode()
    assert len(left(tmp_path / "set")) == 7
