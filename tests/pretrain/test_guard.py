"""The guard never waits for an accelerator's newest work: shown without one, by fake tensors that cannot be read."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain import guard as module
from pretrain.errors import NonFiniteError
from pretrain.guard import FiniteGuard
from pretrain.stop import StopRequest
from tasks.gradients import measure_gradients
from tests.tasks.dino_runs import Views, fit, same, state, tiny_task

waited: list[int] = []
"""Numbers of the copies to the host that were waited for; a step makes two: its loss, then its norm."""


class Event:
    made = 0

    def record(self) -> None:
        self.number = Event.made
        Event.made += 1

    def synchronize(self) -> None:
        waited.append(self.number)


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, float]]:
    """What copies hold, 1 if not said otherwise. Reading a tensor of the device itself raises."""
    told: dict[int, float] = {}

    def arrive(sent: Any) -> float:
        if sent._arrived is None:
            return 1.0
        sent._arrived.synchronize()
        assert sent._value.device.type == "cpu"
        return told.get(sent._arrived.number, 1.0)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(module.Sent, "__float__", arrive)
    Event.made = 0
    waited.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield told


class Run:
    def __init__(self, folder: Path) -> None:
        self.guard = FiniteGuard(folder, StopRequest())
        self.trainer: Any = SimpleNamespace(
            global_step=0, accumulate_grad_batches=1, precision_plugin=SimpleNamespace(), global_rank=0,
            save_checkpoint=lambda path: None,
        )  # fmt: skip
        self.parameter = torch.nn.Parameter(torch.empty(4, device="cuda"))
        self.optimizer = torch.optim.AdamW([self.parameter])
        self.optimizer.defaults["fused"] = True

    def step(self) -> None:
        model: Any = SimpleNamespace(measure_gradients=lambda: measure_gradients([self.parameter]))
        self.guard.on_train_batch_start(self.trainer, model, {"key": [f"of step {self.trainer.global_step + 1}"]}, 0)
        self.guard.on_before_backward(self.trainer, model, torch.empty((), device="cuda"))
        self.parameter.grad = torch.empty(4, device="cuda")
        self.guard.on_before_optimizer_step(self.trainer, model, self.optimizer)
        self.trainer.global_step += 1


def test_a_step_waits_for_its_loss_and_for_the_norm_of_the_one_before(values: dict[int, float], tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step()
    assert waited == [0]
    run.step()
    assert sorted(waited) == [0, 1, 2]
    run.guard.check_before_saving(run.trainer)
    assert sorted(waited) == [0, 1, 2, 3] and Event.made == 4


@pytest.mark.parametrize("saves", [True, False])
def test_a_bad_norm_is_found_one_step_later_or_before_saving(
    saves: bool, values: dict[int, float], tmp_path: Path
) -> None:
    run = Run(tmp_path)
    values[1] = float("nan")
    run.step()
    with pytest.raises(NonFiniteError, match=r"a gradient became NaN or infinite at step 1 .samples of step 1 "):
        run.guard.check_before_saving(run.trainer) if saves else run.step()


class Named(Views):
    """Views whose samples have names."""

    def batch(self, micro_step: int) -> dict[str, Any]:
        return {**super().batch(micro_step), "key": ["a sample"]}


@pytest.mark.parametrize("clip", ["parameter", "module"])
def test_gradients_are_measured_once_for_the_log_and_for_clipping(
    clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    norm = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda tensors: calls.append(len(tensors)) or norm(tensors))
    watched, alone = (tiny_task(clip=clip, clip_grad=0.01) for _ in range(2))
    guard = FiniteGuard(tmp_path, StopRequest())
    fit(watched, 3, Named(), callbacks=[guard], accumulate_grad_batches=2)
    trained = sum(parameter.requires_grad for parameter in watched.parameters())
    assert calls == 3 * [trained]
    assert guard.grad_norm is not None and guard.grad_norm > 1, "logged as it was before clipping"
    fit(alone, 3, Named(), accumulate_grad_batches=2)
    assert calls == 6 * [trained] and same(state(watched), state(alone))
