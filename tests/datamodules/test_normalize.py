import pytest
import torch
import torchvision.transforms.v2.functional as F

from datamodules.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize


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
