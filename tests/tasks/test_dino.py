"""DINO as a plain module: its loss against the naive one, what a forward pass may change, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.cost import LiveBytes
from tasks import soft_cross_entropy as sce
from tasks.block_masks import hide_blocks
from tasks.centering import Centering
from tasks.class_token import answers_alone, class_token
from tasks.dino import DINO, IBOTConfig
from tasks.dino_head import DINOHead, HeadConfig
from tasks.dino_health import dino_health, ibot_health
from tasks.dino_loss import DINOLoss
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.sinkhorn import SinkhornKnopp
from tests.tasks.dino_runs import HEAD, TINY, same, state


def naive_loss(student: Tensor, targets: Tensor, temp: float) -> Tensor:
    """Algorithm 1 of the paper, pair by pair."""
    pairs = [(t, s) for t in range(len(targets)) for s in range(len(student)) if s != t]
    log_probs = torch.log_softmax(student / temp, dim=-1)
    return torch.stack([-(targets[t] * log_probs[s]).sum(-1).mean() for t, s in pairs]).mean()


@pytest.mark.parametrize("teachers", [1, 2, 3])
def test_the_loss_is_that_of_all_pairs(teachers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(sce, "BLOCK", 2 * 11)  # blocks of two rows, and a last one of a single row
    student = torch.randn(5, 3, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(teachers, 3, 11, dtype=torch.float64).softmax(-1)
    ours, theirs = DINOLoss(0.1)(student, targets), naive_loss(student, targets, 0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    (ours_grad,), (theirs_grad,) = (torch.autograd.grad(3 * loss, student) for loss in (ours, theirs))
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-12, atol=1e-15)


def test_16_bit_logits_are_softmaxed_in_float32() -> None:
    torch.manual_seed(0)
    exact = torch.randn(4, 8, 1000)
    targets = torch.randn(2, 8, 1000).softmax(-1)
    for dtype in (torch.bfloat16, torch.float16):
        logits = exact.to(dtype).requires_grad_()
        loss = DINOLoss(0.1)(logits, targets)
        want = naive_loss(logits.detach().float().requires_grad_(), targets, 0.1)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
        (loss * 2.0**16).backward()  # as a gradient scaler does; float16 would lose what was scaled down before
        float32 = logits.detach().float().requires_grad_()
        (naive_loss(float32, targets, 0.1) * 2.0**16).backward()
        assert logits.grad is not None and float32.grad is not None
        error = (logits.grad.float() - float32.grad).norm() / float32.grad.norm()
        assert error < 2 * torch.finfo(dtype).eps


def test_the_loss_keeps_one_gradient_and_spends_it() -> None:
    logits = torch.randn(4, 2, 8, requires_grad=True)
    loss = DINOLoss()(logits, torch.full((2, 2, 8), 1 / 8))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="spent"):
        loss.backward()
    with torch.no_grad():
        assert torch.equal(DINOLoss()(logits, torch.full((2, 2, 8), 1 / 8)), loss)


def test_centering_keeps_its_centre_from_what_is_not_finite() -> None:
    centering = Centering(4)
    centering.update(centering.statistics(torch.ones(3, 4)))
    before = centering.center.clone()
    assert before.unique().tolist() == pytest.approx([0.1])
    centering.update(centering.statistics(torch.tensor([[1.0, float("nan"), 0, 0]])))
    centering.update(centering.statistics(torch.empty(0, 4)))
    assert torch.equal(centering.center, before)


def test_sinkhorn_uses_all_prototypes_and_survives_large_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 8) + 0.5 * torch.eye(8)[0]  # one prototype is everyone's favourite
    probs = SinkhornKnopp(iterations=200)(logits, 0.1)
    torch.testing.assert_close(probs.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(probs.sum(1), torch.ones(64))
    huge = 40 * torch.randn(64, 8) + 40 * torch.eye(8)[0]  # exp(80 / 0.04) is far beyond float32
    torch.testing.assert_close(SinkhornKnopp()(huge, 0.04).sum(1), torch.ones(64))
    assert SinkhornKnopp()(torch.empty(0, 8), 0.04).shape == (0, 8)


def tiny(**changes: object) -> DINO:
    torch.manual_seed(0)
    return DINO(Encoder(TINY), HEAD, **changes)  # type: ignore[arg-type]


def views(b: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(2, b, 3, 16, 16, generator=draw), torch.randn(4, b, 3, 8, 8, generator=draw)


@pytest.mark.parametrize("head", [None, HeadConfig(12, 16, 8)])
@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
def test_all_terms_together(head: HeadConfig | None, targets: str) -> None:
    model = tiny(ibot=IBOTConfig(mask_probability=1.0, head=head), koleo_weight=0.1, targets=targets)
    hidden = hide_blocks(torch.arange(3), 2, (4, 4), (0.3, 0.6), 1.0)
    before = state(model)
    out = model(*views(), 0.04, hidden)
    assert same(before, state(model)), "a forward pass changed the model"
    assert set(out.parts) == {"dino", "ibot", "koleo"}
    total = out.parts["dino"] + out.parts["ibot"] + 0.1 * out.parts["koleo"]
    torch.testing.assert_close(out.loss.detach(), total)
    out.loss.backward()
    trained = {n: p.grad for n, p in model.student.named_parameters() if p.requires_grad}
    lacking = [n for n, gradient in trained.items() if gradient is None or not gradient.any()]
    assert lacking == [], "DDP needs a gradient of everything that is trained"
    assert all(p.grad is None for p in model.teacher.parameters())
    model.observe(out)
    model.update_centers()
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved == ({"dino_targets.center", "ibot_targets.center"} if targets == "centering" else set())


def test_the_student_does_not_see_hidden_patches_and_the_teacher_does() -> None:
    model = tiny(ibot=IBOTConfig())
    images = views()[0].flatten(0, 1)
    hidden = hide_blocks(torch.arange(3), 2, (4, 4), (0.3, 0.6), 1.0)
    cells = hidden.mask.view(6, 1, 4, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    blacked = images.masked_fill(cells, 7.0)
    for branch, mask, seen in ((model.student, True, False), (model.teacher, False, True)):
        one, two = (branch(x, hidden, mask=mask) for x in (images, blacked))
        assert torch.equal(one[0], two[0]) != seen and torch.equal(one[1], two[1]) != seen
        assert len(one[1]) == hidden.mask.sum()


def test_how_many_patches_are_hidden_is_seen_behind_the_blocks_only() -> None:
    """It differs from step to step; compiled blocks would be compiled again for each new number."""
    model = tiny(ibot=IBOTConfig())
    seen: list[torch.Size] = []
    for branch in (model.student, model.teacher):
        for block in branch.encoder.blocks:
            block.register_forward_hook(lambda _m, inputs, output: seen.extend((inputs[0].shape, output.shape)))
    steps = []
    for ratio in ((0.2, 0.3), (0.6, 0.8)):
        hidden = hide_blocks(torch.arange(3), 2, (4, 4), ratio, 1.0)
        model(*views(), 0.04, hidden)
        steps.append((len(hidden.places), seen[:]))
        seen.clear()
    (few, first), (many, second) = steps
    assert few < many and first == second and first


def test_views_of_one_size_pass_together_and_alone_alike() -> None:
    model = tiny().eval()
    many, small = views()
    with torch.no_grad():
        whole = model.student.head(model.student(many.flatten(0, 1))[0]).unflatten(0, (2, 3))
        alone = torch.stack([model.student.head(model.student(view)[0]) for view in many])
    torch.testing.assert_close(whole, alone)
    calls: list[torch.Size] = []
    model.student.encoder.blocks[0].register_forward_pre_hook(lambda _m, inputs: calls.append(inputs[0].shape))
    model(many, small, 0.04)
    assert calls == [(6, 17, 24), (12, 5, 24)]


@pytest.mark.parametrize(
    "changes", [{}, {"registers": 2, "layer_scale": 0.5, "drop_path": 0.5}, {"positions": "sincos2d"}]
)
def test_the_class_token_alone_is_the_class_token(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder = Encoder(replace(TINY, **changes)).double()
    assert answers_alone(encoder) and not answers_alone(Encoder(replace(TINY, positions="rope")))
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    tokens = []
    for features in (lambda: encoder(images).prefix[:, 0], lambda: class_token(encoder, images)):
        torch.manual_seed(1)  # drop path
        tokens.append(features())
    torch.testing.assert_close(*tokens, rtol=1e-12, atol=1e-13)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(token.square().sum(), trained, allow_unused=True) for token in tokens]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or (a - b).abs().max() < 1e-11


def test_the_teacher_drops_nothing_and_its_batch_norm_goes_by_the_batch() -> None:
    model = DINO(Encoder(EncoderConfig(arch="timm:test_vit", image_size=32, pool="cls", drop_path=0.5)), HEAD)
    model.train()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.teacher(images)[0], model.teacher(images)[0])
        assert not torch.equal(model.student(images)[0], model.student(images)[0])
    model = tiny_bn()
    norm = next(part for part in model.teacher.modules() if isinstance(part, nn.BatchNorm1d))
    assert norm.training and not model.eval().teacher.head.mlp[1].training  # type: ignore[index]


def tiny_bn() -> DINO:
    return DINO(Encoder(TINY), HeadConfig(16, 16, 8, batch_norm=True))


def test_bf16_where_it_is_safe() -> None:
    model = tiny()
    dtypes: dict[str, list[torch.dtype]] = {"student": [], "teacher": []}
    for name, found in dtypes.items():
        branch = getattr(model, name)
        branch.head.register_forward_hook(lambda _m, _i, out, found=found: found.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*views(), 0.04)
    assert dtypes == {"student": [torch.bfloat16], "teacher": [torch.float32]}
    assert out.loss.dtype == torch.float32 and model.dino_targets.center.dtype == torch.float32
    torch.testing.assert_close(out.loss, model(*views(), 0.04).loss, rtol=0.02, atol=0)


def test_the_start_is_the_authors() -> None:
    """Teacher and student alike; weights about 0.02 wide; prototypes of length 1."""
    model = tiny()
    assert same(state(model.student), state(model.teacher))
    assert model.student.encoder.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    last = model.student.head.last_layer
    assert last.weight_g.eq(1).all() and not last.weight_g.requires_grad  # type: ignore[union-attr, operator]
    assert model.teacher.head.exact_logits and not model.student.head.exact_logits
    big = DINOHead(8, HeadConfig(layers=1, bottleneck_width=8, prototypes=4))
    assert sorted(big.state_dict()) == ["last_layer.weight_g", "last_layer.weight_v", "mlp.bias", "mlp.weight"]


@pytest.mark.parametrize("targets", [Centering(65536), SinkhornKnopp()], ids=["centering", "Sinkhorn-Knopp"])
def test_targets_take_the_place_of_the_logits(targets: nn.Module) -> None:
    """A gigabyte of them, of which no second copy is ever held, but some rows."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes([]) as live:
        logits = torch.empty(4096, 65536)
        given = logits.untyped_storage().nbytes()
        found = targets(logits, 0.04)
        assert found.shape == logits.shape
        assert given <= live.most < 1.2 * given


