"""Mean and deviation against numpy, to the last digits that are printed."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from datamodules.errors import DataError
from datamodules.shard_writer import ShardWriter
from datamodules.stats import channel_stats
from pretrain.cli import main
from tests.datamodules.deep_images import npy, values, write_deep
from tests.datamodules.pictures import write_pictures
from tests.datamodules.servers import web_server
from tests.datamodules.tar_builders import image_folders, picture


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("channels", "bits"), [(1, 8), (2, 8), (3, 8), (4, 16), (7, 16), (1, 16)])
def test_as_numpy_has_it(tmp_path: Path, channels: int, bits: int, workers: int) -> None:
    made = write_deep(tmp_path / "set", channels, bits, samples=30)
    pixels = np.concatenate([image.reshape(-1, channels) for image in made])
    found = channel_stats(tmp_path / "set", channels=channels, bits=bits, workers=workers)
    scaled = pixels.astype(np.float64) / ((1 << bits) - 1)
    np.testing.assert_allclose(found.mean, scaled.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.std, scaled.std(axis=0), rtol=1e-12)
    assert found.images == 30 and found.bad == () and found.counts.sum(axis=1).tolist() == [len(pixels)] * channels
    for share in (0, 0.01, 0.5, 0.99, 1):
        expected = np.quantile(pixels, share, axis=0, method="inverted_cdf")
        assert found.quantile(share).tolist() == expected.tolist()


def test_images_of_all_sizes_and_kinds_count_by_their_pixels(tmp_path: Path) -> None:
    white, black = np.full((10, 30, 1), 255, np.uint8), np.zeros((10, 10, 3), np.uint16)
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("white", {"npy": npy(white)})
        writer.write("black", {"npy": npy(black)})
    for bits in (8, 16):
        found = channel_stats(tmp_path / "set", bits=bits, workers=1)
        assert found.mean.tolist() == [0.75] * 3
        np.testing.assert_allclose(found.std, [np.sqrt(0.75 * 0.25)] * 3)


def test_a_part_of_the_set_is_drawn_the_same_every_time(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "set", 60, 16)
    everything, some = channel_stats(root, workers=1), channel_stats(root, samples=25, workers=2)
    assert (everything.images, some.images) == (60, 25)
    assert np.array_equal(some.counts, channel_stats(root, samples=25, workers=1).counts)
    assert (some.counts <= everything.counts).all()


def test_of_a_remote_set_few_shards_are_fetched(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "many", 40, 2)
    with web_server(tmp_path / "many") as server:
        found = channel_stats(server.url, samples=30, workers=1)
        assert sum(name.endswith(".tar") for name in server.requests) == 8
    assert found.images == 16 and "drawn from 8 of the 20 shards" in capsys.readouterr().err


def test_the_command_prints_options_that_a_run_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_deep(tmp_path / "set", 2, 16, samples=30)
    assert main(["shards", "stats", str(tmp_path / "set"), "--channels", "2", "--bits", "16"]) == 0
    out = capsys.readouterr().out
    assert "all 30 images read, 20,160 pixels" in out
    options = shlex.split(out.splitlines()[-1])
    assert options[:5] == ["--data.channels", "2", "--data.bits", "16", "--data.mean"] and options[6] == "--data.std"
    scaled = np.stack(made).astype(np.float64) / 65535
    for text, expected in ((options[5], scaled.mean(axis=(0, 1, 2))), (options[7], scaled.std(axis=(0, 1, 2)))):
        np.testing.assert_allclose([float(x) for x in text.strip("[]").split(",")], expected, rtol=5e-4)
    rows = [line.split() for line in out.splitlines() if re.match(r" +[12] ", line)]
    assert [int(row[3].replace(",", "")) for row in rows] == [int(np.stack(made)[..., i].min()) for i in range(2)]

    assert main(["shards", "stats", str(write_pictures(tmp_path / "rgb", 40, 16)), "--samples", "7"]) == 0
    out = capsys.readouterr().out
    assert "7 of 40 images read" in out and out.splitlines()[-1].startswith('--data.mean "[')


def test_a_folder_of_images_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    assert channel_stats(image_folders(tmp_path / "photos"), channels=1, workers=1).images == 15


def test_bad_images_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path / "set") as writer:
        for i in range(6):
            writer.write(f"{i}", {"jpg": picture(i) if i % 2 else b"no"})
    assert main(["shards", "stats", str(tmp_path / "set")]) == 0
    said = capsys.readouterr()
    assert "3 of 6 images read" in said.out
    assert "left out 3 images that cannot be read, first: shard-000000.tar, 0: jpg: no image in a known" in said.err


def test_an_empty_channel_is_no_trap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = values(2, 8)
    pixels[:, :, 1] = 9
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("a", {"npy": npy(pixels)})
    assert main(["shards", "stats", str(tmp_path / "set"), "--channels", "2"]) == 0
    said = capsys.readouterr()
    assert "channel 2 is the same everywhere" in said.err
    assert re.search(r'--data.std "\[0\.\d+, 1\]"$', said.out.strip())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--channels", "3"], "none of the 5 images of .* can be read as 3 channels of 8 bits .first: shard-0.*, "
                              "0000: npy: 4 channels of 28 x 24 pixels in the file, 3 were asked for.; --channels"),
        (["--channels", "0"], "--channels must be at least 1, not 0"),
        (["--channels", "4", "--samples", "0"], "--samples must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_deep(tmp_path / "set", 4, 8, samples=5)
    assert main(["shards", "stats", str(tmp_path / "set"), *options]) == 2
    assert re.search(f"^trivit: {message}", capsys.readouterr().err, re.M)
    with pytest.raises(DataError, match="--bits is 8 or 16, not 12"):
        channel_stats(tmp_path / "set", bits=12)
    assert main(["shards", "stats", str(tmp_path / "nowhere")]) == 2


def test_a_remote_set_is_called_by_its_url(web, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "stats", web.url, "--channels", "5"]) == 2
    assert f"images of {web.url} can be read as 5 channels" in capsys.readouterr().err
