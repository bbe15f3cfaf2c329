"""What the numbers of a run's health are called, and what they mean, for people who have not read the papers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from evaluation.health import newest, pairs, prototypes
from evaluation.loss_terms import sum_words
from evaluation.run_files import Run


class Number(NamedTuple):
    """A column of metrics.csv: its title, and what its values mean; `meaning` may name K, ln_K and B."""

    title: str
    meaning: str


NUMBERS = {
    "train/teacher_entropy": Number(
        "Teacher entropy", "in nats: 0 if one prototype takes all of an image, {ln_K:.2f} = ln({K:,}) if it takes all "
        "prototypes alike; in a run that learns it lies between",
    ),
    "train/kl": Number(
        "Teacher-student divergence", "in nats: what the student has left to learn from the teacher; 0 after a collapse"
    ),
    "train/prototypes_used": Number(
        "Prototypes in use", "1 if all images of a batch share one, {K:,} if all are used alike"
    ),
    "train/feature_std": Number(
        "Feature standard deviation", "0 if the features of all images point the same way, 1 if they point in all "
        "directions",
    ),
    "train/center_norm": Number(
        "Norm of the centre", "length of the mean of the teacher's logits; it levels off in a run that learns"
    ),
    "train/ibot_teacher_entropy": Number(
        "Teacher entropy, hidden patches", "in nats: 0 if one prototype takes all of a patch, {ln_K_patches:.2f} if it "
        "takes all prototypes alike",
    ),
    "train/ibot_prototypes_used": Number(
        "Prototypes in use, hidden patches", "by some hundred patches of a batch: 1 if all share one, "
        "{K_patches:,} if all are used alike",
    ),
    "train/ibot_center_norm": Number(
        "Norm of the patches' centre", "length of the mean of the teacher's logits of hidden patches"
    ),
    "rankme": Number(
        "RankMe", "how many directions the features of some fixed training images use: 1 after a collapse, at most the "
        "encoder's width; to be compared within a run and between encoders of one width",
    ),
    "train/alignment": Number(
        "Alignment", "mean squared distance of an image and its text: 0 if they are the same, 2 if they are unrelated"
    ),
    "train/uniformity": Number(
        "Uniformity", "0 if all images have one vector, and all texts; about -4 if they spread over the whole sphere"
    ),
    "train/modality_gap": Number(
        "Modality gap", "distance of the mean image and the mean text: 0 if they mix, 2 if they lie on opposite sides; "
        "some is usual (0.82 in OpenAI's CLIP, arXiv:2203.02053)",
    ),
    "train/positive_similarity": Number("Similarity of pairs", "mean cosine of an image and its text: 1 at best"),
    "train/hardest_negative": Number(
        "Hardest negative", "mean cosine of an image and the most similar other text: below that of pairs once most "
        "images are recognised",
    ),
    "train/logit_scale": Number(
        "Logit scale", "factor on the cosines (inverse temperature): it rises as the model gets surer, up to "
        "model.max_logit_scale",
    ),
    "train/logit_bias": Number(
        "Logit bias", "of SigLIP, added to every logit: it starts at -10, since nearly all pairs of a batch are wrong"
    ),
    "train/effective_batch": Number("Effective batch", "pairs that are compared with each other, over all ranks"),
    "train/caption_distinct": Number(
        "Different captions", "share of a batch: 1 if no two are the same; images with the same one count as wrong for "
        "each other",
    ),
    "train/caption_cut": Number(
        "Captions cut", "share that is longer than model.text.context_length; what is beyond it is not learned from"
    ),
}  # fmt: skip


def meaning(name: str, run: Run) -> str:
    """What a column of NUMBERS means in this run."""
    k, of_patches = prototypes(run), prototypes(run, patches=True)
    sizes = {"K": k, "ln_K": math.log(k), "K_patches": of_patches, "ln_K_patches": math.log(of_patches)}
    return NUMBERS[name].meaning.format(**sizes, B=pairs(run))


def meaning_for(name: str, runs: Sequence[Run]) -> str:
    """What a column of NUMBERS means in runs that are drawn over each other: in each, where they differ."""
    by_meaning: dict[str, list[str]] = {}
    for run in runs:
        if name in run.metrics:
            by_meaning.setdefault(meaning(name, run), []).append(run.name)
    if len(by_meaning) == 1:
        return next(iter(by_meaning))
    return "; ".join(f"{', '.join(names)}: {words}" for words, names in by_meaning.items())


def loss_words(runs: Sequence[Run]) -> str:
    """What to read from the curve of the loss where it does not fall in a run that learns; "" elsewhere."""
    if not any("train/teacher_entropy" in run.metrics for run in runs):
        return ""
    return (
        "DINO's loss is the teacher's entropy plus the teacher-student divergence (and further terms, if any): it "
        "often rises in a run that learns, as more prototypes come into use. What is left to learn is the divergence."
    )


def missing_words(runs: Sequence[Run]) -> list[str]:
    """That runs which log their health have no RankMe, and why, a sentence; [] where all have."""
    logged = [run for run in runs if any(name in run.metrics for name in NUMBERS)]
    lacking = [r.name for r in logged if not any(math.isfinite(x) for x in r.metrics.get("rankme", ()))]
    whose = f" of {', '.join(lacking)}" if len(runs) > 1 else ""
    why = "it is only taken when it costs less than 1% of the time since training began, which short runs do not reach"
    return [f"RankMe{whose}: none in metrics.csv; {why}."] if lacking else []


def told(run: Run) -> list[str]:
    """A line for each number of health that the run has logged: its title, its newest value, what it means.

    Before them, of which terms its loss is the sum, where there are several.
    """
    lines = [words] if (words := sum_words(run)) else []
    for name, number in NUMBERS.items():
        values = run.metrics.get(name)
        value = math.nan if values is None else newest(run, name)
        if values is not None and math.isnan(value):  # a column with gaps
            seen = values[values == values]
            value = float(seen[-1]) if len(seen) else math.nan
        if not math.isnan(value):
            lines.append(f"{number.title} {shown(value)}: {meaning(name, run)}")
    return lines


def shown(value: float) -> str:
    """Three digits that count, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.3f}"
