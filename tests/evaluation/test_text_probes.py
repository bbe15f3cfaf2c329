"""`trivit evaluate --probes zeroshot,retrieval` on a small CLIP that knows colours by construction."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from datamodules.errors import DataError
from evaluation import evaluate
from evaluation.errors import EvaluationError
from evaluation.report import report
from pretrain.cli import main
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tests.evaluation.conftest import CLIP_CONFIG, COLORS, clip_run


def test_the_command(clip_checkpoint: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["evaluate", clip_checkpoint, "--test", colours, "--probes", "zeroshot,retrieval", "--output", out]
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


def test_classes_from_fields_of_the_json(clip_checkpoint: Path, colours: Path, tmp_path: Path) -> None:
    command = ["evaluate", clip_checkpoint, "--test", colours, "--probes", "zeroshot", "--class-fields", "colour, edge"]
    assert main([str(part) for part in [*command, "--output", tmp_path]]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["zeroshot"]
    assert len(found["classes"]) == found["protocol"]["classes"] == 8 and "blue soft" in found["classes"]
    assert found["protocol"]["class_fields"] == ["colour", "edge"]
    assert main([str(part) for part in [*command[:-1], "place"]]) == 2
    run = clip_run(clip_checkpoint, tmp_path)  # trained with a table that names other classes
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] = {"recipe": {"captions": {"class_names": str(tmp_path / "of_training.tsv")}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["evaluate", str(run), *map(str, command[2:])]) == 0
    again = json.loads((run / "results.json").read_text())["zeroshot"]
    assert again["classes"] == found["classes"] and again["top1"] == found["top1"]


def test_floors_of_earlier_probes_stay(clip_checkpoint: Path, colours: Path, tmp_path: Path) -> None:
    for probe in ("knn", "zeroshot"):
        evaluate(clip_checkpoint, train=colours, test=colours, probes=(probe,), progress=False, output=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["floors"]) == {"raw_pixels", "untrained", "chance"}


def test_the_report_shows_zero_shot_beside_chance_and_what_is_mistaken(
    clip_checkpoint: Path, colours: Path, tmp_path: Path
) -> None:
    run = clip_run(clip_checkpoint, tmp_path)
    found = evaluate(run, test=colours, probes=("zeroshot",), progress=False)["zeroshot"]
    page = report([run]).read_text()
    assert "Zero-shot: what is taken for what" in page and "confusion of classes" in page and ">Chance<" in page
    assert f"Zero-shot: {found['top1']:.1f}% of the test images" in page and "above chance (25.0)" in page
    table = page[page.index("Top-1 of each of the 4 classes, the worst first") :].partition("</details>")[0]
    cells = re.findall(r"<tr><td>(\w+)</td><td>([\d.]+)</td><td>20</td></tr>", table)
    assert {name: float(top1) for name, top1 in cells} == found["per_class"]
    assert [float(top1) for _, top1 in cells] == sorted(found["per_class"].values())


def test_the_report_shows_what_finds_what(clip_checkpoint: Path, colours: Path, tmp_path: Path) -> None:
    run = clip_run(clip_checkpoint, tmp_path)
    found = evaluate(run, test=colours, probes=("retrieval",), progress=False)["retrieval"]
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
    (run / "results.json").write_text((run / "results.json").read_text().replace(str(colours), str(colours / "moved")))
    assert "No examples: " in report([run]).read_text()


def trained_on_templates(clip_checkpoint: Path, tmp_path: Path) -> Path:
    """A run whose captions were made of names and templates, as its config.yaml says."""
    run = clip_run(clip_checkpoint, tmp_path)
    (tmp_path / "names.tsv").write_text("class\tname\n" + "".join(f"{n}\t{n}, {n} paint\n" for n in COLORS))
    captions = {"templates": ["my {}", "a photo of a {}."], "class_names": str(tmp_path / "names.tsv"), "field": None}
    recipe = {"class_path": "datamodules.recipes.CLIPRecipe", "init_args": {"captions": captions}}
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"data": {"recipe": recipe}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


@pytest.mark.parametrize("source", ["", "checkpoints/last.ckpt"])
def test_prompts_are_those_that_the_run_was_trained_with(
    source: str, clip_checkpoint: Path, colours: Path, tmp_path: Path
) -> None:
    """Wherever the results go; what the user says comes first."""
    run = trained_on_templates(clip_checkpoint, tmp_path) / source
    for output in (None, tmp_path / "elsewhere"):
        found = evaluate(run, test=colours, probes=("zeroshot",), progress=False, output=output)["zeroshot"]
        assert found["protocol"]["templates"] == ["my {}", "a photo of a {}."]
        assert found["protocol"]["class_names"] == str(tmp_path / "names.tsv")
        assert found["protocol"]["prompts"] == 2 * 8
    own = evaluate(run, test=colours, probes=("zeroshot",), progress=False, templates=["{}"])["zeroshot"]["protocol"]
    assert (own["templates"], own["prompts"]) == (["{}"], 8)
    (tmp_path / "names.tsv").rename(tmp_path / "moved.tsv")
    moved = evaluate(
        run, test=colours, probes=("zeroshot", "retrieval"), progress=False, class_names=str(tmp_path / "moved.tsv")
    )
    assert moved["zeroshot"]["protocol"]["prompts"] == moved["retrieval"]["texts"] == 16
    for probe in ("retrieval", "zeroshot"):
        with pytest.raises(DataError, match=r"names\.tsv does not exist; this table .* with: --class-names FILE"):
            evaluate(run, test=colours, probes=(probe,), progress=False)
    (tmp_path / "names.tsv").write_text("class\tname\nnarwhal\ta whale\n")  # of the set that it was trained on
    with pytest.raises(DataError, match=r"names\.tsv does not name 4 of 4 classes .* --class-names FILE gives another"):
        evaluate(run, test=colours, probes=("zeroshot",), progress=False)
    with pytest.raises(DataError, match=r"names\.tsv does not name 4 of 4 classes \(first: \w+\)$"):
        evaluate(run, test=colours, probes=("zeroshot",), progress=False, class_names=str(tmp_path / "names.tsv"))


def test_captions_of_classes_can_be_found(
    clip_checkpoint: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty images have the same captions: each of them is right, and chance is told beside the recall."""
    run = trained_on_templates(clip_checkpoint, tmp_path)
    command = ["evaluate", str(run), "--test", str(colours), "--probes", "retrieval"]
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
    where: str, texts: int, told: str, clip_checkpoint: Path, colours: Path, tmp_path: Path
) -> None:
    run = trained_on_templates(clip_checkpoint, tmp_path)
    if where == "templates":  # of a run that was trained on texts, with what the user says
        (run / "config.yaml").write_text("model: {class_path: tasks.clip_task.CLIPTask}\n")
    (tmp_path / "templates.txt").write_text("my {}\na {}\n")
    command = ["evaluate", run, "--test", colours, "--probes", "retrieval", "--captions", where]
    command += ["--templates", tmp_path / "templates.txt"]
    assert main([str(part) for part in command]) == 0
    found = json.loads((run / "results.json").read_text())["retrieval"]
    assert found["texts"] == texts and found["protocol"]["captions"].startswith(told)


