"""Tables of the usual kinds, row by row: CSV, TSV, JSON lines (or one JSON list), Parquet."""

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from itertools import islice
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

Record = dict[str, Any]
_LOOKED_AT = 100


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
    except (csv.Error, ValueError) as error:  # also what json and pyarrow raise
        raise DataError(f"{path} cannot be read as a table: {error}") from error


def column_names(path: Path) -> list[str]:
    """The columns of a table: its header, or the names that its first records have. DataError as `table_errors`."""
    with table_errors(path):
        if path.suffix.lower() in PARQUET:
            with _parquet(path) as file:
                return list(file.schema_arrow.names)
        if path.suffix.lower() in JSON:
            return list(dict.fromkeys(name for _, record in islice(_json(path), _LOOKED_AT) for name in record))
        return [cell.strip() for _, row in islice(text_rows(path), 1) for cell in row]


def records(path: Path, names: Sequence[str] = ()) -> Iterator[tuple[str, Record]]:
    """Every row as ("line 7", {column: value}); of Parquet only the columns `names`. DataError as `table_errors`."""
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
                    header = [cell.strip() for cell in row]
                elif row:
                    yield f"line {number}", dict(zip(header, row, strict=False))


def text_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row of a CSV or TSV."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        # A quote in TSV is a quote; in CSV it protects commas and line breaks.
        is_csv = path.suffix.lower() == ".csv"
        reader = csv.reader(file) if is_csv else csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for row in reader:
            yield reader.line_num, row


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


def _json(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open(encoding="utf-8-sig") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        if first == "[":
            found = [(f"record {number}", record) for number, record in enumerate(json.load(file), 1)]
        else:
            lines = ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())
            found = ((place, json.loads(line)) for place, line in lines)  # type: ignore[assignment]
        for place, record in found:
            if not isinstance(record, dict):
                raise DataError(f"{path}, {place}: not a JSON object")
            yield place, record


def _parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f'{path}: Parquet needs the pyarrow package: pip install "trivit[parquet]"') from error
    return ParquetFile(path)
