import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import evaluation
from datamodules.errors import DataError
from datamodules.labelled_batches import labelled_batches
from datamodules.manifest import load_manifest
from datamodules.recipes import MAERecipe
from datamodules.shard_reader import ShardReader
from datamodules.shard_writer import ShardWriter
from evaluation.errors import EvaluationError
from evaluation.image_probes import IMAGE_PROBES
from evaluation.probe_options import with_options
from evaluation.probes import ProbeSettings
from evaluation.results_file import merge, results_file
from evaluation.run_files import read_run
from evaluation.score import evaluate
from evaluation.verdict import judge
from pretrain.cli import main
from tasks.encoder_files import save_encoder
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tests.evaluation.conftest import CLASSES, CONFIG, make_run, write_images
from tests.evaluation.test_dense import write_masked


def run_evaluate(source: Path, train: Path, test: Path, **options: Any) -> dict[str, Any]:
    return evaluate(source, train=train, test=test, workers=0, device="cpu", **options)


def test_numbers_come_with_their_protocol(
    world: Path, cache: Path, encoder_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ProbeSettings(strengths=(1.0, 1e-2))
    results = run_evaluate(encoder_file, world / "train", world / "test", output=tmp_path / "out", settings=few)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    knn, linear = results["knn"], results["linear"]
    assert knn["top1"] == knn["by_k"]["20"] > 50
    assert linear["top1"] > 50
    assert knn["interval"][0] <= knn["top1"] <= knn["interval"][1]
    assert knn["top5"] >= knn["top1"]
    for protocol in (knn["protocol"], linear["protocol"]):
        assert protocol["crop"] == protocol["resize"] == 16
        assert protocol["pool"] == "mean"
        assert protocol["train"]["images"] == 240
        assert protocol["test"]["images"] == 60
        assert protocol["test"]["bad"] == 0
        assert len(protocol["checkpoint"]) == 16
    assert knn["protocol"]["temperature"] == 0.07
    assert knn["protocol"]["ks"] == [10, 20, 100, 200]
    assert linear["protocol"]["seed"] == 0
    assert linear["protocol"]["strength"] in linear["protocol"]["strength_grid"]
    assert set(results["floors"]) == {"raw_pixels", "untrained"}
    assert set(results["floors"]["raw_pixels"]) == {"knn", "linear"}
    assert "pool" not in results["floors"]["raw_pixels"]["knn"]["protocol"]
    printed = capsys.readouterr().out
    assert f"{knn['top1']:.1f}" in printed
    assert "raw pixels" in printed
    assert str(tmp_path / "out" / "results.json") in printed


def test_that_train_and_test_are_the_same_images_is_kept_and_no_verdict_rests_on_it(
    world: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", train=world / "train")
    few = ProbeSettings(strengths=(1.0,))
    run_evaluate(run, world / "test", world / "test", probes=("knn", "linear", "label_free"), settings=few)
    note = "train and test are the same images, so the scores say little"
    assert f"note: {note}" in capsys.readouterr().err
    results = json.loads((run / "results.json").read_text())
    assert all(results[name]["protocol"]["shared_images"]["note"] == note for name in ("knn", "linear"))
    assert "shared_images" not in results["label_free"]["protocol"]
    verdict = judge(read_run(run))
    assert verdict.tone == "fair" and verdict.headline.endswith("since test images are in train.")
    assert f"kNN and Linear probe: {note}; no verdict rests on them." in verdict.details
    assert not any("raw pixels" in sentence for sentence in (verdict.headline, *verdict.details))


def test_probes_merge_into_the_file_and_repeat_to_the_last_digit(world: Path, cache: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", train=world / "train")
    old = {"zeroshot": {"top1": 12.5}, "finetune": {"top1": 1.5, "protocol": {"checkpoint": "0123456789abcdef"}}}
    (run / "results.json").write_text(json.dumps(old))
    first = run_evaluate(run, world / "train", world / "test", probes=("knn",), floors=False)
    run_evaluate(run / "checkpoints" / "last.ckpt", world / "train", world / "test", probes=("linear",), floors=False)
    merged = json.loads((run / "results.json").read_text())
    assert set(merged) == {"zeroshot", "knn", "linear"}
    assert run_evaluate(run, world / "train", world / "test", probes=("knn",), floors=False) == first


def test_features_are_made_once_for_all_probes_and_made_anew_give_the_same_digits(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each image once, and once more by the untrained encoder for the floors."""
    run, seen, real = make_run(tmp_path / "run", train=world / "train", seed=5), [], Encoder.features

    def counted(self: Encoder, images: Tensor) -> Tensor:
        seen.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Encoder, "features", counted)
    found = []
    few = with_options(
        ProbeSettings(), ["strengths=1,0.1", "few_shot.shots=2", "few_shot.shares=0.5", "few_shot.draws=2"]
    )
    for cache, images in (("one", 2 * 300), ("one", 0), ("other", 2 * 300)):
        monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / cache))
        seen.clear()
        probes = ("knn", "linear", "few_shot", "label_free")
        found.append(run_evaluate(run, world / "train", world / "test", probes=probes, settings=few))
        assert sum(seen) == images
    assert found[0] == found[1] == found[2], "to the last digit"


def test_small_train_sets_get_the_ks_that_fit(cache: Path, encoder_file: Path, tmp_path: Path, world: Path) -> None:
    train = write_images(tmp_path / "train", 30)
    results = run_evaluate(encoder_file, train, world / "test", probes=("knn",), floors=False)
    assert results["knn"]["protocol"]["ks"] == [10, 20]
    with pytest.raises(EvaluationError, match="k = 50 needs at least 50 train images, there are 30"):
        run_evaluate(encoder_file, train, world / "test", probes=("knn",), settings=ProbeSettings(ks=(5, 50)))
    tiny = write_images(tmp_path / "tiny", 12)
    with pytest.raises(EvaluationError, match="k = 20 needs at least 20 train images, there are 12"):
        run_evaluate(encoder_file, tiny, world / "test", probes=("knn",), floors=False)


def test_label_free_needs_neither_labels_nor_train(
    cache: Path, encoder_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_images(tmp_path / "photos", 40, labelled=False)
    command = ["evaluate", str(encoder_file), "--test", str(photos), "--output", str(tmp_path)]
    assert main([*command, "--probes", "label_free"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["label_free"]["rankme"] > 1 and "purity" not in found["label_free"]
    assert found["label_free"]["protocol"]["train"]["images"] == 40
    for each in (found, *found["floors"].values()):
        assert each["label_free"]["protocol"]["looked_at"].startswith("the test images")
    said = capsys.readouterr()
    assert "no purity, which needs labels" in said.out and "raw pixels RankMe" in said.out and "same" not in said.err
    assert main([*command, "--probes", "label_free,knn"]) == 2
    assert "knn learns from labelled images: give --train" in capsys.readouterr().err


def test_probes_on_features_and_their_settings_on_the_command_line(
    cache: Path, encoder_file: Path, tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--train", str(world / "train"), "--test", str(world / "test"), "--output", str(tmp_path)]
    chosen = ["--set", "ks=5", "--set", "few_shot.shots=2", "--set", "few_shot.draws=2", "--set", "few_shot.shares=0.5"]
    command = ["evaluate", str(encoder_file), *data, "--probes", "knn,few_shot,label_free", *chosen]
    assert main(command) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    printed = capsys.readouterr().out
    assert "few_shot: 2: " in printed and "label_free: RankMe " in printed and "  raw pixels RankMe" in printed
    assert found["knn"]["protocol"]["ks"] == [5] and 0 <= found["knn"]["mean_per_class"] <= 100
    assert set(found["few_shot"]["by_labels"]) == {"2", "50%"}
    assert found["few_shot"]["top1"] == found["few_shot"]["by_labels"]["2"]["top1"]
    assert found["few_shot"]["protocol"]["train"]["images"] == 240
    assert 1 < found["label_free"]["rankme"] < 24 and found["label_free"]["uniformity"] < 0
    assert set(found["floors"]["untrained"]) == {"knn", "few_shot", "label_free"}
    assert main(command) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == found, "to the last digit"
    assert main(["evaluate", str(encoder_file), *data, "--probes", "knn", "--set", "ks=5,"]) == 0
    assert main(["evaluate", str(encoder_file), *data, "--set", "ks=a"]) == 2
    assert "--set ks=a: it takes several of int" in capsys.readouterr().err


@pytest.mark.slow
def test_probes_on_images_on_the_command_line(
    cache: Path, encoder_file: Path, tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    names = ("linear_paper", "linear_mae", "attentive", "finetune", "corruptions")
    small = [
        "linear_paper.steps=2", "linear_paper.rates=0.1", "linear_mae.epochs=2", "linear_mae.warmup_epochs=1",
        "attentive.epochs=1", "attentive.rates=1e-3,1e-2", "finetune.epochs=2", "finetune.warmup_epochs=1",
        "corruptions.kinds=contrast,fog", "corruptions.severities=2", "strengths=1",
    ]  # fmt: skip
    data = ["--train", str(world / "train"), "--test", str(world / "test"), "--output", str(tmp_path)]
    command = ["evaluate", str(encoder_file), *data,
               "--probes", ",".join(names), *(f"--set={each}" for each in small)]  # fmt: skip
    assert main(command) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {*names, "floors"} and set(found["floors"]) == {"untrained"}
    for name in names:
        under = found["floors"]["untrained"][name]
        assert under["top1"] == found[name]["top1"], "this encoder is untrained itself, from the same seed"
        assert under["protocol"]["features"].startswith("the same encoder, untrained")
        assert "checkpoint" not in under["protocol"] and under["protocol"]["train"]["images"] == 240
        protocol = found[name]["protocol"]
        assert found[name]["interval"][0] <= found[name]["top1"] <= found[name]["interval"][1]
        assert protocol["train"]["images"] == 240 and protocol["seed"] == 0 and len(protocol["checkpoint"]) == 16
    assert found["linear_paper"]["protocol"]["chosen_on"].startswith("24 train images")
    assert found["linear_paper"]["protocol"]["rates"] == [0.1]
    assert found["finetune"]["protocol"]["layer_decay"] == 0.65
    pools = {name: each["protocol"].get("pool") for name, each in (found | found["floors"]["untrained"]).items()
             if name in names}  # fmt: skip
    assert pools == {"linear_paper": None, "attentive": None} | dict.fromkeys(
        ("linear_mae", "finetune", "corruptions"), "mean"
    )
    assert found["linear_paper"]["protocol"]["head_sees"] in ("1 class tokens", "1 class tokens + mean patch")
    assert "learned query" in found["attentive"]["protocol"]["head_sees"]
    printed = capsys.readouterr().out
    assert all(f"\n{name}: top-1 " in printed for name in names)
    assert printed.count("\n  the untrained encoder top-1 ") == printed.count("always the largest class: 16.7%") == 5
    with monkeypatch.context() as patched:  # nothing is left to build another encoder with
        patched.setattr("evaluation.floors.untrained", None)
        assert main(command) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == found, "to the last digit"


def test_the_floor_of_a_probe_on_images_does_not_depend_on_the_run(
    cache: Path, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--probes", "linear_mae", "--set", "linear_mae.epochs=1", "--set", "linear_mae.warmup_epochs=0"]
    data = ["--train", str(world / "train"), "--test", str(world / "test")]
    found = []
    for seed in (3, 4):
        monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / f"cache{seed}"))
        run = make_run(tmp_path / f"run{seed}", train=world / "train", seed=seed)
        assert main(["evaluate", str(run), *data, *few]) == 0
        found.append(json.loads((run / "results.json").read_text()))
    first, second = found
    assert first["floors"] == second["floors"] and first["linear_mae"]["top1"] != second["linear_mae"]["top1"]
    assert main(["evaluate", str(run), *data, *few, "--no-floors", "--output", str(tmp_path / "bare")]) == 0
    assert set(json.loads((tmp_path / "bare" / "results.json").read_text())) == {"linear_mae"}


def test_what_is_done_is_kept_when_the_next_probe_fails(
    cache: Path, encoder_file: Path, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise EvaluationError("the loss is not finite")

    few = with_options(ProbeSettings(), ["linear_paper.steps=1", "linear_paper.rates=1", "ks=5"])
    both: dict[str, Any] = {"probes": ("knn", "linear_paper", "attentive"), "floors": False, "output": tmp_path}
    with pytest.raises(EvaluationError, match="linear_paper needs rates"):
        wrong = with_options(few, ["linear_paper.rates=0"])
        run_evaluate(encoder_file, world / "train", world / "test", settings=wrong, **both)
    assert not (tmp_path / "results.json").exists(), "before any probe has begun"
    monkeypatch.setitem(IMAGE_PROBES, "attentive", fail)
    with pytest.raises(EvaluationError, match="not finite"):
        run_evaluate(encoder_file, world / "train", world / "test", settings=few, **both)
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"knn", "linear_paper"}


def test_probes_on_masks_need_no_labels(
    cache: Path, encoder_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [write_masked(tmp_path / name, 12, seed=0) for name in ("train", "test")]
    small = ["--set", "segmentation.steps=3", "--set", "segmentation.batch_size=4"]
    command = ["evaluate", str(encoder_file), "--test", str(data[1]), "--output", str(tmp_path)]
    assert main([*command, "--probes", "localisation", "--precision", "bfloat16"]) == 0
    looked = json.loads((tmp_path / "results.json").read_text())
    for of in (looked["localisation"]["protocol"], looked["floors"]["untrained"]["localisation"]["protocol"]):
        assert "crop" not in of and "resize" not in of and "squeezed into a square" in of["interpolation"]
        assert (of["side"], of["precision"], set(of["versions"])) == (16, "float32", {"trivit", "torch"})
    assert main([*command, "--train", str(data[0]), "--probes", "segmentation", *small]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["segmentation"]["protocol"]["classes"] == 2 and found["localisation"]["images"] == 12
    assert set(found["floors"]["untrained"]) >= {"segmentation"}
    told = capsys.readouterr().out
    assert "segmentation: mean IoU" in told and "the most frequent class: " in told and "box in the centre: " in told
    boxes = tmp_path / "boxes.tsv"
    boxes.write_text("file\tx0\ty0\tx1\ty1\n0003.png\t0\t0\t99\t99\n")
    (tmp_path / "results.json").unlink()
    wrong = [*small, "--set", f"localisation.boxes={boxes}"]
    assert main([*command, "--train", str(data[0]), "--probes", "segmentation,localisation", *wrong]) == 2
    assert "ends outside of the image" in capsys.readouterr().err
    kept = json.loads((tmp_path / "results.json").read_text())
    assert "segmentation" in kept and "segmentation" in kept["floors"]["untrained"]
    assert main([*command, "--probes", "segmentation"]) == 2
    assert "segmentation learns from labelled images: give --train" in capsys.readouterr().err


def test_labels_that_are_texts_are_matched_by_name(cache: Path, encoder_file: Path, tmp_path: Path) -> None:
    """Names in `.cls` of both sets give what class folders give; names of no class are one clear line."""
    named = {part: write_images(tmp_path / part, 48, seed=seed) for seed, part in enumerate(("train", "test"))}
    texts = {}
    for part, folder in named.items():
        manifest = load_manifest(folder)
        reader, texts[part] = ShardReader(manifest), tmp_path / f"{part}_texts"
        with ShardWriter(texts[part], samples_per_shard=40) as writer:
            for i in range(48):
                name = manifest.classes[reader.label(i // 40, i % 40)]
                writer.write(f"{i}", {"png": bytes(reader.member(i // 40, i % 40, "png") or b""), "cls": name.encode()})
        (texts[part] / "manifest.json").unlink()  # as of tars from elsewhere
    found = [
        run_evaluate(encoder_file, sets["train"], sets["test"], probes=("knn",), floors=False)
        for sets in (named, texts)
    ]
    how: Any = {"rows": np.arange(48), "batch_size": 24, "steps": 2, "seed": 0, "workers": 0}
    learned = [list(labelled_batches(sets["train"], MAERecipe(16), **how)) for sets in (named, texts)]
    for numbered, by_name in zip(*learned, strict=True):
        assert torch.equal(numbered["image"], by_name["image"])
        names = [[load_manifest(sets["train"]).classes[i] for i in batch["label"]]
                 for sets, batch in ((named, numbered), (texts, by_name))]  # fmt: skip
        assert names[0] == names[1] and len(set(names[0])) == len(CLASSES)
    assert found[0]["knn"]["top1"] == found[1]["knn"]["top1"] and found[0]["knn"]["protocol"]["classes"] == len(CLASSES)
    (texts["train"] / "classes.txt").write_text("yak\n")
    (texts["train"] / "manifest.json").unlink()
    with pytest.raises(EvaluationError, match=r"no image .* could be read \(first: .* is no index.*classes\.txt"):
        run_evaluate(encoder_file, texts["train"], texts["test"])


def test_what_is_probed_may_be_chosen(
    cache: Path, encoder_file: Path, tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = world / "train", world / "test"
    output = ["--train", str(train), "--test", str(test), "--probes", "knn", "--output", str(tmp_path)]
    assert main(["evaluate", str(encoder_file), *output, "--pool", "cls+mean"]) == 0
    widths = [json.loads(about.read_text())["width"] for about in cache.rglob("about.json")]
    assert 2 * 24 in widths
    both = json.loads((tmp_path / "results.json").read_text())["knn"]
    mean = run_evaluate(encoder_file, train, test, probes=("knn",), floors=False)["knn"]
    assert (both["protocol"]["pool"], mean["protocol"]["pool"]) == ("cls+mean", "mean")
    half = ["--precision", "bfloat16", "--image-size", "32"]
    assert main(["evaluate", str(encoder_file), *output, *half]) == 0
    protocol = json.loads((tmp_path / "results.json").read_text())["knn"]["protocol"]
    assert (protocol["precision"], protocol["crop"], protocol["resize"]) == ("bfloat16", 32, 32)
    bare = tmp_path / "bare.safetensors"
    save_encoder(Encoder(replace(CONFIG, class_token=False)), bare)
    with pytest.raises(EvaluationError, match="has no class token: use --pool mean"):
        run_evaluate(bare, train, test, pool="cls+mean")
    with pytest.raises(EvaluationError, match=r"bare\.safetensors has no class token, and localisation looks"):
        evaluate(bare, test=test, probes=("localisation",), workers=0, device="cpu")


def test_bad_input_is_one_clear_line(cache: Path, encoder_file: Path, tmp_path: Path, world: Path) -> None:
    train, test = world / "train", world / "test"
    with pytest.raises(EvaluationError, match="unknown probe 'knm': there are knn, linear"):
        run_evaluate(encoder_file, train, test, probes=("knm",))
    with pytest.raises(EvaluationError, match="give --train"):
        evaluate(encoder_file, test=test)
    with pytest.raises(TaskError, match="no such checkpoint"):
        run_evaluate(tmp_path / "nothing.ckpt", train, test)
    with pytest.raises(DataError):
        run_evaluate(encoder_file, tmp_path / "no data", test)
    with pytest.raises(EvaluationError, match="no test image has a label"):
        run_evaluate(encoder_file, train, write_images(tmp_path / "bare", 12, labelled=False))
    with pytest.raises(EvaluationError, match="without any train image: gnu"):
        run_evaluate(encoder_file, train, write_images(tmp_path / "more", 14, classes=(*CLASSES, "gnu")))
    with pytest.raises(EvaluationError, match="one class"):
        run_evaluate(encoder_file, write_images(tmp_path / "one", 30, classes=("ant",)), test)
    with pytest.raises(TaskError, match="patch_size 4 does not divide image_size 18"):
        run_evaluate(encoder_file, train, test, image_size=18)
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="is a file: name a folder"):
        run_evaluate(encoder_file, train, test, output=tmp_path / "file")


def test_a_damaged_results_file_is_not_overwritten(cache: Path, world: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", train=world / "train")
    (run / "results.json").write_text('{"knn": ')
    with pytest.raises(EvaluationError, match="move it away"):
        run_evaluate(run, world / "train", world / "test", probes=("knn",), floors=False)
    assert (run / "results.json").read_text() == '{"knn": '


def test_where_results_go(tmp_path: Path, world: Path) -> None:
    run = make_run(tmp_path / "run", train=world / "train")
    assert results_file(run, None) == run / "results.json"
    assert results_file(run / "checkpoints" / "last.ckpt", None) == run / "results.json"
    assert results_file("timm:vit_tiny_patch16_224", None) is None
    assert results_file(tmp_path / "a" / "b.safetensors", None) is None
    assert results_file(run, tmp_path / "else") == tmp_path / "else" / "results.json"


def test_from_python_it_is_one_call() -> None:
    assert evaluation.evaluate is evaluate


HELD = """
import fcntl, sys, time
from pathlib import Path
place = Path(sys.argv[1])
with (place.parent / ".results.lock").open("a") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(0.5)
    place.write_text('{"linear": {"top1": 2}}')
"""


def test_two_evaluations_of_one_run_lose_no_scores(tmp_path: Path) -> None:
    place = tmp_path / "results.json"
    place.write_text("{}")
    with subprocess.Popen([sys.executable, "-c", HELD, str(place)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        merge(place, {"knn": {"top1": 1}})
    assert json.loads(place.read_text()) == {"linear": {"top1": 2}, "knn": {"top1": 1}}


def test_a_lock_that_another_user_has_made_keeps_no_score_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, *, wait: bool) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("evaluation.results_file.locked", refused)
    merge(tmp_path / "results.json", {"knn": {"top1": 1}})
    assert json.loads((tmp_path / "results.json").read_text()) == {"knn": {"top1": 1}}


def test_floors_stay_with_the_scores_that_they_are_under(tmp_path: Path) -> None:
    def on(test: str, top1: float) -> dict[str, Any]:
        return {"top1": top1, "protocol": {"checkpoint": "one", "test": {"hash": test}}}

    place = tmp_path / "results.json"
    merge(place, {"knn": on("seen", 30), "floors": {"raw_pixels": {"knn": on("seen", 10)}}})
    merge(place, {"zeroshot": on("unseen", 40), "floors": {"chance": {"zeroshot": on("unseen", 5)}}})
    floors = json.loads(place.read_text())["floors"]
    assert floors == {"raw_pixels": {"knn": on("seen", 10)}, "chance": {"zeroshot": on("unseen", 5)}}
    merge(place, {"knn": on("seen", 31)})  # perhaps of another crop or train set, and without floors of its own
    assert set(json.loads(place.read_text())["floors"]) == {"chance"}
