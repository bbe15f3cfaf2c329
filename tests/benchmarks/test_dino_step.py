"""The DINO benchmark compares like with like: our task's steps are those of the plain loop, drop path included."""

import pytest
import torch

from benchmarks import dino_step


def test_our_steps_are_the_plain_loops() -> None:
    """From the same weights and draws, in float64: losses, student, teacher and centre agree."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        setting = dino_step.TIN40._replace(batch=3)
        ours, plain = dino_step.ours(setting), dino_step.plain(setting)
        model = ours.task.model
        model.student.load_state_dict(plain.student.state_dict())
        model.copy_student()
        for step in range(4):
            ours.task.on_train_batch_start({}, step)  # seeds what drop path draws from
            loss = plain()
            assert ours() == pytest.approx(loss, abs=1e-9)
        for own, other in ((model.student, plain.student), (model.teacher, plain.teacher)):
            for name, value in other.state_dict().items():
                torch.testing.assert_close(own.state_dict()[name], value, rtol=0, atol=1e-9)
        torch.testing.assert_close(model.dino_targets.center, plain.center, rtol=0, atol=1e-9)
    finally:
        torch.set_default_dtype(default)
