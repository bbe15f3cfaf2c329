import json
from pathlib import Path

import pytest

from evaluation.errors import EvaluationError
from evaluation.ranks import one_decimal
from evaluation.suite import SHIPPED, Task, metric_of, read_suite
from pretrain.cli import main
from tests.evaluation.conftest import CLASSES, make_run, write_images


@pytest.mark.parametrize("name", sorted(file.stem for file in SHIPPED.glob("*.yaml")))
def test_shipped_suites_are_read_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIVIT_DATA", "/data")
    found, tasks = read_suite(name)
    assert found == name and tasks
    for task in tasks:
        assert task.test.startswith("/data/") and "$" not in str(task.train)
    monkeypatch.delenv("TRIVIT_DATA")
    with pytest.raises(EvaluationError, match="set the environment variable TRIVIT_DATA"):
        read_suite(name)


def test_yaml_and_tsv_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "tasks:\n"
        "  - {name: one, train: t, test: v, probes: [knn, linear], metric: linear.mean_per_class, set: [ks=5]}\n"
        "  - {name: two, test: w}\n"
    )
    (tmp_path / "a.tsv").write_text(
        "name\ttrain\ttest\tprobes\tmetric\tset\none\tt\tv\tknn,linear\tlinear.mean_per_class\tks=5\ntwo\t\tw\t\t\t\n"
    )
    tasks = [
        Task("one", "v", "t", ("knn", "linear"), "linear.mean_per_class", set=("ks=5",)),
        Task("two", "w", None, ("zeroshot",)),
    ]
    assert read_suite(str(tmp_path / "a.yaml")) == ("a", tasks) == read_suite(str(tmp_path / "a.tsv"))
    assert (tasks[1].number, tasks[1].kind, tasks[0].kind) == ("zeroshot.top1", "accuracy", "accuracy")
    results = {"knn": {"by_k": {"5": 12.5}}, "retrieval": {"image_to_text": {"recall@1": 3}}}
    assert metric_of(results, "knn.by_k.5") == 12.5 and metric_of(results, "retrieval.image_to_text.recall@1") == 3
    with pytest.raises(EvaluationError, match=r"no number knn\.top1"):
        metric_of(results, "knn.top1")


