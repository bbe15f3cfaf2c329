"""Tables of paths, captions and labels: every kind, every guess, and everything that is refused or skipped."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.errors import DataError
from datamodules.manifest import load_manifest
from datamodules.pack import SKIPPED, pack
from datamodules.sources import list_source
from pretrain.cli import main
from tests.datamodules.set_files import files, read
from tests.datamodules.tar_builders import image_folders, picture

Rows = list[dict[str, Any]]


def write_table(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with photos/cat/cat_0.JPEG and so on, six images."""
    image_folders(tmp_path / "photos", ["cat", "dog"], 3)
    return tmp_path


def rows_of(desk: Path) -> Rows:
    found = sorted((desk / "photos").rglob("*.JPEG"))
    return [
        {"file_name": str(path.relative_to(desk)), "caption": f"ein {path.stem}, schön", "label": path.parent.name}
        for path in found
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_gives_the_same_set(desk: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(desk / f"t.{kind}", rows_of(desk))
    assert main(["shards", "pack", str(table), str(desk / "set")]) == 0
    said = capsys.readouterr().err
    assert f"t.{kind}: images from 'file_name', captions from 'caption', labels from 'label' (guessed; " in said
    assert "6 of 6 images have a caption" in said
    manifest = load_manifest(desk / "set")
    assert manifest.classes == ("cat", "dog") and manifest.members == {"cls": 6, "jpeg": 6, "txt": 6}
    assert read(desk / "set") == {
        f"{name}/{name}_{i}": {
            "jpeg": (desk / f"photos/{name}/{name}_{i}.JPEG").read_bytes(),
            "txt": f"ein {name}_{i}, schön".encode(),
            "cls": b"%d" % label,
        }
        for label, name in enumerate(["cat", "dog"])
        for i in range(3)
    }
    before = files(desk / "set")
    assert main(["shards", "pack", str(table), str(desk / "set")]) == 0
    assert "holds these 6 samples already" in capsys.readouterr().err and files(desk / "set") == before


@pytest.mark.parametrize("image", ["filepath", "path", "file_name", "Image", "FILENAME", "img", "where is it?"])
@pytest.mark.parametrize("caption", ["title", "text", "Caption", "words"])
@pytest.mark.parametrize("label", ["class", "label", "species"])
def test_columns_by_guess_and_by_name(desk: Path, image: str, caption: str, label: str) -> None:
    rows = [{"id": 1, label: r["label"], image: r["file_name"], caption: r["label"]} for r in rows_of(desk)]
    table = write_table(desk / "t.parquet", rows)
    given = {
        kind: name
        for kind, name, odd in (
            ("image", image, "imgwhere is it?"),
            ("caption", caption, "words"),
            ("label", label, "species"),
        )
        if name in odd
    }
    source = list_source(table, given)
    assert source.classes == ("cat", "dog") and source.labels() == [0, 0, 0, 1, 1, 1]
    assert source.captions[5] == ("dog",)
    assert ("guessed" in source.notes[0]) == (len(given) < 3)


def test_several_captions_by_list_and_by_rows(desk: Path) -> None:
    by_list = [
        {"path": "photos/cat/cat_0.JPEG", "caption": ["a", "b\n c", "a", " "]},
        {"path": "./photos/dog/../cat/cat_1.JPEG", "caption": "one"},
        {"path": "photos\\cat\\cat_2.JPEG", "caption": None},
    ]
    by_row = [
        {"path": "photos/cat/cat_0.JPEG", "caption": "a"},
        {"path": "photos/cat/cat_1.JPEG", "caption": "one"},
        {"path": "photos/cat/cat_0.JPEG", "caption": "b c"},
        {"path": "photos/cat/cat_2.JPEG", "caption": ""},
    ]
    expected = (("a", "b c"), ("one",), ())
    for name, rows in (
        ("l.jsonl", by_list),
        (
            "l.parquet",
            [{**r, "caption": r["caption"] if isinstance(r["caption"], list) else [r["caption"]]} for r in by_list],
        ),
        ("r.csv", by_row),
    ):
        assert list_source(write_table(desk / name, rows)).captions == expected, name
    pack(desk / "r.csv", desk / "set", workers=1)
    packed = read(desk / "set")
    assert packed["cat_0"]["txt"] == b"a" and packed["cat_0"]["json"] == b'{"captions": ["a", "b c"]}'
    assert set(packed["cat_1"]) == {"jpeg", "txt"} and set(packed["cat_2"]) == {"jpeg"}


def test_numbers_as_labels_stay_numbers(desk: Path) -> None:
    rows = [{**row, "label": label} for row, label in zip(rows_of(desk), [7, 0, 3, None, -1, 7], strict=True)]
    for kind in ("csv", "jsonl", "parquet"):
        table = write_table(
            desk / f"t.{kind}",
            [{**r, "label": "" if r["label"] is None and kind == "csv" else r["label"]} for r in rows],
        )
        source = list_source(table, {"caption": None})
        assert (source.classes, source.labels()) == ((), [7, 0, 3, -1, -1, 7]), kind
    assert read_labels(pack(desk / "t.jsonl", desk / "set", workers=1).root) == {
        "cat/cat_0": 7,
        "cat/cat_1": 0,
        "cat/cat_2": 3,
        "dog/dog_2": 7,
    }
    mixed = write_table(
        desk / "m.jsonl",
        [{**row, "label": [1, "two", 1.0, "two", float("nan"), None][i]} for i, row in enumerate(rows)],
    )
    assert (list_source(mixed).classes, list_source(mixed).labels()) == (("1", "two"), [0, 1, 0, 1, -1, -1])


def test_true_and_false_as_labels_are_one_and_zero(desk: Path) -> None:
    rows = [{**row, "label": label} for row, label in zip(rows_of(desk), [True, False] * 3, strict=True)]
    for kind in ("jsonl", "parquet"):
        table = write_table(desk / f"t.{kind}", rows)
        assert set(read_labels(pack(table, desk / kind, workers=1).root).values()) == {0, 1}, kind


def read_labels(root: Path) -> dict[str, int]:
    return {key: int(members["cls"]) for key, members in read(root).items() if "cls" in members}


def test_paths_of_every_sort(desk: Path) -> None:
    absolute = desk / "photos/cat/cat_0.JPEG"
    (desk / "tables").mkdir()
    rows = [{"path": str(absolute)}, {"path": "../photos/dog/dog_1.JPEG"}, {"path": "../photos/cat/cat_0.JPEG"}]
    source = list_source(write_table(desk / "tables/t.csv", rows))
    assert [Path(image.name).name for image in source.images] == ["cat_0.JPEG", "dog_1.JPEG", "cat_0.JPEG"]
    keys = set(read(pack(desk / "tables/t.csv", desk / "tables/set", workers=1).root))  # beside the table: allowed
    assert "photos/dog/dog_1" in keys and len(keys) == 3 and not any(".." in key or key[0] == "/" for key in keys)


def test_what_is_not_there_is_skipped_and_named(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "bad.png").write_bytes(b"no image")
    (desk / "notes.txt").write_text("text")
    rows = [*rows_of(desk), {"file_name": "photos/gone.jpg"}, {"file_name": ""}, {"file_name": "bad.png"},
            {"file_name": "notes.txt"}, {"file_name": "photos"}, {"file_name": "x\0y.jpg"}]  # fmt: skip
    for kind, where in (("csv", "line 9"), ("jsonl", "line 8"), ("parquet", "row 8")):
        out = desk / f"set_{kind}"
        write_table(desk / f"t.{kind}", rows if kind != "csv" else rows[:-1])
        assert main(["shards", "pack", str(desk / f"t.{kind}"), str(out), "--resize", "16"]) == 0
        skipped = dict(line.split("\t") for line in (out / SKIPPED).read_text().splitlines())
        assert skipped[where] == "no path" and skipped["photos/gone.jpg"] == "No such file or directory"
        assert (
            "known format" in skipped["bad.png"] and "suffix" in skipped["notes.txt"] and "suffix" in skipped["photos"]
        )
        assert load_manifest(out).num_samples == 6
        said = capsys.readouterr().err
        assert f"left out {len(skipped)} rows or images that cannot be read" in said and "photos/gone.jpg" in said


BAD = {
    "no such column": ("t.csv", "a,b\n1,2\n", [], "has the columns a, b: none is called file_name"),
    "only urls": ("t.csv", "url,caption\nhttp://x/a.jpg,x\n", [], "url looks like URLs: download them first"),
    "s3": ("t.jsonl", '{"path": "s3://bucket/a.jpg"}', [], "1 rows can be used .first: line 1: s3://b.* only files"),
    "wrong name": ("t.csv", "path\na.jpg\n", ["--image-column", "file"], "no column 'file' .--image-column., only pa"),
    "wrong caption": ("t.csv", "path\na.jpg\n", ["--caption-column", "c"], "no column 'c' .--caption-column."),
    "two captions": ("t.csv", "path,text,text\na.jpg,x,y\n", [], "has several columns called 'text': rename all but"),
    "label of nothing": ("t.jsonl", '{"path": "a.jpg", "label": [1]}', [], "line 1: the label is neither a name nor"),
    "caption of nothing": ("t.jsonl", '{"path": "a.jpg", "caption": {"a": 1}}', [], "line 1: the caption is neither"),
    "bytes": ("t.jsonl", '{"image": {"bytes": "x"}}', [], "line 1: the image is no path but of the type dict"),
    "nothing there": ("t.csv", "path\na.jpg\nb.jpg\n", [], "none of its 2 rows names .* .first: a.jpg: No such"),
    "no rows": ("t.csv", "path\n", [], "t.csv holds no rows"),
    "empty": ("t.csv", "", [], "t.csv holds no rows"),
    "no table": ("t.parquet", "text", [], "t.parquet cannot be read as a table"),
    "broken json": ("t.jsonl", '\n{"path": ', [], "t.jsonl cannot be read as a table: line 2: not JSON .Expecting"),
    "deep list": ("t.json", "[" * 100_000, [], "t.json cannot be read as a table: maximum recursion"),
    "broken list": ("t.json", '[{"path": "a.jpg"},\n{"path": ]', [], "t.json cannot be read .*: line 2 column 10"),
    "json of lists": ("t.json", "[[1]]", [], "record 1: not a JSON object"),
    "not text": ("t.csv", b"path\n\xff\xfe\n", [], "not UTF-8 text .byte 5."),
    "another kind": ("t.xlsx", "x", [], "neither a folder nor a .tar nor a table .*parquet"),
    "two tables": ("t.csv", "path,caption\nphotos/cat/cat_0.JPEG,x\n", ["--captions", "c.csv"], "leave --captions out"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_one_line(
    case: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, options, message = BAD[case]
    monkeypatch.chdir(desk)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["shards", "pack", name, "set", *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), lines
    assert not Path("set").exists()


def test_columns_are_only_for_tables(desk: Path) -> None:
    with pytest.raises(DataError, match=r"photos is no table .*, so it has no --label-column"):
        pack(desk / "photos", desk / "set", columns={"label": "x"})
    assert main(["shards", "pack", str(desk / "photos"), str(desk / "set")]) == 0


def test_without_pyarrow(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(desk / "t.parquet", rows_of(desk))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r'pip install "trivit\[parquet\]"'):
        list_source(table)


def test_captions_of_another_table_and_resize(desk: Path) -> None:
    (desk / "photos/big.png").write_bytes(picture(5, (90, 60), "PNG"))
    table = write_table(desk / "t.csv", [{"path": "photos/big.png"}, {"path": "photos/cat/cat_0.JPEG"}])
    write_table(desk / "c.parquet", [{"file_name": "photos/big.png", "text": "large"}])
    manifest = pack(table, desk / "set", captions=desk / "c.parquet", resize=30, workers=1)
    assert manifest.members == {"jpeg": 1, "jpg": 1, "txt": 1}
    assert read(desk / "set")["big"]["txt"] == b"large"


def test_a_table_is_training_data(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datamodules.open_shards import open_shards

    monkeypatch.setenv("TRIVIT_CACHE", str(desk / "cache"))
    table = write_table(desk / "t.csv", rows_of(desk))
    assert load_manifest(open_shards(table)).num_samples == 6
    assert open_shards(table) == open_shards(table)
