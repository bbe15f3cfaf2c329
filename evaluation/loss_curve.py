"""What a loss curve does: still early, falling, levelled off, flat, or rising again."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

State = Literal["early", "diverged", "flat", "falling", "plateau"]
FEWEST_ROWS = 8


@dataclass(frozen=True)
class LossHealth:
    """What the loss curve does, and the sentence that says so."""

    state: State
    text: str


def smooth(values: NDArray[np.float64], share: float = 0.05) -> NDArray[np.float64]:
    """Running mean over `share` of the rows, at least 3; the window shrinks at both ends."""
    half = max(3, round(share * len(values))) // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    width = np.minimum(np.minimum(i, len(values) - 1 - i), half)
    return np.asarray((total[i + width + 1] - total[i - width]) / (2 * width + 1))


def judge_loss(step: NDArray[np.float64], loss: NDArray[np.float64], warmup: int = 0) -> LossHealth:
    """The state of a loss curve; step and loss are columns of metrics.csv, warm-up in steps.

    early: fewer than 8 rows, or still warming up. diverged: not finite, or it gave back half of what it had gained, or
    it ended above its start. flat: it has not fallen by more than its noise. falling: over the last fifth of the rows
    it fell by more than its noise and 2% of all it had fallen. plateau: none of these.
    """
    finite = np.isfinite(loss)
    if not finite.all():
        return LossHealth("diverged", f"The loss was not a finite number at step {int(step[~finite][0]):,}.")
    if len(loss) < FEWEST_ROWS or step[-1] <= warmup:
        why = "the learning rate is still warming up" if len(loss) >= FEWEST_ROWS else "only a few rows are written"
        return LossHealth("early", f"It is too early to judge the loss: {why}.")
    curve = smooth(loss)
    edge = max(2, len(loss) // 20)
    start, end = float(loss[:edge].mean()), float(loss[-edge:].mean())
    best = min(end, float(curve[edge:-edge].min()))  # nearer to the end the curve is hardly smooth
    noise = 4 * float(np.diff(loss).std()) / np.sqrt(edge)  # four standard errors of a difference of two such means
    fallen = start - best
    if end > start + noise or (end - best > max(0.5 * fallen, noise) and fallen > noise):
        where = int(step[edge:-edge][curve[edge:-edge].argmin()])
        return LossHealth("diverged", f"The loss rose again: {best:.3f} around step {where:,}, {end:.3f} at the end.")
    if fallen <= noise:
        return LossHealth("flat", f"The loss has not clearly fallen: {start:.3f} at the start, {end:.3f} at the end.")
    before = len(loss) - max(edge, len(loss) // 5)
    late = float(loss[max(0, before - edge) : before].mean()) - end
    drop = f"from {start:.3f} to {end:.3f}"
    if late > max(0.6 * noise, 0.02 * fallen):
        return LossHealth("falling", f"The loss fell {drop} and was still falling at the end.")
    return LossHealth("plateau", f"The loss fell {drop} and has levelled off.")