def test_settings_are_split_before_a_name_only_and_may_have_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHERE", "/data")
    settings = "ks=5,10, few_shot.draws=3,localisation.boxes=$WHERE/a,b.tsv"
    (tmp_path / "a.tsv").write_text(f"name\ttrain\ttest\tprobes\tset\none\tt\tv\tknn\t{settings}\n")
    (tmp_path / "a.yaml").write_text(f"tasks: [{{name: one, train: t, test: v, probes: knn, set: '{settings}'}}]\n")
    for name in ("a.tsv", "a.yaml"):
        (task,) = read_suite(str(tmp_path / name))[1]
        assert task.set == ("ks=5,10", "few_shot.draws=3", "localisation.boxes=/data/a,b.tsv")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tasks: [", "is not YAML"),
        ("[1, 2]", "a suite is `tasks:`"),
        ("tasks: []", "names no task"),
        ("tasks: [{name: a, test: b, trian: c}]", "no trian, but name.*set has settings of probes, such as ks=5"),
        ("tasks: [{name: a}]", "task 1: test is missing"),
        ("tasks: [{name: a b, test: c}]", "may have letters"),
        ("tasks: [{name: a, test: b, probes: knm}]", "unknown probe 'knm'"),
        ("tasks: [{name: a, test: b, probes: 3}]", "probes must be texts"),
        ("tasks: [{name: a, test: b, metric: knn.top1}]", "is of none of its probes"),
        ("tasks: [{name: a, test: b, set: kz=3}]", "there is no kz"),
        ("tasks: [{name: a, test: b}, {name: a, test: c}]", "two tasks are called a"),
        ("tasks: [{name: a, test: 5}]", "test is missing"),
        ("tasks: [{name: a, test: b, templates: [c]}]", "templates must be a text"),
    ],
)
def test_mistakes_are_one_line(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(EvaluationError, match=told):
        read_suite(str(tmp_path / "bad.yaml"))


def test_no_such_suite_names_the_shipped_ones() -> None:
    with pytest.raises(EvaluationError, match="give a file, or one of drawn, imagenet1k"):
        read_suite("imagenet2k")


def test_a_run_is_scored_on_all_tasks_and_what_fails_is_told(
    world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WHERE", str(world))
    other = write_images(tmp_path / "other", 20, classes=(*CLASSES[:4], "gnu"), seed=3)
    run = make_run(tmp_path / "run", train=world / "train")
    (tmp_path / "mine.yaml").write_text(
        "tasks:\n"
        "  - {name: near, train: $WHERE/train, test: $WHERE/test, probes: knn}\n"
        "  - {name: fair, train: $WHERE/train, test: $WHERE/test, probes: [knn], metric: knn.mean_per_class,\n"
        "     set: [ks=5]}\n"
        f"  - {{name: gone, train: $WHERE/train, test: {other}, probes: knn}}\n"
    )
    assert main(["evaluate", str(run), "--suite", str(tmp_path / "mine.yaml")]) == 1, "one task was not scored"
    told = capsys.readouterr()
    assert "gone could not be scored: test classes without any train image: gnu" in told.err
    found = json.loads((run / "results.json").read_text())
    assert set(found) == {"suite:mine"}, "the run's own scores are another matter"
    suite = found["suite:mine"]
    assert set(suite["of"]) == {"near", "fair"} and set(suite["failed"]) == {"gone"}
    assert suite["mean"] == pytest.approx((suite["of"]["near"]["value"] + suite["of"]["fair"]["value"]) / 2)
    near = json.loads((run / "suites" / "mine" / "near" / "results.json").read_text())
    assert (
        near["knn"]["top1"] == suite["of"]["near"]["value"]
        and near["knn"]["interval"] == suite["of"]["near"]["interval"]
    )
    fair = json.loads((run / "suites" / "mine" / "fair" / "results.json").read_text())
    assert fair["knn"]["protocol"]["ks"] == [5]
    assert suite["of"]["fair"]["interval"] == fair["knn"]["mean_per_class_interval"] != near["knn"]["interval"]
    assert suite["means"] == {"accuracy": suite["mean"]} and "not scored" in told.out
    row = next(line.split() for line in told.out.splitlines() if line.strip().startswith("near "))
    assert (
        row[-1]
        == one_decimal(near["floors"]["untrained"]["knn"]["top1"])
        == one_decimal(suite["of"]["near"]["floor"]["untrained"])
    )
    assert main(["report", str(run)]) == 0

    assert main(["evaluate", str(run), "--suite", str(tmp_path / "mine.yaml"), "--set", "ks=7"]) == 1
    fair = json.loads((run / "suites" / "mine" / "fair" / "results.json").read_text())
    assert fair["knn"]["protocol"]["ks"] == [7], "the command line is nearer than the file"
    for wrong, line in ((["--test", "x"], "--test is for one task"), (["--probes", "knn"], "--probes is for one")):
        with pytest.raises(SystemExit) as exit_code:
            main(["evaluate", str(run), "--suite", str(tmp_path / "mine.yaml"), *wrong])
        assert exit_code.value.code == 2 and line in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", str(run)])
    assert "give --test, or --suite" in capsys.readouterr().err


def test_the_drawn_suite_runs(tmp_path: Path, cache: Path, encoder_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, seed in (("train", 0), ("test", 1)):
        folder = tmp_path / "data" / "drawn" / part
        assert main(["shards", "synth", str(folder), "--samples", "60", "--seed", str(seed), "--size", "32"]) == 0
    monkeypatch.setenv("TRIVIT_DATA", str(tmp_path / "data"))
    few = ["--set", "segmentation.steps=2", "--set", "strengths=1"]
    assert main(["evaluate", str(encoder_file), "--suite", "drawn", "--output", str(tmp_path / "out"), *few]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["suite:drawn"]
    assert found["mean"] is None and found["means"] == {
        "accuracy": found["of"]["shape"]["value"], "miou": found["of"]["outline"]["value"]
    }  # fmt: skip
    assert set(found["of"]) == {"shape", "outline"} and found["of"]["outline"]["metric"] == "segmentation.miou"
