"""Drawn sets: whole, the same for everyone, continued when interrupted, not to be guessed from pixels or colours."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datamodules.synth as synth_module
from datamodules.drawing import draw
from datamodules.errors import DataError
from datamodules.manifest import MANIFEST, load_manifest
from datamodules.shard_reader import ShardReader
from datamodules.synth import ATTRIBUTES, SHAPES, synth
from datamodules.synth_scene import held_out, scene
from datamodules.verify import verify
from pretrain.cli import main
from tests.datamodules.set_files import files, read


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_every_sample_is_complete_and_true(tmp_path: Path) -> None:
    manifest = synth(tmp_path, samples=75, size=48, seed=5, samples_per_shard=30)
    assert manifest.classes == SHAPES
    assert [shard.samples for shard in manifest.shards] == [30, 30, 15]
    assert manifest.members == dict.fromkeys(("cls", "jpg", "json", "mask.png", "txt"), 75)
    assert load_manifest(tmp_path) == manifest
    assert verify(tmp_path) == []
    samples = read(tmp_path)
    assert list(samples) == [f"{index:08d}" for index in range(75)]
    for index, sample in enumerate(samples.values()):
        what = scene(5, index)
        image, mask = draw(what, 48)
        assert np.abs(pixels(sample["jpg"]).astype(int) - image).mean() < 4
        assert np.array_equal(pixels(sample["mask.png"]), mask)
        assert SHAPES[int(sample["cls"])] == what.attributes["shape"]
        assert sample["txt"].decode() == what.caption
        about = json.loads(sample["json"])
        assert {name: about[name] for name in ATTRIBUTES} == what.attributes
        assert about["degrees"] == what.degrees and len(about["rgb"]) == 3


def test_workers_and_number_change_no_sample(tmp_path: Path) -> None:
    synth(tmp_path / "one", samples=60, size=32, samples_per_shard=20, workers=1)
    synth(tmp_path / "two", samples=60, size=32, samples_per_shard=20, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    synth(tmp_path / "fewer", samples=25, size=32, workers=1)
    fewer, all_of_them = read(tmp_path / "fewer"), read(tmp_path / "one")
    assert fewer == {key: all_of_them[key] for key in list(all_of_them)[:25]}


def test_seeds_and_splits_are_other_images(tmp_path: Path) -> None:
    sets = [("a", 0, "all"), ("b", 1, "all"), ("c", 0, "train"), ("d", 0, "test"), ("e", 0, "test_unseen")]
    seen = []
    for name, seed, split in sets:
        synth(tmp_path / name, samples=30, size=16, seed=seed, split=split, workers=1)
        seen += [sample["jpg"] for sample in read(tmp_path / name).values()]
    assert len(set(seen)) == 150
    for sample in read(tmp_path / "e").values():
        about = json.loads(sample["json"])
        assert held_out(about["shape"], about["colour"])


def test_the_same_call_again_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = synth(tmp_path, samples=20, size=16)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert synth(tmp_path, samples=20, size=16) == first
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert "there already" in capsys.readouterr().err


@pytest.mark.parametrize("other", [{"samples": 21}, {"size": 32}, {"seed": 1}, {"split": "train"}])
def test_another_set_in_the_same_folder_is_refused(tmp_path: Path, other: dict[str, object]) -> None:
    synth(tmp_path, samples=20, size=16)
    before = files(tmp_path)
    with pytest.raises(DataError, match="already holds another set"):
        synth(tmp_path, **({"samples": 20, "size": 16} | other))  # type: ignore[arg-type]
    assert files(tmp_path) == before


def test_foreign_shards_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.tar").write_bytes(b"")
    with pytest.raises(DataError, match="already holds shards"):
        synth(tmp_path, samples=20, size=16)
    assert files(tmp_path) == {"mine.tar": b""}


def test_interrupted_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"samples": 50, "size": 16, "samples_per_shard": 10, "workers": 1}
    synth(tmp_path / "whole", **arguments)
    drawn: list[int] = []
    original = synth_module.draw_sample

    def interrupted(seed: int, index: int, size: int, split: str, only: object) -> dict[str, bytes]:
        drawn.append(index)
        if len(drawn) == 26:
            raise KeyboardInterrupt
        return original(seed, index, size, split, ())

    monkeypatch.setattr(synth_module, "draw_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synth(tmp_path / "set", **arguments)
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "set" / MANIFEST).exists()
    with pytest.raises(DataError, match="unfinished"):
        load_manifest(tmp_path / "set")
    with pytest.raises(DataError, match="begun by another command"):
        synth(tmp_path / "set", **arguments | {"seed": 9})
    synth(tmp_path / "set", **arguments)
    assert drawn[26:] == list(range(20, 50))  # the two finished shards are kept
    assert files(tmp_path / "set") == files(tmp_path / "whole")


@pytest.mark.slow
def test_killed_and_continued(tmp_path: Path) -> None:
    call = "from datamodules.synth import synth; synth('set', samples=1200, size=32, samples_per_shard=100)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path.cwd())!r}); {call}"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("set/synth-*.tar")) and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "set" / MANIFEST).exists()
    subprocess.run(command, cwd=tmp_path, check=True)
    assert load_manifest(tmp_path / "set").num_samples == 1200
    assert verify(tmp_path / "set") == []
    assert not list(tmp_path.glob("set/.*"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"samples": 0}, "--samples goes from 1"), ({"samples": -5}, "--samples"), ({"workers": 0}, "--workers"),
        ({"size": 15}, "--size goes from 16"), ({"size": 1025}, "to 1024, not 1025"), ({"seed": -1}, "--seed"),
        ({"split": "validation"}, "--split is one of all"), ({"samples_per_shard": 0}, "--samples-per-shard"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_in_one_line(tmp_path: Path, bad: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        synth(tmp_path / "set", **({"samples": 10, "size": 16} | bad))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_a_file_as_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="is a file"):
        synth(tmp_path / "file", samples=10, size=16)


def nearest_top1(train: np.ndarray, test: np.ndarray, train_labels: np.ndarray, test_labels: np.ndarray) -> float:
    """Percent right of the 20 nearest by cosine, each voting exp(similarity / 0.07)."""
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    similar = test @ train.T
    votes = np.zeros((len(test), len(SHAPES)))
    near = np.argpartition(-similar, 20, axis=1)[:, :20]
    weights = np.exp(np.take_along_axis(similar, near, axis=1) / 0.07)
    np.add.at(votes, (np.arange(len(test))[:, None], train_labels[near]), weights)
    return 100 * float((votes.argmax(1) == test_labels).mean())


def test_neither_pixels_nor_colours_give_the_class_away() -> None:
    """Small, so that it takes seconds; the margin holds for 20,000 images to learn from, too."""
    drawn = [scene(0, index) for index in range(2000)] + [scene(1, index) for index in range(500)]
    images = np.stack([draw(what, 32)[0] for what in drawn])
    labels = np.array([SHAPES.index(what.attributes["shape"]) for what in drawn])
    chance = 100 / len(SHAPES)
    mean, std = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
    flat = ((images - mean) / std).reshape(len(images), -1).astype(np.float32)
    assert nearest_top1(flat[:2000], flat[2000:], labels[:2000], labels[2000:]) < 2 * chance
    bins = images.astype(int) // 32
    codes = ((bins[..., 0] * 8 + bins[..., 1]) * 8 + bins[..., 2]).reshape(len(images), -1)
    histogram = np.sqrt(np.stack([np.bincount(code, minlength=512) for code in codes])).astype(np.float32)
    assert nearest_top1(histogram[:2000], histogram[2000:], labels[:2000], labels[2000:]) < 2 * chance


def test_what_all_images_shall_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["shards", "synth", str(tmp_path / "set"), "--samples", "20", "--size", "16", "--only"]
    assert main([*arguments, "background=gradient,size=small"]) == 0
    manifest = load_manifest(tmp_path / "set")
    assert manifest.made_by.endswith(" background=gradient size=small")
    reader = ShardReader(manifest)
    records = [json.loads(reader.member(shard, i, "json") or b"") for shard, s in enumerate(manifest.shards)
               for i in range(s.samples)]  # fmt: skip
    assert {(record["background"], record["size"]) for record in records} == {("gradient", "small")}
    for index, record in enumerate(records):  # all else is as without
        assert record["place"] == scene(0, index).attributes["place"]
    for wrong, told in (("background=pink", "background is one of gradient, striped"), ("shape=star", "names one of")):
        assert main([*arguments, wrong]) == 2
        assert f"trivit: --only {wrong}: {told}" in capsys.readouterr().err


def test_splits_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["shards", "synth", str(tmp_path / "set"), "--samples", "8", "--size", "16"]
    assert main([*arguments, "--split", "test"]) == 0
    assert "split=test " in load_manifest(tmp_path / "set").made_by
    assert main([*arguments, "--split", "half"]) == 2
    assert "trivit: --split is one of all, train, test, test_unseen, not 'half'" in capsys.readouterr().err
