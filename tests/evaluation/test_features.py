import json
import multiprocessing
import os
import re
import socket
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.errors import DataError
from datamodules.manifest import load_manifest
from evaluation import feature_cache
from evaluation import features as features_module
from evaluation.errors import EvaluationError
from evaluation.features import cached_features, extract
from evaluation.floors import PixelFeatures, shrink_pixels
from evaluation.team import gather_team
from pretrain.cli import main
from tasks.encoder_files import load_encoder
from tasks.encoders import Encoder
from tests.datamodules.deep_images import write_deep
from tests.evaluation.conftest import CONFIG, write_images


def take(encoder: Encoder, root: Path, **options: object) -> features_module.Features:
    return extract(encoder, root, device="cpu", workers=0, progress=False, **options)  # type: ignore[arg-type]


def test_features_are_those_of_the_encoder(world: Path, cache: Path, encoder_file: Path) -> None:
    from evaluation.pictures import load_pictures

    encoder = load_encoder(encoder_file)
    found = take(encoder, world / "test", batch_size=17)
    assert found.x.shape == (60, CONFIG.size.width)
    assert found.key[0] == "shard-000000.tar/00000"
    assert found.classes[found.label[0]] == "fox"
    images = load_pictures(load_manifest(world / "test"), [found.key[3], found.key[50]], CONFIG).float() / 255
    mean, std = torch.tensor(CONFIG.mean)[:, None, None], torch.tensor(CONFIG.std)[:, None, None]
    with torch.inference_mode():
        expected = encoder.features((images - mean) / std)
    np.testing.assert_allclose(found.x[[3, 50]], expected.numpy(), atol=1e-5)


