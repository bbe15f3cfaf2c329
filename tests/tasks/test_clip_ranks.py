"""CLIP's and SigLIP's losses over ranks: golden numbers, gradients after DDP's mean, memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from tasks.clip_loss import CLIPLoss
from tasks.clip_task import CLIPTask
from tasks.siglip_loss import SigLIPLoss
from tests.conftest import GOLDEN, Golden
from tests.tasks.clip_runs import Pairs, fit, pairs, peak_bytes, tiny_task

COUNT = 6


class Step(nn.Module):
    """What Lightning runs inside DDP."""

    def __init__(self, task: CLIPTask, micro_batch: int | None) -> None:
        super().__init__()
        self.model, self.micro_batch = task.model, micro_batch

    def forward(self, images: Tensor, ids: Tensor, keys: Tensor) -> Tensor:
        return self.model.contrast(*self.model(images, ids, keys, self.micro_batch))


def cases() -> list[tuple[str, CLIPTask, int | None]]:
    """Drop path and patch dropping on, pairs seen at once and one by one."""
    return [
        (f"{loss}, {micro_batch} at a time", tiny_task(loss=loss, patch_drop=0.5).double(), micro_batch)
        for loss in ("softmax", "sigmoid")
        for micro_batch in (None, 1)
    ]


def step(module: nn.Module, rank: int, world: int) -> dict[str, Tensor]:
    mine = torch.arange(COUNT).chunk(world)[rank]
    loss = module(*(part[mine] for part in pairs(COUNT, dtype=torch.float64)))
    loss.backward()
    gradients = {n.removeprefix("module."): p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    out: dict[str, Any] = {}
    for path in sorted(GOLDEN.glob("clip_dist_loss_*.json")):
        golden = Golden(path)
        c, given = golden.config, golden.group(f"in.ws{world}.rank{rank}.")
        for kind, loss, values in (
            ("clip", CLIPLoss(), [c["scale"]]),
            ("siglip", SigLIPLoss(), [c["siglip_scale"], c["siglip_bias"]]),
        ):
            inputs = [given["image_features"].requires_grad_(), given["text_features"].requires_grad_()]
            inputs += [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]
            found = loss(*inputs)
            out[f"{path.stem} {kind}"] = [found.detach(), *torch.autograd.grad(found, inputs)]
    for name, task, micro_batch in cases():
        out[name] = step(DistributedDataParallel(Step(task, micro_batch)), rank, world)
    torch.save(out, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_one_process_with_the_whole_batch(world: int, tmp_path: Path) -> None:
    spawn(worker, (world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(world)]
    for path in sorted(GOLDEN.glob("clip_dist_loss_*.json")):
        golden = Golden(path)
        for rank, out in enumerate(ranks):
            for kind, prefix in (("clip", "local_loss1_gather_with_grad1."), ("siglip", "")):
                want = golden.group(f"out.{kind}.ws{world}.{prefix}rank{rank}.")
                names = ["loss", "grad_image_features", "grad_text_features", "grad_scale", "grad_bias"]
                assert len(out[f"{path.stem} {kind}"]) == len(want)
                for name, found in zip(names, out[f"{path.stem} {kind}"], strict=False):
                    assert (found - want[name].reshape(found.shape)).abs().max() < 1e-9, (kind, name)
    for name, task, _ in cases():
        whole = step(Step(task, None), 0, 1)  # one process, all pairs at once
        mean = sum(float(out[name]["loss"]) for out in ranks) / world
        assert mean == pytest.approx(float(whole.pop("loss")), abs=1e-9)
        for out in ranks:
            out[name].pop("loss")
            assert out[name].keys() == whole.keys() and len(whole) > 40
            for parameter, gradient in whole.items():
                assert (out[name][parameter] - gradient).abs().max() < 1e-9, (name, parameter)


@pytest.mark.slow
def test_two_ranks_with_accumulation_train_as_one_without() -> None:
    one, two = (tiny_task(patch_drop=0.5, loss="sigmoid").double() for _ in range(2))
    fit(one, 3, Pairs(8), precision="64-true")
    fit(two, 3, Pairs(8, micro_batch=2), precision="64-true", devices=2, strategy="ddp_spawn")
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=0, atol=1e-9)


def memory(loss: nn.Module, world: int, b: int = 128, width: int = 8) -> int:
    """Peak of forward and backward pass of one rank of so many, which exchange nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    scalars = [torch.tensor(1.0, requires_grad=True) for _ in range(2 if isinstance(loss, SigLIPLoss) else 1)]
    image, text = (torch.randn(b, width, requires_grad=True) for _ in range(2))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        return peak_bytes(lambda: loss(image, text, *scalars).backward())
    finally:
        dist.destroy_process_group()


def test_memory_of_siglip_does_not_grow_with_the_ranks_and_that_of_clip_only_in_proportion() -> None:
    assert memory(SigLIPLoss(), 2) == memory(SigLIPLoss(), 8) == memory(SigLIPLoss(), 32)
    four, eight, sixteen = (memory(CLIPLoss(), world) for world in (4, 8, 16))
    assert sixteen - eight == pytest.approx(2 * (eight - four), rel=0.1)
    assert eight - four < 4 * 128 * 128 * 4 * 16  # per rank more: 16 blocks of logits at most


def test_memory_of_siglip_has_a_bound_on_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks.siglip_loss as module

    b = 512
    draw = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(b, 4, generator=draw), dim=1) for _ in range(2))
    image.requires_grad_()
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)

    def run() -> tuple[Tensor, Tensor]:
        loss = SigLIPLoss()(image, text, scale, bias)
        return loss.detach(), torch.autograd.grad(loss, image)[0]

    whole, all_at_once = run(), peak_bytes(run)
    monkeypatch.setattr(module, "BLOCK", 8 * b)
    parts, in_blocks = run(), peak_bytes(run)
    for a, c in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)
    assert in_blocks < all_at_once / 10
