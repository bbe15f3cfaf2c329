"""The CLIP benchmark compares like with like: our task's steps are those of open_clip's model and loss."""

from typing import Any

import pytest
import torch

from benchmarks import clip_step
from tasks.open_clip_names import our_names


def test_our_steps_are_open_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and all parameters agree in float64, so groups, decays, rates and clamp of the YAML are open_clip's."""
    setting = clip_step.SETTINGS[-1]._replace(batch=4, words=(3, 20))
    build, batch_of = clip_step.build, clip_step.batch_of
    models = []

    def build_double(setting: clip_step.Setting) -> Any:
        models.append(build(setting).double())
        return models[-1]

    def batch_double(*arguments: Any, **more: Any) -> Any:
        images, ids = batch_of(*arguments, **more)
        return images.double(), ids

    monkeypatch.setattr(clip_step, "build", build_double)
    monkeypatch.setattr(clip_step, "batch_of", batch_double)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = clip_step.ours(setting), clip_step.theirs(setting)
        for _ in range(6):
            assert ours() == pytest.approx(theirs(), abs=1e-12)
        state = ours.task.model.state_dict()  # type: ignore[attr-defined]
        for name, value in our_names(models[-1].state_dict()).items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)
    finally:
        torch.set_default_dtype(default)