def test_health_tells_the_two_collapses() -> None:
    b, k = 16, 32
    one_point = torch.zeros(2, b, k)
    one_point[..., 3] = 1
    same_feature, many_features = torch.ones(b, 8), torch.randn(b, 512)
    health = dino_health(one_point, torch.tensor(0.0), same_feature)
    assert {n: round(v.item(), 5) for n, v in health.items()} == {
        "teacher_entropy": 0.0, "kl": 0.0, "prototypes_used": 1.0, "feature_std": 0.0, "micro_batch": 16,
    }  # fmt: skip
    uniform = torch.full((2, b, k), 1 / k)
    health = dino_health(uniform, torch.tensor(k).log(), many_features)
    assert health["teacher_entropy"].item() == pytest.approx(3.4657, abs=1e-3)
    assert health["kl"].item() == pytest.approx(0, abs=1e-5) and health["prototypes_used"].item() == pytest.approx(k)
    assert health["feature_std"].item() > 0.9
    spread = torch.eye(k)[:b].expand(2, b, k)
    assert dino_health(spread, torch.tensor(0.0), many_features)["prototypes_used"].item() == pytest.approx(b)


def test_health_of_hidden_patches_is_that_of_their_targets() -> None:
    torch.manual_seed(0)
    targets = torch.randn(3000, 9).mul(2).softmax(-1)
    found = {name: value.tolist()[0] for name, value in ibot_health(targets).items()}  # of some hundred rows
    whole = dino_health(targets[None], torch.tensor(0.0), torch.ones(2, 2))
    assert found["ibot_teacher_entropy"] == pytest.approx(whole["teacher_entropy"].item(), rel=0.1)
    assert found["ibot_prototypes_used"] == pytest.approx(whole["prototypes_used"].item(), rel=0.1)
    few = ibot_health(targets[:5])["ibot_teacher_entropy"]
    assert few.tolist() == pytest.approx([torch.special.entr(targets[:5]).sum(-1).mean().item(), 1])
    assert all(value.tolist() == [0, 0] for value in ibot_health(targets[:0]).values())
    model = tiny(ibot=IBOTConfig())
    with torch.no_grad():
        model.ibot_targets.center.fill_(2.0)  # type: ignore[union-attr, operator]
    hidden = hide_blocks(torch.arange(3), 2, (4, 4), (0.3, 0.6), 1.0)
    health = model(*views(), 0.04, hidden).health
    assert health["ibot_center_norm"].item() == pytest.approx(8) and health["center_norm"].item() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ibot": IBOTConfig(mask_ratio=(0.5, 0.1))}, "mask_ratio"),
        ({"ibot": IBOTConfig(mask_probability=0)}, "mask_probability"),
        ({"ibot": IBOTConfig(weight=0)}, "leave `ibot` out"),
        ({"koleo_weight": -1}, "^koleo_weight .* is -1$"),
        ({"center_momentum": 1}, "^center_momentum .* not 1$"),
        ({"student_temp": 0}, "^student_temp .* not 0$"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        tiny(**changes)


def test_heads_that_cannot_be_built() -> None:
    for sizes in (HeadConfig(prototypes=1), HeadConfig(layers=0)):
        with pytest.raises(TaskError, match="head"):
            DINO(Encoder(TINY), sizes)


def test_ibot_needs_patches_that_can_be_hidden() -> None:
    convolutional = Encoder(EncoderConfig(arch="timm:test_convnext", image_size=32, pool="mean"))
    with pytest.raises(TaskError, match=r"iBOT hides patches, which timm:test_convnext cannot: take a plain ViT"):
        DINO(convolutional, HEAD, ibot=IBOTConfig())
