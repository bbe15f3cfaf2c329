"""`trivit evaluate --probes zeroshot,retrieval` on a small CLIP that knows colours by construction."""

import io
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from datamodules.errors import DataError
from datamodules.shard_writer import ShardWriter
from evaluation import evaluate
from evaluation.errors import EvaluationError
from evaluation.report import report
from pretrain.cli import main
from tasks.clip import CLIP
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.text_tower import TextConfig

ENCODER = EncoderConfig(arch="vit_tiny", width=32, depth=1, heads=2, image_size=16, patch_size=8, eval_resize=16)
TEXT = TextConfig(width=32, depth=1, heads=2, context_length=12)
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (235, 235, 235)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colors") / "test"
    rng = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=30, classes=list(COLORS)) as writer:
        for i in range(80):
            name = list(COLORS)[i % 4]
            pixels = np.clip(np.array(COLORS[name]) + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            caption = {"txt": f"a {name} square, number {i}".encode()} if i % 5 else {}
            kind = json.dumps({"colour": name, "edge": "soft" if i < 40 else "hard"}).encode()
            writer.write(f"{i:04d}", {"png": file.getvalue(), "cls": str(i % 4).encode(), "json": kind, **caption})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Trained for a moment on colours and their names."""
    torch.manual_seed(0)
    clip = CLIP(Encoder(ENCODER), TEXT, joint_width=16)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3)
    colors = torch.tensor(list(COLORS.values())).float() / 255
    ids = clip.text.tokenizer([f"a photo of a {name}." for name in COLORS])
    for _ in range(40):
        images = (colors[:, :, None, None] + 0.1 * torch.randn(4, 3, 16, 16) - 0.45) / 0.226
        loss = clip.contrast(clip.encode_image(images), clip.encode_text(ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    about = {
        "format": 1, "objective": "clip", "encoder": asdict(ENCODER), "encoder_prefix": "model.encoder.",
        "model": clip.settings(),
    }  # fmt: skip
    path = tmp_path_factory.mktemp("clip") / "clip.ckpt"
    torch.save({"trivit": about, "state_dict": {f"model.{k}": v for k, v in clip.state_dict().items()}}, path)
    return path


def test_the_command(checkpoint: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["evaluate", checkpoint, "--test", shards, "--probes", "zeroshot,retrieval", "--output", out]
    assert main([str(part) for part in command]) == 0
    results = json.loads((out / "results.json").read_text())
    zeroshot, retrieval = results["zeroshot"], results["retrieval"]
    assert zeroshot["top1"] > 80 and set(zeroshot["per_class"]) == set(COLORS)
    assert zeroshot["protocol"]["templates"] == ["a photo of a {}."] and zeroshot["protocol"]["test"]["images"] == 80
    assert np.sum(zeroshot["confusion"]) == 80
    assert retrieval["protocol"]["images_without_caption"] == 16
    assert (retrieval["images"], retrieval["texts"], retrieval["captions"]) == (64, 64, 64)
    assert retrieval["chance"]["image_to_text"]["recall@1"] == pytest.approx(100 / 64)
    assert set(retrieval["image_to_text"]) == {"recall@1", "recall@5", "recall@10"}
    told = capsys.readouterr().out
    assert "zero-shot: top-1" in told and "image to text" in told and "chance 25.0%" in told
    assert ["by", "chance", "1.6", "7.8", "15.6"] in [line.split() for line in told.splitlines()]
    assert "64 captions, all different" in told
    assert results["floors"] == {"chance": {"zeroshot": results["floors"]["chance"]["zeroshot"]}}
    assert results["floors"]["chance"]["zeroshot"]["top1"] == 25


def test_classes_from_fields_of_the_json(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    command = ["evaluate", checkpoint, "--test", shards, "--probes", "zeroshot", "--class-fields", "colour, edge"]
    assert main([str(part) for part in [*command, "--output", tmp_path]]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["zeroshot"]
    assert len(found["classes"]) == found["protocol"]["classes"] == 8 and "blue soft" in found["classes"]
    assert found["protocol"]["class_fields"] == ["colour", "edge"]
    assert main([str(part) for part in [*command[:-1], "place"]]) == 2


def test_floors_of_earlier_probes_stay(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    for probe in ("knn", "zeroshot"):
        evaluate(checkpoint, train=shards, test=shards, probes=(probe,), progress=False, output=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["floors"]) == {"raw_pixels", "untrained", "chance"}


def run_of(checkpoint: Path, tmp_path: Path) -> Path:
    """A folder as a run of 40 steps leaves it, with that checkpoint."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").write_bytes(checkpoint.read_bytes())
    (run / "config.yaml").write_text("model: {class_path: tasks.clip_task.CLIPTask}\ntrainer: {max_steps: 40}\n")
    return run


