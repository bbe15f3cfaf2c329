"""Where the time of a run goes: at every moment it is in one phase, told by Lightning's own profiler hooks.

On an accelerator the host runs ahead of the device, so its clock would say which kernels were queued, not which took
long. There the phases are told apart by events in the device's own queue: waiting for data counts only where the
device had nothing left to do, and no step waits for a measurement.
"""

import time
from collections import deque
from typing import Literal, Protocol, get_args

import torch
from lightning.pytorch.profilers import Profiler

Phase = Literal["data", "transfer", "forward", "backward", "communication", "optimizer", "checkpoint", "logging"]
PHASES: tuple[Phase, ...] = get_args(Phase)
COMMUNICATION: Phase = "communication"  # which Lightning knows nothing of: of a sharded model, see `fsdp_clock`
_ACTIONS: dict[str, Phase] = {
    "[_TrainingEpochLoop].train_dataloader_next": "data",
    "run_training_batch": "optimizer",  # besides the two below, which are within
    "save_checkpoint": "checkpoint",
    COMMUNICATION: COMMUNICATION,
}
_HOOKS: dict[str, Phase] = {
    "on_before_batch_transfer": "transfer",
    "batch_to_device": "transfer",
    "on_after_batch_transfer": "transfer",  # what the recipe leaves to the device
    "training_step": "forward",
    "backward": "backward",
}
REST: Phase = "logging"  # callbacks, metrics and the loop itself
MOST_EVENTS = 2048


class Clock(Protocol):
    """Adds up the seconds of each phase."""

    def mark(self, phase: Phase) -> None:
        """What has passed since the last mark belongs to `phase`."""

    def take(self) -> dict[Phase, float]:
        """Seconds of each phase since the last call."""


class HostClock:
    """By the time of the process: right where the host does the work."""

    def __init__(self) -> None:
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def mark(self, phase: Phase) -> None:
        """What has passed since the last mark belongs to `phase`."""
        now = time.perf_counter()
        self._seconds[phase] += now - self._last
        self._last = now

    def take(self) -> dict[Phase, float]:
        """Seconds of each phase since the last call."""
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken


class DeviceClock:
    """By events in the queue of a CUDA device, read when they have long passed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._marks: deque[tuple[torch.cuda.Event, Phase]] = deque()
        self._spare: list[torch.cuda.Event] = []
        self._last = self._event()

    def _event(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def mark(self, phase: Phase) -> None:
        """What the device does between the last mark and this one belongs to `phase`."""
        self._marks.append((self._event(), phase))
        if len(self._marks) > MOST_EVENTS:
            self._read(MOST_EVENTS // 2)

    def _read(self, count: int) -> None:
        if count:
            self._marks[count - 1][0].synchronize()
        for _ in range(count):
            event, phase = self._marks.popleft()
            self._seconds[phase] += self._last.elapsed_time(event) / 1000
            self._spare.append(self._last)
            self._last = event

    def take(self) -> dict[Phase, float]:
        """Seconds of each phase since the last call; waits for the device."""
        self._read(len(self._marks))
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken


class PhaseTimer(Profiler):
    """Tells a clock when phases begin and end; other actions cost one dictionary look-up."""

    def __init__(self) -> None:
        super().__init__()
        self._clock: Clock = HostClock()
        self._now: list[Phase] = [REST]
        self._known: dict[str, Phase | None] = {}

    def begin(self, device: torch.device) -> None:
        """Count from here, by the clock of this device."""
        self._clock = DeviceClock(device) if device.type == "cuda" else HostClock()

    def start(self, action_name: str) -> None:
        """An action begins."""
        if (phase := self._phase(action_name)) is not None:
            self._clock.mark(self._now[-1])
            self._now.append(phase)

    def stop(self, action_name: str) -> None:
        """An action ends."""
        if self._phase(action_name) is not None:
            self._clock.mark(self._now.pop())

    def take(self) -> dict[Phase, float]:
        """Seconds in each phase since the last call; together they are all of the time."""
        self._clock.mark(self._now[-1])
        return self._clock.take()

    def _phase(self, action: str) -> Phase | None:
        if action not in self._known:
            owner, _, hook = action.rpartition(".")
            ours = not owner.startswith("[Callback]")
            self._known[action] = _ACTIONS.get(action) or (_HOOKS.get(hook) if ours else None)
        return self._known[action]
