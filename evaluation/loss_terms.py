"""The terms of DINO's loss in metrics.csv: what each column is, and the level of a student or teacher that guesses."""

import math
from collections.abc import Sequence

from evaluation.health import newest, prototypes
from evaluation.run_files import Run

TERMS = {
    "train/dino_loss": "Loss, DINO's term",
    "train/ibot_loss": "Loss, iBOT's term before its weight",
    "train/koleo_loss": "Loss, KoLeo's term before its weight",
}


def term_words(name: str, runs: Sequence[Run]) -> str:
    """What a column of TERMS is, "" for others; weights are told where runs agree on them."""
    if name == "train/dino_loss":
        return (
            "Cross-entropy of class tokens: the teacher's entropy plus the divergence; ln(K) is that of a student that "
            "guesses. The training loss has the other terms on top, so it is not to be compared with ln(K)."
        )
    if name == "train/ibot_loss":
        share = _agreed("model.ibot.mask_probability", runs)
        some = f", {share:.0%} of them have some" if share is not None else ""
        return (
            "Cross-entropy of hidden patches, mean over all views: those without hidden patches count as 0"
            f"{some}. So it can lie below the teacher's entropy of hidden patches, which is a mean over these alone."
            + _weight("model.ibot.weight", runs)
        )
    if name == "train/koleo_loss":
        return (
            "Minus the logarithm of the distance to the nearest other image of the micro-batch, summed over global "
            "views: the lower, the more evenly features spread." + _weight("model.koleo_weight", runs)
        )
    return ""


def guess_level(name: str, runs: Sequence[Run]) -> float | None:
    """ln(K), where a column can be compared with it and the runs that have it agree on K; None elsewhere."""
    having = [run for run in runs if name in run.metrics and "train/teacher_entropy" in run.metrics]
    if name == "train/loss" and any("train/dino_loss" in run.metrics for run in having):
        return None  # a sum of several terms
    patches = name == "train/ibot_teacher_entropy"
    if not patches and name not in ("train/loss", "train/dino_loss", "train/teacher_entropy"):
        return None
    levels = {prototypes(run, patches=patches) for run in having}
    return math.log(levels.pop()) if len(levels) == 1 and len(having) == sum(name in r.metrics for r in runs) else None


def sum_words(run: Run) -> str:
    """Of what terms a run's newest loss is the sum, in a line; "" where it has one only."""
    if "train/dino_loss" not in run.metrics:
        return ""
    parts = [f"DINO {newest(run, 'train/dino_loss'):.3f}"]
    for name, label, key in (("ibot", "iBOT", "model.ibot.weight"), ("koleo", "KoLeo", "model.koleo_weight")):
        if f"train/{name}_loss" in run.metrics:
            weight = _agreed(key, [run])
            factor = "its weight" if weight is None else f"{weight:g}"
            parts.append(f"{factor} x {label} {newest(run, f'train/{name}_loss'):.3f}")
    log_k = math.log(prototypes(run))
    return f"Loss {newest(run, 'train/loss'):.3f}: {' + '.join(parts)}; with ln(K) = {log_k:.2f} compare DINO's alone"


def _weight(key: str, runs: Sequence[Run]) -> str:
    weight = _agreed(key, runs)
    return f" The training loss has {weight:g} times this." if weight is not None else ""


def _agreed(key: str, runs: Sequence[Run]) -> float | None:
    values = {run.get(key) for run in runs} - {None}
    value = values.pop() if len(values) == 1 else None
    return float(value) if isinstance(value, int | float) else None
