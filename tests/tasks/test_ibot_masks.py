"""Block-wise masks: drawn from keys alone, as many patches as wanted, in rectangles."""

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tasks.block_masks import hide_blocks
from tasks.masks import random_noise

RATIO = (0.1, 0.5)


def test_a_mask_follows_from_the_key_alone() -> None:
    keys = torch.tensor([7, 2**62 + 1, 12345, 7])
    whole = hide_blocks(keys, 2, (14, 14), RATIO, 0.5).mask.view(2, 4, -1)
    assert torch.equal(whole[:, 0], whole[:, 3])
    for i in range(4):
        alone = hide_blocks(keys[i : i + 1], 2, (14, 14), RATIO, 0.5).mask.view(2, 1, -1)
        assert torch.equal(alone[:, 0], whole[:, i])
    many = hide_blocks(torch.arange(50), 2, (14, 14), RATIO, 1.0).mask.view(2, 50, -1)
    assert not torch.equal(many[0], many[1]) and len(many[0].unique(dim=0)) == 50


def test_places_and_weights_belong_to_the_mask() -> None:
    hidden = hide_blocks(torch.arange(20), 2, (6, 8), RATIO, 0.5)
    assert hidden.mask.shape == (40, 48)
    rebuilt = torch.zeros(40 * 48, dtype=torch.bool)
    rebuilt[hidden.places] = True
    assert torch.equal(rebuilt.view(40, 48), hidden.mask)
    weight = hidden.weight(torch.float64)
    per_view = torch.zeros(40, dtype=torch.float64).index_add_(0, hidden.places // 48, weight)
    torch.testing.assert_close(per_view, hidden.mask.any(dim=1).double(), rtol=1e-15, atol=0)


def test_as_many_views_and_patches_as_asked_for() -> None:
    """Shares and counts agree with the authors' loop over single images, drawn from Python's own generator."""
    mask = hide_blocks(torch.arange(1000), 2, (14, 14), RATIO, 0.5).mask
    share = mask.float().mean(dim=1)
    hiding = share[share > 0]
    assert len(hiding) / 2000 == pytest.approx(0.5, abs=0.04)
    assert hiding.min() > 0.05 and hiding.max() <= 0.5
    random.seed(0)
    authors = [sum(one_by_one(14, int(196 * random.uniform(*RATIO)), random.random)) / 196 for _ in range(500)]
    assert hiding.mean().item() == pytest.approx(sum(authors) / 500, abs=0.015)


def test_each_mask_is_the_loops_mask() -> None:
    """The same numbers through the loop over single images give the same masks, patch for patch."""
    keys = torch.arange(12)
    ours = hide_blocks(keys, 1, (9, 9), RATIO, 1.0).mask
    for i in range(len(keys)):
        key = keys[i : i + 1]
        share = random_noise(key, 2, "ibot share 0").double()[0, 1].item()
        draws = torch.cat([random_noise(key, 64, f"ibot block 0 {block}")[0] for block in range(0, 640, 16)])
        wanted = int(81 * (RATIO[0] + share * (RATIO[1] - RATIO[0])))
        theirs = one_by_one(9, wanted, iter(draws.tolist()).__next__)
        assert ours[i].tolist() == theirs


def one_by_one(side: int, wanted: int, uniform) -> list[bool]:
    """BEiT's Algorithm 1 for one image, in the plainest way; four numbers for every block that is tried."""
    hidden: set[tuple[int, int]] = set()
    failures = 0
    while len(hidden) < wanted and failures < 10:
        most = min(wanted - len(hidden), side * side // 2)
        area, aspect = 4 + uniform() * (most - 4), 0.3 ** (1 - 2 * uniform())
        height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        top, left = int(uniform() * (side - height + 1)), int(uniform() * (side - width + 1))
        block = {(y, x) for y in range(top, top + height) for x in range(left, left + width)} - hidden
        fits = height < side and width < side and 0 < len(block) <= most
        hidden |= block if fits else set()
        failures = 0 if fits else failures + 1
    return [(y, x) in hidden for y in range(side) for x in range(side)]


def test_masks_do_not_hold_up_a_step() -> None:
    """A batch of them takes few operations of torch, each of which costs the main thread some microseconds."""

    class Count(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.made += 1
            return func(*args, **(kwargs or {}))

    with Count() as few:
        hide_blocks(torch.arange(2), 2, (16, 16), RATIO, 0.5)
    with Count() as many:
        hide_blocks(torch.arange(64), 2, (16, 16), RATIO, 0.5)
    assert 0 < few.made < many.made < 400


def test_a_batch_may_hide_nothing() -> None:
    """In either view, or in one only."""
    hidden = hide_blocks(torch.arange(3), 2, (4, 4), RATIO, 1e-9)
    assert hidden.mask.shape == (6, 16) and not hidden.mask.any() and hidden.places.shape == (0,)
    assert hide_blocks(torch.arange(0), 2, (4, 4), RATIO, 0.5).mask.shape == (0, 16)
    keys = torch.arange(40)[:, None]
    some = [hide_blocks(key, 2, (14, 14), RATIO, 0.5).mask.any(dim=1).tolist() for key in keys]
    assert {tuple(views) for views in some} == {(False, False), (False, True), (True, False), (True, True)}


def test_tiny_grids_end() -> None:
    for side in (1, 2, 3):
        mask = hide_blocks(torch.arange(50), 2, (side, side), (0.3, 0.9), 1.0).mask
        assert mask.shape == (100, side * side)
