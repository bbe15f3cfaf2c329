"""CLIP through the command: captions to losses, big batches, another vocabulary, export to open_clip."""

import csv
from pathlib import Path

import open_clip
import pytest
import torch

from datamodules.manifest import load_manifest
from pretrain.cli import main
from tasks.clip_files import load_clip
from tasks.tokenizer import train_bpe
from tests.pretrain.conftest import pretrain

SMALL = [
    "--config", "clip_tin40", "--data.recipe.crop_size", "16", "--data.recipe.captions.templates", "[]",
    "--model.encoder.patch_size", "4", "--model.encoder.width", "24", "--model.encoder.depth", "2",
    "--model.encoder.heads", "2", "--model.encoder.drop_path", "0.2", "--model.patch_drop", "0.5",
    "--model.text.width", "16", "--model.text.heads", "2", "--model.joint_width", "12", "--model.warmup_steps", "2",
    "--data.global_batch_size", "16", "--data.workers", "0", "--trainer.max_steps", "4", "--trainer.accelerator", "cpu",
    "--log_every", "1",
]  # fmt: skip


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_micro_batches_keep_every_negative(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for micro_batch in (16, 4):
        run = [*SMALL, "--data.train", drawn, "--output", tmp_path / f"{micro_batch}"]
        assert pretrain(*run, "--data.device_batch_size", micro_batch) == 0
    assert capsys.readouterr().out.count(", or by its texts --test DIR --probes zeroshot,retrieval") == 2
    whole, parts = rows(tmp_path / "16"), rows(tmp_path / "4")
    assert [row["train/loss"] for row in parts] == pytest.approx([row["train/loss"] for row in whole], rel=1e-4)
    assert all(row["train/effective_batch"] == 16 for row in parts)
    assert all(0 < row["train/caption_distinct"] <= 1 and 0 <= row["train/caption_cut"] <= 1 for row in parts)
    assert parts[0]["train/logit_scale"] == pytest.approx(1 / 0.07)
    assert [row["train/lr"] for row in parts[:3]] == pytest.approx([5e-4, 1e-3, 1e-3])


def test_own_vocabulary_and_export(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tmp_path / "words.json"
    train_bpe(["a small red circle on a blue ground"] * 4, words, vocab_size=300)
    run = [*SMALL, "--data.train", drawn, "--output", tmp_path / "run"]
    assert pretrain(*run, "--model.text.tokenizer", words) == 0
    words.unlink()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "open_clip"]) == 0
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    clip = load_clip(tmp_path / "run")
    ids, images = clip.text.tokenizer(["a red circle"]), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_text(ids, normalize=True), clip.encode_text(ids))
        torch.testing.assert_close(theirs.encode_image(images, normalize=True), clip.encode_image(images))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--model.text.tokenizer", "no/words.json"], "no tokenizer no/words.json"),
        (["--model.lock_image", "true"], "lock_image would lock random weights"),
        (["--model.text.width", "17"], "heads do not divide text width 17"),
        (
            ["--data.recipe", "datamodules.recipes.MAERecipe", "--data.recipe.crop_size", "16"],
            "CLIPTask learns from text",
        ),
    ],
)
def test_mistakes_are_one_line(
    drawn: Path, tmp_path: Path, change: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(*SMALL, "--data.train", drawn, "--output", tmp_path / "run", *change) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1] and "Traceback" not in "".join(said)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_table_of_names_is_found_from_other_folders(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    classes = load_manifest(drawn).classes
    Path("names.tsv").write_text("class\tname\n" + "".join(f"{name}\tmy {name}\n" for name in classes))
    recipe = ["--data.recipe.captions.templates", "['a {}']", "--data.recipe.captions.class_names"]
    run = [
        *SMALL,
        "--data.train",
        drawn,
        "--output",
        tmp_path / "run",
        "--allow_changes",
        "[trainer.max_steps]",
        *recipe,
    ]
    assert pretrain(*run, "names.tsv", "--trainer.max_steps", 3) == 0
    assert f"class_names: {tmp_path}/here/names.tsv" in (tmp_path / "run/config.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    assert pretrain("--config", tmp_path / "run/config.yaml", "--trainer.max_steps", 4) == 0
    assert pretrain(*run, "here/names.tsv", "--trainer.max_steps", 5) == 0
