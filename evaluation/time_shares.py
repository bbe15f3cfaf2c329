"""Where the time of a run went: its share of each phase, what that means, and a picture."""

from dataclasses import dataclass
from html import escape

import numpy as np

from evaluation.run_files import Run
from evaluation.svg import INK, SERIES, figure, to_svg

WORDS = {
    "data": "waiting for data",
    "transfer": "moving and changing batches",
    "forward": "forward pass",
    "backward": "backward pass",
    "communication": "waiting for other ranks",
    "optimizer": "optimiser",
    "checkpoint": "checkpoints",
    "logging": "logging and the rest",
}
"""Phase -> what a person calls it, in the order of a step."""
COMPUTING = ("forward", "backward", "optimizer")
LIMITS = {
    "data": (0.1, "more workers (--data.workers), smaller images (trivit shards pack --resize) or a faster disk"),
    "transfer": (0.1, "let the workers change colours (--data.recipe.color_on workers), if they have time"),
    "communication": (0.15, "more images on each GPU at once (--data.device_batch_size), or a faster network"),
    "optimizer": (0.25, "a larger batch: a step of the optimiser costs the same for any"),
    "checkpoint": (0.05, "save less often (--checkpoint_every)"),
    "logging": (0.1, "write rows less often (--log_every)"),
}
"""Phase -> the share above which it is worth a remedy, and the remedy."""
ROWS = 3
"""After the first; fewer say nothing of a run."""
HATCHES = ("", "//", "", "\\\\", "..", "", "xx", "--")


@dataclass(frozen=True)
class Bottleneck:
    """What limits a run: a phase of WORDS, or "computing"; the sentence says how much, and what would help."""

    phase: str
    sentence: str


def time_shares(run: Run) -> dict[str, float]:
    """Share of the training time in each phase, weighted by the rows' seconds; {} when the run has not logged enough.

    The first row is left out: it holds what happens once, such as compiling and the start of the workers.
    """
    columns = {phase: run.metrics[f"time/{phase}"] for phase in WORDS if f"time/{phase}" in run.metrics}
    if not columns:
        return {}
    seconds = np.diff(run.metrics["seconds"], prepend=0.0)
    keep = np.isfinite(next(iter(columns.values()))) & (seconds > 0)  # a resumed part begins its clock anew
    keep[np.argmax(keep)] = False
    if keep.sum() < ROWS:
        return {}
    spent = {phase: float((np.nan_to_num(share[keep]) * seconds[keep]).sum()) for phase, share in columns.items()}
    return {phase: each / sum(spent.values()) for phase, each in spent.items()}


def bottleneck(run: Run) -> Bottleneck | None:
    """The phase with a remedy that takes the most time above its limit, else computing; None: not logged."""
    shares = time_shares(run)
    if not shares:
        return None
    over = {phase: shares[phase] for phase, (limit, _) in LIMITS.items() if shares.get(phase, 0) > limit}
    computing = sum(shares.get(phase, 0) for phase in COMPUTING)
    told = f"Computing takes {computing:.0%} of the time"
    if mfu := run.metrics.get("train/mfu", np.array([]))[1:].tolist():
        told += f", at {np.nanmedian(mfu):.0%} of the GPU's peak"
    if not over:
        return Bottleneck("computing", f"{told}: the model is the limit, not what is around it.")
    phase = max(over, key=lambda each: over[each])
    of = "of which the optimiser" if phase in COMPUTING else WORDS[phase]
    return Bottleneck(phase, f"{told}, {of} {shares[phase]:.0%}. What usually helps: {LIMITS[phase][1]}.")


def draw_time_shares(run: Run) -> str:
    """The shares as one bar, inline SVG; "" when the run has not logged them."""
    shares = time_shares(run)
    if not shares:
        return ""
    with figure(420, 170) as (drawing, axes):
        left = 0.0
        for i, (phase, share) in enumerate(shares.items()):
            colour, hatch = SERIES[i % len(SERIES)], HATCHES[i]
            axes.barh(0, share, left=left, color=colour, hatch=hatch, edgecolor=INK, linewidth=0.5,
                      label=f"{WORDS[phase]} {share:.1%}")  # fmt: skip
            left += share
        axes.set_xlim(0, 1)
        axes.set_axis_off()
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, fontsize=10)
        told = ", ".join(f"{WORDS[phase]} {share:.1%}" for phase, share in shares.items())
        return to_svg(drawing, escape(f"Where the time of {run.name} went: {told}"))
