"""Every command that README shows is run, on small data, in the order in which a reader meets them."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer
from PIL import Image

from pretrain.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
MAKE = re.findall(r"^    make (\w+)", README, re.M)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what README takes for granted: own photographs, and a labelled set."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "photos").mkdir()
    for i in range(150):
        Image.effect_noise((80 + i % 7, 72), 40 + i).convert("RGB").save(desk / "photos" / f"photo {i}.jpg")
    (desk / "more").mkdir()
    (desk / "cells").mkdir()
    for i in range(130):
        Image.effect_noise((72, 80), 20 + i).save(desk / "more" / f"another {i}.png")
        np.save(desk / "cells" / f"{i}.npy", np.random.default_rng(i).integers(0, 1 << 16, (70, 66, 2), np.uint16))
    for part in ("train", "test"):
        (desk / "pairs" / part).mkdir(parents=True)
        for i in range(130):
            Image.effect_noise((60, 64), 30 + i).convert("RGB").save(desk / "pairs" / part / f"{i}.jpg")
            (desk / "pairs" / part / f"{i}.txt").write_text(f"noise of {part} number {i}")
    rows = "".join(f"more/another {i}.png,number {i}\n" for i in range(130))
    (desk / "pictures.csv").write_text(f"file,words\n{rows}")
    for part, seed in (("train", 0), ("test", 1)):
        code = main(["shards", "synth", str(desk / "data/labelled" / part), "--samples", "200", "--seed", str(seed)])
        assert code == 0
    return desk


def run(command: list[str], desk: Path) -> str:
    environment = {**os.environ, "TRIVIT_CACHE": str(desk / "cache"), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_readme_shows_commands() -> None:
    assert "@@" not in README
    assert all((ROOT / path).is_file() for path in re.findall(r"\]\(([\w/.]+)\)", README))
    assert len(SHELL) >= 7 and len(PYTHON) >= 1 and {"demo", "test"} <= set(MAKE)


class WouldTrain(Exception):
    """Everything that is checked before the first step was in order."""


@pytest.fixture
def would_train(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Take a run as far as its first step: parsing, combinations of settings, the data, the schedule."""

    def instead(self: Trainer, *_: object, **__: object) -> None:
        raise WouldTrain

    def check(begin: Callable[[], object]) -> None:
        with pytest.raises(WouldTrain):
            begin()
        for begun in (desk / "runs").glob("*/config.yaml"):  # the run that follows is shorter, so another one
            if not (begun.parent / "checkpoints").exists():
                begun.unlink()

    monkeypatch.setattr(Trainer, "fit", instead)
    monkeypatch.setenv("TRIVIT_CACHE", str(desk / "cache"))
    monkeypatch.chdir(desk)
    return check


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_readme_runs(desk: Path, would_train: Callable[[Callable[[], object]], None]) -> None:
    """Training as printed up to the first step, then with a few steps instead of hundreds."""
    for line in SHELL:
        if line.startswith("trivit pretrain"):
            would_train(partial(main, shlex.split(line)[1:]))
            line = re.sub(r"--trainer.max_steps \d+", "--trainer.max_steps 3", line) + " --model.warmup_steps 1"
        run(["sh", "-c", line], desk)
    for code in PYTHON:
        if "pretrain(" in code:
            would_train(partial(exec, code, {}))
        code = re.sub(r'"trainer.max_steps": \d+', '"trainer.max_steps": 3, "model.warmup_steps": 1', code)
        run([sys.executable, "-c", code], desk)
    assert (desk / "runs/photos/report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_make_demo_in_small(tmp_path: Path) -> None:
    """`make demo` itself, with fewer images and steps; `make test` is what runs this test."""
    small = ["DEMO=" + str(tmp_path / "demo"), "DEMO_TRAIN=300", "DEMO_TEST=100",
             "DEMO_MORE=--trainer.max_steps 3 --model.warmup_steps 1"]  # fmt: skip
    done = subprocess.run(["make", "-C", str(ROOT), "demo", *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(word in done.stdout for word in ("kNN", "raw pixels", "The features know", "chance 1.3%"))
    page = (tmp_path / "demo/report.html").read_text()
    assert "What the features know of the images" in page and "Zero-shot (80 classes, 100 images)" in page
