from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.manifest import load_manifest
from evaluation.errors import EvaluationError
from evaluation.features import Features
from evaluation.neighbours import draw_neighbours, neighbours
from evaluation.pictures import load_pictures, picture, sample_images, spread
from tests.evaluation.conftest import CONFIG


def features(x: list[list[float]], label: list[int], classes: tuple[str, ...]) -> Features:
    keys = [f"s.tar/{i}" for i in range(len(x))]
    return Features(np.array(x, dtype=np.float32), np.array(label), keys, classes, 0, "hash", "")


def test_nearest_first_and_right_by_name() -> None:
    train = features([[1, 0], [0.9, 0.4], [0, 1]], [0, 1, 1], ("cat", "dog"))
    test = features([[0, 1], [1, 0.01]], [1, 1], ("dog", "cat"))
    (query,) = neighbours(train, test, rows=[1], k=2)
    assert (query.row, query.name) == (1, "cat")
    assert [(n.row, n.name, n.right) for n in query.neighbours] == [(0, "cat", True), (1, "dog", False)]
    assert query.neighbours[0].similarity > query.neighbours[1].similarity
    drawn = draw_neighbours(
        [query], torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [torch.zeros(2, 3, 4, 4, dtype=torch.uint8)]
    )
    assert len(drawn[0].near) == 2
    assert drawn[0].near[1][1].startswith("data:image/")


def test_pictures_by_key(world: Path) -> None:
    manifest = load_manifest(world / "train")
    first, far = load_pictures(manifest, ["shard-000000.tar/00000", "shard-000003.tar/00130"], CONFIG)
    assert first.shape == (3, 16, 16)
    assert not torch.equal(first, far)
    with pytest.raises(EvaluationError, match="cannot be read any more"):
        load_pictures(manifest, ["shard-000000.tar/nothing"], CONFIG)
    with pytest.raises(EvaluationError, match="is not in"):
        load_pictures(manifest, ["gone.tar/00000"], CONFIG)


def test_samples_are_spread_and_repeat(world: Path) -> None:
    assert sample_images(world / "test", CONFIG, 7).shape == (7, 3, 16, 16)
    assert spread(100, 5) == spread(100, 5) == sorted(spread(100, 5))
    assert spread(3, 5) == [0, 1, 2]


def test_large_pictures_are_small_files() -> None:
    image = torch.randint(0, 255, (3, 224, 224), dtype=torch.uint8)
    assert picture(image).startswith("data:image/webp;base64,")
    assert picture(image[:, :64, :64]).startswith("data:image/png;base64,")
