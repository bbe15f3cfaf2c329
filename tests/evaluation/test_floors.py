from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.floors import PixelFeatures, floors, pixel_side, shrink_pixels, untrained_floor
from evaluation.probes import ProbeData, ProbeSettings
from evaluation.protocol import floor_protocol
from tasks.encoders import Encoder
from tests.evaluation.conftest import CONFIG


def fake_measure(seen: list[object]):
    def measure(featurizer: object, aside: Path) -> ProbeData:
        seen.append(featurizer)
        rng = np.random.default_rng(0)
        width = featurizer.feature_width  # type: ignore[attr-defined]
        x, y = rng.standard_normal((60, width)).astype(np.float32), np.arange(60) % 3
        x[:, :3] += 5 * np.eye(3, dtype=np.float32)[y]
        return ProbeData(x[:40], y[:40], x[40:], y[40:], 3)

    return measure


def test_floors_are_measured_once(tmp_path: Path) -> None:
    seen: list[object] = []
    arguments = {"train_images": 40, "data_hashes": ("a", "b"), "cache_dir": tmp_path}
    first = floors(CONFIG, fake_measure(seen), ("knn", "linear"), ProbeSettings(strengths=(1.0,)), **arguments)
    assert [type(x) for x in seen] == [PixelFeatures, Encoder]
    assert set(first) == {"raw_pixels", "untrained"}
    assert first["raw_pixels"]["knn"]["top1"] > 60
    assert "16 x 16" in first["raw_pixels"]["linear"]["protocol"]["features"]
    again = floors(CONFIG, fake_measure(seen), ("knn", "linear"), ProbeSettings(strengths=(1.0,)), **arguments)
    assert again == first
    assert len(seen) == 2
    arguments["data_hashes"] = ("a", "other")
    floors(CONFIG, fake_measure(seen), ("knn",), ProbeSettings(), **arguments)
    assert len(seen) == 4


def test_a_floor_from_the_cache_names_the_versions_that_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> list[dict[str, object]]:
        both = floors(
            CONFIG, fake_measure([]), ("knn",), ProbeSettings(), train_images=40, data_hashes=("a",), cache_dir=tmp_path
        )
        trained = untrained_floor(
            "linear_mae", CONFIG, ProbeSettings(), lambda _: {"top1": 1.0, "protocol": {}}, data_hashes=("a",),
            batch_size=2, cache_dir=tmp_path,
        )  # fmt: skip
        return [both["raw_pixels"]["knn"], both["untrained"]["knn"], trained]

    with monkeypatch.context() as earlier:
        earlier.setattr("evaluation.floors.versions", lambda: {"trivit": "0.0.7"})
        first = made()
    shared = {"versions": {"trivit": "now"}, "checkpoint": "of the run", "crop": 16}
    assert made() == first
    for floor in first:
        assert (
            floor_protocol(shared, floor["protocol"]).items() >= {"versions": {"trivit": "0.0.7"}, "crop": 16}.items()
        )
        assert "checkpoint" not in floor_protocol(shared, floor["protocol"])


def test_the_untrained_encoder_is_the_same_every_time_and_leaves_the_random_state(tmp_path: Path) -> None:
    seen: list[object] = []
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name in ("one", "two"):
        floors(
            CONFIG, fake_measure(seen), ("knn",), ProbeSettings(),
            train_images=40, data_hashes=("a",), cache_dir=tmp_path / name,
        )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (e.state_dict() for e in seen if isinstance(e, Encoder))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pixels_shrink_by_area() -> None:
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).reshape(2, 3, 8, 8)
    whole = PixelFeatures(CONFIG, 8).features(images)
    np.testing.assert_array_equal(whole.numpy(), images.flatten(1).numpy())
    halves = PixelFeatures(CONFIG, 4).features(images)
    assert halves[0, 0] == images[0, 0, :2, :2].mean()
    np.testing.assert_allclose(shrink_pixels(whole.numpy(), 4), halves.numpy())


@pytest.mark.parametrize(
    ("image_size", "images", "side"),
    [(32, 10, 32), (64, 20_000, 64), (224, 20_000, 64), (224, 50_000, 32), (224, 10**7, 16)],
)
def test_large_sets_get_smaller_pixels(image_size: int, images: int, side: int) -> None:
    assert pixel_side(image_size, images) == side
