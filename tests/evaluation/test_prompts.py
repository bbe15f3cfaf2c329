import numpy as np
import pytest

from datamodules.errors import DataError
from evaluation.errors import EvaluationError
from evaluation.prompts import make_prompts


def test_every_template_with_every_name(tmp_path):
    (tmp_path / "names.tsv").write_text("wnid\tnames\nn2\tsnail\nn1\tgoldfish, Carassius auratus\n")
    prompts = make_prompts(["n1", "n2"], ["a {}.", "the {}"], str(tmp_path / "names.tsv"))
    assert prompts.texts == [
        "a goldfish.", "the goldfish", "a Carassius auratus.", "the Carassius auratus", "a snail.", "the snail",
    ]  # fmt: skip
    assert prompts.classes.tolist() == [0, 0, 0, 0, 1, 1] and prompts.names.endswith("names.tsv")


def test_defaults():
    prompts = make_prompts(["sea_lion", "cat"])
    assert prompts.texts == ["a photo of a sea lion.", "a photo of a cat."]


def test_imagenets_templates_and_names():
    assert len(make_prompts(["cat"], "imagenet").texts) == 80
    assert make_prompts(["cat"], "simple").texts[0] == "itap of a cat."
    codes = [f"n{i:08d}" for i in range(1000)]
    prompts = make_prompts(codes[::-1], ["{}"])
    assert prompts.texts[-1] == "tench" and prompts.texts[0] == "toilet paper" and "ImageNet" in prompts.names


def test_templates_from_a_file(tmp_path):
    (tmp_path / "t.txt").write_text("a {}\n\n one {} \n")
    assert make_prompts(["cat"], str(tmp_path / "t.txt")).texts == ["a cat", "one cat"]
    (tmp_path / "t.txt").write_text("a cat\n")
    with pytest.raises(EvaluationError, match="must have exactly one"):
        make_prompts(["cat"], str(tmp_path / "t.txt"))
    (tmp_path / "t.txt").write_text("\n")
    with pytest.raises(EvaluationError, match="there are no templates"):
        make_prompts(["cat"], str(tmp_path / "t.txt"))
    with pytest.raises(EvaluationError, match=r"cannot read the templates .*nowhere.txt \(No such.*\): give imagenet"):
        make_prompts(["cat"], str(tmp_path / "nowhere.txt"))
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe{}")
    with pytest.raises(EvaluationError, match="no UTF-8 text: save them as such"):
        make_prompts(["cat"], str(tmp_path / "t.txt"))


def test_classes_without_names(tmp_path):
    with pytest.raises(EvaluationError, match="needs the names of the classes"):
        make_prompts([])
    (tmp_path / "names.tsv").write_text("class\tname\na\tcat\n")
    with pytest.raises(DataError, match="does not name 1 of 2"):
        make_prompts(["a", "b"], class_names=str(tmp_path / "names.tsv"))
    assert isinstance(make_prompts(["a"]).classes, np.ndarray)


def test_codes_are_no_prompts():
    with pytest.raises(DataError, match=r"codes of WordNet \(n01443537\): give a table"):
        make_prompts(["n01443537", "cat"])
