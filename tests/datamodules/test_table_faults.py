"""Tables with rows that cannot be used: these are named, the others packed; nothing hangs or gets lost."""

import json
import os
import re
import socket
from pathlib import Path

import pytest

from datamodules.errors import DataError
from datamodules.pack import SKIPPED
from datamodules.sources import list_source
from pretrain.cli import main
from tests.datamodules.set_files import read
from tests.datamodules.tar_builders import image_folders


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with photos/cat/cat_0.JPEG and so on, six images."""
    image_folders(tmp_path / "photos", ["cat", "dog"], 3)
    return tmp_path


def test_what_is_no_file_is_named_and_never_opened(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)  # the path of a socket must be short
    os.mkfifo(desk / "fifo.jpg")
    (desk / "zero.png").symlink_to("/dev/zero")
    (desk / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("socket.jpg")
    odd = {"fifo.jpg": "a FIFO", "zero.png": "a device", "folder.jpg": "a folder", "socket.jpg": "a socket"}
    (desk / "t.csv").write_text("\n".join(["path", *odd, "photos/cat/cat_0.JPEG"]))
    assert main(["shards", "pack", str(desk / "t.csv"), str(desk / "set")]) == 0
    skipped = dict(line.split("\t") for line in (desk / "set" / SKIPPED).read_text().splitlines())
    assert skipped == {name: f"{kind}, not a file" for name, kind in odd.items()}
    assert "fifo.jpg: a FIFO, not a file" in capsys.readouterr().err
    assert set(read(desk / "set")) == {"cat_0"}


@pytest.mark.parametrize(
    ("lines", "opens"),
    [
        ('photos/cat/cat_0.JPEG,"abc\nphotos/cat/cat_1.JPEG,d\n', 2),
        ('photos/cat/cat_1.JPEG,d\nphotos/cat/cat_0.JPEG,"abc', 3),
        ('photos/cat/cat_0.JPEG,"abc\nphotos/cat/cat_1.JPEG,"d e"\nphotos/cat/cat_2.JPEG,f\n', 2),
        ('"photos/cat/cat_0.JPEG","two\n\nlines"\n"photos/cat/\ncat_1.JPEG","a\nphotos/cat/cat_2.JPEG,"d"\n', 6),
        ('photos/cat/cat_0.JPEG,"abc\n' + "photos/cat/cat_1.JPEG,long\n" * 6000, 2),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_quote_that_takes_in_other_rows_is_refused(
    desk: Path, capsys: pytest.CaptureFixture[str], lines: str, opens: int, end: str
) -> None:
    (desk / "t.csv").write_bytes(f"path,caption\n{lines}".replace("\n", end).encode())
    assert main(["shards", "pack", str(desk / "t.csv"), str(desk / "set")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: ")]
    assert len(said) == 1 and f"t.csv, line {opens}: the quote that opens here is not closed" in said[0]
    assert not (desk / "set").exists()


def test_quotes_that_are_no_mistake(desk: Path) -> None:
    rows = ['cat_0.JPEG,"a, b"', 'cat_1.JPEG,"big" dog', 'cat_2.JPEG,"two\n""lines"""', '"cat_0.JPEG",5" wide', ""]
    (desk / "photos/cat/t.csv").write_text("path,caption\n" + "\n".join(rows))
    source = list_source(desk / "photos/cat/t.csv")
    assert source.captions == (("a, b", '5" wide'), ("big dog",), ('two "lines"',)) and not source.skipped
    (desk / "photos/cat/t.tsv").write_text('path\tcaption\ncat_0.JPEG\t"a\ncat_1.JPEG\tb,c\n')
    assert list_source(desk / "photos/cat/t.tsv").captions == (('"a',), ("b,c",))


