from pathlib import Path

import numpy as np
import pytest

from evaluation.errors import EvaluationError
from evaluation.run_files import read_metrics, read_run
from tests.evaluation.conftest import make_run


def test_a_run_is_read_back(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", train=tmp_path / "data")
    (folder / "bad_samples.jsonl").write_text('{"shard": "a.tar", "key": "k", "reason": "cut off"}\n{"shard": "a.t')
    (folder / "bad_samples.rank1.jsonl").write_text(
        '{"shard": "a.tar", "key": "k", "reason": "cut off"}\n{"shard": "b.tar", "key": "k", "reason": "gone"}\n'
    )
    run = read_run(folder)
    assert run.name == "run"
    assert run.step == run.max_steps == 600
    assert run.get("model.lr") == 1e-3
    assert run.get("model.init_args.warmup_steps") == 50
    assert run.get("model.nothing", "default") == "default"
    assert run.bad == [
        {"shard": "a.tar", "key": "k", "reason": "cut off"},
        {"shard": "b.tar", "key": "k", "reason": "gone"},
    ]
    assert run.results == {}


def test_half_written_rows_and_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss,late\n10,1.5,\n20,nan,3\n30,1.")
    metrics = read_metrics(path)
    assert metrics["step"].tolist() == [10, 20]
    assert metrics["train/loss"][0] == 1.5
    assert np.isnan(metrics["train/loss"][1])
    assert np.isnan(metrics["late"][0])
    assert metrics["late"][1] == 3


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    run = read_run(tmp_path)
    assert run.metrics == {}
    assert run.step == 0
    assert run.max_steps is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.yaml"),
        ({"config.yaml": "a: [1"}, "not valid YAML"),
        ({"config.yaml": "a: 1", "results.json": "{"}, "not valid JSON"),
        ({"config.yaml": "a: 1", "results.json": "[1]"}, "not a JSON object"),
    ],
)
def test_damaged_files_are_one_clear_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_run(tmp_path)


def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no such run"):
        read_run(tmp_path / "nothing")
