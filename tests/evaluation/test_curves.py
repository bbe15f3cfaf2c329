import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.curves import MOST_POINTS, constant, curves, draw_curves
from evaluation.health_words import told
from evaluation.loss_terms import guess_level
from evaluation.report import render
from evaluation.run_files import Run, read_run
from tests.evaluation.conftest import make_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(make_run(tmp_path / "run", train=tmp_path / "data"))


def test_every_column_is_drawn_well_known_ones_first(run: Run) -> None:
    found = curves([run, replace(run, name="other", metrics={"step": np.array([1.0, 2.0]), "train/loss": np.ones(2)})])
    names = list(found)
    assert names[:3] == ["train/loss", "train/lr", "train/images_per_second"]
    assert names[-1] == "probe/extra"
    assert "seconds" not in names
    assert [curve.run for curve in found["train/loss"]] == ["run", "other"]
    assert [curve.run for curve in found["train/lr"]] == ["run"]


def test_empty_cells_are_left_out_and_long_runs_thinned(run: Run) -> None:
    steps = np.arange(5000.0)
    values = np.where(steps % 2, np.nan, 1.0)
    (curve,) = curves([replace(run, metrics={"step": steps, "train/loss": values})])["train/loss"]
    assert len(curve.x) <= MOST_POINTS
    assert np.isfinite(curve.y).all()
    assert curve.x[0] == 0
    assert curve.x[-1] == 4998


def test_a_column_without_numbers_is_no_panel(run: Run) -> None:
    metrics = {"step": np.array([1.0, 2.0]), "train/loss": np.full(2, np.nan)}
    assert curves([replace(run, metrics=metrics)]) == {}


def test_svg_takes_its_colours_from_the_page(run: Run) -> None:
    panel = curves([run, replace(run, name="b")])["train/loss"]
    svg = draw_curves("train/loss", panel, ["run", "b"])
    assert svg.startswith("<svg viewBox=")
    assert svg.endswith("</svg>")
    assert "var(--series-1)" in svg
    assert "var(--series-2)" in svg
    assert "stroke-dasharray" in svg, "runs must differ without colour"
    assert "#0a0b" not in svg, "a placeholder colour was left"
    assert "http" not in svg
    assert "Training loss" in svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))


def test_values_above_the_panel_are_told(run: Run) -> None:
    step = np.arange(1.0, 201.0)
    loss = 1 - step / 400
    metrics = {"step": step, "train/loss": np.where(step == 1, 37.5, loss)}
    assert "cut: up to 37.5" in draw_curves(
        "train/loss", curves([replace(run, metrics=metrics)])["train/loss"], ["run"]
    )
    flat = {"step": step, "train/loss": loss}
    shown = draw_curves("train/lr", curves([replace(run, metrics=flat)])["train/loss"], ["run"])
    assert "cut: up to" not in shown


def test_terms_of_the_loss_are_drawn_apart_with_ln_k_where_it_is_the_level_of_a_guess(run: Run) -> None:
    columns = ["teacher_entropy", "kl", "prototypes_used", "feature_std", "dino_loss", "koleo_loss", "ibot_loss"]
    columns += ["ibot_teacher_entropy", "ibot_prototypes_used"]
    metrics = {"step": np.arange(9.0), "train/loss": np.linspace(9, 8, 9), "train/micro_batch": np.full(9, 16.0)}
    metrics |= {f"train/{name}": np.linspace(4, 3, 9) for name in columns}
    model = {"head": {"prototypes": 64}, "koleo_weight": 0.1}
    model["ibot"] = {"weight": 2.0, "mask_probability": 0.5, "head": {"prototypes": 128}}
    dino = replace(run, config={"model": model}, metrics=metrics)
    assert list(curves([dino]))[:4] == ["train/loss", "train/dino_loss", "train/ibot_loss", "train/koleo_loss"]
    levels = {name: guess_level(name, [dino]) for name in curves([dino])}
    assert {name: pytest.approx(level) for name, level in levels.items() if level} == {
        "train/dino_loss": np.log(64), "train/teacher_entropy": np.log(64), "train/ibot_teacher_entropy": np.log(128),
    }  # fmt: skip
    other = replace(dino, name="b", config={"model": {"head": {"prototypes": 65}}})
    assert guess_level("train/dino_loss", [dino, other]) is None
    alone = replace(dino, metrics={name: metrics[name] for name in ("step", "train/loss", "train/teacher_entropy")})
    assert guess_level("train/loss", [alone]) == pytest.approx(np.log(64))
    page = render([dino])
    assert "50% of them have some" in page and "has 2 times this" in page and "has 0.1 times this" in page
    assert "ends at 3; ln(K) is 4.159" in page and "train/micro_batch" not in page.split("config.yaml")[0]
    assert "Images of a micro-batch on a device: 16 throughout" in page and "RankMe: none in metrics.csv" in page
    assert told(dino)[0].startswith("Loss 8.125: DINO 3.125 + 2 x iBOT 3.125 + 0.1 x KoLeo 3.125; with ln(K) = 4.16")


def test_names_cannot_break_out_of_the_drawing(run: Run) -> None:
    evil = replace(run, name='"><script>x</script>')
    svg = draw_curves("train/loss", curves([evil])["train/loss"], [evil.name])
    assert "<script>" not in svg


def test_a_column_that_does_not_change_is_a_line_of_text(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, train=tmp_path / "data", rows=20)) for name in "ab"]
    more = {"train/caption_cut": np.zeros(20), "train/lr": np.full(20, 2e-4), "probe/extra": np.arange(20.0)}
    runs = [replace(run, metrics={**run.metrics, **more}) for run in runs]
    runs[0].metrics["train/effective_batch"], runs[1].metrics["train/effective_batch"] = np.full((2, 20), [[16], [64]])
    page = render(runs)
    assert "<title>Learning rate" not in page and 'aria-label="Learning rate' not in page
    assert 'aria-label="probe/extra' in page and 'aria-label="Training loss' in page
    for words in (
        "<li>Effective batch: 16 (a), 64 (b) throughout (pairs that are compared",
        "<li>Captions cut: 0 throughout (", "<li>Learning rate: 0.0002 throughout.</li>",
    ):  # fmt: skip
        assert words in page, words
    assert not constant(curves(runs)["train/loss"])


def test_a_column_of_zeros_has_a_plain_axis(run: Run) -> None:
    """Not one of 1e-10 with its exponent; one of equal numbers keeps those in the middle."""
    steps = np.arange(20.0)
    run = replace(
        run, metrics={"step": steps, "train/caption_cut": np.zeros(20), "train/effective_batch": steps * 0 + 64}
    )
    drawn = {name: draw_curves(name, each, [run.name]) for name, each in curves([run]).items()}
    labels = {name: re.findall(r">([-\d.,e]+)</text>", svg) for name, svg in drawn.items()}
    assert labels["train/caption_cut"][-6:] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert min(map(float, labels["train/effective_batch"][-3:])) > 63
