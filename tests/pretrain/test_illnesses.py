"""Each illness, provoked through the real command on data and seeds that set no threshold, is named; healthy runs are
not. Batches are prepared once and shared by the runs: that is most of the time of models this small."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.stream import TrainStream
from datamodules.synth import synth
from evaluation.health import NAMES
from evaluation.report import report
from evaluation.run_files import read_metrics
from tests.pretrain.conftest import pretrain
from tests.pretrain.processes import SMALL_CLIP, SMALL_DINO

BATCHES = 32
Run = Callable[..., tuple[Path, list[tuple[int, str]], str]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("ill") / f"{seed}" for seed in (101, 202)]
    for folder in folders:
        synth(folder, samples=256, size=32, seed=int(folder.name))
    return folders


@pytest.fixture(scope="module")
def shared_batches() -> Iterator[None]:
    prepared: dict[Any, dict[str, Any]] = {}
    prepare = TrainStream.__getitem__

    def take(self: TrainStream, micro_step: int) -> dict[str, Any]:
        place = (self.order.seed, self.micro_batch, micro_step % BATCHES)
        key = (type(self.recipe), self.reader.manifest.hash, *place)
        if key not in prepared:
            prepared[key] = prepare(self, micro_step % BATCHES)
        return dict(prepared[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStream, "__getitem__", take)
        yield


@pytest.fixture
def run(shared_batches: None, sets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Train on one of two sets with one of two seeds; the folder, (step, verdict) as told, and all that was said."""

    def train(which: int, *more: object, exit_code: int = 0) -> tuple[Path, list[tuple[int, str]], str]:
        given = ["--data.train", sets[which], "--seed", 7 + which, "--data.workers", 0, "--log_every", 5]
        folder = tmp_path / f"run{which}"
        assert pretrain(*more[0], *given, "--output", folder, *more[1:]) == exit_code  # type: ignore[misc]
        said = capsys.readouterr().err
        names = "|".join(map(re.escape, NAMES.values()))
        told = [(int(step), name) for step, name in re.findall(rf"(?<!at )step (\d+): ({names})\.", said)]
        return folder, told, said

    return train


DINO = [
    *SMALL_DINO, "--model.head.prototypes", 64, "--data.global_batch_size", 32, "--model.freeze_last_layer_epochs", 0,
    "--model.lr", "1e-3", "--model.warmup_steps", 10, "--trainer.max_steps", 80,
]  # fmt: skip


@pytest.mark.parametrize(("which", "changes"), [(0, []), (1, []), (0, ["--model.ibot", "{}"])])
def test_a_healthy_dino_raises_nothing(run: Run, which: int, changes: list[Any]) -> None:
    folder, told, said = run(which, DINO, *changes)
    assert [name for _, name in told] in (["learning"], ["no sign of illness"])
    assert f"verdict at step 80: {told[0][1]}. " in said and "Prototypes in use " in said and "64 if all" in said
    if not changes:
        headline = {"learning": "It learns", "no sign of illness": "No sign of illness"}[told[0][1]]
        assert f"{headline}; nothing has been scored yet." in report([folder]).read_text()


def test_two_images_at_a_time_raise_nothing_and_rows_without_hidden_patches_leave_no_gap(run: Run) -> None:
    """Of the targets of two images nothing follows; 16 of 100 micro-batches have hidden patches, four of five rows."""
    folder, told, _ = run(0, DINO, "--data.global_batch_size", 2, "--model.ibot", "{mask_probability: 0.04}")
    assert {name for _, name in told} <= {"learning", "no sign of illness"}
    rows = read_metrics(folder / "metrics.csv")
    assert set(rows["train/micro_batch"]) == {2}
    known = np.isfinite(rows["train/ibot_teacher_entropy"])
    assert known.any() and not known.all()
    assert (rows["train/ibot_teacher_entropy"][known] > 0).all() and np.isfinite(rows["train/ibot_loss"]).all()


NO_CENTRE = ["--model.center_momentum", 0.999999]
NOT_SHARP = ["--model.teacher_temp", 1, "--model.warmup_teacher_temp", 1]


BLUNT_AND_FAST = ["--model.teacher_temp", 0.1, "--model.warmup_teacher_temp", 0.1, "--model.lr", 5e-3]
SAME_FOR_ALL = {"plateau at ln(K)", "collapsed to uniform"}  # the first turns into the second, as the centre follows


