"""Where the time of a step goes, through Lightning's own profiler hooks."""

import time

from lightning.pytorch.profilers import Profiler

PHASES = {"[_TrainingEpochLoop].train_dataloader_next": "data"}


class PhaseTimer(Profiler):
    """Adds up the seconds of the phases in PHASES; every other action costs one dictionary look-up."""

    def __init__(self) -> None:
        super().__init__()
        self._began: dict[str, float] = {}
        self._seconds: dict[str, float] = dict.fromkeys(PHASES.values(), 0.0)

    def start(self, action_name: str) -> None:
        """A phase begins."""
        if action_name in PHASES:
            self._began[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """A phase ends."""
        if action_name in PHASES:
            self._seconds[PHASES[action_name]] += time.perf_counter() - self._began[action_name]

    def take(self, phase: str) -> float:
        """Seconds spent in `phase` since the last call."""
        seconds, self._seconds[phase] = self._seconds[phase], 0.0
        return seconds
