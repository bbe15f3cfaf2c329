"""The terms of DINOv2 where they come together: loss and gradients of a step written out image by image, in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tasks.block_masks import Hidden
from tasks.dino import DINO, Branch, IBOTConfig
from tasks.dino_head import HeadConfig
from tasks.encoders import Encoder
from tests.tasks.dino_runs import HEAD, TINY, tiny_task

OWN = HeadConfig(prototypes=12, hidden_width=16, bottleneck_width=8, norm_last_layer=False)
TEMP, KOLEO, IBOT = 0.05, 0.3, 0.7


def a_model(head: HeadConfig | None) -> DINO:
    """Student, teacher and centres all different from each other."""
    torch.manual_seed(0)
    model = DINO(Encoder(TINY), HEAD, IBOTConfig(weight=IBOT, head=head), koleo_weight=KOLEO).double()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def some_views() -> tuple[Tensor, Tensor, Tensor]:
    """Two global and three local views of four images, and masks [2 4 16], one of them empty."""
    draw = torch.Generator().manual_seed(1)
    large = torch.randn(2, 4, 3, 16, 16, generator=draw, dtype=torch.float64)
    small = torch.randn(3, 4, 3, 8, 8, generator=draw, dtype=torch.float64)
    mask = torch.rand(2, 4, 16, generator=draw) < torch.tensor([0.2, 0.4, 0.0, 0.6])[:, None]
    return large, small, mask


def entropy_of(goal: Tensor, guess: Tensor) -> Tensor:
    return -(goal * torch.log_softmax(guess / 0.1, dim=-1)).sum()


def of_patches(branch: Branch, tokens: Tensor) -> Tensor:
    return branch.head(tokens) if branch.patch_head is None else branch.patch_head(tokens)  # type: ignore[no-any-return]


def by_hand(model: DINO, large: Tensor, small: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Each term, from one image and view at a time."""
    student, teacher = model.student, model.teacher
    images, pairs = large.shape[1], []
    ibot, vectors = torch.zeros((), dtype=torch.float64), list[list[Tensor]]()
    centers = model.dino_targets.center, model.ibot_targets.center  # type: ignore[union-attr]
    for i in range(images):
        goals, guesses, of_view = [], [], []
        for view in range(2):
            shown, hidden = large[view, i][None], mask[view, i]
            with torch.no_grad():
                told = teacher.encoder(shown)
                goals.append(((teacher.head(told.prefix[:, 0]) - centers[0]) / TEMP).softmax(-1))
                goal = ((of_patches(teacher, told.patches[0][hidden]) - centers[1]) / TEMP).softmax(-1)
            said = student.encoder(shown, mask=hidden[None], mask_token=student.mask_token)
            of_view.append(said.prefix[0, 0])
            guesses.append(student.head(said.prefix[:, 0]))
            if hidden.any():
                term = entropy_of(goal, of_patches(student, said.patches[0][hidden])) / hidden.sum()
                ibot = ibot + term / (2 * images)
        guesses += [student.head(student.encoder(view[i][None]).prefix[:, 0]) for view in small]
        pairs += [entropy_of(goals[t], guesses[s]) for t in range(2) for s in range(len(guesses)) if s != t]
        vectors.append(of_view)
    koleo = torch.zeros((), dtype=torch.float64)
    for view in range(2):
        unit = [of_view[view] / of_view[view].norm() for of_view in vectors]
        for i in range(images):
            closest = min(((unit[i] - unit[j]).norm() for j in range(images) if j != i), key=lambda d: d.item())
            koleo = koleo - closest.log() / images
    return {"dino": sum(pairs) / len(pairs), "ibot": ibot, "koleo": koleo}  # type: ignore[dict-item]


@pytest.mark.parametrize("head", [None, OWN], ids=["shared head", "own head"])
def test_a_step_is_the_one_written_out(head: HeadConfig | None) -> None:
    model, (large, small, mask) = a_model(head), some_views()
    flat = mask.flatten(0, 1)
    out = model(large, small, TEMP, Hidden(flat, flat.flatten().nonzero()[:, 0]))
    want = by_hand(model, large, small, mask)
    for name, part in want.items():
        torch.testing.assert_close(out.parts[name], part.detach(), rtol=1e-7, atol=0, msg=name)
    total = want["dino"] + IBOT * want["ibot"] + KOLEO * want["koleo"]
    torch.testing.assert_close(out.loss, total, rtol=1e-7, atol=0)
    names, trained = zip(*((n, p) for n, p in model.student.named_parameters() if p.requires_grad), strict=True)
    gradients = (torch.autograd.grad(loss, trained) for loss in (out.loss, total))
    for name, ours, theirs in zip(names, *gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm() + 1e-12, name
    tokens = torch.cat([model.teacher.encoder(image[None]).prefix[:, 0] for image in large[0]])
    spread = torch.nn.functional.normalize(tokens.float()).var(dim=0, correction=0).sum().sqrt()
    torch.testing.assert_close(out.health["feature_std"], spread)


def test_each_module_is_clipped_by_its_own_length() -> None:
    task = tiny_task(clip="module", clip_grad=3.0, ibot=IBOTConfig(head=OWN), lr=1e-3)
    optimizer = task.configure_optimizers()
    task.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=9, datamodule=SimpleNamespace(steps_per_epoch=1)
    )
    student, before = task.model.student, {}
    sizes = {"encoder": 30.0, "head": 5.0, "patch_head": 1.0}
    for p in student.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    modules = {  # DINOv2's backbone holds the mask token
        "encoder": [*student.encoder.parameters(), student.mask_token],
        "head": [*student.head.parameters()],
        "patch_head": [*student.patch_head.parameters()],  # type: ignore[union-attr]
    }
    for name, parameters in modules.items():
        gradients = [p.grad for p in parameters if p is not None and p.grad is not None]
        length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.mul_(sizes[name] / length)
        before[name] = [gradient.clone() for gradient in gradients]
    task.configure_gradient_clipping(optimizer)
    for name, parameters in modules.items():
        after = [p.grad for p in parameters if p is not None and p.grad is not None]
        factor = min(1.0, 3.0 / sizes[name])
        for old, new in zip(before[name], after, strict=True):
            torch.testing.assert_close(new, factor * old, rtol=1e-5, atol=0)


def test_weights_start_as_wide_as_the_authors() -> None:
    """torch's own range for the patch embedding and the prototypes' directions, a normal of 0.02 for the tokens."""
    model = DINO(Encoder(TINY), HEAD, IBOTConfig(head=OWN))
    student = model.student
    convolution = student.encoder.trunk.patch_embed.proj.weight
    directions = [head.last_layer.weight_v for head in (student.head, student.patch_head)]  # type: ignore[union-attr]
    for weight, inputs in ((convolution, 3 * 4 * 4), *((weight, 8) for weight in directions)):
        bound = inputs**-0.5
        assert 0.9 * bound < weight.abs().max() <= bound  # type: ignore[operator, union-attr]
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)  # type: ignore[operator, union-attr]
    trunk = student.encoder.trunk
    for weight in (trunk.cls_token, trunk.pos_embed, trunk.blocks[1].mlp.fc1.weight, student.head.mlp[0].weight):  # type: ignore[index]
        assert weight.std().item() == pytest.approx(0.02, rel=0.4)  # type: ignore[operator, union-attr]
    assert not student.mask_token.any()  # type: ignore[union-attr]
