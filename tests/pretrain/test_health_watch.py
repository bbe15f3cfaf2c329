"""When a verdict is told, and by whom; that runs get the right one is in test_illnesses.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain import health_watch
from pretrain.errors import NonFiniteError
from pretrain.health_watch import HealthWatch

CONFIG = {"model": {"head": {"prototypes": 256}, "warmup_steps": 10}, "trainer": {"max_steps": 1000}}
LEARNS = {"teacher_entropy": 4.5, "kl": 0.4, "prototypes_used": 200.0, "feature_std": 0.5, "micro_batch": 64.0}
POINT = {**LEARNS, "teacher_entropy": 0.2, "kl": 0.1, "prototypes_used": 1.5}


class Console:
    """Feeds rows to a watch, one every ten steps, and keeps what it says."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, first: bool = True) -> None:
        self.said: list[str] = []
        monkeypatch.setattr(health_watch, "_say", self.said.append)
        self.metrics: Any = SimpleNamespace(path=path, newest={})
        self.trainer: Any = SimpleNamespace(is_global_zero=first, global_step=0)
        self.watch = HealthWatch(self.metrics, CONFIG)
        self.watch.on_train_start(self.trainer, None)  # type: ignore[arg-type]

    def rows(self, count: int, numbers: dict[str, float]) -> None:
        for _ in range(count):
            step = int(self.metrics.newest.get("step", 0)) + 10
            values = {f"train/{name}": value for name, value in numbers.items()}
            self.metrics.newest = {"step": step, "epoch": step / 100, **values}
            for _ in range(2):  # the second one is a step without a row
                self.watch.on_train_batch_end(self.trainer, None, None, None, 0)  # type: ignore[arg-type]

    @property
    def told(self) -> list[str]:
        return [line.split(".")[0] for line in self.said]


def test_a_change_is_told_once_and_a_recovery_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(tmp_path / "metrics.csv", monkeypatch)
    console.rows(9, LEARNS)
    assert console.told == ["step 90: learning"]  # possible from 8 rows on, and sure at the second time
    console.rows(5, LEARNS)
    console.rows(1, POINT)  # a single row says nothing
    console.rows(4, LEARNS)
    assert len(console.told) == 1
    console.rows(6, POINT)
    console.rows(3, LEARNS)
    assert console.told[1:] == ["step 220: collapsed to one point"]
    console.rows(3, LEARNS)
    assert console.told[2:] == ["step 300: learning"]
    console.watch.on_train_end(console.trainer, None)  # type: ignore[arg-type]
    last = console.said[-1].splitlines()
    assert last[0].startswith("verdict at step 310: learning. ") and any("Prototypes in use 200: " in x for x in last)
    assert "medians of the last 3 rows" in last[0]


def test_a_resumed_run_knows_what_it_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ",".join(f"train/{name}" for name in POINT)
    values = ",".join(map(str, POINT.values()))
    lines = [f"step,epoch,{names}", *(f"{10 * i},{i / 10},{values}" for i in range(1, 11))]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    console = Console(tmp_path / "metrics.csv", monkeypatch)
    console.metrics.newest = {"step": 100}
    console.rows(2, POINT)
    assert console.told == ["step 120: collapsed to one point"]


def test_only_one_rank_speaks_and_nan_has_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Console(tmp_path / "metrics.csv", monkeypatch, first=False)
    other.rows(9, POINT)
    other.watch.on_train_end(other.trainer, None)  # type: ignore[arg-type]
    other.watch.on_exception(other.trainer, None, NonFiniteError("x"))  # type: ignore[arg-type]
    assert other.said == []
    first = Console(tmp_path / "metrics.csv", monkeypatch)
    first.watch.on_exception(first.trainer, None, ValueError("x"))  # type: ignore[arg-type]
    assert first.said == []
    first.watch.on_exception(first.trainer, None, NonFiniteError("x"))  # type: ignore[arg-type]
    assert first.told == ["step 1: diverging"]


def test_a_long_run_is_judged_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_watch, "MOST_ROWS", 10)
    judged: list[int] = []
    judge = health_watch.judge_health
    monkeypatch.setattr(health_watch, "judge_health", lambda run: judged.append(run.step) or judge(run))
    console = Console(tmp_path / "metrics.csv", monkeypatch)
    console.rows(100, LEARNS)
    assert len(judged) < 40 and console.told == ["step 90: learning"]
