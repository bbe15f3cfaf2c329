"""What the shard commands say: lines beside a progress bar, and tables; nothing unprintable reaches a terminal."""

import multiprocessing
import re
import sys
from collections.abc import Iterable, Sequence

from tqdm import tqdm


def tell(line: str) -> None:
    """One line on stderr, above the progress bar if there is one; from a worker process in the bar's place."""
    if multiprocessing.parent_process() is None:
        tqdm.write(line, file=sys.stderr)
    else:  # the bar is another process's, and this one's copy of it would be drawn as it once was
        sys.stderr.write(f"\r\x1b[K{line}\n" if sys.stderr.isatty() else f"{line}\n")
        sys.stderr.flush()


def one_line(text: str) -> str:
    """Text that cannot break a table or drive a terminal: line breaks and control characters become spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows under a header in aligned columns; columns of numbers are aligned to the right."""
    cells = [[one_line(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row] for row in rows]
    lines = [list(header), *cells]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    to_right = [all(re.fullmatch(r"[\d,.%]*", cell) for cell in column[1:]) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, to_right, strict=True)
        ).rstrip()
        for line in lines
    )
