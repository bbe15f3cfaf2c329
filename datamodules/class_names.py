"""What classes are called: a user's table of names, since folders often carry codes such as WordNet's."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from datamodules.errors import DataError
from datamodules.tar_index import cannot_read

_CODE = re.compile(r"n\d{8}")
_NAME_COLUMNS = ("names", "name", "class_name", "label", "words", "text")


def read_class_names(path: str | Path, classes: Sequence[str]) -> list[list[str]]:
    """The names of each class, in the order of `classes`; synonyms are separated by commas.

    The table is TSV or CSV: one column holds the classes as the data set calls them, another one (with a header: names,
    name, class_name, label, words or text) what they are. Or it has one line of names for each class, in their order.

    Raises:
        DataError: when the file cannot be read, or does not name every class.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(cannot_read(path, error)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    separator = "\t" if path.suffix.lower() != ".csv" else ","
    rows = [row for row in csv.reader(lines, delimiter=separator) if row]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    named = next((header.index(column) for column in _NAME_COLUMNS if column in header), None)
    if named is not None and len(header) > 1:
        table = [row for row in rows[1:] if len(row) == len(header)]
        if (cells := _called(table, len(header), classes, named)) is not None:
            return _synonyms_of(cells, classes, path)
        missing = sorted(set(classes) - {cell for row in table for cell in row})
        raise DataError(
            f"{path} does not name {len(missing)} of {len(classes)} classes (first: {missing[0]})" if missing
            else f"{path}: no column holds the classes as the data set calls them (such as {classes[0]})"
        )  # fmt: skip
    columns = max(map(len, rows)) if rows and min(map(len, rows)) > 1 else 0
    if (cells := _called(rows, columns, classes)) is not None:
        return _synonyms_of(cells, classes, path)
    if separator == "\t" and any(len(row) > 1 for row in rows):
        raise DataError(
            f"{path}: no column holds the classes as the data set calls them (such as {classes[0]}); without one give "
            "each line the names of a class, separated by commas, in the order of the classes"
        )
    if len(rows) != len(classes):
        raise DataError(
            f"{path} has {len(rows)} lines for {len(classes)} classes: give one line of names for each class, or a "
            f"header with a column of classes and one called {' or '.join(_NAME_COLUMNS[:2])}"
        )
    return _synonyms_of([",".join(row) for row in rows], classes, path)


def _called(
    rows: Sequence[Sequence[str]], columns: int, classes: Sequence[str], named: int | None = None
) -> list[str] | None:
    """What rows call each class, by the first column that holds all classes; `named`: where names are, None: elsewhere.

    None when no column does.
    """
    for column in range(columns):
        if column == named:
            continue
        long = [row for row in rows if len(row) > column]
        rest = {row[column]: [*row[:column], *row[column + 1 :]] if named is None else [row[named]] for row in long}
        if set(classes) <= set(rest):
            return [",".join(rest[name]) for name in classes]
    return None


def refuse_codes(names: Iterable[Sequence[str]]) -> None:
    """DataError when a class is called by its code in WordNet: nobody captions an image so."""
    codes = [name for each in names for name in each if _CODE.fullmatch(name)]
    if codes:
        more = f" and {len(codes) - 5} more" if len(codes) > 5 else ""
        raise DataError(
            f"captions would name classes by codes of WordNet ({', '.join(codes[:5])}{more}): give a table of what "
            "they are called (class_names, with a column of classes and one of names)"
        )


def _synonyms_of(cells: Sequence[str], classes: Sequence[str], path: Path) -> list[list[str]]:
    """The names in the cell of each class, which commas separate; DataError for a class without any."""
    found = [[name.strip() for name in cell.split(",") if name.strip()] for cell in cells]
    for name, names in zip(classes, found, strict=True):
        if not names:
            raise DataError(f"{path} gives {name} no name")
    return found
