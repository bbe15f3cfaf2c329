"""The teacher's running mean."""

import copy

import pytest
import torch
from torch import nn

from tasks.ema import update_ema


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    student[0].bias.requires_grad_(False)
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for p in student.parameters():
            p.normal_()
    student[1].running_mean.fill_(5)  # type: ignore[operator, union-attr]
    return teacher, student


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_it_is_a_weighted_mean_of_all_parameters_and_of_no_buffer(momentum: float) -> None:
    teacher, student = pair()
    old, new = ([p.clone() for p in module.parameters()] for module in (teacher, student))
    update_ema(teacher, student, momentum)
    for p, a, b in zip(teacher.parameters(), old, new, strict=True):
        torch.testing.assert_close(p, momentum * a + (1 - momentum) * b, rtol=1e-14, atol=1e-15)
    for p, b in zip(student.parameters(), new, strict=True):
        assert torch.equal(p, b)
    assert not teacher[1].running_mean.any()  # type: ignore[index, union-attr, operator]


def test_modules_that_differ_are_refused() -> None:
    with pytest.raises(RuntimeError):
        update_ema(nn.Linear(3, 4), nn.Linear(3, 4, bias=False), 0.9)
