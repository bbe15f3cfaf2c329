"""What changes over a run of DINO (github.com/facebookresearch/dino), as functions of the optimiser step or epoch."""

import math


def cosine(step: int, total: int, start: float, end: float, warmup: int = 0, first: float = 0.0) -> float:
    """Linear warm-up from `first` to `start`, both included, then half a cosine to `end`, which is never quite reached.

    The last step of the warm-up has `start`, as has the step after it (MAE's warm-up differs).

    Args:
        step: optimiser steps done so far.
        total: optimiser steps of the run.
        start: value after the warm-up.
        end: value one step after the last.
        warmup: steps of the warm-up, less than `total`.
        first: value of step 0 if there is a warm-up.
    """
    if step < warmup:
        return first + (start - first) * step / (warmup - 1) if warmup > 1 else first
    progress = (step - warmup) / (total - warmup)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def ramp(epoch: int, epochs: int, start: float, end: float) -> float:
    """Linear from `start` in epoch 0 to `end` in epoch `epochs` - 1, then constant."""
    if epoch >= epochs:
        return end
    return start + (end - start) * epoch / (epochs - 1) if epochs > 1 else start
