"""KoLeo away from the recorded numbers."""

import pytest
import torch

from tasks.errors import TaskError
from tasks.koleo_loss import KoLeoLoss


def test_it_pushes_neighbours_apart() -> None:
    torch.manual_seed(0)
    x = (torch.ones(6, 4) + 0.05 * torch.randn(6, 4)).requires_grad_()
    loss = KoLeoLoss()(x)
    loss.backward()
    assert x.grad is not None
    assert KoLeoLoss()(x - 0.01 * x.grad) < loss


def test_the_same_image_twice_is_no_catastrophe() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    loss = KoLeoLoss()(x)
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


def test_a_single_image_has_no_neighbour() -> None:
    with pytest.raises(TaskError, match="at least 2 images"):
        KoLeoLoss()(torch.ones(1, 4))


def test_distances_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = KoLeoLoss()(x.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, KoLeoLoss()(x.bfloat16().float()))
