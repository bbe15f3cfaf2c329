"""Encoders of every kind behind one interface."""

from dataclasses import replace

import pytest
import torch

from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder, Tokens
from tasks.errors import TaskError

SMALL = EncoderConfig(arch="vit_tiny", width=32, depth=2, heads=2, image_size=32, patch_size=8)


def built(**changes) -> Encoder:
    torch.manual_seed(0)
    return Encoder(replace(SMALL, **changes)).eval()


@pytest.mark.parametrize("positions", ["learned", "sincos2d", "rope"])
@pytest.mark.parametrize(("class_token", "registers"), [(True, 0), (True, 3), (False, 0), (False, 2)])
def test_prefix_and_patches_are_kept_apart(positions, class_token, registers):
    encoder = built(positions=positions, class_token=class_token, registers=registers, layer_scale=0.1)
    tokens = encoder(torch.randn(2, 3, 32, 32))
    assert tokens.prefix.shape == (2, class_token + registers, 32)
    assert tokens.patches.shape == (2, 16, 32)
    assert encoder.features(torch.randn(2, 3, 32, 32)).shape == (2, encoder.feature_width)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("registers", [0, 2])
def test_tokens_are_those_of_timms_own_forward(class_token, registers):
    encoder = built(positions="learned", class_token=class_token, registers=registers, layer_scale=0.5)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.cat(encoder(images), dim=1), encoder.trunk.forward_features(images))


@pytest.mark.parametrize("positions", ["learned", "sincos2d", "rope"])
def test_showing_all_patches_in_another_order_changes_nothing(positions):
    encoder, images = built(positions=positions, registers=1), torch.randn(2, 3, 32, 32)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    full, shuffled = encoder(images), encoder(images, order)
    torch.testing.assert_close(full.prefix, shuffled.prefix)
    torch.testing.assert_close(full.patches.gather(1, order[:, :, None].expand(-1, -1, 32)), shuffled.patches)


@pytest.mark.parametrize("positions", ["learned", "sincos2d", "rope"])
def test_hidden_patches_are_not_seen(positions):
    encoder, images = built(positions=positions), torch.randn(1, 3, 32, 32)
    keep = torch.tensor([[0, 5, 6]])
    before = encoder(images, keep)
    images[:, :, 24:] = 9.0  # the last row of patches
    torch.testing.assert_close(torch.cat(before, 1), torch.cat(encoder(images, keep), 1))
    assert before.patches.shape == (1, 3, 32)


def test_masked_patches_become_the_mask_token_but_keep_their_place():
    encoder, images = built(), torch.randn(2, 3, 32, 32)
    mask, token = torch.zeros(2, 16, dtype=torch.bool), torch.randn(32, requires_grad=True)
    torch.testing.assert_close(encoder(images, mask=mask, mask_token=token).patches, encoder(images).patches)
    mask[:, 3] = mask[:, 7] = True
    first = encoder(images, mask=mask, mask_token=token)
    images[:, :, :8, 24:] = 5.0  # patch 3
    torch.testing.assert_close(first.patches, encoder(images, mask=mask, mask_token=token).patches)
    assert (first.patches[:, 3] - first.patches[:, 7]).abs().max() > 1e-4
    first.patches.sum().backward()
    assert token.grad.abs().sum() > 0
    keep = torch.tensor([[7, 0], [0, 1]])
    together = encoder(images, keep, mask, token)
    images[:, :, 8:16, 24:] = 5.0  # patch 7
    torch.testing.assert_close(together.patches, encoder(images, keep, mask, token).patches)


@pytest.mark.parametrize("positions", ["learned", "sincos2d", "rope"])
@pytest.mark.parametrize("manner", ["mae", "dino", "open_clip"])
def test_other_resolutions_and_shapes(positions, manner):
    encoder = built(positions=positions, position_resize=manner)
    for height, width in ((48, 48), (16, 16), (24, 40), (35, 33)):
        tokens = encoder(torch.randn(1, 3, height, width))
        assert tokens.patches.shape[1] == (height // 8) * (width // 8)


def test_pooling():
    encoder = built(pool="cls+mean", registers=1)
    tokens = Tokens(torch.randn(2, 2, 32), torch.randn(2, 16, 32))
    both = encoder.pool(tokens)
    assert encoder.feature_width == both.shape[1] == 64
    torch.testing.assert_close(both, torch.cat([tokens.prefix[:, 0], tokens.patches.mean(1)], dim=1))
    torch.testing.assert_close(encoder.pool(tokens, "mean"), both[:, 32:])
    torch.testing.assert_close(encoder.pool(tokens, "cls"), both[:, :32])
    with pytest.raises(TaskError, match="no class token"):
        built(class_token=False).pool(tokens, "cls")


def test_drop_path_grows_with_depth_and_follows_the_seed():
    encoder = built(drop_path=0.4, depth=3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    for arch in ("vit_tiny", "timm:test_vit"):
        config = EncoderConfig(arch=arch, image_size=32, drop_path=0.4, drop_path_uniform=True, pool="cls")
        uniform = Encoder(config if arch != "vit_tiny" else replace(config, depth=1))
        paths = [path for block in uniform.blocks for path in (block.drop_path1, block.drop_path2)]
        assert [path.drop_prob for path in paths] == [0.4] * len(paths)
    images = torch.randn(4, 3, 32, 32)
    encoder.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(encoder(images).patches)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    encoder.eval()
    assert torch.equal(encoder(images).patches, encoder(images).patches)


def test_learned_positions_learn_and_fixed_ones_do_not():
    for positions, learns in (("learned", True), ("sincos2d", False)):
        encoder = built(positions=positions)
        keep = torch.tensor([[0, 5]])
        encoder(torch.randn(1, 3, 32, 32), keep).patches.square().sum().backward()
        grad = encoder.trunk.pos_embed.grad
        assert (grad is not None) == learns
        if learns:  # class token, patch 0 and patch 5 were there, no other
            assert grad[0].abs().sum(1).gt(0).nonzero().flatten().tolist() == [0, 1, 6]


def test_blocks_can_be_recomputed_one_at_a_time():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    encoder, images = built(), torch.randn(2, 3, 32, 32)
    want, names = encoder(images).patches, list(encoder.state_dict())
    blocks = set(encoder.blocks)
    apply_activation_checkpointing(encoder, check_fn=lambda module: module in blocks)
    assert list(encoder.state_dict()) == names
    torch.testing.assert_close(encoder(images).patches, want)
    encoder(images).patches.sum().backward()
    assert encoder.trunk.patch_embed.proj.weight.grad is not None


def test_blocks_can_be_compiled_one_at_a_time():
    encoder, images = built(), torch.randn(2, 3, 32, 32)
    want, names = encoder(images).patches, list(encoder.state_dict())
    for block in encoder.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert list(encoder.state_dict()) == names
    torch.testing.assert_close(encoder(images).patches, want)


def test_float64_and_other_channels():
    encoder = Encoder(replace(SMALL, in_chans=1, mean=(0.5,), std=(0.5,))).double()
    assert encoder(torch.randn(1, 1, 32, 32).double()).patches.dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["gloo"])
def test_blocks_can_be_sharded_with_fsdp2(backend, tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from tasks.mae import MAE

        torch.manual_seed(0)
        model, images, noise = MAE(built(), 16, 2, 2), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
        want = model(images, noise, loss_only=True).loss
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for block in (*model.encoder.blocks, *model.decoder_blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss = model(images, noise, loss_only=True).loss
        torch.testing.assert_close(loss, want)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        dist.destroy_process_group()
