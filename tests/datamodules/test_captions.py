"""Captions from tables of several kinds, and their images."""

import json
from pathlib import Path

import pytest

from datamodules.captions import captions_of, read_captions
from datamodules.errors import DataError
from datamodules.sources import Source, list_source
from tests.datamodules.tar_builders import image_folders

ROWS = [("a/x.jpg", 'says "hi"'), ("b.jpg", "ein Bär"), ("a/x.jpg", "again")]
EXPECTED = {"a/x.jpg": ['says "hi"', "again"], "b.jpg": ["ein Bär"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.tsv", "".join(f"{file}\t{caption}\n" for file, caption in ROWS)),
        ("c.tsv", "id\tcaption\tfilename\r\n" + "".join(f"1\t{caption}\t{file}\r\n" for file, caption in ROWS)),
        ("c.txt", "".join(f"./{file}\t{caption}\n\n" for file, caption in ROWS)),
        ("c.csv", "\ufeffFile_Name,Text\na/x.jpg,\"says \"\"hi\"\"\"\nb.jpg,\"ein\n Bär\"\na\\x.jpg,again\n"),
        ("c.jsonl", "\n".join(json.dumps({"file_name": file, "text": caption, "n": 1}) for file, caption in ROWS)),
    ],
)  # fmt: skip
def test_tables(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    assert read_captions(tmp_path / name) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", b"a,b,c\n1,2,3\n", "3 columns and no header"),
        ("c.csv", b"file,caption\nonly\n", "line 2: a file name and a caption"),
        ("c.csv", b"file,caption\na.jpg,red, green\n", "line 2: more cells than in the first line: put quotes around"),
        (
            "c.tsv",
            b"a.jpg\tred\nb.jpg\tblue\tgreen\n",
            "line 2: more cells than in the first line: captions hold no tabs",
        ),
        ("c.csv", b'file,caption\na.jpg,"red\nb.jpg,blue\n', "line 2: the quote that opens here is not closed"),
        ("c.csv", b"file,caption\n", "holds no captions"),
        ("c.tsv", b"a.jpg\t \n", "holds no captions"),
        ("c.tsv", b"a.jpg\t\xff\n", r"not UTF-8 text \(byte 6\)"),
        ("c.jsonl", b"{", "cannot be read as a table"),
        ("c.jsonl", b"[1]", "record 1: not a JSON object"),
        ("c.jsonl", b'{"file": "a"}', "line 1: a file name and a caption"),
        ("c.jsonl", b'{"file": 3, "text": "x"}', "line 1: a file name and a caption"),
        ("c.parquet", b"PAR1", "cannot be read as a table"),
        ("c.xlsx", b"PK", r"captions come as \.tsv, \.csv, \.jsonl or \.parquet"),
    ],
)
def test_bad_tables(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_captions(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_captions(tmp_path / "c.csv")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    folder = image_folders(tmp_path / "top" / "photos", ["cat", "dog"], 2)
    (folder / "cat" / "same.jpg").touch()
    (folder / "dog" / "same.jpg").touch()
    return list_source(tmp_path / "top")


@pytest.mark.parametrize(
    "name",
    ["photos/cat/cat_1.JPEG", "cat/cat_1.JPEG", "cat_1.JPEG", "cat/cat_1", "cat_1", "{top}/photos/cat/cat_1.JPEG"],
)
def test_ways_to_name_an_image(source: Source, name: str) -> None:
    found = captions_of(source, {name.format(top=source.path): ["a cat"], "unused.jpg": ["-"]}, "t.csv")
    assert [bool(captions) for captions in found] == [image.name.endswith("cat_1.JPEG") for image in source.images]


def test_names_that_do_not_fit(source: Source) -> None:
    with pytest.raises(DataError, match=r"same\.jpg may be photos/cat/same\.jpg or photos/dog/same\.jpg: write the"):
        captions_of(source, {"same.jpg": ["x"]}, "t.csv")
    assert sum(map(len, captions_of(source, {"cat/same.jpg": ["x", "y"]}, "t.csv"))) == 2
    with pytest.raises(
        DataError, match=r"names no image of .*: it has 'zebra\.jpg', the images are like 'photos/cat/c"
    ):
        captions_of(source, {"zebra.jpg": ["x"]}, "t.csv")
