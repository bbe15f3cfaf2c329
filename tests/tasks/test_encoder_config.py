"""What a config resolves to and refuses."""

import pytest

from tasks.encoder_config import EncoderConfig
from tasks.errors import TaskError


def test_published_sizes_with_exceptions():
    assert EncoderConfig(arch="vit_huge").size == (1280, 32, 16)
    assert EncoderConfig(arch="vit_tiny", depth=6).size == (192, 6, 3)


def test_another_image_size_keeps_the_evaluation_crop():
    config = EncoderConfig(image_size=64, patch_size=8, eval_resize=64)
    assert (config.at(96).image_size, config.at(96).resize) == (96, 96)
    assert EncoderConfig().resize == 256
    assert EncoderConfig().at(448).resize == 512


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"arch": "vit_giga"}, "vit_giga.*vit_tiny"),
        ({"image_size": 30}, "does not divide image_size 30"),
        ({"width": 50, "heads": 3}, "heads"),
        ({"width": 54, "heads": 3}, "divisible by 4"),
        ({"width": 54, "heads": 3, "positions": "rope"}, "divisible by 4"),
        ({"class_token": False, "pool": "cls"}, "class token"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"mean": (0.5,)}, "in_chans"),
        ({"patch_size": 0}, "^encoder.patch_size 0 must be positive"),
        ({"registers": -1}, "^encoder.registers -1 cannot be negative"),
        ({"arch": "timm:resnet18", "depth": 3}, "fixes width, depth and heads"),
    ],
)
def test_what_cannot_be_built_is_one_clear_line(fields, says):
    with pytest.raises(TaskError, match=says) as caught:
        EncoderConfig(**{"arch": "vit_tiny", "image_size": 32, "patch_size": 16, **fields}).check()
    assert "\n" not in str(caught.value)