def test_computed_once_per_encoder_and_data(
    world: Path, cache: Path, encoder_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(encoder_file)
    assert cached_features(encoder, load_manifest(world / "test")) is None
    first = take(encoder, world / "test")
    calls = []
    monkeypatch.setattr(
        features_module, "_compute", lambda *_: calls.append(1) or (_ for _ in ()).throw(OSError(28, "x"))
    )
    again = take(encoder, world / "test")
    kept = cached_features(encoder, load_manifest(world / "test"))
    assert kept is not None
    assert np.array_equal(first.x, again.x)
    assert np.array_equal(first.x, kept.x)
    assert not calls
    with torch.no_grad():
        next(encoder.parameters()).add_(1e-3)
    with pytest.raises(EvaluationError, match="disk"):
        take(encoder, world / "test")
    assert calls, "other weights must not find these features"


def test_labels_changed_in_place_are_read_again(tmp_path: Path, cache: Path, encoder_file: Path) -> None:
    root = write_images(tmp_path / "data", 12)
    encoder = load_encoder(encoder_file)
    before = take(encoder, root)
    (tar,) = root.glob("*.tar")
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as members:
        first = next(member for member in members if member.name.endswith(".cls"))
    content[first.offset_data] = ord("0") if content[first.offset_data] != ord("0") else ord("1")
    tar.write_bytes(bytes(content))
    after = take(encoder, root)
    assert before.data_hash == after.data_hash and before.label[0] != after.label[0]
    assert before.label[1:].tolist() == after.label[1:].tolist()


def test_half_removed_features_are_made_again(world: Path, cache: Path, encoder_file: Path) -> None:
    encoder = load_encoder(encoder_file)
    first = np.array(take(encoder, world / "test").x)
    (about,) = cache.rglob("about.json")
    about.unlink()
    assert np.array_equal(first, take(encoder, world / "test").x)
    assert about.exists()


@pytest.mark.parametrize("name", ["x.float32", "label.npy", "keys.json", "about.json"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "gone"])
def test_damaged_features_are_told_and_made_again(
    name: str, damage: str, world: Path, cache: Path, encoder_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = load_encoder(encoder_file)
    want = np.array(take(encoder, world / "test").x)
    capsys.readouterr()
    (file,) = cache.rglob(name)
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else bytes(len(data)))
    assert cached_features(encoder, load_manifest(world / "test")) is None
    told = capsys.readouterr().err
    assert (told == "") == (name == "about.json" and damage == "gone")  # no entry at all
    assert told == "" or "are damaged and are computed again" in told
    np.testing.assert_array_equal(take(encoder, world / "test").x, want)


def test_checksums_are_read_once_by_a_process_and_never_by_the_one_that_wrote(
    world: Path, cache: Path, encoder_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, manifest, read = load_encoder(encoder_file), load_manifest(world / "test"), list[str]()
    crc32 = feature_cache.file_crc32
    monkeypatch.setattr(feature_cache, "file_crc32", lambda file: (read.append(file.name), crc32(file))[1])
    for _ in range(2):
        take(encoder, world / "test")
        assert cached_features(encoder, manifest) is not None and read == []
    feature_cache.CHECKED.clear()  # as in another process
    for _ in range(2):
        take(encoder, world / "test")
        assert cached_features(encoder, manifest) is not None
        assert read == ["x.float32", "label.npy", "keys.json"]
    (file,) = cache.rglob("x.float32")
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    assert cached_features(encoder, manifest) is None, "damage after the check"


def test_what_killed_processes_left_goes_a_day_later(world: Path, cache: Path, encoder_file: Path) -> None:
    encoder = load_encoder(encoder_file)
    take(encoder, world / "test")
    (about,) = cache.rglob("about.json")
    old, new = (about.parent.parent / f".partial-{name}" for name in ("old", "new"))
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    take(encoder, world / "train")
    assert new.exists() and not old.exists()


def test_oldest_features_leave_a_full_cache(
    world: Path, cache: Path, encoder_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(encoder_file)
    monkeypatch.setattr(feature_cache, "CACHE_LIMIT_BYTES", 1)
    first = take(encoder, world / "test")
    take(encoder, world / "train")
    assert cached_features(encoder, load_manifest(world / "test")) is None
    assert cached_features(encoder, load_manifest(world / "train")) is not None
    assert np.isfinite(first.x).all(), "what is open stays readable"


def test_bad_images_are_left_out_and_counted(tmp_path: Path, cache: Path, encoder_file: Path) -> None:
    found = take(load_encoder(encoder_file), write_images(tmp_path / "data", 20, bad=3))
    assert len(found) == len(found.key) == len(found.x) == 17
    assert found.bad == 3
    assert found.key[0].endswith("00003")


def test_features_without_images_that_were_lost_are_used_once(
    tmp_path: Path, cache: Path, encoder_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, encoder = write_images(tmp_path / "data", 60), load_encoder(encoder_file)
    whole = (data / "shard-000001.tar").read_bytes()
    (data / "shard-000001.tar").write_bytes(whole[:-14_000])
    with pytest.raises(EvaluationError, match=r"\d+ of 60 images of .* cannot be read now \(first: shard-000001.tar"):
        take(encoder, data)
    monkeypatch.setattr("evaluation.lost_images.MOST_LOST", 0.5)
    found = take(encoder, data)
    assert found.bad == 60 - len(found) > 0 and np.isfinite(found.x).all()
    assert list((cache / "features").iterdir()) == []
    (data / "shard-000001.tar").write_bytes(whole)
    assert len(take(encoder, data)) == 60


def test_a_shard_that_is_gone_is_told_in_one_line_or_left_out(
    tmp_path: Path, cache: Path, encoder_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `evaluate`, whose features, floors and shared images all ask when the tars were written."""
    train, test = write_images(tmp_path / "train", 60), write_images(tmp_path / "test", 60)
    (train / "shard-000001.tar").unlink()
    (test / "shard-000001.tar").unlink()
    command = ["evaluate", str(encoder_file), "--train", str(train), "--test", str(test), "--probes", "knn"]
    command += ["--set", "ks=5", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert re.match(
        r"trivit: 20 of 60 images of .* cannot be read now \(first: shard-000001.tar", capsys.readouterr().err
    )
    monkeypatch.setattr("evaluation.lost_images.MOST_LOST", 0.5)
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["knn"]["protocol"]["test"]["images"] == 40


def test_features_without_images_that_were_packed_damaged_are_kept(
    tmp_path: Path, cache: Path, encoder_file: Path
) -> None:
    encoder, data = load_encoder(encoder_file), write_images(tmp_path / "data", 20, bad=3)
    take(encoder, data)
    kept = cached_features(encoder, load_manifest(data))
    assert kept is not None and kept.bad == 3


def test_nothing_readable_is_one_clear_line(tmp_path: Path, cache: Path, encoder_file: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no image under .* could be read"):
        take(load_encoder(encoder_file), write_images(tmp_path / "data", 4, bad=4))


def test_no_data_is_one_clear_line(tmp_path: Path, cache: Path, encoder_file: Path) -> None:
    with pytest.raises(DataError):
        take(load_encoder(encoder_file), tmp_path / "nowhere")


def test_a_diverged_encoder_is_named_and_leaves_nothing(world: Path, cache: Path, encoder_file: Path) -> None:
    encoder = load_encoder(encoder_file)
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.nan)
    with pytest.raises(EvaluationError, match=r"shard-000000.tar/00000 contain NaN"):
        take(encoder, world / "test")
    assert list((cache / "features").iterdir()) == []


@pytest.mark.parametrize(("channels", "bits", "kind"), [(1, 8, "npy"), (2, 16, "npy"), (4, 16, "tif")])
def test_encoders_of_other_channels_and_bits(channels: int, bits: int, kind: str, tmp_path: Path, cache: Path) -> None:
    made = write_deep(tmp_path / "set", channels, bits, samples=12, kind=kind)
    config = replace(
        CONFIG, image_size=24, eval_resize=24, in_chans=channels, bits=bits, mean=(0.4,) * channels,
        std=(0.2,) * channels,
    )  # fmt: skip
    found = extract(PixelFeatures(config, 24), tmp_path / "set", workers=0, progress=False)
    scaled = np.stack(made)[:, :, 2:26].astype(np.float64) / ((1 << bits) - 1)
    expected = ((scaled - 0.4) / 0.2).transpose(0, 3, 1, 2).reshape(12, -1)
    assert found.x.shape == (12, channels * 24 * 24) and np.abs(found.x - expected).max() < 1e-4
    assert extract(Encoder(config).eval(), tmp_path / "set", workers=0, progress=False).x.shape == (12, 24)
    shrunk = shrink_pixels(np.asarray(found.x), 8, channels)
    blocks = expected.reshape(12, channels, 8, 3, 8, 3).mean(axis=(3, 5)).reshape(12, -1)
    assert np.abs(shrunk - blocks).max() < 1e-4


def test_half_precision_is_kept_apart_and_near(world: Path, cache: Path, encoder_file: Path) -> None:
    encoder = load_encoder(encoder_file)
    half = take(encoder, world / "test", precision="bfloat16")
    kept = cached_features(encoder, load_manifest(world / "test"))
    assert kept is not None and np.array_equal(kept.x, half.x)
    whole = take(encoder, world / "test")
    difference = np.abs(half.x - whole.x).max()
    assert 0 < difference < 0.1 and len(list((cache / "features").iterdir())) == 2
    assert half.x.dtype == np.float32


def _take_part(rank: int, port: int, folder: Path, source: Path, train: Path, test: Path) -> None:
    """One of two processes; what it says goes to a file, and its exit code is the command's."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    command = ["evaluate", str(source), "--train", str(train), "--test", str(test), "--probes", "label_free"]
    with (folder / f"said{rank}").open("w") as said, redirect_stdout(said), redirect_stderr(said):
        code = main([*command, "--set", "label_free.k=5", "--output", str(folder / "out")])
    os._exit(code)


def evaluate_by_two(folder: Path, source: Path, train: Path, test: Path) -> tuple[list[int | None], list[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_take_part, args=(r, port, folder, source, train, test)) for r in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
    return [process.exitcode for process in processes], [(folder / f"said{r}").read_text() for r in (0, 1)]


def test_several_processes_share_the_images_and_one_tells(
    world: Path, cache: Path, tmp_path: Path, encoder_file: Path
) -> None:
    codes, said = evaluate_by_two(tmp_path, encoder_file, world / "train", world / "test")
    assert codes == [0, 0], said
    assert "label_free: RankMe" in said[0] and said[1] == ""
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["label_free"]["protocol"]["train"]["images"] == 240 and set(found["floors"]) == {
        "untrained",
        "raw_pixels",
    }
    encoder = load_encoder(encoder_file)
    for data in ("train", "test"):
        shared = cached_features(encoder, load_manifest(world / data))
        alone = take(encoder, world / data, cache_dir=tmp_path / "alone")
        assert shared is not None and shared.key == alone.key and np.array_equal(shared.label, alone.label)
        np.testing.assert_allclose(shared.x, alone.x, atol=1e-5)


def test_a_part_that_fails_ends_all_processes_in_one_line(
    tmp_path: Path, cache: Path, encoder_file: Path, world: Path
) -> None:
    data = write_images(tmp_path / "data", 1000)
    whole = (data / "shard-000024.tar").read_bytes()
    (data / "shard-000024.tar").write_bytes(whole[: len(whole) // 4])
    codes, said = evaluate_by_two(tmp_path, encoder_file, data, world / "test")
    assert codes == [2, 0]
    assert "cannot be read now (first: shard-000024.tar" in said[0] and "Traceback" not in said[0] + said[1]
    assert list((cache / "features").iterdir()) == []


def test_processes_that_never_meet_are_one_line(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("evaluation.team._MEETING", timedelta(seconds=1))
    with pytest.raises(EvaluationError, match="the 2 processes of this evaluation have not met"), gather_team():
        pass
