"""RankMe during a run: what it is, that it changes nothing, and what it costs."""

import csv
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.first_images import first_images
from datamodules.normalize import normalize
from evaluation.rankme import rankme
from pretrain import rank_watch
from pretrain import run as run_module
from pretrain.config import parse
from pretrain.rank_watch import RankWatch, evaluating
from pretrain.run import train
from tasks import load_encoder
from tasks.blocks import compile_forward
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tests.pretrain.conftest import SMALL
from tests.pretrain.processes import OBJECTIVES
from tests.pretrain.two_ranks import pretrain_on_two_ranks


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def run_small(drawn: Path, output: Path, *more: str, objective: str = "mae", callbacks: Any = ()) -> Path:
    given = [*OBJECTIVES[objective], "--data.train", str(drawn), "--data.workers", "0", "--output", str(output)]
    if objective == "dino":
        given += ["--model.freeze_last_layer_epochs", "0"]
    if objective == "clip":
        given += ["--data.recipe.captions.templates", "[]"]
    return train(*parse([*given, "--trainer.max_steps", "4", *more]), callbacks)


class Modes(Callback):
    """In which mode each part of the model is after a step."""

    def __init__(self) -> None:
        self.seen: list[list[bool]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.data: Any = trainer.datamodule  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append([part.training for part in pl_module.modules()])


@pytest.mark.parametrize("objective", ["mae", "dino", "clip"])
def test_it_measures_the_encoder_that_is_evaluated_and_changes_nothing(
    objective: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--model.encoder.drop_path", "0.3"]
    monkeypatch.setattr(rank_watch, "SHARE", 0.0)
    without = run_small(drawn, tmp_path / "without", *more, objective=objective, callbacks=[plain := Modes()])
    monkeypatch.setattr(rank_watch, "SHARE", 1e6)
    measured = run_small(drawn, tmp_path / "with", *more, objective=objective, callbacks=[watched := Modes()])
    assert "rankme" not in rows(without)[0]
    values = [float(row["rankme"]) for row in rows(measured)]
    assert len(values) == 4 and all(1 <= value <= 24 for value in values)
    losses = [[row["train/loss"] for row in rows(run)] for run in (without, measured)]
    assert losses[0] == losses[1] and plain.seen == watched.seen
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (without, measured)]
    assert all(torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items())

    encoder, data = load_encoder(measured), watched.data  # DINO's is the teacher's
    images = torch.stack(list(first_images(data.order, data.manifest, 256, crop_size=16, resize=encoder.config.resize)))
    with torch.no_grad():
        found = encoder.features(normalize(images, encoder.config.mean, encoder.config.std))
    assert len(images) == 96 and rankme(found) == pytest.approx(values[-1], rel=1e-4)


def test_it_costs_less_than_its_share(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: a step takes 1 s, an image 0.002 s to read, 0.01 s to encode."""
    monkeypatch.setattr(rank_watch, "SHARE", 0.2)
    clock = [0.0]
    monkeypatch.setattr(rank_watch, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    watches: list[RankWatch] = []

    class Clocked(RankWatch):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            watches.append(self)

        def on_train_batch_end(self, trainer: Trainer, *given: Any) -> None:
            clock[0] += 1
            super().on_train_batch_end(trainer, *given)
            assert self.spent <= 0.2 * clock[0] + 0.002

        def _read(self) -> None:
            clock[0] += 0.002
            super()._read()

        def _measure(self, trainer: Trainer, encoder: Any, count: int) -> dict[str, float] | None:
            clock[0] += 0.01 * min(count, 96)
            return super()._measure(trainer, encoder, count)

    monkeypatch.setattr(run_module, "RankWatch", Clocked)
    run = run_small(drawn, tmp_path / "run", "--trainer.max_steps", "30")
    (watch,) = watches
    given = [int(row["step"]) for row in rows(run) if row["rankme"]]
    assert watch.spent <= 0.2 * clock[0]
    assert 5 <= len(given) <= 8 and max(b - a for a, b in pairwise(given)) <= 6  # a pass costs what is left of 5 steps


def test_a_run_without_room_for_it_goes_on(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rank_watch, "SHARE", 1e6)
    monkeypatch.setattr("tasks.encoders.Encoder.features", no_memory)
    run = run_small(drawn, tmp_path / "run")
    assert len(rows(run)) == 4 and "rankme" not in rows(run)[0]


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one alone, or both together where each has only a part of the encoder."""
    probed = ["--probe.train", str(drawn), "--probe.test", str(drawn)]
    several = ["--data.train", drawn, *probed, "--trainer.max_steps", 3, "--trainer.strategy"]
    commands = [[*SMALL, *several, strategy, "--output", tmp_path / strategy] for strategy in ("ddp", "fsdp2")]
    always = "import pretrain.rank_watch as w; w.RankWatch._may_spend = lambda *_: True"
    pretrain_on_two_ranks(commands, tmp_path, always)
    monkeypatch.setattr(RankWatch, "_may_spend", lambda *_: True)
    run_small(drawn, tmp_path / "one", *probed, "--trainer.max_steps", "3")
    one, ddp, fsdp2 = ([float(row["rankme"]) for row in rows(tmp_path / name)] for name in ("one", "ddp", "fsdp2"))
    assert len(one) == 3 and ddp == pytest.approx(one, rel=1e-3) and fsdp2 == pytest.approx(one, rel=1e-3)
    found = [[float(row["probe/knn"]) for row in rows(tmp_path / name)] for name in ("one", "ddp", "fsdp2")]
    for values in found:
        assert len(values) == 3 and values == pytest.approx(found[0], abs=100 / 96 + 1e-6)  # one image may be a tie


def test_compiled_blocks_are_not_compiled_for_other_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]

    def count(graph: Any, inputs: Any) -> Any:
        calls[0] += 1
        return graph.forward

    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compiling(forward, backend=count))
    torch.compiler.reset()
    encoder = Encoder(EncoderConfig(arch="vit_tiny", width=16, depth=1, heads=1, image_size=16, patch_size=8))
    compile_forward(encoder.blocks)
    encoder(torch.randn(2, 3, 16, 16))
    assert calls == [1]
    with evaluating(encoder):
        encoder(torch.randn(7, 3, 16, 16))
    assert calls == [1]
