import time

import pytest

from benchmarks.measuring import LIMIT, measure
from pretrain.metrics import Metrics
from pretrain.phases import PhaseTimer
from tests.pretrain.conftest import SMALL


def spin(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@pytest.mark.slow
def test_every_call_that_measures_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made slower, they are found slower by as much, in marks, in metrics, and in the clock that these ask."""
    small = [f"{name}={value}" for name, value in zip(SMALL[2::2], SMALL[3::2], strict=True)]
    small = [option for option in small if not option.startswith(("--log_every", "--trainer", "--data.workers"))]
    (row,) = measure(1, small)
    assert row.ours > 0 and row.baseline > 0 and row.ratio == row.baseline / row.ours
    calls = [0]
    end, take, mark = Metrics.on_train_batch_end, PhaseTimer.take, PhaseTimer.start

    def slow_end(*arguments: object) -> None:
        spin(0.03)
        end(*arguments)  # type: ignore[arg-type]

    def slow_take(timer: PhaseTimer) -> object:
        calls[0] += 1
        spin(0.1)
        return take(timer)

    def slow_mark(timer: PhaseTimer, name: str) -> None:
        if name == "run_training_batch":
            spin(0.02)
        mark(timer, name)

    monkeypatch.setattr(Metrics, "on_train_batch_end", slow_end)
    monkeypatch.setattr(PhaseTimer, "take", slow_take)
    monkeypatch.setattr(PhaseTimer, "start", slow_mark)
    (slower,) = measure(1, small)
    assert calls[0] == 2  # of which one before what is counted
    assert slower.ours - row.ours == pytest.approx(30 + 100 / 10 + 20, rel=0.15)
    assert slower.baseline - row.baseline == pytest.approx(LIMIT * (slower.ours - row.ours), rel=0.5)
    assert Metrics.on_train_batch_end is slow_end, "nothing stays as it was for measuring"