def test_captions_that_are_not_there(clip_checkpoint: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(clip_checkpoint), "--test", str(colours), "--probes", "retrieval", "--captions"]
    assert main([*command, "json:place"]) == 2
    assert "has none (field 'place' of .json); --captions txt, json:FIELD or templates" in capsys.readouterr().err
    assert main([*command, "words"]) == 2
    assert "--captions words: use txt, json:FIELD or templates" in capsys.readouterr().err


def test_own_names_and_templates(clip_checkpoint: Path, colours: Path, tmp_path: Path) -> None:
    (tmp_path / "names.tsv").write_text("class\tname\n" + "".join(f"{n}\t{n}, {n} paint\n" for n in COLORS))
    (tmp_path / "templates.txt").write_text("a photo of a {}.\nmy {}\n")
    found = evaluate(
        clip_checkpoint, test=colours, probes=("zeroshot",), templates=str(tmp_path / "templates.txt"),
        class_names=str(tmp_path / "names.tsv"), progress=False,
    )["zeroshot"]  # fmt: skip
    assert found["protocol"]["prompts"] == 16 and found["top1"] > 60


def test_with_other_probes(clip_checkpoint: Path, colours: Path) -> None:
    results = evaluate(
        clip_checkpoint, train=colours, test=colours, probes=("knn", "zeroshot"), progress=False, floors=False
    )
    assert set(results) == {"knn", "zeroshot", "floors"} and results["knn"]["top1"] > 80


def test_bad_input(clip_checkpoint: Path, colours: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="knn learns from labelled images: give --train"):
        evaluate(clip_checkpoint, test=colours, probes=("knn", "zeroshot"), progress=False)
    from tasks.encoder_files import save_encoder

    save_encoder(Encoder(CLIP_CONFIG), tmp_path / "encoder.safetensors")
    with pytest.raises(TaskError, match="no CLIP"):
        evaluate(tmp_path / "encoder.safetensors", test=colours, probes=("zeroshot",), progress=False)
