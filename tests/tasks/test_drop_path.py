"""Drop path by key: the same for a sample wherever it is, with the right share and mean."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from tasks.drop_path import KeyedDropPath, drop_path_keys, use_keyed_drop_path


def two_paths() -> nn.Sequential:
    module = nn.Sequential(DropPath(0.25), nn.Sequential(nn.Identity(), DropPath(0.25)))
    use_keyed_drop_path(module)
    return module


def test_draws_follow_from_the_keys() -> None:
    module, keys, x = two_paths(), torch.arange(4000), torch.ones(4000, 2, 3)
    with drop_path_keys(module, keys):
        whole = module(x)
        again = module(x)
    parts = []
    for part in keys.flip(0).split(7):
        with drop_path_keys(module, part):
            parts.append(module(x[: len(part)]))
    assert torch.equal(whole, again) and torch.equal(torch.cat(parts).flip(0), whole)
    assert torch.equal(whole, whole[:, :1, :1].expand_as(whole))  # a whole sample or nothing
    assert (whole[:, 0, 0] > 0).float().mean() == pytest.approx(0.75**2, abs=0.03)  # two independent draws
    assert whole.mean() == pytest.approx(1, abs=0.05)


def test_without_keys_and_in_evaluation() -> None:
    module, x = two_paths(), torch.ones(64, 2)
    paths = [part for part in module.modules() if isinstance(part, KeyedDropPath)]
    assert len(paths) == 2
    torch.manual_seed(0)
    first = module(x)
    assert not torch.equal(first, module(x))
    with drop_path_keys(module, torch.arange(3)):  # windows of images, say
        assert module(x).shape == x.shape
    assert all(path.noise is None for path in paths)
    assert torch.equal(module.eval()(x), x)
