"""DINOv2's terms against the authors' recorded numbers: DINO and iBOT losses, centring, Sinkhorn-Knopp, KoLeo."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tasks.centering import Centering
from tasks.dino_loss import DINOLoss
from tasks.ibot_loss import IBOTLoss
from tasks.koleo_loss import KoLeoLoss
from tasks.sinkhorn import SinkhornKnopp
from tests.conftest import Golden

EXACT, SINGLE = 1e-9, 1e-5  # float64, and whatever passes through Sinkhorn-Knopp's float32

pytestmark = pytest.mark.golden("dinov2_losses")


def off(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()


def centered(c: dict[str, Any], logits: Tensor) -> tuple[Centering, Tensor]:
    """A centring that has been used and moved once, and the targets of that first use; logits stay as they are."""
    centering = Centering(logits.shape[-1], c["center_momentum"]).double()
    first = centering(logits.clone(), c["teacher_temp"])
    assert not centering.center.any(), "a forward pass moved the centre"
    rows = logits.flatten(0, -2)
    halves = rows.split([len(rows) // 3, len(rows) - len(rows) // 3])
    centering.update(sum(centering.statistics(half) for half in halves))  # type: ignore[arg-type]
    return centering, first


def test_koleo(golden: Golden) -> None:
    x, want = golden.group("in.koleo.")["x"].requires_grad_(), golden.group("out.koleo.")
    loss = KoLeoLoss()(x)
    assert off(loss, want["loss"]) < EXACT
    assert off(torch.autograd.grad(loss, x)[0], want["grad"]) < EXACT


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
def test_dino(golden: Golden, targets: str) -> None:
    c, given, want = golden.config, golden.group("in.dino."), golden.group(f"out.dino.{targets}.")
    tolerance = EXACT if targets == "centering" else SINGLE
    views, _, _ = given["teacher_logits"].shape
    if targets == "centering":
        centering, probs = centered(c, given["teacher_logits"])
        assert off(centering.center, want["center_after_next_use"]) < EXACT
        next_probs = centering(given["teacher_logits_next"].clone(), c["teacher_temp2"])
        assert off(next_probs, want["teacher_probs_next"]) < EXACT
    else:
        probs = SinkhornKnopp(c["n_iterations"])(given["teacher_logits"].clone(), c["teacher_temp"])
    assert off(probs, want["teacher_probs"]) < tolerance
    student = given["student"].requires_grad_()
    pairs = len(student) * views  # the recorded function adds up all pairs, and leaves out none
    loss = DINOLoss(c["student_temp"])(student, probs, own=0) * pairs
    assert off(loss, want["loss"]) < tolerance
    assert off(torch.autograd.grad(loss, student)[0], want["grad"]) < tolerance


def test_ibot_on_all_patches(golden: Golden) -> None:
    c, given, want = golden.config, golden.group("in.ibot."), golden.group("out.ibot.")
    centering, probs = centered(c, given["teacher_logits"])
    assert off(probs, want["teacher_probs_first"]) < EXACT
    assert off(centering.center[None], want["center_after_next_use"]) < EXACT
    probs = centering(given["teacher_logits"].clone(), c["teacher_temp"])
    assert off(probs, want["teacher_probs_second"]) < EXACT
    mask = given["mask"]
    weight = (1 / mask.sum(dim=1).clamp(min=1).double())[:, None].expand(mask.shape)[mask]
    student = given["student"].requires_grad_()
    loss = IBOTLoss(c["student_temp"])(student[mask], probs[mask], weight, len(mask))
    assert off(loss, want["dense_loss"]) < EXACT
    assert off(torch.autograd.grad(loss, student)[0], want["dense_grad"]) < EXACT


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
def test_ibot_on_hidden_patches(golden: Golden, targets: str) -> None:
    c, given, want = golden.config, golden.group("in.ibot."), golden.group(f"out.ibot_masked.{targets}.")
    tolerance = EXACT if targets == "centering" else SINGLE
    m = int(given["n_masked_patches"])
    teacher = given["teacher_masked_logits"][:m]
    if targets == "centering":
        centering, probs = centered(c, teacher)
        assert off(centering.center[None], want["center_after"]) < EXACT
    else:
        probs = SinkhornKnopp(c["n_iterations"])(teacher.clone(), c["teacher_temp"])
    assert off(probs, want["teacher_probs"]) < tolerance
    mask = given["mask"]
    weight = (1 / mask.sum(dim=1).clamp(min=1).double())[:, None].expand(mask.shape)[mask]
    student = given["student_masked"][:m].requires_grad_()
    loss = IBOTLoss(c["student_temp"])(student, probs, weight, len(mask))
    assert off(loss, want["loss"]) < tolerance
    assert off(torch.autograd.grad(loss, student)[0], want["grad"]) < tolerance


@pytest.mark.slow
def test_two_processes(golden: Golden, tmp_path: Path) -> None:
    """Ranks normalise and centre together, with different numbers of hidden patches."""
    world_size = golden.config["ws"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (world_size, port, golden.path, tmp_path), nprocs=world_size)  # type: ignore[no-untyped-call]
    for rank in range(world_size):
        ours, want = torch.load(tmp_path / f"{rank}.pt"), golden.group(f"out.dist.rank{rank}.")
        assert off(ours["dino_center_after"], want["dino_center_after"]) < EXACT
        assert off(ours["dino_sinkhorn_probs"], want["dino_sinkhorn_probs"]) < SINGLE
        assert off(ours["ibot_sinkhorn_probs"], want["ibot_sinkhorn_probs"]) < SINGLE
        assert ours["rows_of_one_rank_only"].isfinite().all()


def _rank(rank: int, world_size: int, port: int, path: Path, results: Path) -> None:
    torch.set_num_threads(1)
    golden = Golden(path)
    c, given = golden.config, golden.group(f"in.dist.rank{rank}.")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    centering = Centering(given["teacher_logits"].shape[-1], c["center_momentum"]).double()
    centering.update(centering.statistics(given["teacher_logits"]))
    sinkhorn = SinkhornKnopp(c["n_iterations"])
    ours = {
        "dino_center_after": centering.center,
        "dino_sinkhorn_probs": sinkhorn(given["teacher_logits"].clone(), c["teacher_temp"]),
        "ibot_sinkhorn_probs": sinkhorn(given["ibot_teacher_logits"].clone(), c["teacher_temp"]),
        "rows_of_one_rank_only": sinkhorn(given["ibot_teacher_logits"][: 2 * rank].clone(), c["teacher_temp"]),
    }
    torch.save(ours, results / f"{rank}.pt")
    dist.destroy_process_group()
