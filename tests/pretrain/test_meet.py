"""Ranks that are started again do not call those that are gone."""

import threading

import pytest
import torch.distributed as dist

from pretrain.meet import agree_on_round


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
