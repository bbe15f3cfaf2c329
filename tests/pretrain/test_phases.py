"""Where time goes: phases of Lightning's hooks, on the host and in the queue of a device."""

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import phases
from pretrain.health_watch import HealthWatch
from pretrain.metrics import Metrics
from pretrain.phases import PHASES, DeviceClock, HostClock, PhaseTimer
from pretrain.progress import Progress
from tests.pretrain.conftest import pretrain


class Ticking:
    """Host time in whole seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    ticking = Ticking()
    monkeypatch.setattr(phases, "time", ticking)
    return ticking


def test_every_second_belongs_to_one_phase(clock: Ticking) -> None:
    timer = PhaseTimer()
    timer.begin(torch.device("cpu"))
    for action, inside in (
        ("[_TrainingEpochLoop].train_dataloader_next", 3),
        ("[Strategy]DDPStrategy.batch_to_device", 1),
        ("[LightningDataModule]ShardDataModule.on_after_batch_transfer", 2),
        ("[Callback]Metrics.on_train_batch_start", 5),  # logging and the rest
    ):
        with timer.profile(action):
            clock.now += inside
    with timer.profile("run_training_batch"), timer.profile("[LightningModule]MAETask.optimizer_step"):
        with timer.profile("[Strategy]DDPStrategy.training_step"):
            clock.now += 7
        with timer.profile("[Strategy]FSDP2Strategy.backward"):
            clock.now += 14
            with timer.profile("communication"):
                clock.now += 8
        clock.now += 4
    with timer.profile("[Callback]Checkpoints.on_train_batch_end"):
        clock.now += 1
        with timer.profile("save_checkpoint"):
            clock.now += 6
    assert timer.take() == {
        "data": 3, "transfer": 3, "forward": 7, "backward": 14, "communication": 8, "optimizer": 4, "checkpoint": 6,
        "logging": 6,
    }  # fmt: skip
    assert timer.take() == dict.fromkeys(PHASES, 0)


def test_a_callback_that_has_hooks_of_the_same_name_is_no_phase(clock: Ticking) -> None:
    timer = PhaseTimer()
    timer.begin(torch.device("cpu"))
    with timer.profile("[Callback]Own.backward"):
        clock.now += 2
    assert timer.take()["logging"] == 2


class Event:
    """Stands for an event in the queue of a device that is 10 s behind the host."""

    now, waits = 0.0, 0

    def record(self, stream: object) -> None:
        self.at = Event.now + 10

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, later: "Event") -> float:
        return 1000 * (later.at - self.at)


def test_a_device_is_read_late_and_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = DeviceClock(torch.device("cuda"))
    for _ in range(phases.MOST_EVENTS):
        Event.now += 2
        clock.mark("forward")
    assert Event.waits == 0
    Event.now += 3
    clock.mark("backward")
    assert Event.waits == 1, "too many events are read, the older half of them"
    seconds = clock.take()
    assert (seconds["forward"], seconds["backward"]) == (2 * phases.MOST_EVENTS, 3)
    assert sum(clock.take().values()) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_device_time_is_that_of_the_kernels() -> None:
    device = torch.device("cuda")
    x = torch.randn(8192, 8192, device=device)
    x @ x
    torch.cuda.synchronize()
    host, clock = time.perf_counter(), DeviceClock(device)
    for _ in range(20):
        x @ x
    clock.mark("forward")
    queued = time.perf_counter() - host
    time.sleep(0.05)  # the host waits for data, the device is busy still
    clock.mark("data")
    seconds = clock.take()
    assert seconds["forward"] > queued
    assert seconds["data"] < 0.06


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations on tensors, and how many of them wait for a value."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_is_measured_by_a_few_marks_and_waits_for_nothing(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Of all that is measured in a step that ends no row: looks at the clock, and operations that are only queued."""
    marks, taken, steps = [0], [0], []
    mark, take = HostClock.mark, PhaseTimer.take

    def marked(clock: HostClock, phase: Any) -> None:
        marks[0] += 1
        mark(clock, phase)

    def took(timer: PhaseTimer) -> Any:
        taken[0] += 1
        return take(timer)

    def watch(kind: Any) -> None:
        end = kind.on_train_batch_end

        def counted(self: Any, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
            with Counting() as counting:
                end(self, trainer, module, outputs, *rest)
            if kind is Metrics:
                steps.append((trainer.global_step % 4 == 0, marks[0], [], [], len(outputs)))
                marks[0] = 0
            steps[-1][2].append(counting.operations)
            steps[-1][3].append(counting.waits)

        monkeypatch.setattr(kind, "on_train_batch_end", counted)

    for kind in (
        Metrics,
        Progress,
        HealthWatch,
    ):  # in their order; `RankWatch` has a share of the time, tested elsewhere
        watch(kind)
    monkeypatch.setattr(HostClock, "mark", marked)
    monkeypatch.setattr(PhaseTimer, "take", took)
    assert pretrain(*small, "--log_every", 4, "--trainer.max_steps", 12, "--output", tmp_path / "run") == 0
    assert taken == [3] and sum(row for row, *_ in steps) == 3
    between = [step for (before, *_), step in pairwise(steps) if not before and not step[0]]
    assert between
    for _, looks, operations, waits, outputs in between:
        assert looks <= 14 and sum(operations) <= 4 * outputs and waits == [0, 0, 0], steps
