"""Loss, learning rate, speed and whatever else metrics.csv holds, one small panel each, runs over each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from evaluation.health_words import NUMBERS
from evaluation.loss_curve import smooth
from evaluation.loss_terms import TERMS
from evaluation.run_files import Run
from evaluation.svg import INK, SERIES, figure, to_svg

TITLES = {
    "train/loss": "Training loss",
    **TERMS,
    "train/lr": "Learning rate",
    "train/images_per_second": "Images per second",
    "train/mfu": "Model FLOPs utilisation",
    "train/grad_norm": "Gradient norm",
    "train/data_wait": "Waiting for data, share",
    "probe/knn": "kNN on the probe's images, %",
    **{name: number.title for name, number in NUMBERS.items()},
    "train/micro_batch": "Images of a micro-batch on a device",
}
NOT_DRAWN = {"step", "epoch", "seconds", "train/peak_memory"}  # the last is a number, among the facts
EXACT = {"train/lr"}
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1)), (0, (8, 2, 1, 2, 1, 2)))
MOST_POINTS = 600


@dataclass(frozen=True)
class Curve:
    """One column of one run: steps x and values y, thinned for drawing, and the smoothed values."""

    run: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    smooth: NDArray[np.float64]


def curves(runs: Sequence[Run]) -> dict[str, list[Curve]]:
    """Column -> a curve of each run that has it; well-known columns first, the others by name."""
    known = [name for name in TITLES if any(name in run.metrics for run in runs)]
    others = sorted({name for run in runs for name in run.metrics} - set(TITLES) - NOT_DRAWN)
    others = [name for name in others if not name.startswith("time/")]  # one bar says more: see `time_shares`
    found = {name: [_curve(run, name) for run in runs if name in run.metrics] for name in (*known, *others)}
    drawable = {name: [curve for curve in each if len(curve.x) > 1] for name, each in found.items()}
    return {name: each for name, each in drawable.items() if each}


def constant(each: Sequence[Curve]) -> bool:
    """Whether none of the runs has two different values, so that a line of text says as much as a panel."""
    return all(float(np.ptp(curve.y)) == 0 for curve in each)


def constant_words(name: str, each: Sequence[Curve]) -> str:
    """The value of a column that does not change, of each run where they differ."""
    values: dict[str, list[str]] = {}
    for curve in each:
        values.setdefault(f"{curve.y[0]:.6g}", []).append(curve.run)
    told = (value if len(values) == 1 else f"{value} ({', '.join(runs)})" for value, runs in values.items())
    return f"{TITLES.get(name, name)}: {', '.join(told)} throughout"


def _curve(run: Run, name: str) -> Curve:
    x, y = run.metrics["step"], run.metrics[name]
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    smoothed = y if name in EXACT or len(y) < 8 else smooth(y)
    if len(x) > MOST_POINTS:
        chosen = np.unique(np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int))
        x, y, smoothed = x[chosen], y[chosen], smoothed[chosen]
    return Curve(run.name, x, y, smoothed)


def draw_curves(name: str, each: Sequence[Curve], order: Sequence[str], log_k: float | None = None) -> str:
    """One panel as inline SVG; a run keeps its colour and dashes (its place in `order`) in all panels.

    `log_k`: ln(K), a thin line to compare the values with; None: none.
    """
    title = TITLES.get(name, name)
    with figure(360, 215) as (drawing, axes):
        for curve in each:
            i = order.index(curve.run) % len(SERIES)
            style = {"color": SERIES[i], "linestyle": DASHES[i]}
            if curve.smooth is not curve.y:
                axes.plot(curve.x, curve.y, color=SERIES[i], linewidth=0.8, alpha=0.35)
            axes.plot(curve.x, curve.smooth, **style)
        low, high = _limits(name, each)
        if log_k is not None:
            low, high = min(low, log_k - 0.05 * (high - low)), max(high, log_k + 0.05 * (high - low))
            axes.axhline(log_k, color=INK, linewidth=1, linestyle=(0, (1, 2)))
            axes.text(0.01, log_k, "ln(K)", transform=axes.get_yaxis_transform(), va="top", fontsize=10)
        axes.set_ylim(low, high)
        highest = max(float(curve.y.max()) for curve in each)
        if highest > high:
            axes.text(1, 1, f"cut: up to {highest:.3g}", transform=axes.transAxes, ha="right", va="bottom", fontsize=10)
        axes.set_xlim(left=0)
        axes.set_title(title, pad=10)
        axes.set_xlabel("optimiser step")
        axes.locator_params(axis="both", nbins=5)
        if max(float(curve.x.max()) for curve in each) >= 1000:
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if name == "train/mfu":
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        last = "; ".join(f"{curve.run} ends at {curve.smooth[-1]:.4g}" for curve in each)
        last += "" if log_k is None else f"; ln(K) is {log_k:.4g}"
        return to_svg(drawing, escape(f"{title} over optimiser steps. {last}"))


def _limits(name: str, each: Sequence[Curve]) -> tuple[float, float]:
    """Speed and shares start at 0; a first few huge values do not flatten the rest of a loss or a norm."""
    values = np.concatenate([curve.y for curve in each])
    smoothed = np.concatenate([curve.smooth for curve in each])
    if name in ("train/images_per_second", "train/lr", "train/mfu"):
        return 0.0, max(1.08 * float(values.max()), 1e-12)
    low, high = float(min(np.percentile(values, 0.5), smoothed.min())), float(np.percentile(values, 97))
    high = max(high, *(float(curve.smooth[len(curve.smooth) // 33]) for curve in each))
    if high == low == 0:  # a share of nothing, say: a line at the foot of a plain axis
        return 0.0, 1.0
    pad = 0.06 * max(high - low, 1e-9 + 0.01 * abs(high))
    return low - pad, high + pad
