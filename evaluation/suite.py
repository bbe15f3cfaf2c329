"""Downstream tasks as data: a YAML or TSV file names them, one command scores an encoder on all.

YAML: `tasks:`, a list of mappings with the fields of `Task`. TSV: a header with the fields, one task a line, several
probes or settings separated by commas. Paths, also in settings, may have environment variables ($TRIVIT_DATA), and
relative ones are from the folder that the command runs in, as on the command line.
"""

import csv
import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from evaluation.errors import EvaluationError
from evaluation.probe_options import with_options
from evaluation.probes import ProbeSettings, check_probes

SHIPPED = Path(__file__).resolve().parent.parent / "configs" / "suites"
METRICS = {
    "knn": "top1", "linear": "top1", "few_shot": "top1", "label_free": "purity", "attributes": "top1",
    "linear_paper": "top1", "linear_mae": "top1", "attentive": "top1", "finetune": "top1", "corruptions": "top1",
    "segmentation": "miou", "localisation": "corloc", "zeroshot": "top1", "retrieval": "image_to_text.recall@1",
}  # fmt: skip
"""The number that stands for a probe."""
SET_EXAMPLE = "ks=5,10, finetune.epochs=30"
ACCURACIES = ("top1", "mean_per_class")
"""Numbers that a mean may mix, as papers on transfer do."""


@dataclass(frozen=True)
class Task:
    """One line of a suite.

    Args:
        name: letters, digits, - and _.
        test: images to score on.
        train: images to learn from; None: the probes need none.
        probes: as for `evaluate`.
        metric: PROBE.NUMBER, a number in the results; empty: the main one of the first probe.
        class_names, templates, captions: as for `evaluate`.
        set: settings of the probes, NAME=VALUE, as `--set` takes them.
    """

    name: str
    test: str
    train: str | None = None
    probes: tuple[str, ...] = ()
    metric: str = ""
    class_names: str | None = None
    templates: str | None = None
    captions: str | None = None
    set: tuple[str, ...] = ()

    @property
    def number(self) -> str:
        """The metric, spelt out."""
        return self.metric or f"{self.probes[0]}.{METRICS[self.probes[0]]}"

    @property
    def kind(self) -> str:
        """What the metric is, whichever probe gives it; means are over tasks of one kind."""
        number = self.number.partition(".")[2]
        return "accuracy" if number in ACCURACIES else number


def read_suite(source: str) -> tuple[str, list[Task]]:
    """Name and tasks of a suite: a file, or the name of a shipped one.

    Raises:
        EvaluationError: no such suite, or a task that makes no sense; nothing has been done then.
    """
    path = Path(source).expanduser()
    if not path.is_file() and (SHIPPED / f"{source}.yaml").is_file():
        path = SHIPPED / f"{source}.yaml"
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise EvaluationError(f"cannot read the suite {source}: give a file, or one of {shipped}") from error
    rows = _table(text) if path.suffix == ".tsv" else _mappings(text, path)
    if not rows:
        raise EvaluationError(f"{path} names no task")
    tasks = [_task(row, f"{path}, task {number}") for number, row in enumerate(rows, start=1)]
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise EvaluationError(f"{path}: two tasks are called {twice[0]}")
    return path.stem, tasks


def metric_of(results: Mapping[str, Any], number: str) -> float:
    """The number PROBE.NUMBER in results, as in "retrieval.image_to_text.recall@1"; EvaluationError if not there."""
    value: Any = results
    for part in number.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float):
        raise EvaluationError(f"the results have no number {number}")
    return float(value)


def _mappings(text: str, path: Path) -> list[Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EvaluationError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    tasks = content.get("tasks") if isinstance(content, dict) and set(content) == {"tasks"} else None
    if not isinstance(tasks, list):
        raise EvaluationError(f"{path}: a suite is `tasks:` with a list, and nothing else")
    return tasks


def _table(text: str) -> list[dict[str, Any]]:
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    return [{key: value for key, value in row.items() if value not in (None, "")} for row in rows]


def _task(row: Any, where: str) -> Task:
    known = [field.name for field in fields(Task)]
    if not isinstance(row, dict) or any(key not in known for key in row):
        odd = next((key for key in row if key not in known), row) if isinstance(row, dict) else row
        raise EvaluationError(
            f"{where}: there is no {odd}, but {', '.join(known)} (set has settings of probes, such as {SET_EXAMPLE})"
        )
    if missing := [key for key in ("name", "test") if not isinstance(row.get(key), str)]:
        raise EvaluationError(f"{where}: {missing[0]} is missing")
    if not re.fullmatch(r"[\w-]+", row["name"]):
        raise EvaluationError(f"{where}: the name {row['name']!r} may have letters, digits, - and _ only")
    values: dict[str, Any] = {}
    for key, value in row.items():
        if key == "probes":
            values[key] = _several(value, ",", f"{where}: {key}")
        elif key == "set":  # a value may be several numbers, as in ks=5,10
            pairs = _several(value, r",(?=\s*[A-Za-z_][\w.]*\s*=)", f"{where}: set (as in {SET_EXAMPLE})")
            values[key] = tuple(_expanded(pair, where) for pair in pairs)
        elif not isinstance(value, str):
            raise EvaluationError(f"{where}: {key} must be a text, not {value!r}")
        else:
            values[key] = _expanded(value, where) if key in ("train", "test", "class_names", "templates") else value
    values.setdefault("probes", ("linear",) if "train" in values else ("zeroshot",))
    task = Task(**values)
    check_probes(task.probes)
    with_options(ProbeSettings(), task.set)
    if task.number.partition(".")[0] not in task.probes:
        raise EvaluationError(f"{where}: the metric {task.number} is of none of its probes ({', '.join(task.probes)})")
    return task


def _several(value: Any, between: str, what: str) -> tuple[str, ...]:
    parts: Sequence[Any] = re.split(between, value) if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        raise EvaluationError(f"{what} must be texts, separated by commas or in a list")
    return tuple(part.strip() for part in parts)


def _expanded(path: str, where: str) -> str:
    try:
        return string.Template(path).substitute(os.environ)
    except (KeyError, ValueError) as error:
        name = error.args[0] if isinstance(error, KeyError) else path
        raise EvaluationError(f"{where}: set the environment variable {name}, which {path} asks for") from error
