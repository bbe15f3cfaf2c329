import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as Reference

from evaluation import linear
from evaluation.errors import EvaluationError
from evaluation.linear import LogisticRegression, Scaler, Table, linear_probe, scores, stratified_order
from evaluation.ranks import top


def blobs(n: int, d: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes along few of many correlated features of very different size."""
    shape = np.random.default_rng(123)
    mix, centre = shape.standard_normal((d, d)) * np.logspace(0, -2, d), shape.standard_normal((classes, d)) * 0.5
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    x = (rng.standard_normal((n, d)) + centre[label]) @ mix.T * np.logspace(-2, 2, d) + 3
    return x.astype(np.float32), label


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
def test_same_optimum_as_scikit_learn(strength: float) -> None:
    x, y = blobs(1500, 24, 7)
    test_x, test_y = blobs(500, 24, 7, seed=1)
    scaler = Scaler.of(x)
    problem = LogisticRegression(Table(x, y, scaler, np.arange(len(x))), 7)
    fit = problem.fit(strength)
    reference = Reference(C=1 / (strength * len(x)), tol=1e-9, max_iter=10_000)
    reference.fit(scaler(x).double().numpy(), y)
    theirs = torch.from_numpy(np.concatenate([reference.coef_.T, reference.intercept_[None]]))
    assert fit.converged
    assert fit.gradient_norm <= linear.TOLERANCE
    assert fit.value == pytest.approx(problem.value(theirs, strength)[0], rel=1e-5)
    mine = scores(scaler(test_x), fit.point).argmax(dim=1).numpy()
    assert np.mean(mine == reference.predict(scaler(test_x).numpy())) > 0.99
    assert abs(np.mean(mine == test_y) - np.mean(reference.predict(scaler(test_x).numpy()) == test_y)) < 0.005


def test_gradient_is_that_of_the_value() -> None:
    x, y = blobs(200, 5, 3)
    problem = LogisticRegression(Table(x, y, Scaler.of(x), np.arange(200)), 3)
    weight = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, gradient = problem.value(weight, 0.3)
    rise = problem.value(weight + 1e-2 * direction, 0.3)[0] - problem.value(weight - 1e-2 * direction, 0.3)[0]
    assert float((gradient * direction).sum()) == pytest.approx(rise / 2e-2, rel=1e-3)


def test_blocks_from_disk_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(500, 6, 4)
    fits = [LogisticRegression(Table(x, y, Scaler.of(x), np.arange(500)), 4).fit(1e-2)]
    monkeypatch.setattr(linear, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(linear, "BLOCK", 64)
    fits.append(LogisticRegression(Table(x, y, Scaler.of(x), np.arange(500)), 4).fit(1e-2))
    assert fits[0].value == pytest.approx(fits[1].value, abs=1e-7)


def test_probe_chooses_on_train_alone_and_repeats_itself() -> None:
    x, y = blobs(900, 12, 5)
    test_x, test_y = blobs(300, 12, 5, seed=1)
    first = linear_probe(x, y, test_x, test_y, classes=5, seed=3)
    again = linear_probe(x, y, test_x[::-1].copy(), test_y[::-1].copy(), classes=5, seed=3)
    assert first.strength == again.strength
    assert first.held_out == again.held_out
    assert np.array_equal(first.rank, again.rank[::-1])
    assert first.held_out[first.strength] == max(first.held_out.values())
    assert top(first.rank) > 50


def test_weak_signal_in_many_features_wants_a_strong_penalty() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    x = rng.standard_normal((300, 400)).astype(np.float32)
    x[:, 0] += 1.5 * y
    probe = linear_probe(x, y, x, y, classes=2)
    assert probe.strength >= 1e-2
    assert min(probe.held_out) > min(linear.STRENGTHS), "the search must end when it only gets worse"


def test_features_that_never_change_are_harmless() -> None:
    x, y = blobs(300, 6, 3)
    dead = np.concatenate([x, np.full((300, 2), 1e3, dtype=np.float32)], axis=1)
    problem = LogisticRegression(Table(dead, y, Scaler.of(dead), np.arange(300)), 3)
    plain = LogisticRegression(Table(x, y, Scaler.of(x), np.arange(300)), 3)
    assert problem.fit(1e-3).value == pytest.approx(plain.fit(1e-3).value, rel=1e-6)


def test_more_features_than_images() -> None:
    x, y = blobs(60, 200, 3)
    fit = LogisticRegression(Table(x, y, Scaler.of(x), np.arange(60)), 3).fit(1e-7)
    assert fit.value < 1e-3


def test_penalties_that_are_far_too_strong_do_not_end_the_search() -> None:
    x, y = blobs(900, 12, 5)
    probe = linear_probe(x, y, x, y, classes=5, strengths=(1e5, 1e4, 1e3, 300.0, 100.0, 1e-3))
    assert probe.strength == 1e-3


def test_stratified_tenth() -> None:
    label = np.array([0] * 100 + [1] * 20 + [2] * 2 + [3])
    order, fitted = stratified_order(label, 0.1, seed=0)
    assert sorted(order) == list(range(123))
    held = label[order[fitted:]]
    assert np.bincount(held, minlength=4).tolist() == [10, 2, 1, 0]


def test_bad_input_is_one_clear_line() -> None:
    x, y = blobs(30, 4, 3)
    with pytest.raises(EvaluationError, match="at least two classes"):
        linear_probe(x, np.zeros(30, dtype=np.int64), x, y, classes=3)
    with pytest.raises(EvaluationError, match="two train images of some class"):
        linear_probe(x[:3], np.arange(3), x, y, classes=3)
    x[5, 1] = np.nan
    with pytest.raises(EvaluationError, match="NaN"):
        linear_probe(x, y, x, y, classes=3)
