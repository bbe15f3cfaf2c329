import numpy as np
import pytest

from evaluation.loss_curve import judge_loss, smooth

STEPS = np.arange(1, 121) * 10.0


def noise(scale: float = 0.005) -> np.ndarray:
    return np.random.default_rng(0).normal(0, scale, len(STEPS))


@pytest.mark.parametrize(
    ("loss", "state"),
    [
        (1.0 - 0.4 * (1 - np.exp(-STEPS / 150)) + noise(), "plateau"),
        (1.0 - 0.4 * STEPS / STEPS[-1] + noise(), "falling"),
        (1.0 + noise(), "flat"),
        (1.0 - 0.4 * (1 - np.exp(-STEPS / 150)) + 0.35 * (STEPS > 900) + noise(), "diverged"),
        (1.0 + STEPS / 1000 + noise(), "diverged"),
        (np.where(STEPS < 800, 1.0 - STEPS / 2000, np.nan), "diverged"),
        (np.where(STEPS < 800, 1.0 - STEPS / 2000, np.inf), "diverged"),
    ],
)
def test_states_of_a_loss(loss: np.ndarray, state: str) -> None:
    assert judge_loss(STEPS, loss).state == state


def test_too_early() -> None:
    loss = 1 - STEPS / 2000
    assert judge_loss(STEPS[:5], loss[:5]).state == "early"
    assert judge_loss(STEPS[:20], loss[:20], warmup=250).state == "early"
    assert judge_loss(STEPS[:40], loss[:40], warmup=250).state != "early"
    assert judge_loss(np.array([]), np.array([])).state == "early"


def test_noise_alone_is_no_progress() -> None:
    states = [
        judge_loss(STEPS, 1 + np.random.default_rng(seed).normal(0, 0.05, len(STEPS))).state for seed in range(50)
    ]
    assert states.count("flat") > 40


def test_smoothing_keeps_level_and_ends() -> None:
    np.testing.assert_allclose(smooth(np.full(50, 3.0)), 3.0)
    line = np.arange(50.0)
    np.testing.assert_allclose(smooth(line), line)
    assert smooth(np.random.default_rng(0).normal(size=400)).std() < 0.4


def test_a_single_low_value_at_the_end_is_no_best_that_was_lost() -> None:
    steps = np.arange(1.0, 2001)
    loss = 1 - 0.1 * steps / 2000 + np.random.default_rng(0).normal(0, 0.02, 2000)
    loss[-1] = 0.7
    assert judge_loss(steps, loss).state == "falling"
