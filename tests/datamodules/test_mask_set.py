"""Images with masks: which of them could not be read."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.mask_set import MaskBatches
from datamodules.shard_reader import BadSampleError, ShardReader
from datamodules.shard_writer import ShardWriter
from tests.datamodules.tar_builders import picture


def test_what_was_read_again_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that fails now and then has failed for each image once, after enough epochs."""
    mask = io.BytesIO()
    Image.new("L", (8, 8), 1).save(mask, "png")
    with ShardWriter(tmp_path / "set", samples_per_shard=4) as writer:
        for i in range(8):
            writer.write(f"{i:04d}", {"jpg": picture(i, (8, 8)), **({"mask.png": mask.getvalue()} if i != 2 else {})})
    learn = MaskBatches(tmp_path / "set", crop_size=8, resize=8, batch_size=4, seed=0)
    whole, bad = ShardReader.image, set[int]()

    def read(reader: ShardReader, shard: int, sample: int) -> Any:
        if 4 * shard + sample in bad:
            raise BadSampleError(reader.name(shard), f"#{sample}", "cannot be read: Input/output error", passing=True)
        return whole(reader, shard, sample)

    monkeypatch.setattr(ShardReader, "image", read)
    batches = learn.batches(5 * len(learn), workers=0)
    for epoch in ({1, 2, 5}, {2, 5}, {5, 6}, {5}, {7}):
        bad.clear()
        bad |= epoch
        for _ in range(len(learn)):
            next(batches)
        assert {(lost.shard, lost.key) for lost in learn.lost} == {
            (f"shard-00000{row // 4}.tar", f"#{row % 4}") for row in epoch
        }
