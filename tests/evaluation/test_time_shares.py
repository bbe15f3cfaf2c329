from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.run_files import Run, read_run
from evaluation.time_shares import bottleneck, draw_time_shares, time_shares
from tests.evaluation.conftest import make_run

PHASES = ("data", "forward", "backward", "optimizer", "logging")


def logged(run: Run, *rows: tuple[float, ...], seconds: tuple[float, ...]) -> Run:
    columns = {f"time/{phase}": np.array(column) for phase, column in zip(PHASES, zip(*rows, strict=True), strict=True)}
    return replace(run, metrics={"step": np.arange(1.0, len(rows) + 1), "seconds": np.array(seconds), **columns})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(make_run(tmp_path / "run", train=tmp_path / "data"))


def test_rows_count_by_their_time_and_the_first_not(run: Run) -> None:
    rows = (0.9, 0.1, 0, 0, 0), (0.1, 0.3, 0.6, 0, 0), (0.4, 0.2, 0.4, 0, 0), (0.4, 0.2, 0.4, 0, 0)
    shares = time_shares(logged(run, *rows, seconds=(50.0, 51.0, 54.0, 55.0)))
    assert shares["data"] == pytest.approx((0.1 * 1 + 0.4 * 4) / 5)
    assert sum(shares.values()) == pytest.approx(1)
    assert time_shares(logged(run, *rows[:3], seconds=(50.0, 51.0, 54.0))) == {}, "too few rows"


@pytest.mark.parametrize(
    ("row", "phase", "words"),
    [
        ((0.02, 0.3, 0.6, 0.05, 0.03), "computing", "Computing takes 95% of the time: the model is the limit"),
        (
            (0.31, 0.2, 0.4, 0.05, 0.04),
            "data",
            "waiting for data 31%. What usually helps: more workers (--data.workers)",
        ),
        ((0.12, 0.2, 0.3, 0.30, 0.08), "optimizer", "of which the optimiser 30%. What usually helps: a larger batch"),
        ((0.02, 0.2, 0.3, 0.08, 0.40), "logging", "--log_every"),
    ],
)
def test_what_limits_a_run(run: Run, row: tuple[float, ...], phase: str, words: str) -> None:
    found = bottleneck(logged(run, *4 * (row,), seconds=(1.0, 2.0, 3.0, 4.0)))
    assert found is not None
    assert found.phase == phase
    assert words in found.sentence


def test_mfu_is_told_where_it_is_known(run: Run) -> None:
    row = (0.02, 0.3, 0.6, 0.05, 0.03)
    timed = logged(run, *4 * (row,), seconds=(1.0, 2.0, 3.0, 4.0))
    timed.metrics["train/mfu"] = np.array([0.01, 0.5, 0.52, 0.51])
    found = bottleneck(timed)
    assert found is not None and "at 51% of the GPU's peak" in found.sentence


def test_the_bar_names_every_phase_and_an_old_run_has_none(run: Run) -> None:
    row = (0.31, 0.2, 0.4, 0.05, 0.04)
    svg = draw_time_shares(logged(run, *4 * (row,), seconds=(1.0, 2.0, 3.0, 4.0)))
    assert svg.startswith("<svg") and "waiting for data 31.0%" in svg and "backward pass 40.0%" in svg
    old = replace(run, metrics={"step": np.ones(1), "seconds": np.ones(1)})
    assert (draw_time_shares(old), bottleneck(old), time_shares(old)) == ("", None, {})
