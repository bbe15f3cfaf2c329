"""Which rows a rank has, and tensors whose rows lie in files. (`tests/pretrain/test_same_on_ranks.py` trains.)"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tasks.gradients import clip_gradients, gradient_norms
from tasks.sharded_files import ABOUT, NOTE, Pieces, read_sharded, save_flushed, shard_name, split_off, whole
from tasks.sharding import fill, is_sharded, local, rows, shard


@pytest.fixture(params=[(0, 3), (2, 3), (3, 4)], ids="rank {0[0]} of {0[1]}".format)
def place(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """One rank of several, which exchange nothing."""
    rank, world = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    yield rank, world
    dist.destroy_process_group()


@pytest.mark.parametrize("count", [1, 2, 5, 9, 12])
def test_rows_are_those_of_chunk(count: int, place: tuple[int, int]) -> None:
    rank, world = place
    full = torch.arange(count * 2.0).view(count, 2)
    model = nn.Linear(2, count, bias=False)
    shard(model, [], [], init_device_mesh("cpu", (world,)))
    parts = full.chunk(world)
    mine = parts[rank] if rank < len(parts) else full[:0]
    assert is_sharded(model) and local(model.weight).shape == mine.shape
    fill(model.weight, full)
    assert torch.equal(local(model.weight), mine)
    cuts = [(0, full[: count // 2]), (count // 2, full[count // 2 :])]
    pieces = Pieces((count, 2), full.dtype, [(first, part) for first, part in cuts if len(part)])
    assert torch.equal(pieces[...], full)
    fill(model.weight, pieces)
    assert torch.equal(local(model.weight), mine)


def test_a_scalar_is_on_every_rank(place: tuple[int, int]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.tensor(3.0))

    model = Scaled()
    shard(model, [], [], init_device_mesh("cpu", (place[1],)))
    assert rows(model.scale) is None and local(model.scale) == 3 and rows(model.weight) is not None


def test_norms_of_whole_gradients_need_no_other_rank() -> None:
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([1e15, 0.0])]
    assert torch.equal(gradient_norms(gradients), torch.tensor([5.0, 1e15]))
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([[parameter]], 1.0) == 5 and parameter.grad.norm() == pytest.approx(1, rel=1e-5)


def test_a_checkpoint_in_a_folder_is_what_it_was(tmp_path: Path) -> None:
    full, scalar = torch.arange(10.0).view(5, 2), torch.tensor(2.0)
    for rank in range(2):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        part = torch.zeros(100)[:6].view(3, 2).copy_(full[:3]) if rank == 0 else full[3:].clone()  # of a larger storage
        cut = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())
        kept = DTensor.from_local(scalar, mesh, [Replicate()], run_check=False)
        rest, mine = split_off({"state_dict": {"w": cut, "s": kept}, "step": 3, "list": [(cut, "x")]})
        assert rest["state_dict"]["w"][NOTE] == "/state_dict/w" and set(mine) == {"/state_dict/w", "/list/0/0"}
        size = save_flushed(mine, tmp_path / shard_name(rank))
        assert size < 3000
        dist.destroy_process_group()
    save_flushed({"shards": {shard_name(0): 0, shard_name(1): 0}, "checkpoint": rest}, tmp_path / ABOUT)
    found = whole(read_sharded(tmp_path))
    assert torch.equal(found["state_dict"]["w"], full) and torch.equal(found["list"][0][0], full)
    assert found["state_dict"]["s"] == 2 and found["step"] == 3 and found["list"][0][1] == "x"
