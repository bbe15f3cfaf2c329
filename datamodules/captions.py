"""Captions for images to be packed, from a table of file names and captions."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from datamodules.errors import DataError
from datamodules.sources import Source
from datamodules.tables import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    JSON,
    MORE_CELLS,
    PARQUET,
    captions_in,
    column_names,
    find_column,
    keep_together,
    miscounted,
    records,
    table_errors,
    text_rows,
)


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """File name -> its captions, in the order of the table; line breaks within a caption become spaces.

    A header names the columns (see FILE_COLUMNS, CAPTION_COLUMNS); a text table without one must have two, file and
    caption.

    Raises:
        DataError: when the table cannot be read, has no such columns, or is of another kind.
    """
    path = Path(path)
    captions: dict[str, list[str]] = {}
    with table_errors(path):
        for place, name, value in _rows(path):
            texts = captions_in(value)
            if not name or not isinstance(name, str) or texts is None or value is None:
                raise DataError(f"{path}, {place}: a file name and a caption are needed")
            if texts:
                captions.setdefault(name.replace("\\", "/").removeprefix("./"), []).extend(texts)
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
        spellings = [str(source.root / image.name), image.name, inner, base]
        spellings += [str(PurePosixPath(spelling).with_suffix("")) for spelling in spellings[1:]]
        name = next((spelling for spelling in spellings if spelling in captions), None)
        if name is not None and used.setdefault(name, image.name) != image.name:
            raise DataError(f"{table}: {name} may be {used[name]} or {image.name}: write the folder, too")
        found.append(captions[name] if name is not None else [])
    if not used:
        wanted, given = source.images[0].name, next(iter(captions))
        raise DataError(f"{table} names no image of {source.path}: it has {given!r}, the images are like {wanted!r}")
    return found


def _rows(path: Path) -> Iterator[tuple[str, object, object]]:
    """Place, file name and caption of every row."""
    suffix = path.suffix.lower()
    if suffix in (*JSON, *PARQUET):
        columns = column_names(path)
        file, text = find_column(columns, FILE_COLUMNS), find_column(columns, CAPTION_COLUMNS)
        if columns and (file is None or text is None) and suffix in PARQUET:
            raise DataError(f"{path} has the columns {', '.join(columns)}: a file name and a caption are needed")
        for place, record in records(path, [name for name in (file, text) if name is not None]):
            if isinstance(record, str):
                raise DataError(f"{path}, {place}: {record}")
            yield place, record.get(file or ""), record.get(text or "")
        return
    if suffix not in (".csv", ".tsv", ".txt"):
        raise DataError(f"{path}: captions come as .tsv, .csv, .jsonl or .parquet")
    places: tuple[int, int] | None = None
    header: list[str] = []
    for number, row in text_rows(path):
        if isinstance(row, str):
            raise DataError(f"{path}, line {number}: {row}")
        if places is None:
            header = [cell.strip() for cell in row]
            file, text = find_column(header, FILE_COLUMNS), find_column(header, CAPTION_COLUMNS)
            if file is not None and text is not None:
                places = header.index(file), header.index(text)
                continue
            if len(row) != 2:
                raise DataError(
                    f"{path}: {len(row)} columns and no header: name one {'|'.join(FILE_COLUMNS[:4])} and one "
                    f"{'|'.join(CAPTION_COLUMNS[:2])}, or have just two columns"
                )
            places = 0, 1
        if row:
            if miscounted(row, len(header)) == MORE_CELLS:
                raise DataError(f"{path}, line {number}: more cells than in the first line: {keep_together(path)}")
            short = len(row) <= max(places)
            yield f"line {number}", *((None, None) if short else (row[places[0]], row[places[1]]))
