"""The same config trains the same model on one and on two ranks, with accumulation and without."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.pretrain.conftest import pretrain
from tests.pretrain.processes import OBJECTIVES, losses
from tests.pretrain.two_ranks import pretrain_on_two_ranks

STEPS = 20
PLAIN = {"mae": [], "dino": ["--model.freeze_last_layer_epochs", 0.5, "--model.clip_grad", 0.3], "clip": []}
PRECISIONS = {"64-true": (1e-8, 1e-9), "32-true": (2e-4, 2e-3)}  # of losses (nine digits are written), of parameters
MICRO_BATCHES = (8, 4)  # of 8 images that a rank has of 16: without accumulation, and with


def command(objective: str, data: Path, run: Path, precision: str, micro_batch: int) -> list[object]:
    return [
        *OBJECTIVES[objective], *PLAIN[objective], "--model.encoder.drop_path", 0, "--data.train", data,
        "--data.workers", 0, "--trainer.max_steps", STEPS, "--trainer.precision", precision,
        "--data.device_batch_size", micro_batch, "--output", run,
    ]  # fmt: skip


def parameters(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def two_ranks(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run OBJECTIVE-PRECISION-MICRO_BATCH for each case."""
    folder = tmp_path_factory.mktemp("two_ranks")
    commands = [
        [*command(objective, drawn, folder / f"{objective}-{precision}-{size}", precision, size),
         "--trainer.strategy", "ddp"]
        for objective in OBJECTIVES for precision in PRECISIONS for size in MICRO_BATCHES
    ]  # fmt: skip
    pretrain_on_two_ranks(commands, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_parameters_are_those_of_one_rank(
    objective: str, precision: str, two_ranks: Path, drawn: Path, tmp_path: Path
) -> None:
    of_loss, of_parameter = PRECISIONS[precision]
    whole = tmp_path / "whole"
    assert pretrain(*command(objective, drawn, whole, precision, 16)) == 0
    assert pretrain(*command(objective, drawn, tmp_path / "parts", precision, 4)) == 0
    want, wanted = losses(whole), parameters(whole)
    assert len(want) == STEPS and any(value.is_floating_point() for value in wanted.values())
    runs = [tmp_path / "parts", *(two_ranks / f"{objective}-{precision}-{size}" for size in MICRO_BATCHES)]
    for run in runs:
        assert losses(run) == pytest.approx(want, rel=of_loss)
        found = parameters(run)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=of_parameter, msg=f"{run.name}: {name}")
