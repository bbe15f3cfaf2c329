"""Position tables and their resizing, against the authors' numbers and against timm."""

import re

import pytest
import torch
import torch.nn.functional as F

from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.positions import resize_table, rope_table, rotate, sincos2d_table


@pytest.mark.golden("mae_pos_embed")
def test_sine_cosine_table_is_the_authors(golden):
    for table in golden.config["tables"]:
        ours = sincos2d_table(table["dim"], (table["grid"], table["grid"]), int(table["cls_token"]))
        name = f"dim{table['dim']}_grid{table['grid']}_cls{int(table['cls_token'])}"
        assert (ours - golden.group("pos_embed.")[name]).abs().max() < 1e-9


@pytest.mark.golden("mae_pos_embed")
def test_resizing_in_the_manner_of_mae(golden):
    given = golden.group("resize.")
    cases = [name.removesuffix(".in") for name in given if name.endswith(".in")]
    assert cases
    for case in cases:
        old, new = (int(side) for side in re.search(r"from(\d+)_to(\d+)", case).groups())
        table = given[f"{case}.in"][0]
        prefix, patches = table[: len(table) - old * old], table[len(table) - old * old :]
        ours = torch.cat([prefix, resize_table(patches, (old, old), (new, new), "mae")])
        assert (ours - given[f"{case}.out"][0]).abs().max() < 1e-9


@pytest.mark.golden("dino_pos_interp")
def test_resizing_in_the_manner_of_dino_through_an_encoder(golden):
    c, want = golden.config, golden.group("out.")
    config = EncoderConfig(
        width=c["dim"], depth=1, heads=1, image_size=c["grid"] * c["patch_size"], patch_size=c["patch_size"],
        positions="learned", position_resize="dino",
    )  # fmt: skip
    encoder = Encoder(config).double()
    encoder.trunk.pos_embed.data.copy_(golden.group("in.")["pos_embed"])
    for height, width in c["image_sizes"]:
        ours = encoder.position_table(height, width)
        assert (ours - want[f"{height}x{width}"][0]).abs().max() < 1e-9
        assert encoder(torch.randn(1, 3, height, width).double()).patches.shape[1] == len(ours) - 1


@pytest.mark.parametrize("new", [(3, 3), (6, 6), (3, 5)])
def test_resizing_in_the_manner_of_open_clip(new):
    table = torch.randn(16, 8)
    image = table.reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    want = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    ours = resize_table(table, (4, 4), new, "open_clip")
    torch.testing.assert_close(ours, want.flatten(2)[0].t())
    resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
    torch.testing.assert_close(ours[None], resample(table[None], list(new), [4, 4], num_prefix_tokens=0))


def test_resizing_in_the_manner_of_open_clip_is_open_clips():
    open_clip = pytest.importorskip("open_clip")
    table = torch.randn(1 + 16, 8)
    tower = torch.nn.Module()
    tower.visual = torch.nn.Module()
    tower.visual.grid_size = (6, 6)
    state = {"visual.positional_embedding": table.clone()}
    open_clip.model.resize_pos_embed(state, tower)
    torch.testing.assert_close(
        resize_table(table[1:], (4, 4), (6, 6), "open_clip"), state["visual.positional_embedding"][1:]
    )


def test_manners_differ_and_gradients_pass():
    table = torch.randn(16, 8, requires_grad=True)
    results = [resize_table(table, (4, 4), (3, 3), manner) for manner in ("mae", "dino", "open_clip")]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (results[one] - results[other]).abs().max() > 1e-3
    results[1].sum().backward()
    assert table.grad.abs().sum() > 0


def test_half_precision_table_is_resized_in_float32():
    table = torch.randn(16, 8)
    ours = resize_table(table.bfloat16(), (4, 4), (6, 6), "mae")
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, resize_table(table.bfloat16().float(), (4, 4), (6, 6), "mae").bfloat16())


def test_rotary_angles_are_those_of_dinov3_in_timm():
    layers = pytest.importorskip("timm.layers")
    if not hasattr(layers, "RotaryEmbeddingDinoV3"):
        pytest.skip("this timm has no DINOv3")
    theirs = layers.RotaryEmbeddingDinoV3(16, temperature=100.0).get_embed([3, 5])
    torch.testing.assert_close(torch.cat(rope_table(16, (3, 5)), dim=1).float(), theirs, atol=1e-5, rtol=1e-5)


def test_rotation_keeps_prefix_and_lengths_and_sees_only_differences():
    sin, cos = rope_table(8, (4, 4))
    x = torch.randn(2, 3, 1 + 16, 8, dtype=torch.float64)
    turned = rotate(x, sin, cos)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    q, k = (rotate(torch.randn(8, dtype=torch.float64).expand(1, 1, 16, 8), sin, cos)[0, 0] for _ in range(2))
    scores = q @ k.t()
    torch.testing.assert_close(scores[0, 5], scores[5, 10])  # one step down and right, from two places
    assert abs(scores[0, 5] - scores[5, 0]) > 1e-6
