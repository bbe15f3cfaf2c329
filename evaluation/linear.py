"""Multinomial logistic regression to convergence: the linear probe on features that were computed once.

Minimises  mean cross-entropy + strength / 2 * |W|^2  over weights W [d c] and biases [c] (not penalised) on features
standardised with the mean and deviation of train: the objective of scikit-learn's LogisticRegression with
C = 1 / (strength * n). Full-batch L-BFGS, whose initial inverse Hessian is that of the objective at W = 0: one
Cholesky factor of the feature covariance, and tens of passes over the data instead of hundreds.
Features and the matrix products are float32; weights, sums, gradients and the factor are float64.

Axes: n = samples, d = width, c = classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.errors import EvaluationError
from evaluation.lbfgs import Minimum, minimise
from evaluation.progress import progress_bar
from evaluation.ranks import rank_of_truth

STRENGTHS = tuple(float(f"{10 ** (e / 2):.3g}") for e in range(2, -15, -1))  # 10 ... 1e-7, half a decade apart
HELD_OUT = 0.1
PATIENCE = 3
TOLERANCE = 3e-5
SEARCH_TOLERANCE = 3e-4
MAX_ITERATIONS = 1000
BLOCK = 16384
IN_MEMORY_BYTES = 4 << 30

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Scaler:
    """(x - mean) * scale, per feature; the scale of a feature that never changes is 0."""

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def of(cls, x: Floats) -> "Scaler":
        """From train features [n d], summed in float64; raises EvaluationError where they are not finite."""
        starts = range(0, len(x), BLOCK)
        mean = sum(x[s : s + BLOCK].sum(axis=0, dtype=np.float64) for s in starts) / len(x)
        std = np.sqrt(sum(np.square(x[s : s + BLOCK] - mean).sum(axis=0) for s in starts) / len(x))
        if not np.isfinite(std).all():
            raise EvaluationError("features contain NaN or infinite values: the encoder has diverged")
        alive = std > 1e-7 * np.abs(mean) + 1e-30
        return cls(mean, np.where(alive, 1 / np.where(alive, std, 1), 0))

    def __call__(self, x: Floats) -> Tensor:
        """[b d] -> standardised float32 [b d]."""
        return torch.from_numpy((x - self.mean.astype(np.float32)) * self.scale.astype(np.float32))


class Table:
    """Standardised features and labels in blocks: in memory if they fit, otherwise scaled while they are read."""

    def __init__(self, x: Floats, label: Ints, scaler: Scaler, order: Ints, device: str = "cpu") -> None:
        self.x, self.scaler, self.order, self.device = x, scaler, order, device
        self.label = torch.from_numpy(np.asarray(label)[order]).to(device)
        self.memory: Tensor | None = None
        if len(order) * x.shape[1] * 4 <= IN_MEMORY_BYTES:
            self.memory = torch.cat([self._read(s, s + BLOCK) for s in range(0, len(order), BLOCK)])

    def __len__(self) -> int:
        return len(self.order)

    def _read(self, start: int, stop: int) -> Tensor:
        return self.scaler(self.x[self.order[start:stop]]).to(self.device)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(features [b d], labels [b]) of the rows start ... stop."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            x = self._read(first, last) if self.memory is None else self.memory[first:last]
            yield x, self.label[first:last]


class LogisticRegression:
    """The objective on the rows start ... stop of a table, and its minimum for any strength."""

    def __init__(self, table: Table, classes: int, start: int = 0, stop: int | None = None) -> None:
        self.table, self.classes, self.start = table, classes, start
        self.stop = len(table) if stop is None else stop
        self.width = table.x.shape[1]
        moment = torch.zeros(self.width + 1, self.width + 1, dtype=torch.float64, device=table.device)
        for x, _ in table.blocks(self.start, self.stop):
            moment[:-1, :-1] += (x.T @ x).double()
            moment[-1, :-1] += x.double().sum(dim=0)
            moment[-1, -1] += len(x)
        moment[:-1, -1] = moment[-1, :-1]
        self.moment = moment / (self.stop - self.start)

    def fit(self, strength: float, start: Tensor | None = None, tolerance: float = TOLERANCE) -> Minimum:
        """Weights with the biases as last row [d+1 c], float64, where |gradient| <= tolerance (Euclidean norm)."""
        if start is None:
            start = torch.zeros(self.width + 1, self.classes, dtype=torch.float64, device=self.table.device)
        hessian = self.moment / self.classes
        hessian.diagonal()[:-1] += strength
        factor = _cholesky(hessian)
        return minimise(
            lambda w: self.value(w, strength),
            start,
            lambda g: torch.cholesky_solve(g, factor),
            tolerance=tolerance,
            max_iterations=MAX_ITERATIONS,
        )

    def value(self, weight: Tensor, strength: float) -> tuple[float, Tensor]:
        """Objective and its gradient [d+1 c]."""
        count = self.stop - self.start
        gradient = torch.zeros_like(weight)
        loss = torch.zeros((), dtype=torch.float64, device=weight.device)
        for x, label in self.table.blocks(self.start, self.stop):
            log_p = scores(x, weight).log_softmax(dim=1)
            loss -= log_p.gather(1, label[:, None]).sum(dtype=torch.float64)
            error = log_p.exp_()
            error[torch.arange(len(label), device=label.device), label] -= 1
            gradient[:-1] += (x.T @ error).double()
            gradient[-1] += error.sum(dim=0, dtype=torch.float64)
        gradient /= count
        gradient[:-1] += strength * weight[:-1]
        return float(loss) / count + 0.5 * strength * float(weight[:-1].square().sum()), gradient


def _cholesky(matrix: Tensor) -> Tensor:
    """The factor of a positive matrix plus as little of the identity as rounding asks for, as with few images."""
    ridge = 1e-10 * float(matrix.diagonal().mean())
    while True:
        matrix.diagonal().add_(ridge)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor
        ridge *= 10


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """Logits [b c] of standardised features [b d] under weights [d+1 c]."""
    return torch.addmm(weight[-1].float(), x, weight[:-1].float())


class LinearProbe(NamedTuple):
    """What the probe found; `held_out` is the accuracy in percent of every strength that was tried."""

    rank: Ints  # [t] of the true class among the scores, 0 = on top
    strength: float
    held_out: dict[float, float]
    fit: Minimum


def linear_probe(
    train: Floats,
    train_label: Ints,
    test: Floats,
    test_label: Ints,
    *,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> LinearProbe:
    """Chooses the strength on a stratified tenth of train, then fits all of train and ranks the test classes.

    Strengths go from strong to weak, each from the solution before; the search ends after PATIENCE in a row that
    neither raise the held-out accuracy nor lower the held-out loss. Of equally accurate ones the strongest is taken.
    Nothing of test is looked at. x [n d] and [t d], labels [n] and [t].

    Raises:
        EvaluationError: one class only, no class with two images, or features that are not finite.
    """
    if len(np.unique(train_label)) < 2:
        raise EvaluationError("the linear probe needs at least two classes in train")
    order, fitted = stratified_order(train_label, HELD_OUT, seed)
    if fitted == len(order):
        raise EvaluationError("the linear probe needs at least two train images of some class, to choose its strength")
    scaler = Scaler.of(train)
    table = Table(train, train_label, scaler, order, device)
    part = LogisticRegression(table, classes, 0, fitted)
    held_out: dict[float, float] = {}
    weight, best, lowest, worse = None, strengths[0], np.inf, 0
    with progress_bar(len(strengths) + 1, "fit", "linear probe", progress) as bar:
        for strength in sorted(strengths, reverse=True):
            weight = part.fit(strength, weight, tolerance=SEARCH_TOLERANCE).point
            accuracy, loss = _held_out_scores(table, fitted, weight)
            held_out[strength] = accuracy
            bar.update()
            better = accuracy > held_out.get(best, -1.0) or len(held_out) == 1
            # Accuracy alone would stop on the noisy plateau of the strongest penalties, which have learnt nothing yet.
            worse = 0 if better or loss < lowest else worse + 1
            best, lowest = strength if better else best, min(lowest, loss)
            if worse == PATIENCE:
                break
        bar.update(len(strengths) - len(held_out))  # those that are not needed
        fit = LogisticRegression(table, classes).fit(best)
        bar.update()
    rank = np.empty(len(test), dtype=np.int64)
    for start in range(0, len(test), BLOCK):
        chosen = slice(start, start + BLOCK)
        rank[chosen] = rank_of_truth(
            scores(scaler(test[chosen]).to(device), fit.point).cpu().numpy(), test_label[chosen]
        )
    return LinearProbe(rank, best, held_out, fit)


def _held_out_scores(table: Table, start: int, weight: Tensor) -> tuple[float, float]:
    """Top-1 in percent and mean cross-entropy of the rows from `start` on."""
    right, loss = 0, 0.0
    for x, label in table.blocks(start):
        log_p = scores(x, weight).log_softmax(dim=1)
        right += int((log_p.argmax(dim=1) == label).sum())
        loss -= float(log_p.gather(1, label[:, None]).sum(dtype=torch.float64))
    return 100 * right / (len(table) - start), loss / (len(table) - start)


def stratified_order(label: Ints, share: float, seed: int) -> tuple[Ints, int]:
    """All rows, those to fit on first, and how many they are: `share` of each class is held out, of two images one."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(label), dtype=bool)
    for value in np.unique(label):
        rows = np.flatnonzero(label == value)
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held[rng.permutation(rows)[:count]] = True
    return np.concatenate([np.flatnonzero(~held), np.flatnonzero(held)]), int((~held).sum())
