"""Where time goes: phases of Lightning's hooks, on the host and in the queue of a device."""

import time

import pytest
import torch

from pretrain import phases
from pretrain.phases import PHASES, DeviceClock, HostClock, PhaseTimer


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


def test_a_mark_costs_little() -> None:
    """Fourteen a step, and less than 0.5% of a step of 20 ms: under 7 us each, by the fastest of some tries."""
    clock = HostClock()
    spent = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            clock.mark("forward")
        spent.append((time.perf_counter() - start) / 100)
    assert min(spent) < 7e-6
