"""Whether a run learns, from the numbers it has logged: one verdict in plain words, with the usual remedy.

Nothing here knows sizes: thresholds are shares of ln(K) (K prototypes) or ln(B) (B pairs compared at once), lengths of
vectors that are 1 long, or nats between one answer for all images and a different one for each. The DINO ones were set
on ViTs of 2 and 3 blocks (24 and 64 wide, K = 64 and 256, up to 250 steps); docs/health.md says where they were tried.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from evaluation.loss_curve import FEWEST_ROWS, judge_loss
from evaluation.run_files import Column, Run
from evaluation.suspects import suspects

Good = Literal["well", "learning"]
State = Literal["early", Good, "plateau", "one point", "uniform", "diverging", "not learning", "collapsed"]
NAMES: dict[State, str] = {
    "early": "too early to say",
    "well": "no sign of illness",
    "learning": "learning",
    "plateau": "plateau at ln(K)",
    "one point": "collapsed to one point",
    "uniform": "collapsed to uniform",
    "diverging": "diverging",
    "not learning": "not learning",
    "collapsed": "collapsed",
}
LOWER_RATE = "lower the learning rate or warm up for longer"
REMEDIES: dict[State, str] = {
    "plateau": f"{LOWER_RATE}; lower model.warmup_teacher_temp, freeze the last layer for longer, take fewer "
    "prototypes or a larger batch",
    "one point": f"{LOWER_RATE}; centre the teacher (model.center_momentum 0.9, not nearly 1) or take model.targets "
    "sinkhorn",
    "uniform": f"sharpen the teacher (model.teacher_temp 0.04 to 0.07, well below model.student_temp); {LOWER_RATE}",
    "diverging": f"{LOWER_RATE}, clip gradients, use bf16 or fp32 instead of fp16, and begin anew or from an earlier "
    "checkpoint",
    "not learning": f"look at some images and captions (trivit shards inspect); {LOWER_RATE}, or raise it where it is "
    "tiny",
    "collapsed": f"{LOWER_RATE}; look whether captions differ (train/caption_distinct)",
}
RAISE_RATE = (
    "raise the learning rate where it is tiny (5e-4 times global batch / 256 is usual), or lower it or warm up "
)
RAISE_RATE += "for longer where it is large; look at some images (trivit shards inspect)"
ROWS = 3
"""Rows that are looked at, by their median; an illness needs as many, good news more (FEWEST_ROWS)."""


@dataclass(frozen=True)
class Health:
    """A state, the sentence that says why, and what usually helps ("" when nothing needs to).

    `suspects`: of an ill run, settings in its config that are known to make a run so, see `suspects.suspects`.
    """

    state: State
    reason: str
    remedy: str = ""
    suspects: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The state in words."""
        return NAMES[self.state]

    @property
    def ill(self) -> bool:
        """Whether somebody should do something."""
        return self.state not in ("early", "well", "learning")

    @property
    def line(self) -> str:
        """All of it in one line."""
        return " ".join([f"{self.name}.", self.reason, *self.advice])

    @property
    def advice(self) -> tuple[str, ...]:
        """What to look at and what to do, a sentence each, the run's own settings first."""
        suspected = (f"Suspect in the config: {'; '.join(self.suspects)}.",) if self.suspects else ()
        return (*suspected, *((f"Usual remedy: {self.remedy}.",) if self.remedy else ()))


def judge_health(run: Run) -> Health:
    """What the newest rows of a run say.

    early: fewer than 3 rows, or still within `settled`. DINO: see `_dino`, CLIP: `_clip`, others: `_by_loss`.
    """
    health = _judge(run)
    return replace(health, suspects=suspects(run)) if health.ill else health


def by_medians(run: Run) -> bool:
    """Whether the numbers of a verdict are medians of the last ROWS rows: not of a run that is judged by its loss."""
    return run.non_finite is None and any(f"train/{name}" in run.metrics for name in ("teacher_entropy", "uniformity"))


