"""kNN during a run: what it is, that it changes nothing, what it costs, and what cannot work."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules.synth import synth
from evaluation.score import evaluate
from pretrain import rank_watch
from pretrain import run as run_module
from pretrain.probe_watch import ProbeWatch
from pretrain.rank_watch import RankWatch
from tests.evaluation.conftest import write_images
from tests.pretrain.conftest import pretrain
from tests.pretrain.test_rank_watch import rows, run_small


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("labelled")
    synth(root / "train", samples=60, size=32, seed=5, samples_per_shard=40)
    synth(root / "test", samples=30, size=32, seed=6, samples_per_shard=40)
    return ["--probe.train", str(root / "train"), "--probe.test", str(root / "test")]


@pytest.fixture
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if training had begun long ago."""
    monkeypatch.setattr(RankWatch, "_may_spend", lambda *_: True)


@pytest.mark.parametrize("objective", ["mae", "dino", "clip"])
def test_it_is_the_knn_of_evaluation_and_changes_nothing(
    objective: str, drawn: Path, labelled: list[str], tmp_path: Path, no_limit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    more = ["--model.encoder.drop_path", "0.3"]
    without = run_small(drawn, tmp_path / "without", *more, objective=objective)
    probed = run_small(drawn, tmp_path / "with", *more, *labelled, objective=objective)
    values = [float(row["probe/knn"]) for row in rows(probed)]
    assert len(values) == 4 and "probe/knn" not in rows(without)[0]
    assert [row["train/loss"] for row in rows(without)] == [row["train/loss"] for row in rows(probed)]
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (without, probed)]
    assert all(torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items())
    found = evaluate(
        probed, train=labelled[1], test=labelled[3], probes=("knn",), floors=False, workers=0, device="cpu"
    )
    assert values[-1] == pytest.approx(found["knn"]["top1"], abs=100 / 30 + 1e-6)


def test_every_so_many_steps(drawn: Path, labelled: list[str], tmp_path: Path, no_limit: None) -> None:
    run = run_small(drawn, tmp_path / "run", *labelled, "--probe.every", "2", "--trainer.max_steps", "6")
    assert [int(row["step"]) for row in rows(run) if row["probe/knn"]] == [2, 4, 6]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[ProbeWatch]]:
    """Time of our own, and who watches: a step takes 1 s, an image 0.002 s to read, 0.005 s to encode."""
    clock = [0.0]
    monkeypatch.setattr(rank_watch, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    watches: list[ProbeWatch] = []

    class Clocked(ProbeWatch):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            watches.append(self)

        def on_train_batch_end(self, trainer: Trainer, *given: Any) -> None:
            clock[0] += 1
            super().on_train_batch_end(trainer, *given)
            assert self.spent <= self.config.share * clock[0] + 0.002

        def _read(self) -> None:
            clock[0] += 0.002
            super()._read()

        def _measure(self, trainer: Trainer, encoder: Any, count: int) -> dict[str, float] | None:
            clock[0] += 0.005 * count
            return super()._measure(trainer, encoder, count)

    monkeypatch.setattr(run_module, "ProbeWatch", Clocked)
    return clock, watches


def test_it_costs_less_than_its_share(
    drawn: Path, labelled: list[str], tmp_path: Path, clock: tuple[list[float], list[ProbeWatch]]
) -> None:
    run = run_small(drawn, tmp_path / "run", *labelled, "--probe.share", "0.2", "--trainer.max_steps", "30")
    (now,), (watch,) = clock
    given = [int(row["step"]) for row in rows(run) if row["probe/knn"]]
    assert watch.spent <= 0.2 * now
    assert len(given) >= 5 and max(b - a for a, b in pairwise(given)) <= 4


def test_a_run_too_short_for_its_images_says_which_share_they_need(
    drawn: Path, labelled: list[str], tmp_path: Path, clock: tuple[list[float], list[ProbeWatch]],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    short = ["--trainer.max_steps", "30", "--probe.share"]
    none = run_small(drawn, tmp_path / "none", *labelled, *short, "0.002")
    told = capfd.readouterr().err
    assert not any(row.get("probe/knn") for row in rows(none)) and "probe/knn was never measured: 90 images" in told
    share = told.partition("--probe.share ")[2].split()[0]
    clock[0][0] = 0
    some = run_small(drawn, tmp_path / "some", *labelled, *short, share)
    assert any(row["probe/knn"] for row in rows(some)) and "never measured" not in capfd.readouterr().err


def test_what_cannot_work_is_one_line(
    small: list[str], labelled: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "run")]
    bare = str(write_images(tmp_path / "bare", 10, labelled=False))
    other = str(write_images(tmp_path / "other", 12))
    for given, told in (
        (labelled[:2], "probe needs both"),
        ([*labelled, "--probe.share", "2"], "probe.share must be between 0 and 1"),
        ([*labelled, "--probe.k", "0"], "probe.k must be at least 1"),
        ([*labelled[:2], "--probe.test", str(tmp_path / "none")], "none"),
        ([*labelled[:2], "--probe.test", bare], "no test image has a label"),
        ([*labelled[:2], "--probe.test", other], "test classes without any train image"),
    ):
        assert pretrain(*small, *given, *output) == 2
        error = capsys.readouterr().err
        assert told in error and "Traceback" not in error and not (tmp_path / "run" / "metrics.csv").exists()
