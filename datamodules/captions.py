"""Captions for images to be packed, from a table: TSV, CSV, or one JSON object per line."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from datamodules.errors import DataError
from datamodules.sources import Source
from datamodules.tar_index import cannot_read

FILE_COLUMNS = ("file_name", "filename", "file", "filepath", "path", "image", "name", "key")
CAPTION_COLUMNS = ("caption", "text", "title", "description", "sentence")


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """File name -> its captions, in the order of the table; line breaks within a caption become spaces.

    A header names the columns (see FILE_COLUMNS, CAPTION_COLUMNS); without one there must be two, file and caption.

    Raises:
        DataError: when the table cannot be read, has no such columns, or is of another kind.
    """
    path = Path(path)
    captions: dict[str, list[str]] = {}
    try:
        for number, name, caption in _rows(path):
            if not name or not isinstance(name, str) or not isinstance(caption, str):
                raise DataError(f"{path}, line {number}: a file name and a caption are needed")
            if caption := " ".join(caption.split()):
                captions.setdefault(name.replace("\\", "/").removeprefix("./"), []).append(caption)
    except OSError as error:
        raise DataError(cannot_read(path, error)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except (csv.Error, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as a table: {error}") from error
    if not captions:
        raise DataError(f"{path} holds no captions")
    return captions


def captions_of(source: Source, captions: dict[str, list[str]], table: str | Path) -> list[list[str]]:
    """The captions of each image of a source; the table may name it by path, by path within the source, or by name.

    Raises:
        DataError: when no image is in the table, or a bare name in it stands for several images.
    """
    found: list[list[str]] = []
    used: dict[str, str] = {}
    for image in source.images:
        inner = source.inner_name(image)
        base = inner.rpartition("/")[2]
        spellings = [str(source.path / image.name), image.name, inner, base]
        spellings += [str(PurePosixPath(spelling).with_suffix("")) for spelling in spellings[1:]]
        name = next((spelling for spelling in spellings if spelling in captions), None)
        if name is not None and used.setdefault(name, image.name) != image.name:
            raise DataError(f"{table}: {name} may be {used[name]} or {image.name}: write the folder, too")
        found.append(captions[name] if name is not None else [])
    if not used:
        wanted, given = source.images[0].name, next(iter(captions))
        raise DataError(f"{table} names no image of {source.path}: it has {given!r}, the images are like {wanted!r}")
    return found


def _rows(path: Path) -> Iterator[tuple[int, object, object]]:
    """Line number, file name and caption of every row."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json", ".ndjson"):
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise DataError(f"{path}, line {number}: not a JSON object")
                    yield number, _first(record, FILE_COLUMNS), _first(record, CAPTION_COLUMNS)
        return
    if suffix not in (".csv", ".tsv", ".txt"):
        raise DataError(f"{path}: captions come as .tsv, .csv or .jsonl")
    with path.open(encoding="utf-8-sig", newline="") as file:
        # A quote in TSV is a quote; in CSV it protects commas and line breaks.
        reader = csv.reader(file) if suffix == ".csv" else csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns: tuple[int, int] | None = None
        for row in reader:
            if columns is None:
                header = [cell.strip().lower() for cell in row]
                names = [column for column in FILE_COLUMNS if column in header]
                texts = [column for column in CAPTION_COLUMNS if column in header]
                if names and texts:
                    columns = header.index(names[0]), header.index(texts[0])
                    continue
                if len(row) != 2:
                    raise DataError(
                        f"{path}: {len(row)} columns and no header: name one {'|'.join(FILE_COLUMNS[:4])} and one "
                        f"{'|'.join(CAPTION_COLUMNS[:2])}, or have just two columns"
                    )
                columns = 0, 1
            if row:
                short = len(row) <= max(columns)
                yield reader.line_num, *((None, None) if short else (row[columns[0]], row[columns[1]]))


def _first(record: dict[str, object], names: tuple[str, ...]) -> object:
    """The first field of a record that exists."""
    return next((record[name] for name in names if name in record), None)