def _judge(run: Run) -> Health:
    if run.non_finite is not None:
        return _ill("diverging", f"The loss or a gradient became NaN or infinite at step {run.non_finite:,}.")
    if (norms := run.metrics.get("train/grad_norm")) is not None and len(norms) >= ROWS:
        lost = int((~np.isfinite(norms[-8:])).sum())
        if lost > len(norms[-8:]) // 2:
            return _ill("diverging", f"Gradients were not finite in {lost} of the last {len(norms[-8:])} rows.")
    if "train/teacher_entropy" in run.metrics:
        return _dino(run)
    if "train/uniformity" in run.metrics:
        return _clip(run)
    return _by_loss(run)


def settled(run: Run, at_least: int) -> int:
    """The step from which a run can be expected to show what becomes of it.

    Behind warm-up and frozen phases by 2% of the run, and by `at_least` steps.
    """
    return busy(run) + max(at_least, (run.max_steps or 0) // 50)


def busy(run: Run) -> int:
    """Steps until the learning rate has warmed up and nothing is frozen any more, as configured."""
    seen = run.metrics.get("epoch", np.array([]))
    steps_per_epoch = run.step / float(seen[-1]) if len(seen) and seen[-1] > 0 else 0.0
    lengths = [0.0]
    for name in ("warmup_epochs", "freeze_last_layer_epochs", "head_warmup_epochs"):
        epochs = run.get(f"model.{name}")
        lengths.append(epochs * steps_per_epoch if isinstance(epochs, int | float) else 0.0)
    steps = run.get("model.warmup_steps")
    return round(max(*lengths, steps if isinstance(steps, int) else 0.0))


def newest(run: Run, name: str) -> float:
    """Median of a column over the newest rows, NaN without any."""
    values = run.metrics.get(name, np.array([]))[-ROWS:]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def prototypes(run: Run, *, patches: bool = False) -> int:
    """K of a DINO run, or of its hidden patches, which may have a head of their own (iBOT)."""
    count = run.get("model.ibot.head.prototypes") if patches else None
    count = run.get("model.head.prototypes") if count is None else count
    return count if isinstance(count, int) and count > 1 else 65536


def pairs(run: Run) -> int:
    """B of a CLIP run: pairs that are compared with each other."""
    batch = newest(run, "train/effective_batch")
    return max(2, round(batch)) if math.isfinite(batch) else int(run.get("data.global_batch_size", 2))


def chance_loss(run: Run) -> float:
    """Loss of a CLIP that knows nothing: ln(B), and for SigLIP that of saying 1/B for every pair."""
    b = pairs(run)
    one_of_many = math.log(b)
    return one_of_many if run.get("model.loss") != "sigmoid" else one_of_many + (b - 1) * math.log(b / (b - 1))


def _dino(run: Run) -> Health:
    """What targets and features say, most certain first.

    one point: targets use fewer than 3 prototypes and not more and more (from step 40 on); or features all point the
        same way; or a target says nothing about its image (its mutual information with it is below 0.003 nats).
    uniform: the teacher's entropy is within 0.3% of ln(K), or 1.5% if a target says nothing about its image; the
        student may still be on its way there.
        All of this but the features is asked of the targets of hidden patches too, where there are any (iBOT).
    diverging: the loss is more than 1 nat above ln(K), that of a student that knows nothing. (It can reach ln(K) + 20
        or so. Small runs that learn have been seen up to 0.4 nats above: students too sure of local views.)
    plateau: the loss is within 1.5% of ln(K), and what is left to learn is less than 2% of ln(K); not yet uniform.
    not learning: the student is no better than one that says the same about every image (the divergence is above the
        mutual information of targets and images), and since the run has settled the divergence has not once been 15%
        below its first row, and the features spread as at first, within a fifth. (Moving the centre alone has brought
        the divergence to 3.4 times its first row.)
    early, and one point when the run ends so: fewer than 6 prototypes in use and not more and more.
    learning: none of this, and the student is better than one that says the same about every image, of 8 images at
        least that are compared.
    well: none of this, and not yet so. Both from 8 rows on, and from 40 steps behind warm-up and frozen phases.
    """
    rows, step, early = len(run.metrics["step"]), run.step, settled(run, 20)
    k, most = prototypes(run), math.log(prototypes(run))
    entropy, kl = newest(run, "train/teacher_entropy"), newest(run, "train/kl")
    used, spread = newest(run, "train/prototypes_used"), newest(run, "train/feature_std")
    if rows < ROWS:
        return _early(run, settled(run, 40))
    told, divergence = math.log(max(used, 1e-9)) - entropy, run.metrics["train/kl"]
    course = run.metrics["train/prototypes_used"][-ROWS:]
    in_use = f"{used:,.{1 if used < 10 else 0}f} of {k:,} prototypes are in use"
    done = step >= early
    images = _compared(run)
    if done and spread < 0.05 and images >= 2:
        return _ill("one point", f"The features of all images point the same way (standard deviation {spread:.3f}).")
    if done and entropy <= 0.997 * most and entropy + kl > 0.985 * most and kl < 0.02 * most:
        return _ill("plateau", f"The loss, {entropy + kl:.3f}, stays at ln({k:,}) = {most:.3f}.")
    collapsed = _collapsed(run, done, images)
    if collapsed is None and "train/ibot_teacher_entropy" in run.metrics:
        collapsed = _collapsed(run, done, images, patches=True)
    if collapsed is not None:
        return collapsed
    first, since = float(divergence[0]), run.metrics["step"] >= early
    at_first = float(run.metrics["train/feature_std"][0])
    as_before = abs(spread - at_first) < 0.2 * at_first
    if (
        done
        and as_before
        and images >= 8
        and kl > max(told, 0.85 * first)
        and _lowest(divergence[since]) > 0.85 * first
    ):
        if rows < FEWEST_ROWS:
            return Health("early", f"The student has {kl:.2f} nats left to learn, and {first:.2f} at the start.")
        rate = float(np.max(run.metrics.get("train/lr", np.array([math.nan]))))
        text = f"The student has {kl:.2f} nats left to learn from the teacher, {first:.2f} at the start; the highest"
        return _ill("not learning", f"{text} learning rate so far is {rate:.1e}.", RAISE_RATE)
    if done and entropy + kl > most + 1:
        return _ill("diverging", f"The loss, {entropy + kl:.2f}, is above that of a student that guesses, {most:.2f}.")
    if not done:
        return _early(run, settled(run, 40))
    if used < 6 and course[-1] <= course[0] and images >= 8:
        if run.max_steps is not None and step >= run.max_steps:
            return _ill("one point", f"Only {in_use}.")
        return Health("early", f"Only {in_use}, and not more and more: this may become a collapse to one point.")
    if rows < FEWEST_ROWS or step < settled(run, 40):
        return _early(run, settled(run, 40))
    text = f"The student has {kl:.2f} nats left to learn from the teacher"
    if kl < told and images >= 8:
        return Health("learning", f"{text}, {in_use}.")
    same = f" (one that says the same about every image would have {max(told, 0):.2f})" if images >= 8 else ""
    text += f"{same}, {in_use}"
    if spread < 0.6 * at_first:
        text += f"; features spread less than at first ({spread:.2f}, then {at_first:.2f})"
    return Health("well", f"{text}.")


def _collapsed(run: Run, done: bool, images: float, *, patches: bool = False) -> Health | None:
    """What the teacher's targets of class tokens, or of hidden patches, say of a collapse."""
    k, prefix, what = prototypes(run, patches=patches), "train/", "image"
    if patches:
        prefix, what = "train/ibot_", "hidden patch"
    entropy, used = newest(run, f"{prefix}teacher_entropy"), newest(run, f"{prefix}prototypes_used")
    most, course = math.log(k), run.metrics[f"{prefix}prototypes_used"][-ROWS:]
    if run.step >= 40 and used < 3 and course[-1] < 1.2 * course[0] and images >= 8:
        whose = " by hidden patches" if patches else ""
        return _ill("one point", f"Only {used:.1f} of {k:,} prototypes are in use{whose}.")
    if done and math.log(max(used, 1e-9)) - entropy < 0.003 and entropy <= 0.997 * most and images >= 8:
        state: State = "one point" if entropy < 0.985 * most else "uniform"
        return _ill(state, f"The teacher says the same about every {what}.")
    if done and entropy > 0.997 * most:
        text = f"The teacher finds all {k:,} prototypes alike for every {what}: its entropy is {entropy:.3f}, ln(K) is"
        return _ill("uniform", f"{text} {most:.3f}.")
    return None


def _compared(run: Run) -> float:
    """Images of a micro-batch on one device; runs that did not log it had as many as were asked for, at most."""
    found = newest(run, "train/micro_batch")
    if math.isfinite(found):
        return found
    return float(min(run.get(f"data.{name}_batch_size") or 64 for name in ("device", "global")))


def _lowest(values: Column) -> float:
    """The least median of ROWS rows in a row."""
    if len(values) < ROWS:
        return float(np.median(values))
    return float(np.nanmin(np.median(np.lib.stride_tricks.sliding_window_view(values, ROWS), axis=1)))


def _clip(run: Run) -> Health:
    """What the joint space says.

    collapsed: uniformity above -0.02: all images, and all texts, have one vector.
    not learning: the loss is no more than 1% below that of guessing, of what there is to win with these captions.
    diverging: the loss rose again, by 5% of that of guessing at least.
    """
    rows, loss, chance = len(run.metrics["step"]), newest(run, "train/loss"), chance_loss(run)
    uniformity, distinct = newest(run, "train/uniformity"), newest(run, "train/caption_distinct")
    if rows < ROWS or (run.step < settled(run, 200) and not loss < 0.9 * chance):  # what is good may be told at once
        return _early(run, settled(run, 200))
    if uniformity > -0.02:
        return _ill("collapsed", f"All images have nearly one vector, and all texts (uniformity {uniformity:.3f}).")
    curve = run.metrics["train/loss"]
    course = judge_loss(run.metrics["step"], curve, busy(run))
    if course.state == "diverged" and loss > float(np.nanmin(curve)) + 0.05 * chance:
        return _ill("diverging", course.text)
    # b captions of which a share is distinct: the rest can only be guessed.
    to_win = math.log(max(pairs(run) * distinct, 1)) if math.isfinite(distinct) else chance
    if loss > chance - 0.01 * to_win:
        few = f" Only {distinct:.0%} of the captions of a batch are distinct." if distinct < 0.5 else ""
        text = f"The loss, {loss:.3f}, is not below that of guessing one of {pairs(run):,} pairs, {chance:.3f}.{few}"
        return _ill("not learning", text)
    right, wrong = newest(run, "train/positive_similarity"), newest(run, "train/hardest_negative")
    text = f"The loss, {loss:.2f}, is below that of guessing, {chance:.2f}; an image and its text have a cosine of"
    return Health("learning", f"{text} {right:.2f}, the most similar other text {wrong:.2f}.{_remarks(run)}")


def _remarks(run: Run) -> str:
    scale, most = newest(run, "train/logit_scale"), run.get("model.max_logit_scale")
    if isinstance(most, int | float) and scale > 0.999 * most:
        return f" logit_scale is at its bound, {most:g}: usual late in a long run, early on a sign of too high a rate."
    return ""


def _by_loss(run: Run) -> Health:
    """What the loss curve says; MAE's loss on normalised patches is 1 when each patch's mean is guessed."""
    loss = run.metrics.get("train/loss", np.array([]))
    course = judge_loss(run.metrics.get("step", np.array([])), loss, busy(run))
    if course.state == "diverged":
        return _ill("diverging", course.text)
    if course.state == "early" or run.step < settled(run, 100):
        return _early(run, settled(run, 100))
    if course.state == "flat":
        return _ill("not learning", course.text)
    if run.get("model.norm_pix_loss") is True and (level := newest(run, "train/loss")) > 0.99:
        return _ill("not learning", f"The loss, {level:.3f}, is that of guessing the mean of each patch, 1.")
    return Health("learning", course.text)


def _ill(state: State, reason: str, remedy: str = "") -> Health:
    return Health(state, reason, remedy or REMEDIES[state])


def _early(run: Run, until: int) -> Health:
    if run.max_steps is not None and until >= run.max_steps:
        return Health("early", f"The run is too short: it would have to go on past step {until:,}.")
    if run.step >= until:
        rows = len(run.metrics.get("step", ()))
        less = " (lower log_every)" if run.max_steps is not None and run.step >= run.max_steps else ""
        return Health("early", f"A verdict needs {FEWEST_ROWS} rows of metrics.csv, and there are {rows}{less}.")
    return Health("early", f"A verdict comes after step {until:,}.")
