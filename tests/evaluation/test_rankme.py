"""RankMe of features whose spectrum is known."""

import math

import pytest
import torch

from evaluation.rankme import rankme


def test_all_directions_alike_and_one_line() -> None:
    assert rankme(torch.eye(8)) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.eye(8).repeat(5, 1)) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.outer(torch.arange(1.0, 33), torch.randn(6))) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(4, 3)) == pytest.approx(1, abs=1e-3)


def test_between_them_the_entropy_of_the_singular_values() -> None:
    """Singular values 3 and 1: shares 3/4 and 1/4."""
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(entropy), rel=1e-5)


def test_turning_scaling_and_precision_change_nothing() -> None:
    x = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    assert 6 < rankme(x) < 12
    assert rankme(7 * x @ turn) == pytest.approx(rankme(x), rel=1e-6)
    assert rankme(x.float()) == pytest.approx(rankme(x), rel=1e-4)


def test_what_is_not_finite_is_no_number() -> None:
    assert math.isnan(rankme(torch.tensor([[1.0, float("inf")], [0.0, 1.0]])))
