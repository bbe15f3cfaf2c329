"""Noise from keys alone, and which patches it shows."""

import pytest
import torch

from tasks.masks import random_noise, split_patches, visible_patches


def splitmix(x: int) -> int:
    x &= (1 << 64) - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & ((1 << 64) - 1)
    return x ^ (x >> 31)


def test_noise_is_splitmix_of_key_purpose_and_patch():
    import zlib

    keys = torch.tensor([0, 1, 2**63 - 1, 123456789])
    noise = random_noise(keys, 5, "mae mask")
    for i, key in enumerate(keys.tolist()):
        stream = splitmix(key ^ zlib.crc32(b"mae mask"))
        want = [(splitmix(stream + j * 0x9E3779B97F4A7C15) >> 40) / 2**24 for j in range(1, 6)]
        assert noise[i].tolist() == want


def test_noise_does_not_depend_on_its_neighbours_in_the_batch():
    keys = torch.arange(10)
    together = random_noise(keys, 7, "a")
    apart = torch.cat([random_noise(key[None], 7, "a") for key in keys])
    assert torch.equal(together, apart)


def test_noise_is_uniform_and_independent_between_keys_patches_and_purposes():
    noise = random_noise(torch.arange(4000), 50, "a").double()
    other = random_noise(torch.arange(4000), 50, "b").double()
    assert noise.min() >= 0 and noise.max() < 1
    counts = torch.histc(noise.float(), 50, 0, 1)
    assert (counts - 4000).abs().max() < 5 * 4000**0.5
    rows = torch.stack([noise.flatten(), other.flatten(), noise.roll(1, 0).flatten(), noise.roll(1, 1).flatten()])
    correlation = torch.corrcoef(rows) - torch.eye(4)
    assert correlation.abs().max() < 5 / noise.numel() ** 0.5


@pytest.mark.parametrize(("n", "ratio", "visible"), [(196, 0.75, 49), (64, 0.75, 16), (256, 0.75, 64), (49, 0.6, 19)])
def test_as_many_patches_are_seen_as_in_mae(n, ratio, visible):
    assert visible_patches(n, ratio) == visible
    keep, hide = split_patches(torch.rand(3, n), ratio)
    assert keep.shape == (3, visible)
    assert torch.cat([keep, hide], dim=1).sort(dim=1).values.eq(torch.arange(n)).all()


def test_smallest_noise_is_seen_and_ties_go_by_place():
    keep, hide = split_patches(torch.tensor([[0.5, 0.1, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]), 0.5)
    assert keep.tolist() == [[1, 0], [0, 1]]
    assert hide.tolist() == [[2, 3], [2, 3]]
