"""Verdicts on tables whose state is known, at any number of prototypes and any length; real runs are in
tests/pretrain/test_illnesses.py."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.health import Health, chance_loss, judge_health
from evaluation.health_words import NUMBERS, loss_words, meaning_for, told
from evaluation.run_files import Run, non_finite_step
from evaluation.verdict import HEADLINES, judge

SIZES = [(64, 120, 10), (256, 250, 25), (1024, 3125, 312), (65536, 375_300, 12_510)]  # K, steps, warm-up


def table(steps: int, rows: int = 60, **columns: Any) -> dict[str, np.ndarray]:
    """Columns of a run of that many steps; a number stands for a constant, a function gets the share done (0 to 1)."""
    share = np.arange(1, rows + 1) / rows
    values = {
        name: np.array([value(x) if callable(value) else value for x in share]) for name, value in columns.items()
    }
    return {"step": np.round(share * steps), "epoch": share * 10, **{f"train/{k}": v for k, v in values.items()}}


def dino(k: int, steps: int, warmup: int, **columns: Any) -> Run:
    entropy, kl = columns.pop("entropy"), columns.pop("kl")
    loss = lambda x: at(entropy, x) + at(kl, x)  # noqa: E731
    columns = {"teacher_entropy": entropy, "kl": kl, "loss": loss, "micro_batch": 64, **columns}
    model = {"head": {"prototypes": k}, "warmup_steps": warmup, "freeze_last_layer_epochs": 0.1}
    config = {"trainer": {"max_steps": steps}, "model": {"init_args": model}}
    return run(config, table(steps, **columns))


def at(value: Any, x: float) -> float:
    return float(value(x) if callable(value) else value)


def run(config: dict[str, Any], metrics: dict[str, np.ndarray]) -> Run:
    return Run(Path("runs/x"), "x", "", config, metrics, {}, [])


def state(run: Run) -> str:
    return judge_health(run).state


@pytest.mark.parametrize("size", SIZES)
def test_dino_at_any_size(size: tuple[int, int, int]) -> None:
    k, log_k = size[0], math.log(size[0])
    healthy = {"entropy": 0.85 * log_k, "kl": 0.05 * log_k, "prototypes_used": 0.8 * k, "feature_std": 0.5}
    for changes, expected in (
        ({}, "learning"),
        # what a long run ends with, which is sure of each image
        ({"entropy": 0.3 * log_k, "kl": 0.02 * log_k, "prototypes_used": 0.7 * k}, "learning"),
        # a loss that rises as the teacher's temperature does
        ({"entropy": lambda x: (0.4 + 0.4 * x) * log_k}, "learning"),
        # a student that has not yet learnt more than to say the same about every image
        ({"kl": lambda x: (0.2 + 0.3 * math.exp(-20 * x)) * log_k}, "well"),
        ({"entropy": 0.2, "kl": 0.1, "prototypes_used": 1.6}, "one point"),
        ({"entropy": 0.0, "kl": 0.0, "prototypes_used": 1.0}, "one point"),
        ({"feature_std": 0.02}, "one point"),
        ({"entropy": 0.5 * log_k, "kl": 0.0, "prototypes_used": k**0.5}, "one point"),
        ({"entropy": 0.9999 * log_k, "kl": 1e-4, "prototypes_used": k}, "uniform"),
        ({"entropy": 0.99 * log_k, "kl": 0.008 * log_k, "prototypes_used": 0.99 * k}, "plateau"),
        ({"entropy": 0.6 * log_k, "kl": 0.4 * log_k + 1.5, "feature_std": lambda x: 0.7 - 0.4 * x}, "diverging"),
    ):  # fmt: skip
        assert state(dino(*size, **{**healthy, **changes})) == expected, changes


def test_few_images_cannot_be_compared() -> None:
    """What a healthy teacher says of one or two images, whose features and targets hardly differ, is no collapse."""
    log_k = math.log(1024)
    for images, spread in ((1, 0.0), (2, 0.3)):
        alike = {"entropy": 0.8 * log_k, "kl": 0.05 * log_k, "prototypes_used": 1024**0.8, "feature_std": spread}
        assert state(dino(*SIZES[2], **alike, micro_batch=images)) == "well"
        assert state(dino(*SIZES[2], **alike)) == "one point"


def test_runs_that_did_not_log_how_many_images_they_compare_had_a_batch_of_them() -> None:
    ill = dino(*SIZES[2], entropy=0.2, kl=0.1, prototypes_used=1.6, feature_std=0.5)
    del ill.metrics["train/micro_batch"]
    assert state(ill) == "one point"
    ill.config["data"] = {"device_batch_size": 1, "global_batch_size": 64}
    assert state(ill) != "one point"


@pytest.mark.parametrize("size", SIZES)
def test_hidden_patches_are_judged_as_class_tokens_are(size: tuple[int, int, int]) -> None:
    own = 4096  # prototypes of a head for patches
    log_k, log_own = math.log(size[0]), math.log(own)
    healthy = {"entropy": 0.85 * log_k, "kl": 0.05 * log_k, "prototypes_used": 0.8 * size[0], "feature_std": 0.5}
    for patches, expected, words in (
        ({"ibot_teacher_entropy": 0.7 * log_own, "ibot_prototypes_used": 0.7 * own}, "learning", "nats left"),
        ({"ibot_teacher_entropy": 0.1, "ibot_prototypes_used": 1.3}, "one point", "1.3 of 4,096 .* by hidden patches"),
        ({"ibot_teacher_entropy": 0.5 * log_own, "ibot_prototypes_used": own**0.5}, "one point", "every hidden patch"),
        ({"ibot_teacher_entropy": log_own, "ibot_prototypes_used": own}, "uniform", "all 4,096 .* every hidden patch"),
        ({"ibot_teacher_entropy": math.nan, "ibot_prototypes_used": math.nan}, "learning", "nats left"),
    ):
        ill = dino(*size, **healthy, **patches)
        ill.config["model"]["init_args"]["ibot"] = {"head": {"prototypes": own}}
        assert state(ill) == expected, patches
        assert re.search(words, judge_health(ill).reason), judge_health(ill).reason


@pytest.mark.parametrize("size", SIZES)
def test_a_dino_that_never_learnt_anything_is_told(size: tuple[int, int, int]) -> None:
    log_k = math.log(size[0])
    untouched = {"entropy": 0.65 * log_k, "prototypes_used": math.exp(0.85 * log_k), "feature_std": 0.5}
    # as recorded with rates of 1e-9 and 2e-6: the centre moves, and with it the divergence, down by 13% and up again
    moved = lambda x: (0.37 - 0.05 * math.exp(-200 * (x - 0.12) ** 2) + 0.03 * x) * log_k  # noqa: E731
    ill = dino(*size, **untouched, kl=moved, lr=1e-9)
    assert state(ill) == "not learning" and judge(ill).tone == "bad"
    told = judge_health(ill)
    assert "1.0e-09" in told.reason and "raise the learning rate" in told.remedy and "caption" not in told.remedy
    for kl, expected in (
        (lambda x: (0.05 + 0.32 * math.exp(-20 * x) + 0.3 * x**2) * log_k, "well"),  # then the targets get harder
        (0.1 * log_k, "learning"),  # one that began with what another run had learnt
    ):
        assert state(dino(*size, **untouched, kl=kl, lr=5e-4)) == expected


def test_good_news_need_rows_and_steps_and_a_student_that_knows_something() -> None:
    fine = {"entropy": 4.0, "kl": 0.4, "prototypes_used": 200, "feature_std": 0.5}
    three = dino(256, 30, 0, **fine, rows=3)
    found = judge_health(three)
    assert found.state == "early" and judge(three).headline == HEADLINES["early"] and "too short" in found.reason
    few = judge_health(dino(256, 300, 0, **fine, rows=7))
    assert few.state == "early" and "needs 8 rows" in few.reason and "there are 7 (lower log_every)" in few.reason
    assert state(dino(256, 300, 0, **fine, rows=8)) == "learning"
    assert state(dino(256, 38, 0, **fine, rows=38)) == "early"
    # as seen: the loss rises to ln K, features draw together, and the student knows less than a constant would
    fading = dino(256, 300, 0, **{**fine, "entropy": 5.1, "kl": 0.4, "feature_std": lambda x: 0.52 - 0.26 * x})
    verdict = judge(fading)
    assert state(fading) == "well" and verdict.headline == "No sign of illness; nothing has been scored yet."
    assert verdict.tone == "fair" and any("spread less than at first (0.26, then 0.52)" in x for x in verdict.details)


def test_a_dino_on_its_way_to_one_point_is_not_good_news() -> None:
    falling = {"entropy": 0.7, "kl": 0.4, "feature_std": 0.3, "prototypes_used": lambda x: 3.1 + 5 * math.exp(-9 * x)}
    whole = dino(128, 80, 10, **falling)
    assert state(whole) == "one point"
    young = judge_health(run(whole.config, {name: column[:40] for name, column in whole.metrics.items()}))
    assert young.state == "early" and "of 128 prototypes" in young.reason and "collapse" in young.reason
    rising = {**falling, "prototypes_used": lambda x: 3 + 3 * x}
    assert state(dino(128, 80, 10, **rising)) == "learning"


def test_dino_is_given_time() -> None:
    """Before the warm-up is over and something can be seen; and a centre that has only begun to move."""
    flat = {"entropy": 5.54, "kl": 1e-4, "prototypes_used": 255.9, "feature_std": 0.4}
    first = {name: column[:10] for name, column in dino(256, 250, 25, **flat).metrics.items()}  # up to step 42
    whole = dino(256, 250, 25, **flat)
    early = judge_health(run(whole.config, first))
    assert early.state == "early" and "after step 65" in early.reason and not early.ill
    assert state(whole) == "uniform"
    whole.config["model"]["init_args"]["freeze_last_layer_epochs"] = 9.5  # of 10
    assert state(whole) == "early"
    rising = {"entropy": 0.5, "kl": 0.5, "feature_std": 0.4, "prototypes_used": lambda x: math.exp(8 * x)}
    moving = dino(256, 300, 200, **rising)
    few = {name: column[:8] for name, column in moving.metrics.items()}  # up to step 40
    assert 2.8 < few["train/prototypes_used"][-1] < 3 and state(run(moving.config, few)) == "early"
    short = judge_health(dino(256, 30, 25, **flat))
    assert short.state == "early" and "too short" in short.reason
    assert state(run(whole.config, {})) == "early"


def clip(
    loss: Any, *, kind: str = "softmax", distinct: float = 1.0, scale: float = 20.0, uniformity: float = -1.0
) -> Run:
    config = {"trainer": {"max_steps": 1000}, "model": {"loss": kind, "warmup_steps": 50, "max_logit_scale": 100.0}}
    numbers = {"positive_similarity": 0.4, "hardest_negative": 0.3, "caption_distinct": distinct, "logit_scale": scale}
    return run(config, table(1000, loss=loss, uniformity=uniformity, effective_batch=256.0, **numbers))


def test_clip() -> None:
    chance = math.log(256)
    falling = lambda x: chance * (1 - 0.6 * x)  # noqa: E731
    assert state(clip(falling)) == "learning"
    assert state(clip(falling, uniformity=-0.001)) == "collapsed"
    assert state(clip(chance - 0.01)) == "not learning"
    assert state(clip(1.2 * chance)) == "not learning"
    again = clip(lambda x: falling(x) if x < 0.5 else chance * (0.7 + 0.5 * (x - 0.5)))
    assert state(again) == "diverging"
    # with a few distinct captions a loss near that of guessing may be all there is to win
    assert state(clip(chance - 0.03, distinct=0.01)) == "learning"
    lost = judge_health(clip(chance, distinct=0.01))
    assert lost.state == "not learning" and "Only 1% of the captions" in lost.reason
    assert "bound" in judge_health(clip(falling, scale=100.0)).reason
    for loss, expected in ((0.95 * chance, "early"), (0.8 * chance, "learning")):  # 200 steps behind the warm-up
        young = clip(loss)
        young.metrics.update({name: column[:14] for name, column in young.metrics.items()})
        assert young.step < 250 and state(young) == expected


def test_siglip_is_compared_with_saying_one_of_b_for_every_pair() -> None:
    chance = chance_loss(clip(1.0, kind="sigmoid"))
    p = 1 / 256
    assert chance == pytest.approx(-(math.log(p) + 255 * math.log(1 - p)))
    assert state(clip(chance, kind="sigmoid")) == "not learning"
    assert state(clip(lambda x: chance * (1.5 - x), kind="sigmoid")) == "learning"


def test_mae() -> None:
    config = {"trainer": {"max_steps": 1000}, "model": {"norm_pix_loss": True, "warmup_steps": 50}}
    noise = np.random.default_rng(0).normal(0, 0.004, 60)
    for loss, expected in (
        (lambda x: 0.6 + 0.7 * math.exp(-8 * x), "learning"),
        (lambda x: 1.0 + 0.3 * math.exp(-8 * x), "not learning"),
        (lambda x: 1.3, "not learning"),
        (lambda x: 0.6 + 0.7 * math.exp(-8 * x) if x < 0.6 else 1.2, "diverging"),
        (lambda x: 0.9 if x < 0.6 else math.nan, "diverging"),
    ):  # fmt: skip
        metrics = table(1000, loss=loss)
        metrics["train/loss"] += noise
        assert state(run(config, metrics)) == expected


def test_what_is_not_finite(tmp_path: Path) -> None:
    healthy = dino(256, 250, 25, entropy=4.5, kl=0.4, prototypes_used=200, feature_std=0.5)
    healthy.metrics["train/grad_norm"] = np.where(np.arange(60) < 55, 1.0, np.inf)
    assert state(healthy) == "diverging"
    healthy.metrics["train/grad_norm"] = np.where(np.arange(60) == 57, np.inf, 1.0)  # a gradient scaler tries its luck
    assert state(healthy) == "learning"
    assert non_finite_step(tmp_path, 5) is None
    (tmp_path / "non_finite_rank0.json").write_text(json.dumps({"step": 9}))
    (tmp_path / "non_finite_rank1.json").write_text("{")
    assert non_finite_step(tmp_path, 5) == 9 and non_finite_step(tmp_path, 9) is None
    ended = Run(healthy.path, "x", "", healthy.config, healthy.metrics, {}, [], non_finite=9)
    assert "at step 9" in judge_health(ended).reason and judge(ended).tone == "bad"


def test_an_ill_run_is_bad_whatever_it_scores_and_the_remedy_is_named() -> None:
    ill = dino(256, 250, 25, entropy=0.2, kl=0.1, prototypes_used=1.6, feature_std=0.4)
    verdict = judge(Run(ill.path, "x", "", ill.config, ill.metrics, {"knn": {"top1": 90.0}}, []))
    assert verdict.tone == "bad" and verdict.headline == HEADLINES["one point"]
    assert any("1.6 of 256 prototypes" in line for line in verdict.details)
    assert any(line.startswith("Usual remedy: ") and "centre the teacher" in line for line in verdict.details)


def test_suspicious_settings_are_named_before_the_usual_remedy() -> None:
    columns = {"entropy": 0.2, "kl": 0.1, "prototypes_used": 1.6, "feature_std": 0.4}
    usual = {"center_momentum": 0.9, "student_temp": 0.1, "teacher_temp": 0.04, "clip_grad": 3.0, "lr": 2e-3}
    for changes, words in (
        ({}, ""),
        ({"center_momentum": 0.9999999}, "model.center_momentum 0.9999999 (0.9 is usual"),
        ({"center_momentum": 0.9999999, "targets": "sinkhorn"}, ""),
        ({"teacher_temp": 0.1}, "model.teacher_temp 0.1 (should be well below model.student_temp, 0.1)"),
        ({"clip_grad": 0}, "model.clip_grad 0 (3 is usual"),
        ({"lr": 0.5}, "model.lr 0.5 (0.00013 is usual with a batch of 64)"),
        ({"lr": 1e-9}, "model.lr 1e-09 (0.00013 is usual"),
        ({"lr": None, "base_lr": 0.1}, "model.base_lr 0.1 (0.0005 is usual)"),
        ({"lr": 0.5, "optimizer": "sgd"}, ""),
    ):
        ill = dino(256, 250, 25, **columns)
        ill.config["data"] = {"global_batch_size": 64}
        ill.config["model"]["init_args"].update({**usual, **changes})
        line, details = judge_health(ill).line, judge(ill).details
        assert ("Suspect in the config: " in line) == bool(words) and f"{words}" in line, line
        if words:
            assert line.index(words) < line.index("Usual remedy: ")
            assert any(told.startswith("Suspect in the config: ") and words in told for told in details)
        ill.config["model"]["init_args"].update(usual)
    healthy = dino(256, 250, 25, entropy=4.5, kl=0.4, prototypes_used=200, feature_std=0.5)
    healthy.config["model"]["init_args"]["clip_grad"] = 0
    assert judge_health(healthy).suspects == () and any(
        "medians of the last 3 rows" in x for x in judge(healthy).details
    )


def test_every_number_has_words() -> None:
    columns = {name.removeprefix("train/"): 0.5 for name in NUMBERS if name != "rankme"}
    found = run({"model": {"head": {"prototypes": 256}}}, table(100, **columns))
    found.metrics["rankme"] = np.where(np.arange(60) == 20, 12.345, np.nan)  # not in every row
    lines = told(found)
    assert len(lines) == len(NUMBERS) and any(line.startswith("RankMe 12.3: ") for line in lines)
    assert any("5.55 = ln(256)" in line for line in lines) and not any("{" in line for line in lines)
    assert isinstance(judge_health(found), Health)


def test_runs_drawn_over_each_other_share_words_where_they_can() -> None:
    columns = {"teacher_entropy": 4.0, "kl": 0.5}
    small, large, same = (run({"model": {"head": {"prototypes": k}}}, table(100, **columns)) for k in (256, 1024, 256))
    assert meaning_for("train/kl", [small, large]) == NUMBERS["train/kl"].meaning
    assert "ln(256)" in meaning_for("train/teacher_entropy", [small, same])
    both = meaning_for("train/teacher_entropy", [replace(small, name="a"), replace(large, name="b")])
    assert both.startswith("a: in nats") and "ln(256)" in both and "; b: in nats" in both and "ln(1,024)" in both


def test_a_dino_loss_that_rises_is_explained() -> None:
    healthy = run({}, table(100, teacher_entropy=4.0, kl=0.5, loss=4.5))
    assert "often rises in a run that learns" in loss_words([healthy])
    assert not loss_words([run({}, table(100, loss=0.5))])


def test_a_run_that_is_too_short_is_not_blamed_for_its_features() -> None:
    short = dino(256, 30, 25, entropy=4.5, kl=0.4, prototypes_used=200, feature_std=0.5)
    floors = {"raw_pixels": {"knn": {"top1": 20.0, "interval": [18, 22]}}}
    scored = replace(short, results={"knn": {"top1": 10.0, "interval": [9, 11]}, "floors": floors})
    verdict = judge(scored)
    assert verdict.tone == "fair" and verdict.headline == HEADLINES["early"]
    assert any("10.0 points below raw pixels" in line for line in verdict.details)
