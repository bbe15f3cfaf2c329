"""The learning rate over a run, against the MAE authors' numbers."""

import pytest
import torch

from tasks.encoder_config import EncoderConfig
from tasks.errors import TaskError
from tasks.mae_task import MAETask
from tasks.schedules import set_learning_rate, warmup_cosine

TINY = EncoderConfig(arch="vit_tiny", width=16, depth=1, heads=1, image_size=16, patch_size=8)


def tiny_task(**changes) -> MAETask:
    return MAETask(TINY, 16, 1, 1, mask_ratio=0.5, **changes)


@pytest.mark.golden("mae_schedules")
def test_learning_rates_are_the_authors(golden):
    for recorded in golden.values["lr_schedules"]:
        c = recorded["config"]
        task = tiny_task(lr=c["lr"], min_lr=c["min_lr"], warmup_epochs=c["warmup_epochs"])
        scales = recorded["lr_scales"]
        groups = [{"params": [torch.zeros(1)], **({} if scale is None else {"lr_scale": scale})} for scale in scales]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        steps_per_epoch, total = c["iters_per_epoch"], c["epochs"] * c["iters_per_epoch"]
        task.check_schedule(total, steps_per_epoch)
        for row in recorded["rows"]:
            values = dict(zip(recorded["columns"], row, strict=True))
            step = round(values["epoch"] * steps_per_epoch)
            rate = task.learning_rate(step, total, steps_per_epoch, global_batch_size=256)
            set_learning_rate(optimizer, rate)
            assert abs(rate - values["lr"]) < 1e-12
            for i, group in enumerate(optimizer.param_groups):
                assert abs(group["lr"] - values[f"group{i}_lr"]) < 1e-12


def test_shape_of_the_schedule():
    rates = [warmup_cosine(step, 20, 5, 1.0, 0.1) for step in range(21)]
    assert rates[0] == 0
    assert rates[5] == max(rates) == 1
    assert abs(rates[20] - 0.1) < 1e-12
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert warmup_cosine(0, 10, 0, 1.0) == 1
    assert warmup_cosine(1000, 20, 5, 1.0, 0.1) == pytest.approx(0.1)


def test_base_rate_follows_the_global_batch():
    assert tiny_task(base_lr=1.5e-4).peak_lr(4096) == pytest.approx(2.4e-3)
    assert tiny_task(lr=1.5e-4).peak_lr(4096) == 1.5e-4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "exactly one of lr and base_lr"),
        ({"lr": 1e-3, "base_lr": 1e-3}, "exactly one of lr and base_lr"),
        ({"lr": 1e-3, "warmup_epochs": 1, "warmup_steps": 1}, "not both"),
        ({"lr": -1e-3}, "negative"),
        ({"lr": 1e-3, "warmup_steps": -1}, "negative"),
    ],
)
def test_contradictions_are_refused(changes, says):
    with pytest.raises(TaskError, match=says):
        tiny_task(**changes)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(TaskError, match="not shorter than the run of 10"):
        tiny_task(lr=1e-3, warmup_epochs=2).check_schedule(10, 5)
    tiny_task(lr=1e-3, warmup_epochs=1.9).check_schedule(10, 5)
