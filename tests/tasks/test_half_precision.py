"""DINO in float16: what is sensitive is computed in float32, and a step that overflows moves nothing."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from tasks.block_masks import hide_blocks
from tasks.centering import Centering
from tasks.dino import DINO, IBOTConfig
from tasks.dino_loss import DINOLoss
from tasks.encoders import Encoder
from tasks.ibot_loss import IBOTLoss
from tasks.koleo_loss import KoLeoLoss
from tasks.sinkhorn import SinkhornKnopp
from tests.tasks.dino_runs import HEAD, TINY, fit, same, state, tiny_task

LARGEST = torch.finfo(torch.float16).max
K = 12


def large(*shape: int, seed: int) -> Tensor:
    """Numbers in float16 up to the largest there is, which some have."""
    draw = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).mul(2).sub(1)
    draw[..., 0] = draw[..., 0].sign()
    return (draw * LARGEST).half()


def term(name: str, student: Tensor, teacher: Tensor, targets: nn.Module) -> Tensor:
    goals = targets(teacher, 0.04)
    assert goals.dtype == torch.promote_types(teacher.dtype, torch.float32) or isinstance(targets, SinkhornKnopp)
    torch.testing.assert_close(goals.sum(-1), torch.ones(goals.shape[:-1], dtype=goals.dtype))
    if name == "DINO":
        return DINOLoss()(student, goals)  # type: ignore[no-any-return]
    return IBOTLoss()(student[0], goals[0], torch.full((4,), 0.5), 8)  # type: ignore[no-any-return]


@pytest.mark.parametrize("targets", [Centering(K), SinkhornKnopp()], ids=["centering", "Sinkhorn-Knopp"])
@pytest.mark.parametrize("name", ["DINO", "iBOT"])
def test_losses_of_the_largest_logits(name: str, targets: nn.Module) -> None:
    student, teacher = large(3, 4, K, seed=1).requires_grad_(), large(2, 4, K, seed=2)
    with torch.autocast("cpu", torch.float16):
        loss = term(name, student, teacher.clone(), targets)
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None and student.grad.isfinite().all() and student.grad.any()
    exact = term(name, student.detach().double(), teacher.double(), targets)
    torch.testing.assert_close(loss.detach().double(), exact.double(), rtol=1e-4, atol=0)


def test_koleo_of_the_largest_features() -> None:
    features = large(5, 300, seed=3).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = KoLeoLoss()(features)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), KoLeoLoss()(features.detach().double()), rtol=1e-5, atol=0)
    loss.backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_a_centre_of_the_largest_logits() -> None:
    centering, logits = Centering(K, 0.5), large(2000, K, seed=4)
    with torch.autocast("cpu", torch.float16):
        centering.update(centering.statistics(logits))
    assert centering.center.dtype == torch.float32
    torch.testing.assert_close(centering.center[0], 0.5 * logits.float().mean(0), rtol=1e-4, atol=0.5)
    before = centering.center.clone()
    centering.update(centering.statistics(torch.full((2, K), torch.inf).half()))
    assert torch.equal(centering.center, before), "an overflow has reached the centre"


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
def test_all_terms_in_float16(targets: Any) -> None:
    torch.manual_seed(0)
    model = DINO(Encoder(TINY), HEAD, IBOTConfig(), koleo_weight=0.1, targets=targets)
    dtypes: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}
    for branch, found in dtypes.items():
        hooked = getattr(model, branch).head
        hooked.register_forward_hook(lambda _m, _i, out, found=found: found.add(out.dtype))
    views = torch.randn(2, 3, 3, 16, 16), torch.randn(2, 3, 3, 8, 8)
    hidden = hide_blocks(torch.arange(3), 2, (4, 4), (0.3, 0.6), 1.0)
    with torch.autocast("cpu", torch.float16):
        half = model(*views, 0.04, hidden)
    assert dtypes == {"student": {torch.float16}, "teacher": {torch.float32}}
    whole = model(*views, 0.04, hidden)
    for name in whole.parts:
        assert half.parts[name].dtype == torch.float32
        torch.testing.assert_close(half.parts[name], whole.parts[name], rtol=0.02, atol=0)
    assert all(value.isfinite().all() for value in half.health.values())


class Watch(Callback):
    """The model and the scaler's factor before training and after every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, dict[str, Tensor]]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append((trainer.precision_plugin.scaler.get_scale(), state(pl_module.model)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.on_train_start(trainer, pl_module)


@pytest.mark.parametrize("clip", ["parameter", "module"])
def test_a_step_that_a_gradient_scaler_skips_moves_nothing(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[float] = []
    update = Centering.update

    def count(self: Centering, statistics: Tensor) -> None:
        rows.append(statistics[-1].item())
        update(self, statistics)

    monkeypatch.setattr(Centering, "update", count)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)  # too large for this model: each overflow halves it
    watch, task = Watch(), tiny_task(clip=clip)
    fit(task, 8, callbacks=[watch], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    skipped = 0
    for (before, then), (after, now) in zip(watch.seen, watch.seen[1:], strict=False):
        assert all(value.isfinite().all() for value in now.values())
        if after < before:
            skipped += 1
            assert same(then, now), "student, teacher or centre have moved"
        else:
            for part in ("student.head.mlp.0.weight", "teacher.head.mlp.0.weight", "dino_targets.center"):
                assert not torch.equal(then[part], now[part]), part
    assert 1 <= skipped <= 6
    assert rows == (8 - skipped) * [8], "the centre was moved by what a skipped step had seen"
