"""`trivit evaluate RUN --suite FILE`: every task of a suite, each with its own results.json, and one table of them."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.console import table, tell
from datamodules.errors import DataError
from datamodules.open_shards import open_shards
from evaluation.errors import EvaluationError
from evaluation.features import assist
from evaluation.probe_options import with_options
from evaluation.probes import ProbeSettings
from evaluation.ranks import one_decimal
from evaluation.results_file import merge, results_file
from evaluation.score import evaluate
from evaluation.suite import METRICS, Task, metric_of, read_suite
from evaluation.team import gather_team
from tasks.encoder_files import checkpoint_hash
from tasks.errors import TaskError

UNTRAINED = "untrained"
"""The floor that has a column of its own; "chance", of zeroshot, is named in it."""


def evaluate_suite(
    source: str | os.PathLike[str], suite: str, *, output: str | os.PathLike[str] | None = None,
    settings: Sequence[str] = (), **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Score an encoder on all tasks of a suite; under torchrun all processes extract features.

    A task that cannot be scored is told and left out. What a task found goes to `suites/SUITE/TASK/results.json` beside
    the results.json of `output` (or of the run), which gets "suite:SUITE".

    Args:
        source: as for `evaluate`.
        suite: a file, or the name of a shipped one, see `read_suite`.
        output: a folder; None: the run.
        settings: of the probes, NAME=VALUE; they go before those of a task.
        options: as for `evaluate`, the same for all tasks.

    Returns:
        {"mean": of the tasks' metrics, None where they are of several kinds, "means": of each kind (accuracy, miou),
        "of": {task: {"metric", "value", "interval", "floor": {name: value}}}, "failed": {task: why}, "protocol": ...};
        {} on all but the first process.

    Raises:
        EvaluationError: the suite cannot be read, or nowhere to write. TaskError: no such encoder.
    """
    name, tasks = read_suite(suite)
    with_options(ProbeSettings(), settings)
    place = results_file(source, output)
    if place is None:
        raise EvaluationError(f"the results of {source} have no place: give --output")
    checkpoint = checkpoint_hash(str(source))
    with gather_team() as team:
        if team.rank:
            for data in {path for task in tasks for path in (task.train, task.test) if path}:
                with contextlib.suppress(DataError):  # which the first process tells
                    open_shards(data)
            assist(team)
            return {}
        found: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for number, task in enumerate(tasks, start=1):
            tell(f"{name}, task {number} of {len(tasks)}: {task.name}")
            folder = place.parent / "suites" / name / task.name
            try:
                found[task.name] = _score(source, task, folder, settings, {**options, "team": team})
            except (EvaluationError, DataError, TaskError) as error:
                failed[task.name] = " ".join(str(error).split())
                tell(f"{task.name} could not be scored: {failed[task.name]}")
    kinds = {task.kind: [found[each.name]["value"] for each in tasks if each.kind == task.kind and each.name in found]
             for task in tasks if task.name in found}  # fmt: skip
    means = {kind: float(np.mean(values)) for kind, values in kinds.items()}
    result = {
        "mean": next(iter(means.values())) if len(means) == 1 else None,
        "means": means,
        "of": found,
        "failed": failed,
        "protocol": {"checkpoint": checkpoint, "suite": name, "tasks": [task.name for task in tasks],
                     "mean": "over the tasks of one kind of metric that were scored"},
    }  # fmt: skip
    merge(place, {f"suite:{name}": result})
    print(suite_table(name, result))
    print(f"results: {place}")
    return result


def suite_table(name: str, result: dict[str, Any]) -> str:
    """The tasks, their metrics and values, the floors, and a mean for each kind of metric, for the terminal."""
    rows = [
        [task, each["metric"], one_decimal(each["value"]),
         " to ".join(map(one_decimal, each["interval"])) if each["interval"] else "",
         ", ".join(one_decimal(value) + ("" if name == UNTRAINED else f" ({name})")
                   for name, value in each["floor"].items())]
        for task, each in result["of"].items()
    ]  # fmt: skip
    rows += [[task, "not scored", "", "", ""] for task in result["failed"]]
    rows += [["mean", kind, one_decimal(mean), "", ""] for kind, mean in result["means"].items()]
    return "\n" + table([name, "metric", "%", "95% interval", UNTRAINED], rows) + "\n"


def _score(
    source: str | os.PathLike[str], task: Task, folder: Path, settings: Sequence[str], options: dict[str, Any]
) -> dict[str, Any]:
    chosen = with_options(ProbeSettings(), (*task.set, *settings))
    results = evaluate(
        source, train=task.train, test=task.test, probes=task.probes, output=folder, settings=chosen,
        templates=task.templates, class_names=task.class_names, captions=task.captions, **options,
    )  # fmt: skip
    probe, _, number = task.number.partition(".")
    interval = results[probe].get("interval" if number == METRICS[probe] else f"{number}_interval")
    floor = {}
    for name, scores in results.get("floors", {}).items():
        if name in (UNTRAINED, "chance") and probe in scores:
            with contextlib.suppress(EvaluationError):  # a number that this floor has not
                floor[name] = metric_of(scores, task.number)
    return {"metric": task.number, "value": metric_of(results, task.number), "interval": interval, "floor": floor}