def test_the_report_shows_zero_shot_beside_chance_and_what_is_mistaken(
    checkpoint: Path, shards: Path, tmp_path: Path
) -> None:
    run = run_of(checkpoint, tmp_path)
    found = evaluate(run, test=shards, probes=("zeroshot",), progress=False)["zeroshot"]
    page = report([run]).read_text()
    assert "Zero-shot: what is taken for what" in page and "confusion of classes" in page and ">Chance<" in page
    assert f"Zero-shot: {found['top1']:.1f}% of the test images" in page and "above chance (25.0)" in page
    table = page[page.index("Top-1 of each of the 4 classes, the worst first") :].partition("</details>")[0]
    cells = re.findall(r"<tr><td>(\w+)</td><td>([\d.]+)</td><td>20</td></tr>", table)
    assert {name: float(top1) for name, top1 in cells} == found["per_class"]
    assert [float(top1) for _, top1 in cells] == sorted(found["per_class"].values())


def test_the_report_shows_what_finds_what(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    run = run_of(checkpoint, tmp_path)
    found = evaluate(run, test=shards, probes=("retrieval",), progress=False)["retrieval"]
    page = report([run]).read_text()
    section = page[page.index("<h2>Retrieval</h2>") :]
    section = section[: section.index("</section>")]
    assert section.count("<img") == 6 + 6 * 5 and section.count("<li") == 6 * 3
    marked = [text["right"] for each in found["examples"]["image_to_text"] for text in each["texts"]]
    marked += [near["right"] for each in found["examples"]["text_to_image"] for near in each["images"]]
    assert (
        section.count('<span class="mark">✓') - 1
        == sum(marked)
        < len(marked)
        == section.count('<span class="mark">✗') - 1 + sum(marked)
    )
    first = found["examples"]["image_to_text"][0]
    assert first["texts"][0]["text"] in section
    ranks = [each["rank"] for each in found["examples"]["image_to_text"] if each["rank"] > 3]
    assert all(f"comes in place {rank}." in section for rank in ranks)
    (run / "results.json").write_text((run / "results.json").read_text().replace(str(shards), str(shards / "moved")))
    assert "No examples: " in report([run]).read_text()


def trained_on_templates(checkpoint: Path, tmp_path: Path) -> Path:
    """A run whose captions were made of names and templates, as its config.yaml says."""
    run = run_of(checkpoint, tmp_path)
    (tmp_path / "names.tsv").write_text("class\tname\n" + "".join(f"{n}\t{n}, {n} paint\n" for n in COLORS))
    captions = {"templates": ["my {}", "a photo of a {}."], "class_names": str(tmp_path / "names.tsv"), "field": None}
    recipe = {"class_path": "datamodules.recipes.CLIPRecipe", "init_args": {"captions": captions}}
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"data": {"recipe": recipe}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


@pytest.mark.parametrize("source", ["", "checkpoints/last.ckpt"])
def test_prompts_are_those_that_the_run_was_trained_with(
    source: str, checkpoint: Path, shards: Path, tmp_path: Path
) -> None:
    """Wherever the results go; what the user says comes first."""
    run = trained_on_templates(checkpoint, tmp_path) / source
    for output in (None, tmp_path / "elsewhere"):
        found = evaluate(run, test=shards, probes=("zeroshot",), progress=False, output=output)["zeroshot"]
        assert found["protocol"]["templates"] == ["my {}", "a photo of a {}."]
        assert found["protocol"]["class_names"] == str(tmp_path / "names.tsv")
        assert found["protocol"]["prompts"] == 2 * 8
    own = evaluate(run, test=shards, probes=("zeroshot",), progress=False, templates=["{}"])["zeroshot"]["protocol"]
    assert (own["templates"], own["prompts"]) == (["{}"], 8)
    (tmp_path / "names.tsv").rename(tmp_path / "moved.tsv")
    moved = evaluate(
        run, test=shards, probes=("zeroshot", "retrieval"), progress=False, class_names=str(tmp_path / "moved.tsv")
    )
    assert moved["zeroshot"]["protocol"]["prompts"] == moved["retrieval"]["texts"] == 16
    with pytest.raises(DataError, match=r"names\.tsv does not exist"):
        evaluate(run, test=shards, probes=("retrieval",), progress=False)


def test_captions_of_classes_can_be_found(
    checkpoint: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty images have the same captions: each of them is right, and chance is told beside the recall."""
    run = trained_on_templates(checkpoint, tmp_path)
    command = ["evaluate", str(run), "--test", str(shards), "--probes", "retrieval"]
    assert main(command) == 0
    found = json.loads((run / "results.json").read_text())["retrieval"]
    assert (found["images"], found["texts"], found["captions"]) == (80, 16, 320)
    assert found["image_to_text"]["recall@1"] > 80 > 50 > found["chance"]["image_to_text"]["recall@1"]
    assert found["chance"]["text_to_image"]["recall@1"] == 25
    told = capsys.readouterr().out
    assert "80 images with 320 captions, of which 16 are different: where images share one, each of them is" in told
    assert "templates my {}, a photo of a {}. with class names " in found["protocol"]["captions"]
    page = report([run]).read_text()
    assert "of which 16 are different" in page and "<small>(25.0)</small>" in page


@pytest.mark.parametrize(
    ("where", "texts", "told"),
    [("txt", 64, ".txt, else"), ("json:colour", 4, "field 'colour' of .json"), ("templates", 8, "templates my {}, a")],
)
def test_which_captions_to_read(
    where: str, texts: int, told: str, checkpoint: Path, shards: Path, tmp_path: Path
) -> None:
    run = trained_on_templates(checkpoint, tmp_path)
    if where == "templates":  # of a run that was trained on texts, with what the user says
        (run / "config.yaml").write_text("model: {class_path: tasks.clip_task.CLIPTask}\n")
    (tmp_path / "templates.txt").write_text("my {}\na {}\n")
    command = ["evaluate", run, "--test", shards, "--probes", "retrieval", "--captions", where]
    command += ["--templates", tmp_path / "templates.txt"]
    assert main([str(part) for part in command]) == 0
    found = json.loads((run / "results.json").read_text())["retrieval"]
    assert found["texts"] == texts and found["protocol"]["captions"].startswith(told)


def test_captions_that_are_not_there(checkpoint: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(checkpoint), "--test", str(shards), "--probes", "retrieval", "--captions"]
    assert main([*command, "json:place"]) == 2
    assert "has none (field 'place' of .json); --captions txt, json:FIELD or templates" in capsys.readouterr().err
    assert main([*command, "words"]) == 2
    assert "--captions words: use txt, json:FIELD or templates" in capsys.readouterr().err


def test_own_names_and_templates(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "names.tsv").write_text("class\tname\n" + "".join(f"{n}\t{n}, {n} paint\n" for n in COLORS))
    (tmp_path / "templates.txt").write_text("a photo of a {}.\nmy {}\n")
    found = evaluate(
        checkpoint, test=shards, probes=("zeroshot",), templates=str(tmp_path / "templates.txt"),
        class_names=str(tmp_path / "names.tsv"), progress=False,
    )["zeroshot"]  # fmt: skip
    assert found["protocol"]["prompts"] == 16 and found["top1"] > 60


def test_with_other_probes(checkpoint: Path, shards: Path) -> None:
    results = evaluate(checkpoint, train=shards, test=shards, probes=("knn", "zeroshot"), progress=False, floors=False)
    assert set(results) == {"knn", "zeroshot", "floors"} and results["knn"]["top1"] > 80


def test_bad_input(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="knn learns from labelled images: give --train"):
        evaluate(checkpoint, test=shards, probes=("knn", "zeroshot"), progress=False)
    from tasks.encoder_files import save_encoder

    save_encoder(Encoder(ENCODER), tmp_path / "encoder.safetensors")
    with pytest.raises(TaskError, match="no CLIP"):
        evaluate(tmp_path / "encoder.safetensors", test=shards, probes=("zeroshot",), progress=False)
