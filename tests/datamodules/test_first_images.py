"""The fixed images that a run measures itself on."""

from pathlib import Path

import pytest
import torch

from datamodules.first_images import first_images
from datamodules.image_set import evaluation_loader
from datamodules.manifest import load_manifest
from datamodules.order import Order
from datamodules.shard_reader import ShardReader
from datamodules.synth import synth


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "train"
    synth(folder, samples=40, size=32, seed=9, samples_per_shard=20)
    return folder


def test_those_of_the_first_steps_as_evaluation_sees_them(drawn: Path) -> None:
    manifest = load_manifest(drawn)
    order = Order(manifest.counts, seed=3, global_batch_size=12)
    found = list(first_images(order, manifest, 18, crop_size=16, resize=18))
    reader = ShardReader(manifest)
    draws = [order.batch(0), order.batch(1, 0, 6)]
    places = [place for d in draws for place in zip(d.shard.tolist(), d.sample.tolist(), strict=True)]
    names = [f"{reader.name(shard)}/{reader.key(shard, sample)}" for shard, sample in places]
    seen = {
        key: image
        for batch in evaluation_loader(drawn, crop_size=16, resize=18, workers=0)
        for key, image in zip(batch["key"], batch["image"], strict=True)
    }
    assert len(found) == 18 and all(torch.equal(seen[name], image) for name, image in zip(names, found, strict=True))
    again = first_images(order, manifest, 18, crop_size=16, resize=18)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_small_set_gives_what_it_has_and_bad_samples_are_passed_over(drawn: Path, tmp_path: Path) -> None:
    manifest = load_manifest(drawn)
    order = Order(manifest.counts, seed=3, global_batch_size=12)
    assert len(list(first_images(order, manifest, 1000, crop_size=16, resize=16))) == 36
    (tmp_path / "set").mkdir()
    for file in drawn.iterdir():
        (tmp_path / "set" / file.name).write_bytes(file.read_bytes())
    tar = next((tmp_path / "set").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    left = list(first_images(order, load_manifest(tmp_path / "set"), 1000, crop_size=16, resize=16))
    assert 18 < len(left) < 36


def test_a_remote_tar_that_is_not_here_is_not_fetched(drawn: Path) -> None:
    from dataclasses import replace

    manifest = load_manifest(drawn)
    order = Order(manifest.counts, seed=3, global_batch_size=12)
    gone = replace(manifest, root=drawn / "gone", url="https://data.example/set")
    assert list(first_images(order, gone, 12, crop_size=16, resize=16)) == []