def fits(name: str, folder: Path, step: int) -> bool:
    """Whether a name is true of the rows it was told after, by what the word means and not by its thresholds."""
    rows = read_metrics(folder / "metrics.csv")
    newest = {key: np.median(column[rows["step"] <= step][-3:]) for key, column in rows.items()}
    entropy, kl, used = (newest[f"train/{key}"] for key in ("teacher_entropy", "kl", "prototypes_used"))
    most, says_nothing = np.log(64), np.log(used) - entropy < 0.01
    truth = {
        "collapsed to one point": (says_nothing or newest["train/feature_std"] < 0.06) and entropy < 0.985 * most,
        "collapsed to uniform": entropy > 0.98 * most and says_nothing,
        "plateau at ln(K)": abs(entropy + kl - most) < 0.1 and kl < 0.1,
        "not learning": np.ptp(rows["train/feature_std"]) < 0.15 * newest["train/feature_std"],  # the encoder stays
    }
    return bool(truth[name])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("changes", "names", "within"),
    [
        pytest.param(NO_CENTRE, {"collapsed to one point"}, 60, id="no centring"),
        pytest.param(NOT_SHARP, {"collapsed to uniform"}, 60, id="no sharpening"),
        pytest.param(["--model.lr", 1e-9, "--model.min_lr", 0], {"not learning"}, 60, id="tiny rate"),
        pytest.param(["--model.targets", "sinkhorn", *NOT_SHARP], {"collapsed to uniform"}, 60, id="Sinkhorn-Knopp"),
        pytest.param(["--model.lr", 1], {"collapsed to one point"}, 40, id="huge rate"),
        pytest.param(["--model.lr", 0.1], {"collapsed to one point", *SAME_FOR_ALL}, 40, id="large rate"),
        pytest.param(BLUNT_AND_FAST, {"collapsed to one point", *SAME_FOR_ALL}, 40, id="plateau"),
    ],
)
def test_an_ill_dino_is_named(run: Run, which: int, changes: list[Any], names: set[str], within: int) -> None:
    folder, told, said = run(which, DINO, *changes)
    assert told and told[0][0] <= within and {name for _, name in told} <= names, told
    if changes == BLUNT_AND_FAST:
        assert any(name == "plateau at ln(K)" and step <= 50 for step, name in told), told
    last = re.findall(r"verdict at step 80: (.*?)\. .* Usual remedy: ", said)
    assert last and last[0] in names
    for step, name in told:
        assert fits(name, folder, step), (step, name)
    if changes != NO_CENTRE:  # one page tells how an illness is shown
        return
    page = report([folder]).read_text()
    assert 'class="verdict bad"' in page and "Usual remedy: " in page
    assert page.index("Usual remedy") < page.index("<h2>Scores</h2>") < page.index("<h2>Health</h2>")
    assert "Prototypes in use over optimiser steps" in page and "64 if all are used alike." in page


@pytest.mark.parametrize("which", [0, 1])
def test_an_overflow_is_named_and_never_reaches_the_teacher(run: Run, which: int) -> None:
    folder, told, said = run(which, DINO, "--model.optimizer", "sgd", "--model.lr", 1e4, exit_code=1)
    assert [name for _, name in told][-1:] == ["diverging"] and told[-1][0] <= 40
    assert "became NaN or infinite" in said
    saved = torch.load(folder / "checkpoints/non_finite.ckpt", weights_only=True)["state_dict"]
    teacher = {name: value for name, value in saved.items() if name.startswith("model.teacher.")}
    assert teacher and all(value.isfinite().all() for value in teacher.values())
    assert "The loss has diverged." in report([folder]).read_text()


CLIP = [
    *SMALL_CLIP, "--data.recipe.captions.templates", "[]", "--data.global_batch_size", 32, "--model.lr", "3e-3",
    "--trainer.max_steps", 230,
]  # fmt: skip


@pytest.mark.parametrize(
    ("which", "changes", "name"),
    [
        pytest.param(0, [], "learning", id="healthy"),
        pytest.param(1, ["--model.loss", "sigmoid"], "learning", id="healthy SigLIP"),
        pytest.param(1, ["--model.lr", 10], "collapsed", id="huge rate"),
        pytest.param(0, ["--model.lr", 1e-7], "not learning", id="tiny rate"),
    ],
)
def test_clip(run: Run, which: int, changes: list[Any], name: str) -> None:
    _, told, said = run(which, CLIP, *changes)
    assert [found for _, found in told] == [name] and told[0][0] <= 220
    assert f"verdict at step 230: {name}. " in said and "Modality gap " in said and "some is usual" in said
