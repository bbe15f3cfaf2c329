"""Tables of the usual kinds, row by row: CSV, TSV, JSON lines (or one JSON list), Parquet.

A row that cannot be read is a text that says why, in the place of what it holds: one such row is no reason to refuse
the others. A quote in a CSV that is not closed is one: nobody knows how many rows it took in.
"""

import contextlib
import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.errors import DataError
from datamodules.tar_index import cannot_read

JSON = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")
TABLES = (".csv", ".tsv", *JSON, *PARQUET)
"""Suffixes of tables, in lower case."""

FILE_COLUMNS = ("file_name", "filename", "file", "filepath", "file_path", "path", "image_path", "image", "name", "key")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "title", "description", "sentence", "sentences")
LABEL_COLUMNS = ("class_name", "label_name", "class", "label", "category", "target")

MORE_CELLS, FEWER_CELLS = "more cells than the header", "fewer cells than the header"

Record = dict[str, Any]
_LOOKED_AT = 100
_NO_OBJECT = "not a JSON object"
_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')


@contextlib.contextmanager
def table_errors(path: Path) -> Iterator[None]:
    """Turn whatever reading a table raises into a DataError."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(cannot_read(path, error)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except (csv.Error, ValueError, RecursionError) as error:  # also what json and pyarrow raise
        raise DataError(f"{path} cannot be read as a table: {error}") from error


def column_names(path: Path) -> list[str]:
    """The columns of a table: its header, or the names that its first records have. DataError as `table_errors`."""
    with table_errors(path):
        if path.suffix.lower() in PARQUET:
            with _parquet(path) as file:
                return list(file.schema_arrow.names)
        if path.suffix.lower() in JSON:
            return _json_columns(path)
        return next((header_of(path, row) for _, row in text_rows(path)), [])


def records(path: Path, names: Sequence[str] = ()) -> Iterator[tuple[str, Record | str]]:
    """Every row as ("line 7", {column: value}); of Parquet only the columns `names`.

    A text in place of the record says why it cannot be read. DataError as `table_errors`, and as `text_rows`.
    """
    with table_errors(path):
        suffix = path.suffix.lower()
        if suffix in PARQUET:
            with _parquet(path) as file:
                batches = file.iter_batches(columns=list(names) or None)
                rows = (record for batch in batches for record in batch.to_pylist())
                yield from ((f"row {number}", record) for number, record in enumerate(rows, 1))
        elif suffix in JSON:
            yield from _json(path)
        else:
            header: list[str] | None = None
            for number, row in text_rows(path):
                if header is None:
                    header = header_of(path, row)
                elif row:
                    odd = row if isinstance(row, str) else miscounted(row, len(header))
                    yield f"line {number}", odd or dict(zip(header, row, strict=False))


def text_rows(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Number of the first line, and cells, of every row of a CSV or TSV, or why they cannot be told apart.

    Raises:
        DataError: when a quote is not closed where its cell ends.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines: list[str] = []
        # A quote in TSV is a quote; in CSV it protects commas and line breaks.
        is_csv = path.suffix.lower() == ".csv"
        kept = _kept(file, lines)
        reader = csv.reader(kept, strict=True) if is_csv else csv.reader(kept, delimiter="\t", quoting=csv.QUOTE_NONE)
        while True:
            lines.clear()
            number = reader.line_num + 1
            row: list[str] | str
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if is_csv and (opens := _unclosed(lines)) is not None:
                    raise DataError(
                        f"{path}, line {number + opens}: the quote that opens here is not closed where its cell ends: "
                        'add the closing one (quotes within quoted text are written twice, "")'
                    ) from error
                row = _leniently(lines) if is_csv else f"{error}"
            yield number, row


def header_of(path: Path, row: list[str] | str) -> list[str]:
    """The names in the first row of a text table; commas behind the last one mean nothing."""
    if isinstance(row, str):
        raise DataError(f"{path} cannot be read as a table: its header: {row}")
    names = [cell.strip() for cell in row]
    while names and not names[-1]:
        names.pop()
    return names


def miscounted(row: Sequence[str], columns: int) -> str | None:
    """Why a row does not fit under so many columns, None when it does; empty cells behind the last one are harmless."""
    if any(cell.strip() for cell in row[columns:]):
        return MORE_CELLS
    return FEWER_CELLS if len(row) < columns else None


def keep_together(path: Path) -> str:
    """What to do so that a text is not cut into several cells."""
    return "put quotes around captions that hold commas" if path.suffix.lower() == ".csv" else "captions hold no tabs"


def find_column(columns: Sequence[str], usual: Sequence[str]) -> str | None:
    """The column that has the first of the usual names, in any case of letters; None when there is none."""
    by_name = {column.lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in usual if name in by_name), None)


def captions_in(value: object) -> list[str] | None:
    """The captions in a cell, one or a list of them, each on one line; None when it holds something else."""
    texts = value if isinstance(value, list) else [value]
    if any(not isinstance(text, str) and not is_missing(text) for text in texts):
        return None
    return [clean for text in texts if isinstance(text, str) and (clean := " ".join(text.split()))]


def is_missing(value: object) -> bool:
    """Whether a cell is empty: also the NaN that other programs write for it."""
    return value is None or value == "" or value != value


def _kept(file: Iterable[str], lines: list[str]) -> Iterator[str]:
    """The lines of a file, which are put into `lines` as well."""
    for line in file:
        lines.append(line)
        yield line


def _unclosed(lines: Sequence[str]) -> int | None:
    """In which of the lines of a row of CSV a quote opens that takes in more than its cell; None when none does."""
    text, start = "".join(lines), 0
    while start < len(text):
        if text[start] == '"':
            closed = _QUOTED.match(text, start)
            amid = closed is not None and text[closed.end() : closed.end() + 1] not in ("", ",", "\r", "\n")
            if closed is None or (amid and len(lines) > 1):  # the next quote, rows below, is not its own
                return len(re.findall(r"\r\n|\r|\n", text[:start]))
            start = closed.end()
        start = text.find(",", start) + 1 or len(text)
    return None


def _leniently(lines: Iterable[str]) -> list[str] | str:
    """A line with text behind a closing quote, as other programs read it: "big" dog is big dog."""
    try:
        return next(csv.reader(lines))
    except csv.Error as error:
        return f"{error}"


def _json_columns(path: Path) -> list[str]:
    """The names that the first records have."""
    odd: list[str] = []
    names: dict[str, None] = {}
    looked_at = 0
    for place, record in _json(path):
        if isinstance(record, str):
            odd = odd or [f"{place}: {record}"]
        else:
            names.update(dict.fromkeys(record))
            looked_at += 1
            if looked_at == _LOOKED_AT:
                break
    if odd and not looked_at:
        raise DataError(f"{path} cannot be read as a table: {odd[0]}")
    return list(names)


def _json(path: Path) -> Iterator[tuple[str, Record | str]]:
    """The records of JSON lines, or of one list."""
    with path.open(encoding="utf-8-sig") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        if first == "[":
            try:
                values = json.load(file)
            except (ValueError, RecursionError):
                if path.suffix.lower() == ".json":
                    raise
                file.seek(0)  # lines, of which the first one is odd
            else:
                for number, value in enumerate(values, 1):
                    yield f"record {number}", value if isinstance(value, dict) else _NO_OBJECT
                return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _parsed(line)


def _parsed(line: str) -> Record | str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at character {error.colno})"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        return f"not JSON ({error})"
    return value if isinstance(value, dict) else _NO_OBJECT


def _parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f'{path}: Parquet needs the pyarrow package: pip install "trivit[parquet]"') from error
    return ParquetFile(path)
