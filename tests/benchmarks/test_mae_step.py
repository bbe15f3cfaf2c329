"""The MAE benchmark compares like with like: our task's steps are those of the plain loop."""

import pytest
import torch

from benchmarks import mae_step


@pytest.mark.parametrize("batch", [2, 3])
def test_our_steps_are_the_plain_loops(batch: int) -> None:
    """From the same weights and masks, in float64: losses and parameters agree."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        setting = mae_step.TIN40._replace(batch=batch)
        ours, plain = mae_step.ours(setting), mae_step.plain(setting)
        plain.model.load_state_dict(ours.task.model.state_dict())
        for _ in range(4):
            loss = plain()
            assert ours() == pytest.approx(loss, abs=1e-9)
        for name, value in plain.model.state_dict().items():
            torch.testing.assert_close(ours.task.model.state_dict()[name], value, rtol=0, atol=1e-9)
    finally:
        torch.set_default_dtype(default)
