"""The account of bad samples: each is named in `bad_samples.jsonl`, and too many of them stop the run.

Every rank writes a file of its own, `bad_samples.rank1.jsonl` and so on, and reads those of all: on NFS, lines that two
nodes append to one file may overwrite each other.
"""

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from datamodules.errors import DataError, DataFailure
from datamodules.sidecars import cannot_write

_A_FAIR_SAMPLE = 10_000


class BadSample(NamedTuple):
    """A sample that was replaced: shard (file name), key, reason, and the epoch in which it was met."""

    shard: str
    key: str
    reason: str
    epoch: int


class BadSamples:
    """Counts the different bad samples of a run, over all its ranks and earlier starts as far as the file knows them.

    The budget is a share of the samples drawn so far (at most one epoch of them, at least ten thousand or the whole
    data set), so that a broken data set stops a run early and a single bad image never stops a small one twice over.

    Args:
        path: the JSON lines file of the first rank, those of others lie beside it; None keeps the account in memory.
        budget: largest share of bad samples.
        num_samples: of the data set.
        root: the data set's folder or URL, for the message.
        rank: whose account this is.
    """

    def __init__(self, path: Path | None, budget: float, num_samples: int, root: Path | str, rank: int = 0) -> None:
        self.path, self.budget, self.num_samples, self.root, self.rank = path, budget, num_samples, root, rank
        self._known: set[tuple[str, str]] = set()
        self._read_up_to: dict[Path, int] = {}
        self._read()

    @property
    def count(self) -> int:
        """How many different bad samples there were, over all ranks as far as the file tells."""
        self._read()
        return len(self._known)

    @property
    def where(self) -> str:
        """The file that names them, whichever rank has written it, or a pattern when there are several."""
        if self.path is None:
            return ""
        files = account_files(self.path) or [self.path]
        return f"{files[0] if len(files) == 1 else self.path.with_stem(self.path.stem + '*')}"

    def add(self, bad: Iterable[BadSample], drawn: int) -> None:
        """Name those that are new; `drawn` samples were drawn since the run began. DataError beyond the budget."""
        bad = list(bad)
        if not bad:
            return
        self._read()
        new = {(sample.shard, sample.key): sample for sample in bad if (sample.shard, sample.key) not in self._known}
        if self.path is not None and new:
            own = self.path.with_stem(f"{self.path.stem}.rank{self.rank}") if self.rank else self.path
            try:
                _append(own, new.values())
            except OSError as error:
                raise DataFailure(cannot_write(own, error)) from error
        self._known |= new.keys()
        allowed = self.budget * min(self.num_samples, max(drawn, _A_FAIR_SAMPLE))
        if self.count > (max(1, allowed) if self.budget else 0):
            last = bad[-1]
            named = f"; all are named in {self.where}" if self.path else ""
            raise DataError(
                f"{self.count} bad samples in {self.root} are more than data.bad_sample_budget {self.budget:g} "
                f"allows, the last one: {last.shard}, {last.key}: {last.reason}{named}. "
                f"`trivit shards verify {self.root}` shows what is wrong"
            )

    def _read(self) -> None:
        for path in account_files(self.path) if self.path else []:
            self._read_file(path)

    def _read_file(self, path: Path) -> None:
        up_to = self._read_up_to.get(path, 0)
        with path.open("rb") as file:
            file.seek(up_to)
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self._read_up_to[path] = up_to + whole
        for line in text[:whole].splitlines():
            try:
                entry = json.loads(line)
                self._known.add((entry["shard"], entry["key"]))
            except (ValueError, KeyError, TypeError):
                continue  # cut by a crash: that sample will be met and named again


def account_files(path: Path) -> list[Path]:
    """The files of all ranks, as far as they exist; `path` is the first rank's."""
    return [*([path] if path.is_file() else []), *sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))]


def _append(path: Path, samples: Iterable[BadSample]) -> None:
    lines = "".join(json.dumps(sample._asdict(), ensure_ascii=False) + "\n" for sample in samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        data = lines.encode("utf-8", "backslashreplace")
        if os.write(file, data) < len(data):  # one write, so that a crash cuts a line at most
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(file)
