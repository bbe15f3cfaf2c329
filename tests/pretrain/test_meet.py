"""Ranks that are started again do not call those that are gone."""

import signal
import threading

import pytest
import torch.distributed as dist

from pretrain.errors import AgreedFailure, Interrupted, RunFailure
from pretrain.meet import agree_on_round, part


def together(store: dist.Store, world: int, order: list[int]) -> list[str]:
    """What the ranks agree on when they come in that order."""
    found: dict[int, str] = {}
    ranks = [
        threading.Thread(
            target=lambda rank=rank: found.__setitem__(rank, agree_on_round(store, rank, world)), daemon=True
        )
        for rank in order
    ]
    for rank in ranks:
        rank.start()
        rank.join(0.1)
    for rank in ranks:
        rank.join(20)
    return [found[rank] for rank in range(world)]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_each_round_is_its_own_whoever_comes_first(order: list[int]) -> None:
    store = dist.HashStore()
    names = [together(store, 3, order) for _ in range(3)]
    assert all(len(set(name)) == 1 for name in names) and len({name[0] for name in names}) == 3


def test_ranks_that_died_while_they_waited_do_not_matter() -> None:
    store = dist.HashStore()
    store.set("trivit/here/1", "dead")
    for _ in range(2):
        assert len(set(together(store, 2, [0, 1]))) == 1


@pytest.mark.parametrize(
    ("error", "parted"),
    [
        (None, True),
        (Interrupted("saved", signal.SIGTERM), True),
        (AgreedFailure("a full disk", 1), True),
        (RunFailure("another rank ended"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_ranks_part_where_all_of_them_end_and_only_there(
    error: BaseException | None, parted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    destroyed: list[int] = []

    def destroy() -> None:
        destroyed.append(1)
        raise RuntimeError("another one is gone after all")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", destroy)
    part(error)
    assert len(destroyed) == parted
