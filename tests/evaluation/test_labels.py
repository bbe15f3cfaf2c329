import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.manifest import load_manifest
from evaluation import evaluate
from evaluation.errors import EvaluationError
from evaluation.labels import check_labelled, match_labels
from evaluation.overlap import shared_images
from evaluation.probes import ProbeSettings
from pretrain.cli import main
from tests.evaluation.conftest import CLASSES, write_images


def test_classes_match_by_name_not_by_number() -> None:
    label, names = match_labels(("a", "b", "c"), np.array([0, 1, 2]), ("c", "a"), np.array([0, 0, 1]))
    assert label.tolist() == [2, 2, 0]
    assert names == ("a", "b", "c")


def test_numbers_are_names_where_there_are_no_others() -> None:
    label, names = match_labels((), np.array([0, 2]), (), np.array([2, 0]))
    assert label.tolist() == [2, 0]
    assert names == ("0", "1", "2")


def test_a_listed_class_without_images_does_no_harm() -> None:
    label, _ = match_labels(("a", "b"), np.array([0, 1]), ("a", "b", "unused"), np.array([1, 0]))
    assert label.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("train_names", "train_label", "test_names", "test_label", "message"),
    [
        (("a", "b"), [0, 1], ("a", "x", "y"), [0, 1, 2], "without any train image: x, y"),
        (("a", "b"), [0, 0], ("a", "b"), [0, 1], "without any train image: b"),
        (("Ant", "b"), [0, 1], ("ant", "b"), [0, 1], "image: ant .train has 'Ant': upper and lower case make"),
        ((), [0, 1], (), [5], "without any train image: 5"),
        (("a", "b"), [0, 1], (), [0, 1], "test only numbers .* classes.txt .* beside the tars of test"),
        ((), [0, 1], ("a", "b"), [0, 1], "test names its classes and train only numbers"),
        (("crane", "crane"), [0, 1], ("crane", "dog"), [0, 0], "'crane' stands for two classes"),
    ],
)
def test_what_cannot_be_matched_is_one_clear_line(
    train_names: tuple[str, ...],
    train_label: list[int],
    test_names: tuple[str, ...],
    test_label: list[int],
    message: str,
) -> None:
    with pytest.raises(EvaluationError, match=message):
        match_labels(train_names, np.array(train_label), test_names, np.array(test_label))


def test_the_same_list_may_hold_a_name_twice() -> None:
    assert match_labels(("crane", "crane"), np.array([0, 1]), ("crane", "crane"), np.array([1, 0]))[0].tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("label", "what", "message"),
    [
        ([-1, -1], "test", "no test image has a label"),
        ([0, -1, 1], "train", "only 2 of 3 train image has a label"),
        ([3, 3], "train", "one class"),
    ],
)
def test_images_that_cannot_be_scored(label: list[int], what: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        check_labelled(np.array(label), what)


def folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_one_class_folder_is_told_and_enough_for_test(
    tmp_path: Path, cache: Path, encoder_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, ant = folders(tmp_path / "train", "ant", "bee"), folders(tmp_path / "only_ant", "ant")
    how: dict[str, Any] = {"workers": 0, "device": "cpu"}
    found = evaluate(encoder_file, train=train, test=ant, probes=("knn",), settings=ProbeSettings(ks=(1,)), **how)
    # the images of both classes are the same, so what matters is that there is a score and of how many classes
    assert found["knn"]["protocol"]["classes"] == 2 and found["floors"]["untrained"]["knn"]["top1"] >= 0
    told = capsys.readouterr().err
    assert "all images lie in one folder, ant, which is taken for no class" in told
    assert "note: 6 test images (100.0%) are in train, too" in told
    kept = found["knn"]["protocol"]["shared_images"]
    assert kept["images"] == 6 and "6 test images (100.0%) are in train, too" in kept["note"]
    for one, other, says in (
        (ant, train, "all train images lie in one folder, 'ant': .* at least two class folders"),
        (train, folders(tmp_path / "more", "cow"), "one folder, 'cow': .* train has no class of that name"),
    ):
        with pytest.raises(EvaluationError, match=says):
            evaluate(encoder_file, train=one, test=other, probes=("knn",), **how)


def test_classes_that_train_lacks_are_left_out_on_demand_and_counted(
    tmp_path: Path, cache: Path, encoder_file: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write_images(tmp_path / "more", 70, classes=("gnu", *CLASSES))
    command = ["evaluate", str(encoder_file), "--train", str(world / "train"), "--test", str(more),
               "--output", str(tmp_path), "--probes", "knn,corruptions", "--set", "corruptions.kinds=fog",
               "--set", "corruptions.severities=1", "--set", "strengths=1"]  # fmt: skip
    how: dict[str, Any] = {"train": world / "train", "probes": ("knn",), "workers": 0, "device": "cpu"}
    with pytest.raises(EvaluationError, match="without any train image: gnu; --drop-unknown-classes leaves"):
        evaluate(encoder_file, test=more, **how)
    assert main([*command, "--drop-unknown-classes"]) == 0
    told = capsys.readouterr().err
    assert "note: 10 test images of a class that train lacks are left out: gnu (10)" in told
    results = json.loads((tmp_path / "results.json").read_text())
    for result in (results["knn"], results["corruptions"], *results["floors"]["untrained"].values()):
        test = result["protocol"]["test"]
        assert test["left_out"] == {"gnu": 10} and test["images"] == 60 and result["protocol"]["classes"] == 6
        assert test["hash"] != load_manifest(more).hash and result["protocol"]["majority_class"] < 17
    # the same as on a set that never had them
    clean = write_images(tmp_path / "clean", 70, classes=("gnu", *CLASSES), leave_out="gnu")
    assert evaluate(encoder_file, test=clean, **how)["knn"]["by_k"] == results["knn"]["by_k"]
    with pytest.raises(EvaluationError, match="nothing is left"):
        other = write_images(tmp_path / "other", 12, classes=("gnu", "owl"))
        evaluate(encoder_file, test=other, drop_unknown_classes=True, **how)
    with pytest.raises(EvaluationError, match="no train image has a label"):
        bare = write_images(tmp_path / "bare", 12, labelled=False)
        evaluate(encoder_file, test=more, drop_unknown_classes=True, **(how | {"train": bare}))


def test_what_is_known_of_sets_goes_where_the_features_go(
    world: Path, tmp_path: Path, cache: Path, encoder_file: Path
) -> None:
    evaluate(
        encoder_file, train=world / "train", test=world / "test", probes=("knn",), floors=False, workers=0,
        device="cpu", cache_dir=tmp_path / "here",
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["facts", "features"] and not cache.exists()


def test_images_of_other_bytes_are_not_in_train(
    world: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shared_images(world / "train", world / "test") == 0
    again = write_images(tmp_path / "again", 30)
    with monkeypatch.context() as patched:  # not kept: it may be readable another time
        patched.setattr("evaluation.overlap.read_index", lambda path: (_ for _ in ()).throw(OSError(5, "lost")))
        assert shared_images(world / "train", again) == 0
    assert shared_images(world / "train", again) == 30
    with monkeypatch.context() as patched:  # once for each state of a set
        patched.setattr("evaluation.overlap.read_index", None)
        assert shared_images(world / "train", again) == 30
    shutil.rmtree(again)
    assert shared_images(world / "train", write_images(again, 20)) == 20
