import pytest
import torch
import torchvision.transforms.v2.functional as F

from datamodules.errors import DataError
from datamodules.normalize import IMAGENET_MEAN, IMAGENET_STD, check_channels, normalize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_as_torchvision(dtype, layout):
    images = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8).repeat(1, 3, 1, 1)
    images = images.contiguous(memory_format=layout)
    expected = F.normalize(images.to(torch.float64) / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    ours = normalize(images, IMAGENET_MEAN, IMAGENET_STD, dtype)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert (ours - expected).abs().max() < (1e-12 if dtype == torch.float64 else 1e-6)


def test_one_channel_and_bfloat16():
    images = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    ours = normalize(images, [0.48], [0.27], torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, normalize(images, [0.48], [0.27]).bfloat16())


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (3, 2, 5, 4, 4)])
def test_sixteen_bits_come_in_the_same_units(shape):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255
    before = images.clone()
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1]
    ours = normalize(images, mean, std)
    expected = F.normalize(images.double() / 255, mean, std)
    assert (ours - expected).abs().max() < 1e-5 and torch.equal(images, before), "the input is left alone"
    assert torch.equal(normalize(images.byte(), mean, std), normalize(images.byte().float(), mean, std))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0, 8, [], []), "data.channels 0 must be at least 1"),
        ((3, 12, IMAGENET_MEAN, IMAGENET_STD), "data.bits 12 must be 8 or 16"),
        ((4, 16, IMAGENET_MEAN, IMAGENET_STD),
         "data.channels 4 needs a data.mean and data.std of its own: `trivit shards stats D --channels 4 --bits 16`"),
        ((1, 8, [0.5, 0.5], [0.2]), r"data.mean \[0.5, 0.5\] and data.std \[0.2\] must be one number for each of 1"),
        ((2, 8, [0.5, 0.5], [0.2, 0]), "std above 0: `trivit shards stats D --channels 2` finds them"),
        ((3, 8, [0.5], [0.2]), "for each of 3 channels"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(DataError, match=message):
        check_channels(*settings, "D")