@pytest.mark.parametrize(
    ("kind", "comma", "advice"), [("csv", ",", "put quotes around capt"), ("tsv", "\t", "no tabs")]
)
def test_rows_cut_at_the_wrong_places_are_skipped_and_named(
    desk: Path, capsys: pytest.CaptureFixture[str], kind: str, comma: str, advice: str
) -> None:
    rows = ["path,caption,", "photos/cat/cat_0.JPEG,one", "photos/cat/cat_1.JPEG,a,b,c", "photos/cat/cat_2.JPEG", "",
            "photos/dog/dog_0.JPEG,two,,", "photos/dog/dog_1.JPEG,"]  # fmt: skip
    (desk / f"t.{kind}").write_text("\n".join(rows).replace(",", comma))
    assert main(["shards", "pack", str(desk / f"t.{kind}"), str(desk / "set")]) == 0
    said = capsys.readouterr().err
    assert f"t.{kind}: 2 rows have more or fewer cells than the header (first: line 3): " in said and advice in said
    assert "left out 2 rows or images that cannot be read" in said
    skipped = "line 3\tmore cells than the header\nline 4\tfewer cells than the header\n"
    assert (desk / "set" / SKIPPED).read_text() == skipped
    texts = {key: members.get("txt") for key, members in read(desk / "set").items()}
    assert texts == {"cat/cat_0": b"one", "dog/dog_0": b"two", "dog/dog_1": None}
    (desk / "all.csv").write_text("path,caption\nphotos/cat/cat_0.JPEG,a,b\n")
    with pytest.raises(DataError, match=r"none of its 1 rows can be used \(first: line 2: more cells .*; .*put quotes"):
        list_source(desk / "all.csv")


GOOD = {"path": "photos/cat/cat_0.JPEG", "label": "cat", "caption": "one"}
ODD = {
    "url": ("https://x.org/a.jpg,dog,x", "https://x.org/a.jpg is a URL, and only files can be packed: download"),
    "two labels": ("photos/cat/cat_0.JPEG,dog,x", "photos/cat/cat_0.JPEG has two labels, cat and dog: the first one"),
    "no path": (",dog,x", "no path"),
    "number": ({"path": 7}, "the image is no path but of the type int"),
    "no list": ({"path": "photos/dog/dog_0.JPEG", "caption": {"a": 1}}, "the caption is neither a text nor a list of"),
    "no label": ({"path": "photos/dog/dog_0.JPEG", "label": [1]}, "the label is neither a name nor a whole number"),
    "half": ('{"path": "photos/dog/dog_0.JPEG", "caption": "\\ud83d"}', "its text holds half a character"),
    "half a name": ('{"path": "photos/\\udcff.JPEG"}', "its text holds half a character"),
    "no json": ('{"path": "photos/dog/dog_0.JPEG", oops}', "not JSON (Expecting property name "),
    "no object": ('"photos/dog/dog_0.JPEG"', "not a JSON object"),
    "a list": ("[1]", "not a JSON object"),
    "long number": ('{"path": ' + "9" * 5000 + "}", "not JSON (Exceeds the limit"),
    "deep": ("[" * 100_000, "not JSON ("),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "first"),
    [(case, first) for case in ODD for first in (False, True) if not (first and case == "two labels")],
)
def test_one_odd_row_is_skipped_and_named(
    case: str, first: bool, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd, reason = ODD[case]
    is_csv = case in ("url", "two labels", "no path")
    good = [",".join(GOOD.values()) if is_csv else json.dumps(GOOD)]
    row = [odd if isinstance(odd, str) else json.dumps(odd)]
    rows = ["path,label,caption"] * is_csv + (row + good if first else good + row)
    table = desk / ("t.csv" if is_csv else "t.jsonl")
    table.write_text("\n".join(rows))
    assert main(["shards", "pack", str(table), str(desk / "set")]) == 0
    place, found = (desk / "set" / SKIPPED).read_text().rstrip("\n").split("\t")
    assert place == f"line {rows.index(row[0]) + 1}" and found.startswith(reason), found
    said = capsys.readouterr().err
    assert "left out 1 rows or images that cannot be read" in said and f"  {place}: {reason}" in said
    assert read(desk / "set") == {
        "cat_0": {"jpeg": (desk / "photos/cat/cat_0.JPEG").read_bytes(), "txt": b"one", "cls": b"0"}
    }


@pytest.mark.parametrize("case", [case for case in ODD if case != "two labels"])
def test_nothing_but_odd_rows_is_refused_with_the_first_reason(
    case: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd, reason = ODD[case]
    row = odd if isinstance(odd, str) else json.dumps(odd)
    table = desk / ("t.csv" if case in ("url", "no path") else "t.jsonl")
    table.write_text("path,label,caption\n" * (table.suffix == ".csv") + f"{row}\n{row}\n")
    assert main(["shards", "pack", str(table), str(desk / "set")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: ")]
    assert len(said) == 1 and re.search(rf"line [12]: {re.escape(reason)}", said[0]), said
    assert not (desk / "set").exists()
