from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from evaluation.errors import EvaluationError
from evaluation.features import extract
from evaluation.robustness import Corruptions, robustness
from tasks.encoder_files import load_encoder
from tests.evaluation.test_frozen_heads import data_of


def pictures(side: int = 64) -> torch.Tensor:
    """Smooth colours with an edge and some texture."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    image = torch.stack([x, y, (x + y) / 2])
    image[:, side // 5 : side // 2 + 3, side // 5 : side // 2 + 3] = 0.9
    cells = torch.rand(1, 3, 23, 23, generator=torch.Generator().manual_seed(0))
    image = 0.7 * image + 0.3 * torch.nn.functional.interpolate(cells, (side, side), mode="bilinear")[0]
    return torch.stack([image, 1 - image])


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_each_corruption_grows_and_repeats(kind: str) -> None:
    images = pictures()
    spoiled = [corrupt(images, kind, severity, seed=0) for severity in SEVERITIES]
    for each in spoiled:
        assert each.shape == images.shape and each.dtype == images.dtype
        assert each.min() >= 0 and each.max() <= 1 and each.isfinite().all()
    distance = [float((each - images).square().mean().sqrt()) for each in spoiled]
    assert distance[0] > 0.005 and distance[-1] > 1.05 * distance[0], distance
    assert torch.equal(spoiled[2], corrupt(images, kind, 3, seed=0))
    assert torch.equal(images, pictures()), "the given images stay"
    assert corrupt(pictures(16)[:, :1], kind, 5, seed=0).shape == (2, 1, 16, 16)


def test_blurs_keep_the_mean_and_scale_with_the_image() -> None:
    for kind in ("defocus_blur", "motion_blur", "pixelate"):
        images = pictures()
        assert corrupt(images, kind, 3, seed=0).mean() == pytest.approx(float(images.mean()), abs=0.01)
    large = torch.nn.functional.interpolate(pictures(), scale_factor=2, mode="bilinear")
    small = torch.nn.functional.interpolate(corrupt(large, "defocus_blur", 5, 0), (64, 64), mode="area")
    assert (small - corrupt(pictures(), "defocus_blur", 5, 0)).abs().mean() < 0.01


def test_mean_corruption_accuracy_is_below_the_clean_one(world: Path, cache: Path, encoder_file: Path) -> None:
    encoder = load_encoder(encoder_file)
    data = data_of(world / "train", world / "test", encoder)
    train, test = (extract(encoder, world / name, workers=0, progress=False).x for name in ("train", "test"))
    config = Corruptions(kinds=("contrast", "brightness"), severities=(1, 5))
    few = (1.0, 1e-2)
    found = robustness(encoder, data, train, test, config, strengths=few)
    assert found["clean"] > 60 and found["top1"] < found["clean"] - 10
    assert found["by_kind"].keys() == {"contrast", "brightness"}
    assert all(slight >= strong for slight, strong in found["by_kind"].values())
    assert found["top1"] == pytest.approx(np.mean(list(found["by_kind"].values())))
    assert found["interval"][0] < found["top1"] < found["interval"][1]
    assert robustness(encoder, data, train, test, config, strengths=few) == found


def test_corruptions_that_there_are_not_are_one_line() -> None:
    with pytest.raises(EvaluationError, match="there is no corruption rain, but gaussian_noise"):
        Corruptions(kinds=("rain",)).check(3)
    with pytest.raises(EvaluationError, match="severities from 1 to 5"):
        Corruptions(severities=(0,)).check(3)
    with pytest.raises(EvaluationError, match=r"not 2: --set corruptions.kinds=gaussian_noise,.*pixelate$"):
        Corruptions().check(2)


def test_every_image_is_moved_in_a_direction_of_its_own() -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    one, two, three = corrupt(image, "motion_blur", 3, seed=0)
    assert not torch.allclose(one, two) and not torch.allclose(two, three)
