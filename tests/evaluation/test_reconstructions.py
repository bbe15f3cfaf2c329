from dataclasses import replace

import pytest
import torch

from evaluation.reconstructions import GREY, draw_reconstructions, reconstruct
from tasks.encoders import Encoder
from tasks.mae import MAE
from tests.evaluation.conftest import CONFIG


def images(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def model(norm_pix_loss: bool) -> MAE:
    torch.manual_seed(0)
    return MAE(Encoder(CONFIG), decoder_width=16, decoder_depth=1, decoder_heads=2, norm_pix_loss=norm_pix_loss)


def test_what_is_seen_stays_as_it_is_and_the_rest_is_predicted() -> None:
    found = reconstruct(model(norm_pix_loss=False), images())
    hidden = (found.masked == GREY).all(dim=1, keepdim=True).expand_as(found.image)
    assert 0.6 < hidden.float().mean() < 0.8
    assert torch.equal(found.output[~hidden], found.image[~hidden])
    assert not torch.equal(found.output[hidden], found.image[hidden])
    assert torch.equal(found.image, images())


def test_masks_repeat_and_differ_between_images_and_seeds() -> None:
    mae = model(norm_pix_loss=True)
    one, two = reconstruct(mae, images()), reconstruct(mae, images())
    assert torch.equal(one.masked, two.masked)
    hidden = (one.masked == GREY).all(dim=1)
    assert not torch.equal(hidden[0], hidden[1])
    assert not torch.equal(one.masked, reconstruct(mae, images(), seed=1).masked)


def test_normalised_predictions_get_the_brightness_and_contrast_of_their_patch() -> None:
    mae = model(norm_pix_loss=True)
    with torch.no_grad():  # always predicts one pattern, of mean 0 and deviation 1
        pattern = torch.randn(48, generator=torch.Generator().manual_seed(1))
        mae.decoder_pred.weight.zero_()
        mae.decoder_pred.bias.copy_((pattern - pattern.mean()) / pattern.std())
    smooth = images().float().mean(dim=(2, 3), keepdim=True).expand(-1, -1, 16, 16) + torch.arange(16) - 8
    found = reconstruct(mae, smooth.round().to(torch.uint8))
    whole, filled = mae.patchify(found.image.float()), mae.patchify(found.output.float())
    torch.testing.assert_close(filled.mean(dim=-1), whole.mean(dim=-1), atol=3.0, rtol=0)


def test_pictures_are_inside_the_page() -> None:
    drawn = draw_reconstructions(reconstruct(model(norm_pix_loss=True), images(2)))
    assert [[name for name, _ in triple] for triple in drawn] == [["input", "masked", "output"]] * 2
    assert all(uri.startswith("data:image/png;base64,") for triple in drawn for _, uri in triple)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("bits", [8, 16])
def test_other_channels_and_bits_are_shown(channels: int, bits: int) -> None:
    config = replace(CONFIG, in_chans=channels, mean=(0.4,) * channels, std=(0.2,) * channels, bits=bits)
    mae = MAE(Encoder(config), decoder_width=16, decoder_depth=1, decoder_heads=2)
    deep = images().float()[:, :1].repeat(1, channels, 1, 1) / 50 + 3  # a camera that uses a fiftieth of its range
    found = reconstruct(mae, deep if bits == 16 else deep.byte())
    shown = 3 if channels == 4 else 1
    for part in found:
        assert part.dtype == torch.uint8 and part.shape == (3, shown, 16, 16)
    if bits == 16:
        assert int(found.image.amin()) == 0 and int(found.image.amax()) == 255
    hidden = (found.masked != found.image).any(dim=1, keepdim=True).expand_as(found.image)
    assert (found.output[~hidden].int() - found.image[~hidden].int()).abs().max() <= 1
    drawn = draw_reconstructions(found)
    assert len(drawn) == 3 and all(uri.startswith("data:image/png") for _, uri in drawn[0])
