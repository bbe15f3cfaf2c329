"""Principal components of patches: known axes are found, shared by all images, and never turned around."""

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluation.errors import EvaluationError
from evaluation.patch_pca import draw_patch_components, patch_components
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder, Tokens

IMAGES = torch.zeros(2, 3, 24, 24, dtype=torch.uint8)


class Told:
    """An encoder that gives these patch tokens [b n d]."""

    config = EncoderConfig(image_size=24, patch_size=4)

    def __init__(self, patches: Tensor) -> None:
        self.patches, self.width = patches, patches.shape[2]

    def eval(self) -> "Told":
        return self

    def __call__(self, images: Tensor) -> Tokens:
        return Tokens(self.patches[:, :0], self.patches)


def components(patches: Tensor) -> Any:
    return patch_components(Told(patches), IMAGES)  # type: ignore[arg-type]


def structured() -> tuple[Tensor, Tensor]:
    """Patches [2 36 8] of three orthogonal sources, and the sources [72 3]: in the middle, the image, noise."""
    generator = torch.Generator().manual_seed(0)
    middle = torch.zeros(2, 6, 6)
    middle[:, 2:4, 2:4] = 1
    image = torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 6, 6)
    noise = 0.2 * torch.randn(2, 6, 6, generator=generator)
    sources = torch.stack([6 * middle, image, noise], dim=-1).double().reshape(72, 3)
    axes = torch.linalg.qr(torch.randn(8, 8, generator=generator).double())[0][:3]
    return (sources @ axes + 5).reshape(2, 36, 8), sources - sources.mean(0)


def test_known_sources_are_found_in_their_order() -> None:
    patches, sources = structured()
    found = components(patches)
    assert found.values.shape == (2, 6, 6, 3)
    values = found.values.reshape(72, 3)
    for i in range(3):
        assert abs(np.corrcoef(values[:, i], sources[:, i])[0, 1]) > 0.95
    assert np.corrcoef(values[:, 0], sources[:, 0])[0, 1] > 0.99  # what is in the middle is high
    share = sources.var(0) / sources.var(0).sum()
    assert found.shares == pytest.approx(share.tolist(), abs=0.01)


def test_no_turning_of_the_features_turns_the_picture() -> None:
    patches, _ = structured()
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).double())[0]
    # the second source is the image alone, and has no relation to the middle but by rounding
    for other in (-patches, 3 * patches, patches @ turn):
        found, same = components(other).values, components(patches).values
        for i in (0, 2):
            torch.testing.assert_close(
                found[..., i] / found[..., i].abs().max(), same[..., i] / same[..., i].abs().max()
            )


def test_colours_mean_the_same_in_every_image() -> None:
    patches, _ = structured()
    first, second = draw_patch_components(components(patches))
    shown = [np.array(Image.open(io.BytesIO(base64.b64decode(p.colours.split(",")[1])))) for p in (first, second)]
    assert all(each.shape == (6, 6, 3) for each in shown)
    assert shown[0][2, 2, 0] == shown[1][2, 2, 0] == 255 and shown[0][0, 0, 0] < 20
    assert abs(int(shown[0][0, 0, 1]) - int(shown[1][0, 0, 1])) > 200  # the component that tells the images apart
    assert len(first.components) == 3 and first.components[0] != first.components[1]


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"])
def test_any_encoder_with_a_map_of_features(name: str) -> None:
    size = 224 if "224" in name else 64
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(arch=f"timm:{name}", image_size=size))
    found = patch_components(encoder, torch.randint(0, 255, (2, 3, size, size), dtype=torch.uint8))
    side = size // encoder.config.patch_size
    assert found.values.shape == (2, side, side, 3) and torch.isfinite(found.values).all()


def test_one_line_where_there_is_no_map() -> None:
    for patches in (torch.randn(2, 1, 8), torch.randn(2, 35, 8), torch.randn(2, 36, 2)):
        with pytest.raises(EvaluationError, match="gives no map of patches for images of 24 pixels"):
            components(patches)
    with pytest.raises(EvaluationError, match="not finite, the encoder has diverged"):
        components(torch.full((2, 36, 8), float("nan")))


def test_features_that_are_all_the_same_are_a_picture_too() -> None:
    found = components(torch.ones(2, 36, 8))
    assert found.shares == (0, 0, 0) and len(draw_patch_components(found)) == 2
