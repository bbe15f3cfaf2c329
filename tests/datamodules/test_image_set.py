import logging

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from torchvision.transforms import InterpolationMode

from datamodules.decode import decode_image
from datamodules.errors import DataError
from datamodules.image_set import evaluation_loader
from datamodules.manifest import load_manifest
from datamodules.shard_writer import ShardWriter
from datamodules.tar_index import read_index
from tests.datamodules.deep_images import npy, values, write_deep
from tests.datamodules.pictures import jpeg


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_once_in_order(picture_set, workers):
    loader = evaluation_loader(picture_set, crop_size=14, resize=16, batch_size=32, workers=workers)
    batches = list(loader)
    assert len(loader) == len(batches) == 4 and loader.bad == []
    assert loader.manifest.num_samples == 100
    keys = [key for batch in batches for key in batch["key"]]
    assert keys == [f"shard-{i // 16:06d}.tar/{i:05d}" for i in range(100)]
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [i % 3 for i in range(100)]
    images = torch.cat([batch["image"] for batch in batches])
    assert images.dtype == torch.uint8 and images.shape == (100, 3, 14, 14)
    for i in (0, 41, 99):
        resized = F.resize(decode_image(jpeg(i), "jpg"), [16], interpolation=InterpolationMode.BICUBIC)
        assert torch.equal(images[i], F.center_crop(resized, [14, 14]))
    assert len(list(loader)) == 4, "can be iterated again"


def test_limit_takes_samples_from_all_over_the_set(picture_set):
    loader = evaluation_loader(picture_set, crop_size=8, resize=8, batch_size=4, workers=0, limit=10)
    assert [key[-5:] for batch in loader for key in batch["key"]] == [f"{i:05d}" for i in range(0, 100, 10)]
    assert len(evaluation_loader(picture_set, crop_size=8, resize=8, batch_size=64, limit=1000)) == 2


def test_bad_samples_are_left_out_counted_and_named(own_pictures, caplog):
    manifest = load_manifest(own_pictures)
    member = read_index(manifest.path(1)).members(3)["jpg"]
    with manifest.path(1).open("r+b") as file:
        file.seek(member.offset)
        file.write(b"nothing")
    manifest.path(3).unlink()
    loader = evaluation_loader(own_pictures, crop_size=8, resize=8, batch_size=10, workers=1)
    with caplog.at_level(logging.WARNING, "trivit"):
        batches = list(loader)
    assert [len(batch["key"]) for batch in batches] == [10, 9, 10]
    assert all(len(batch["key"]) == len(batch["image"]) == len(batch["label"]) for batch in batches)
    assert len(loader.bad) == 11
    assert (loader.bad[0].shard, loader.bad[0].key) == ("shard-000001.tar", "00013")
    assert "11 bad samples left out" in caplog.text
    list(loader)
    assert len(loader.bad) == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "crop_size 0"),
        ({"crop_size": 32}, "crop_size 32 must be at least 1 and at most resize, which is 16"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"limit": 0}, "limit 0"),
        ({"workers": -2}, "workers -2"),
    ],
)
def test_bad_input(picture_set, options, message):
    with pytest.raises(DataError, match=message):
        evaluation_loader(picture_set, **({"crop_size": 8, "resize": 16, "batch_size": 4} | options))


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        evaluation_loader(tmp_path / "nowhere", crop_size=8, resize=8, batch_size=4)


@pytest.mark.parametrize(("channels", "bits", "kind"), [(1, 8, "npy"), (2, 16, "tif"), (3, 16, "png"), (5, 8, "tif")])
@pytest.mark.parametrize("workers", [0, 1])
def test_other_channels_and_bits(tmp_path, channels, bits, kind, workers):
    made = write_deep(tmp_path / "set", channels, bits, samples=10, kind=kind)
    loader = evaluation_loader(
        tmp_path / "set", crop_size=24, resize=24, batch_size=4, workers=workers, channels=channels, bits=bits
    )
    images = torch.cat([batch["image"] for batch in loader])
    assert images.dtype == (torch.uint8 if bits == 8 else torch.float32) and images.shape == (10, channels, 24, 24)
    middle = torch.from_numpy(np.stack(made)[:, :, 2:26].astype(np.float32)).permute(0, 3, 1, 2)
    assert torch.equal(images.float(), middle / 257 if bits == 16 else middle)
    asked = evaluation_loader(tmp_path / "set", crop_size=8, resize=8, batch_size=4, workers=0, channels=channels + 6)
    assert not list(asked) and len(asked.bad) == 10 and "were asked for" in asked.bad[0].reason


def test_an_array_beside_a_picture_is_not_the_image(tmp_path):
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("a", {"a.npy": b"x", "jpg": jpeg(1), "npy": npy(values(3, 8))})
    loader = evaluation_loader(tmp_path / "set", crop_size=20, resize=20, batch_size=1, workers=0)
    (batch,) = loader
    assert torch.equal(batch["image"][0], decode_image(jpeg(1), "jpg")[:, :, 2:22])
