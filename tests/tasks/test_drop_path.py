"""Drop path by key: the same for a sample wherever it is, with the right share and mean."""

from dataclasses import replace

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from tasks.dino import DINO
from tasks.drop_path import KeyedDropPath, drop_path_keys, use_keyed_drop_path
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.mae_task import MAETask
from tasks.masks import view_keys
from tests.tasks.dino_runs import HEAD, TINY


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


def test_parts_of_an_image_drop_together() -> None:
    module = two_paths()
    with drop_path_keys(module, torch.arange(50)):
        parts = module(torch.ones(50 * 4, 2)).view(50, 4, 2)
    assert torch.equal(parts, parts[:, :1, :1].expand_as(parts)) and parts[:, 0, 0].unique().numel() == 2


def test_all_blocks_of_an_encoder_that_drops_compute_alike() -> None:
    """timm has no drop path in the first block, whose share is 0; an encoder without drop path needs none."""
    for arch in ("vit_tiny", "timm:test_vit"):
        for drop_path, kind in ((0.5, KeyedDropPath), (0.0, nn.Identity)):
            encoder = Encoder(EncoderConfig(arch=arch, image_size=32, patch_size=8, drop_path=drop_path, pool="cls"))
            assert all(type(block.drop_path1) is type(block.drop_path2) is kind for block in encoder.blocks)
    encoder = Encoder(replace(TINY, drop_path=0.5)).train()
    with drop_path_keys(encoder, torch.arange(64)):
        first, last = (block.drop_path1.noise for block in encoder.blocks)
        assert first.eq(1).all() and sorted(last.unique().tolist()) == [0, 2]


def test_every_view_has_keys_of_its_own() -> None:
    keys = view_keys(torch.arange(100), 10)
    assert keys.shape == (10, 100) and keys.unique().numel() == 1000
    assert torch.equal(view_keys(torch.arange(100)[50:], 2), keys[:2, 50:])


def test_losses_do_not_depend_on_how_a_batch_is_cut() -> None:
    torch.manual_seed(0)
    mae = MAETask(replace(TINY, drop_path=0.5), 16, 1, 1, lr=1e-3).double().train()
    images, keys = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.arange(6)

    def of_mae(part: slice) -> Tensor:
        return mae.training_step({"image": images[part], "rng": keys[part]}, 0)["loss"]

    dino = DINO(Encoder(replace(TINY, drop_path=0.5)), HEAD).double()
    views = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64), torch.randn(3, 6, 3, 8, 8, dtype=torch.float64)

    def of_dino(part: slice) -> Tensor:
        return dino(views[0][:, part], views[1][:, part], 0.1, keys=keys[part]).loss  # type: ignore[no-any-return]

    for loss in (of_mae, of_dino):
        whole = loss(slice(6))
        halves = (loss(slice(3)) + loss(slice(3, 6))) / 2
        torch.testing.assert_close(halves, whole, rtol=1e-12, atol=0)
    model_loss = dino(*views, 0.1, keys=keys + 6).loss
    assert not torch.isclose(model_loss, of_dino(slice(6)), rtol=1e-4)
