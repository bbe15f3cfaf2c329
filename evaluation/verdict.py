"""What the numbers of a run mean, in plain words: is the loss healthy, and are the scores above their floors?"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaluation.run_files import Run

Health = Literal["early", "diverged", "flat", "falling", "plateau"]
FEWEST_ROWS = 8
FLOORS = {"raw_pixels": "raw pixels", "untrained": "the untrained encoder"}
PROBE_NAMES = {"knn": "kNN", "linear": "Linear probe"}


@dataclass(frozen=True)
class Verdict:
    """`tone` is good, fair or bad; `headline` one short sentence; `details` the reasons, a sentence each."""

    tone: Literal["good", "fair", "bad"]
    headline: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class LossHealth:
    """What the loss curve does, and the sentence that says so."""

    state: Health
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
    start, end, best = float(loss[:edge].mean()), float(loss[-edge:].mean()), float(curve[edge:].min())
    noise = 4 * float(np.diff(loss).std()) / np.sqrt(edge)  # four standard errors of a difference of two such means
    fallen = start - best
    if end > start + noise or (end - best > max(0.5 * fallen, noise) and fallen > noise):
        where = int(step[edge:][curve[edge:].argmin()])
        return LossHealth("diverged", f"The loss rose again: {best:.3f} around step {where:,}, {end:.3f} at the end.")
    if fallen <= noise:
        return LossHealth("flat", f"The loss has not fallen: {start:.3f} at the start, {end:.3f} at the end.")
    before = len(loss) - max(edge, len(loss) // 5)
    late = float(loss[max(0, before - edge) : before].mean()) - end
    drop = f"from {start:.3f} to {end:.3f}"
    if late > max(0.6 * noise, 0.02 * fallen):
        return LossHealth("falling", f"The loss fell {drop} and was still falling at the end.")
    return LossHealth("plateau", f"The loss fell {drop} and has levelled off.")


def judge(run: Run) -> Verdict:
    """Loss, progress and scores of a run in a headline and a few sentences."""
    loss = run.metrics.get("train/loss", np.array([]))
    health = judge_loss(run.metrics.get("step", np.array([])), loss, warmup_steps(run))
    details = [_progress(run), health.text]
    above = [compare(run.results, probe) for probe in PROBE_NAMES if probe in run.results]
    details += [line for _, line in above]
    levels = {level for level, _ in above}
    if health.state == "diverged":
        return Verdict("bad", "The loss has diverged.", tuple(details))
    if health.state == "flat":
        return Verdict("bad", "The loss does not fall: nothing is being learnt.", tuple(details))
    if not above:
        headline = {
            "early": "Too early to say anything.",
            "falling": "Training looks healthy; nothing has been scored yet.",
            "plateau": "The loss has levelled off; nothing has been scored yet.",
        }[health.state]
        return Verdict("fair", headline, (*details, "trivit evaluate tells what the features are worth."))
    if levels == {"above"}:
        headline = "The features are clearly better than raw pixels and than an untrained encoder."
        return Verdict("good", headline, tuple(details))
    if "above" in levels:
        return Verdict(
            "fair", "The features are clearly above the floors by one probe, not by the other.", tuple(details)
        )
    if levels == {"unknown"}:
        return Verdict("fair", "There are scores, but no floors to compare them with.", tuple(details))
    return Verdict(
        "bad", "The features are not clearly better than raw pixels or an untrained encoder.", tuple(details)
    )


def compare(results: dict[str, Any], probe: str) -> tuple[Literal["above", "near", "below", "unknown"], str]:
    """Where a probe's top-1 lies against its floors, by its 95% interval, and the sentence that says so."""
    score = results[probe]["top1"]
    low, high = results[probe].get("interval", [score, score])
    name = PROBE_NAMES[probe]
    floors = {
        label: results.get("floors", {}).get(floor, {}).get(probe, {}).get("top1") for floor, label in FLOORS.items()
    }
    known = {label: value for label, value in floors.items() if value is not None}
    if not known:
        return "unknown", f"{name}: {score:.1f}% of the test images get the right class."
    parts = []
    for label, value in known.items():
        margin = score - value
        if low <= value <= high:
            parts.append(f"about the same as {label} ({value:.1f})")
        else:
            parts.append(f"{abs(margin):.1f} points {'above' if margin > 0 else 'below'} {label} ({value:.1f})")
    highest = max(known.values())
    level: Literal["above", "near", "below"] = "above" if low > highest else "below" if high < highest else "near"
    return level, f"{name}: {score:.1f}% of the test images get the right class, {' and '.join(parts)}."


def warmup_steps(run: Run) -> int:
    """Steps of warm-up as configured; 0 when the config does not tell."""
    steps, epochs = run.get("model.warmup_steps"), run.get("model.warmup_epochs")
    if isinstance(steps, int):
        return steps
    seen = run.metrics.get("epoch", np.array([]))
    if isinstance(epochs, int | float) and len(seen) and seen[-1] > 0:
        return round(epochs * run.step / float(seen[-1]))
    return 0


def _progress(run: Run) -> str:
    if run.max_steps is None or not run.step:
        return f"{run.step:,} steps so far."
    if run.step >= run.max_steps:
        return f"The run is finished: {run.step:,} steps."
    return f"The run has done {run.step:,} of {run.max_steps:,} steps ({100 * run.step // run.max_steps}%)."
