"""MAE against the authors' recorded numbers, and its faults."""

import pytest
import torch

from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.mae import MAE
from tasks.mae_task import MAETask
from tasks.original_files import mae_names

SMALL = EncoderConfig(arch="vit_tiny", width=32, depth=2, heads=2, image_size=32, patch_size=8)


def small_mae(**changes) -> MAE:
    torch.manual_seed(0)
    return MAE(Encoder(SMALL), **{"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2, **changes})


def golden_task(golden, **changes) -> MAETask:
    """The task that a YAML with the fixture's sizes builds, holding the fixture's weights, in float64."""
    c = golden.config
    encoder = EncoderConfig(
        arch="vit_base",
        image_size=c["img_size"],
        patch_size=c["patch_size"],
        in_chans=c["in_chans"],
        width=c["embed_dim"],
        depth=c["depth"],
        heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        norm_eps=c["layer_norm_eps"],
        qkv_bias=c["qkv_bias"],
        positions="sincos2d",
        position_resize="mae",
    )
    decoder = (c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"])
    task = MAETask(encoder, *decoder, mask_ratio=c["mask_ratio"], lr=1e-3, **changes).double()
    task.model.load_state_dict(mae_names(golden.group("state.")))
    return task


def off(ours, theirs) -> float:
    assert ours.shape == theirs.shape
    return (ours.double() - theirs).abs().max().item()


@pytest.mark.golden("mae_model")
def test_features_predictions_and_mask_are_the_authors(golden):
    model, want = golden_task(golden).model, golden.group("out.")
    images, noise = golden.group("in.")["imgs"], golden.group("in.")["noise"]
    out = model(images, noise)
    assert off(torch.cat(out.latent, dim=1), want["latent"]) < 1e-9
    assert off(out.pred, want["pred"]) < 1e-9
    assert off(out.mask, want["mask"].double()) == 0
    assert off(model.patchify(images), want["patchified"]) == 0
    assert off(model.unpatchify(model.patchify(images)), images) == 0


@pytest.mark.golden("mae_model")
@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("loss_only", [True, False])
def test_loss_is_the_authors_both_ways(golden, norm_pix_loss, loss_only):
    model = golden_task(golden, norm_pix_loss=norm_pix_loss).model
    given = golden.group("in.")
    loss = model(given["imgs"], given["noise"], loss_only=loss_only).loss
    want = golden.group("out.")[f"loss_norm_pix_{str(norm_pix_loss).lower()}"]
    assert abs(loss.item() - want.item()) < 1e-9


@pytest.mark.golden("mae_model")
@pytest.mark.parametrize("loss_only", [True, False])
def test_every_gradient_is_the_authors(golden, loss_only):
    model, given, want = golden_task(golden).model, golden.group("in."), mae_names(golden.group("grad."))
    model(given["imgs"], given["noise"], loss_only=loss_only).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert grads.keys() == want.keys()
    assert max(off(grads[name], want[name]) for name in want) < 1e-9


@pytest.mark.golden("mae_pos_embed")
def test_tables_of_a_built_model_are_the_authors(golden):
    for table in golden.config["tables"]:
        if not table["cls_token"]:
            continue
        grid, width = table["grid"], table["dim"]
        config = EncoderConfig(width=width, depth=1, heads=1, image_size=4 * grid, patch_size=4)
        model = MAE(Encoder(config), width, 1, 1)
        want = golden.group("pos_embed.")[f"dim{width}_grid{grid}_cls1"]
        for ours in (model.encoder.trunk.pos_embed, model.decoder_pos_embed):
            assert not ours.requires_grad
            assert off(ours[0], want) < 1e-7  # kept in float32, as the authors keep it


def test_training_alone_spares_predictions_but_changes_nothing():
    model, images, noise = small_mae(), torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    quick, full = model(images, noise, loss_only=True), model(images, noise)
    torch.testing.assert_close(quick.loss, full.loss)
    assert quick.pred is None
    assert full.pred.shape == (3, 16, 192)
    hidden = full.mask.bool()
    target = model.patchify(images)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    torch.testing.assert_close(((full.pred - target) ** 2)[hidden].mean(), full.loss)


def test_hidden_pixels_never_reach_the_encoder():
    model, images, noise = small_mae(), torch.randn(1, 3, 32, 32), torch.rand(1, 16)
    before = model(images, noise)
    hidden = model.patchify(images)
    hidden[before.mask.bool()] = 7.0
    after = model(model.unpatchify(hidden), noise)
    torch.testing.assert_close(before.latent.patches, after.latent.patches)
    torch.testing.assert_close(before.pred, after.pred)
    assert abs(before.loss - after.loss) > 1e-3


def test_bfloat16_autocast_keeps_the_loss_in_float32():
    model, images, noise = small_mae(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    exact = model(images, noise, loss_only=True).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, noise, loss_only=True).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["sincos2d", "rope"])
def test_one_graph_for_torch_compile(positions):
    from dataclasses import replace

    model = MAE(Encoder(replace(SMALL, positions=positions, drop_path=0.2)), 16, 1, 2)
    step = torch.compile(
        lambda images, noise: model(images, noise, loss_only=True).loss, fullgraph=True, backend="aot_eager"
    )
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    model.eval()
    loss = step(images, noise)
    torch.testing.assert_close(loss, model(images, noise).loss)
    loss.backward()


@pytest.mark.parametrize("positions", ["sincos2d", "learned", "rope"])
def test_meta_device_then_filled(positions):
    from dataclasses import replace

    with torch.device("meta"):
        model = MAE(Encoder(replace(SMALL, positions=positions, layer_scale=0.1, registers=2)), 16, 1, 2)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.init_weights()
    loss = model(torch.randn(2, 3, 32, 32), torch.rand(2, 16)).loss
    assert 0.5 < loss.item() < 3


def test_initialisation_is_the_papers():
    model = small_mae(decoder_width=64)
    limit = (6 / (192 + 32)) ** 0.5  # Xavier-uniform of the patch embedding as a linear layer
    weight = model.encoder.trunk.patch_embed.proj.weight
    assert 0.95 * limit < weight.abs().max() <= limit
    assert model.decoder_pred.bias.abs().max() == 0
    assert 0.01 < model.mask_token.std() < 0.03
    assert model.encoder.trunk.norm.weight.eq(1).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": 0.97}, "mask_ratio"),
        ({"decoder_width": 18}, "decoder_width"),
        ({"decoder_heads": 3}, "decoder_heads"),
        ({"decoder_depth": 0}, "decoder_depth"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(TaskError, match=says):
        small_mae(**changes)


def test_an_encoder_that_cannot_hide_patches_is_refused():
    with pytest.raises(TaskError, match="plain ViT"):
        MAE(Encoder(EncoderConfig(arch="timm:convnext_atto", image_size=64)))
