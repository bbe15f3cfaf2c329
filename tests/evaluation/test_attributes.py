import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.shard_writer import ShardWriter
from datamodules.synth import synth
from evaluation.attribute_table import attribute_rows, attribute_sentences, attribute_summary
from evaluation.attributes import classed_by, read_attributes
from evaluation.errors import EvaluationError
from evaluation.features import Features
from evaluation.probes import ProbeSettings
from evaluation.report import report
from evaluation.score import evaluate
from tests.evaluation.conftest import make_run


def write_json(folder: Path, records: list[dict[str, Any] | None]) -> tuple[Path, Features]:
    """A set whose samples have these `.json` (None: none), and features of all of them, in the opposite order."""
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for i, record in enumerate(records):
            extra = {} if record is None else {"json": json.dumps(record).encode()}
            writer.write(f"{i:05d}", {"jpg": b"unread", **extra})
    shards = sorted(path.name for path in folder.glob("*.tar"))
    keys = [f"{shards[i // 3]}/{i:05d}" for i in range(len(records))][::-1]
    none = np.zeros((len(keys), 1), np.float32)
    return folder, Features(none, np.full(len(keys), -1), keys, (), 0, "", "")


def test_attributes_are_the_texts_that_all_images_have(tmp_path: Path) -> None:
    records = [
        {"hue": "red", "lit": i % 2 == 0, "name": f"picture {i}", "size": i, "one": "same", "odd": "a" if i else 3}
        for i in range(120)
    ]
    records[7]["hue"] = "blue"
    train = write_json(tmp_path / "train", records)
    test = write_json(tmp_path / "test", [{**records[7], "name": "picture 1"}, {**records[1], "name": "picture 2"}])
    found = read_attributes(*train, *test)
    assert list(found) == ["hue", "lit"]
    assert found["hue"].values == ("blue", "red")
    assert found["hue"].train.tolist() == [1] * 112 + [0] + [1] * 7  # the features are the other way round
    assert found["hue"].test.tolist() == [1, 0]
    assert found["lit"].values == ("False", "True") and found["lit"].test.tolist() == [0, 0]


def test_a_value_that_train_lacks_or_an_image_without_json_leaves_none(tmp_path: Path) -> None:
    train = write_json(tmp_path / "train", [{"hue": "red"}, {"hue": "blue"}])
    for name, record in (("new", {"hue": "green"}), ("bare", None)):
        with pytest.raises(EvaluationError, match=r"attributes found none: it needs fields with 2 to 100"):
            read_attributes(*train, *write_json(tmp_path / name, [{"hue": "red"}, record]))


def test_classes_are_all_combinations_of_fields(tmp_path: Path) -> None:
    root, features = write_json(tmp_path / "set", [{"a": "red", "b": "dot"}, {"a": "blue", "b": "bar"}])
    found = classed_by(features, root, ["a", "b"])
    assert found.classes == ("blue bar", "blue dot", "red bar", "red dot")
    assert found.label.tolist() == [0, 3]
    assert classed_by(features, root, ["b"]).classes == ("bar", "dot")
    with pytest.raises(EvaluationError, match="--class-fields size: not every test image has that as a text"):
        classed_by(features, root, ["a", "size"])
    root, features = write_json(tmp_path / "one", [{"a": "red"}, {"a": "red"}])
    with pytest.raises(EvaluationError, match="make 1 classes: there must be 2 to 10,000"):
        classed_by(features, root, ["a"])


def result(top1: float) -> dict[str, Any]:
    return {"top1": top1, "interval": [top1 - 1, top1 + 1], "chance": 12.0}


def test_what_features_know_is_said_against_both_floors() -> None:
    results = {
        "attributes": {"of": {"colour": result(60), "tilt": result(34), "shape": result(45), "size": result(40)}},
        "floors": {
            "untrained": {"attributes": {"of": {"colour": result(50), "tilt": result(34), "shape": result(20),
                                                "size": result(30)}}},
            "raw_pixels": {"attributes": {"of": {"colour": result(70), "tilt": result(34), "shape": result(12),
                                                 "size": result(30)}}},
        },
    }  # fmt: skip
    rows = attribute_rows(results)
    assert [row.name for row in rows] == ["shape", "size", "tilt", "colour"]
    assert attribute_sentences(rows) == [
        "The features know shape and size: clearly better than the untrained encoder and raw pixels.",
        "Not better than the untrained encoder and raw pixels: tilt.",
        "Not better than raw pixels: colour.",
    ]
    assert "shape" in attribute_summary(results) and "45.0" in attribute_summary(results)


def test_without_floors_chance_is_the_floor() -> None:
    rows = attribute_rows({"attributes": {"of": {"shape": result(45), "tilt": result(12.5)}}})
    assert attribute_sentences(rows) == [
        "The features know shape: clearly better than chance.", "Not better than chance: tilt.",
    ]  # fmt: skip
    assert attribute_sentences(rows[1:]) == ["The features know no attribute clearly better than chance."]


def test_features_that_know_nothing_are_told_so_once_and_what_got_worse() -> None:
    floor = {"attributes": {"of": {"shape": result(12), "tilt": result(34)}}}
    found = {"attributes": {"of": {"shape": result(12), "tilt": result(20)}}}
    assert attribute_sentences(attribute_rows({**found, "floors": {"untrained": floor, "raw_pixels": floor}})) == [
        "The features know no attribute clearly better than the untrained encoder and raw pixels.",
        "Clearly worse than the untrained encoder: tilt.",
    ]


def test_drawn_images_have_seven_attributes(
    tmp_path: Path, cache: Path, encoder_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, samples, seed in (("train", 300, 0), ("test", 60, 1)):
        synth(tmp_path / name, samples=samples, size=16, seed=seed, workers=1)
    found = evaluate(
        encoder_file, train=tmp_path / "train", test=tmp_path / "test", probes=("attributes",), output=tmp_path,
        settings=ProbeSettings(strengths=(0.1,)), workers=0, device="cpu",
    )  # fmt: skip
    seven = {"shape", "colour", "size", "place", "texture", "background", "rotation"}
    assert set(found["attributes"]["of"]) == seven
    for floor in ("untrained", "raw_pixels"):
        assert set(found["floors"][floor]["attributes"]["of"]) == seven
    assert found["floors"]["raw_pixels"]["attributes"]["of"]["colour"]["top1"] > 20  # pixels tell colours, of eight
    printed = capsys.readouterr().out
    run = make_run(tmp_path / "run", train=tmp_path / "train")
    (run / "results.json").write_text((tmp_path / "results.json").read_text())
    page = report([run]).read_text()
    assert "What the features know of the images" in page and '<th scope="row">colour</th><td>8</td>' in page
    assert "attribute, top-1 %" in printed and "colour" in printed and "top-1, %" not in printed
