"""The class token's attention: a token that is built to look at one patch must be seen to do so."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.attention import class_attention, draw_class_attention
from evaluation.errors import EvaluationError
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder

CONFIG = EncoderConfig(
    arch="vit_tiny", width=16, depth=2, heads=2, image_size=16, patch_size=4, registers=2, positions="learned"
)


def pixels(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def looking_at_red() -> Encoder:
    """In its last layer, head 2 asks for what a red patch says, and head 1 asks for nothing."""
    torch.manual_seed(0)
    encoder = Encoder(CONFIG).eval()
    with torch.no_grad():
        encoder.trunk.patch_embed.proj.weight.zero_()
        encoder.trunk.pos_embed.zero_()
        encoder.trunk.patch_embed.proj.weight[3, 0] = 1.0  # channel 3 of a token is its redness
        for block in encoder.blocks:
            for part in (block.attn.proj, block.mlp.fc2, block.attn.qkv):
                torch.nn.init.zeros_(part.weight)
                torch.nn.init.zeros_(part.bias)
        encoder.blocks[1].attn.qkv.bias[8] = 3.0  # a query of head 2 (channels 8 to 15), the same for each token
        encoder.blocks[1].attn.qkv.weight[16 + 8, 3] = 3.0  # its key: redness
    return encoder


def one_red_patch() -> torch.Tensor:
    """Two wide images, black but for one patch: row 1, column 4 of the first, row 3, column 0 of the second."""
    images = torch.zeros(2, 3, 16, 24, dtype=torch.uint8)
    images[0, 0, 4:8, 16:20] = images[1, 0, 12:16, 0:4] = 255
    return images


def test_each_head_is_shown_where_it_looks() -> None:
    found = class_attention(looking_at_red(), one_red_patch())
    assert found.weights.shape == (2, 2, 2, 4, 6)
    even = torch.full((2, 2, 4, 6), 1 / 27)  # 24 patches, a class token, two registers
    torch.testing.assert_close(found.weights[0], even)
    torch.testing.assert_close(found.weights[1, :, 0], even[:, 0])
    assert [divmod(int(found.weights[1, i, 1].argmax()), 6) for i in range(2)] == [(1, 4), (3, 0)]


def test_pictures_are_by_their_own_largest_value_and_tell_how_wide_it_is() -> None:
    first, _ = draw_class_attention(class_attention(looking_at_red(), one_red_patch()))
    assert first.image.startswith("data:image/")
    even, peaked = first.layers[1]
    assert (pixels(even.image) == 255).all() and pixels(even.image).shape == (4, 6)
    assert pixels(peaked.image)[1, 4] == 255 and np.count_nonzero(pixels(peaked.image) > 128) == 1
    assert even.patches == 24 and even.on_patches == pytest.approx(24 / 27) and even.spread == pytest.approx(24)
    assert 1 <= peaked.spread < 12
    assert even.least == pytest.approx(1) and even.most == pytest.approx(1) and peaked.least < 1 < 2 < peaked.most < 24


def test_one_line_where_there_is_nothing_to_see() -> None:
    with pytest.raises(EvaluationError, match="has no class token"):
        class_attention(Encoder(replace(CONFIG, class_token=False)), one_red_patch())
    encoder = looking_at_red()
    with torch.no_grad():
        encoder.blocks[0].attn.proj.bias[0] = float("nan")
    with pytest.raises(EvaluationError, match="not finite, the encoder has diverged"):
        class_attention(encoder, one_red_patch())
