"""A run as it lies on disk: config.yaml, metrics.csv, results.json, bad_samples.jsonl, skipped.tsv."""

import contextlib
import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from datamodules.bad_samples import account_files
from datamodules.manifest import skipped_images
from evaluation.errors import EvaluationError

Column = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """What a run has written so far.

    `metrics`: column -> values, one per row, NaN where a cell is empty; `bad`: those of skipped.tsv (images that
    could not be packed) and the lines of bad_samples.jsonl; `non_finite`: the step at which the run ended with a loss
    or a gradient that was no number, if it has not come further since; `scores_only`: this is no run, but a folder with
    the results.json of another encoder (an export, `timm:NAME`, a file of other authors).
    """

    path: Path
    name: str
    config_text: str
    config: dict[str, Any]
    metrics: dict[str, Column]
    results: dict[str, Any]
    bad: list[dict[str, Any]]
    non_finite: int | None = None
    scores_only: bool = False

    @property
    def source(self) -> str:
        """What its encoder is loaded from: the run, or what was scored where there is none."""
        if not self.scores_only:
            return str(self.path)
        sources = (each.get("protocol", {}).get("source") for each in self.results.values() if isinstance(each, dict))
        return next((str(source) for source in sources if source), str(self.path))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the config by its dotted key; `init_args` does not show, as on the command line."""
        value: Any = self.config
        for part in key.split("."):
            if isinstance(value, dict) and part not in value:
                value = value.get("init_args")
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def step(self) -> int:
        """The last optimiser step in metrics.csv, 0 before the first row."""
        steps = self.metrics.get("step", np.array([]))
        return int(steps[-1]) if len(steps) else 0

    @property
    def max_steps(self) -> int | None:
        """How long the run is meant to be."""
        steps, epochs, done = self.get("trainer.max_steps"), self.get("epochs"), self.metrics.get("epoch", np.array([]))
        if epochs is not None and len(done):
            return max(1, round(float(epochs) * self.step / float(done[-1])))
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint, which may not exist yet."""
        return self.path / "checkpoints" / "last.ckpt"


def read_run(path: Path) -> Run:
    """Read a run's folder, or one with a results.json alone.

    Raises:
        EvaluationError: there is neither, or a file is damaged.
    """
    if not path.is_dir():
        raise EvaluationError(f"no such run: {path}")
    config = path / "config.yaml"
    if not config.is_file() and (path / "results.json").is_file():
        results = _read_results(path / "results.json")
        return Run(path, path.resolve().name, "", {}, {}, results, [], scores_only=True)
    if not config.is_file():
        raise EvaluationError(
            f"{path} is no trivit run: it has no config.yaml (nor a results.json of `trivit evaluate ... --output DIR`)"
        )
    try:
        text = config.read_text()
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{config} is not valid YAML: {error}") from error
    metrics = read_metrics(path / "metrics.csv")
    return Run(
        path=path,
        name=path.resolve().name,
        config_text=text,
        config=values if isinstance(values, dict) else {},
        metrics=metrics,
        results=_read_results(path / "results.json"),
        bad=[
            *({"shard": "not packed", "key": name, "reason": reason} for name, reason in skipped_images(path)),
            *_bad_samples(path / "bad_samples.jsonl"),
        ],
        non_finite=non_finite_step(path / "checkpoints", int(max(metrics.get("step", [0])))),
    )


def read_metrics(path: Path) -> dict[str, Column]:
    """Columns of metrics.csv; a cell that is empty or no number is NaN."""
    rows = read_rows(path)
    names = list(rows[0]) if rows else []
    return {name: np.array([_number(row[name]) for row in rows]) for name in names}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv as they are, none when it does not exist; a half-written last one is left out."""
    if not path.is_file():
        return []
    with path.open(newline="", errors="replace") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and row.get("step", "").isdigit()]


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _read_results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise EvaluationError(f"{path} is not valid JSON: move it away and evaluate again") from error
    if not isinstance(results, dict):
        raise EvaluationError(f"{path} is not a JSON object: move it away and evaluate again")
    return results


def non_finite_step(checkpoints: Path, done: int) -> int | None:
    """The step at which a run gave up because of NaN, on any rank; None when it has come further since (`done`)."""
    steps = [0]
    for note in checkpoints.glob("non_finite_rank*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            steps.append(int(json.loads(note.read_text())["step"]))
    return max(steps) if max(steps) > done else None


def _bad_samples(path: Path) -> list[dict[str, Any]]:
    """Of all ranks; two of them may have met the same one at the same time."""
    named: dict[str, dict[str, Any]] = {}
    for file in account_files(path):
        for entry in _read_lines(file):
            named.setdefault(f"{entry.get('shard')}/{entry.get('key')}", entry)
    return list(named.values())


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut by a crash
        if isinstance(entry, dict):
            found.append(entry)
    return found
