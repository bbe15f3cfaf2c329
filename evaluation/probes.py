"""The probes by name: train and test features in, a result with its protocol out.

A result is plain data for results.json, in percent: {"top1", "top5" (with more than five classes), "interval" (95%, of
top-1, for the sampling of test images), "mean_per_class" with "mean_per_class_interval", "protocol", ...}.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from evaluation import knn, linear
from evaluation.attentive import Attentive
from evaluation.attributes import Attribute
from evaluation.errors import EvaluationError
from evaluation.few_shot import FewShot, few_shot
from evaluation.finetune import Finetune
from evaluation.label_free import LabelFree, label_free
from evaluation.linear_mae import LinearMAE
from evaluation.linear_paper import LinearPaper
from evaluation.localisation import Localisation
from evaluation.ranks import UNSEEN, interval, mean_per_class, mean_per_class_interval, top
from evaluation.robustness import Corruptions
from evaluation.segmentation import Segmentation

Result = dict[str, Any]


@dataclass(frozen=True)
class ProbeData:
    """Features x [n d], labels [n] in one numbering, the number of classes c, and what else is known of the images."""

    train: NDArray[np.float32]
    train_label: NDArray[np.int64]
    test: NDArray[np.float32]
    test_label: NDArray[np.int64]
    classes: int
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeSettings:
    """What a user may choose. ks None: those of the DINO paper that are not larger than train."""

    ks: Sequence[int] | None = None
    temperature: float = knn.TEMPERATURE
    strengths: Sequence[float] = linear.STRENGTHS
    seed: int = 0
    few_shot: FewShot = field(default_factory=FewShot)
    label_free: LabelFree = field(default_factory=LabelFree)
    # Of the probes on images; the floors of the others do not depend on them.
    linear_paper: LinearPaper = field(default_factory=LinearPaper, repr=False)
    linear_mae: LinearMAE = field(default_factory=LinearMAE, repr=False)
    attentive: Attentive = field(default_factory=Attentive, repr=False)
    finetune: Finetune = field(default_factory=Finetune, repr=False)
    corruptions: Corruptions = field(default_factory=Corruptions, repr=False)
    segmentation: Segmentation = field(default_factory=Segmentation, repr=False)
    localisation: Localisation = field(default_factory=Localisation, repr=False)
    device: str = "cpu"
    progress: bool = field(default=False, repr=False)  # of which no number depends

    def check(self, names: Sequence[str], channels: int) -> None:
        """EvaluationError for a setting of one of these probes that cannot work, before any of them has begun."""
        if self.ks is not None and (not self.ks or min(self.ks) < 1):
            raise EvaluationError("ks are numbers of neighbours: 1 at least, and one of them at least")
        if not 0 < self.temperature < math.inf:
            raise EvaluationError(f"temperature must be above 0, not {self.temperature:g}")
        if not self.strengths or not all(0 <= strength < math.inf for strength in self.strengths):
            raise EvaluationError("strengths must be numbers from 0 on, and one of them at least")
        for name in names:
            config: Any = getattr(self, name, None)
            if isinstance(config, Corruptions):
                config.check(channels)
            elif config is not None and hasattr(config, "check"):
                config.check()


class Scored(Protocol):
    """Test labels [t] and the number of classes."""

    @property
    def test_label(self) -> NDArray[np.int64]:
        """[t]."""
        ...

    @property
    def classes(self) -> int:
        """How many there are."""
        ...


def score_knn(data: ProbeData, settings: ProbeSettings) -> Result:
    """kNN with the DINO vote; top1 is that of k = 20 (of the largest k when 20 was not asked for)."""
    ks = sorted(settings.ks) if settings.ks else [k for k in knn.KS if k == 20 or k <= len(data.train)]
    ranks = knn.knn_ranks(
        data.train, data.train_label, data.test, data.test_label,
        classes=data.classes, ks=ks, temperature=settings.temperature, device=settings.device,
        progress=settings.progress,
    )  # fmt: skip
    main = 20 if 20 in ks else ks[-1]
    protocol = {"k": main, "ks": ks, "temperature": settings.temperature, "similarity": "cosine, exact"}
    by_k = {str(k): top(rank) for k, rank in ranks.items()}
    return {**tops(ranks[main], data), "by_k": by_k, "protocol": protocol}


def score_linear(data: ProbeData, settings: ProbeSettings) -> Result:
    """Logistic regression on standardised features, its strength chosen on a tenth of train."""
    probe = linear.linear_probe(
        data.train, data.train_label, data.test, data.test_label,
        classes=data.classes, strengths=settings.strengths, seed=settings.seed, device=settings.device,
        progress=settings.progress,
    )  # fmt: skip
    protocol = {
        "objective": "mean cross-entropy + strength / 2 * |W|^2 on standardised features, full batch L-BFGS",
        "strength": probe.strength,
        "strengths_tried": {f"{s:g}": accuracy for s, accuracy in probe.held_out.items()},
        "strength_grid": list(settings.strengths),
        "chosen_on": f"stratified {linear.HELD_OUT:.0%} of train (top-1), then refit on all of train",
        "stopped_at": f"gradient norm <= {linear.TOLERANCE:g}",
        "gradient_norm": float(f"{probe.fit.gradient_norm:.3g}"),
        "iterations": probe.fit.iterations,
        "converged": probe.fit.converged,
        "train_loss": float(f"{probe.fit.value:.6g}"),
        "seed": settings.seed,
    }
    return {**tops(probe.rank, data), "protocol": protocol}


def score_attributes(data: ProbeData, settings: ProbeSettings) -> Result:
    """The linear probe for each attribute instead of the class; top1 is their mean, `of` has the result of each."""
    few = replace(settings, strengths=settings.strengths[::2])  # so many probes: a decade between two strengths
    of: dict[str, Result] = {}
    for name, attribute in data.attributes.items():
        classes = len(attribute.values)
        found = score_linear(
            replace(data, train_label=attribute.train, test_label=attribute.test, classes=classes), few
        )
        of[name] = {key: found[key] for key in ("top1", "interval")} | {
            "values": list(attribute.values),
            "chance": 100 * float(np.mean(attribute.test == np.bincount(attribute.train).argmax())),
            "strength": found["protocol"]["strength"],
        }
    protocol = {k: v for k, v in found["protocol"].items() if k in ("objective", "strength_grid", "chosen_on", "seed")}
    mean = float(np.mean([result["top1"] for result in of.values()]))
    return {"top1": mean, "of": of, "protocol": protocol}


def score_few_shot(data: ProbeData, settings: ProbeSettings) -> Result:
    """Logistic regression on few images; top1 is that of the most images of each class, `by_labels` has all."""
    config = settings.few_shot
    found = few_shot(
        data.train, data.train_label, data.test, data.test_label,
        classes=data.classes, config=config, seed=settings.seed, device=settings.device, progress=settings.progress,
    )  # fmt: skip
    main = str(max(config.shots)) if config.shots else f"{100 * max(config.shares):g}%"
    protocol = {
        "labels": main,
        "objective": "mean cross-entropy + strength / 2 * |W|^2 on features standardised over the drawn images",
        "strength": config.strength,
        "draws": config.draws,
        "interval": "bootstrap over test images and draws",
        "seed": settings.seed,
    }
    return {key: found[main][key] for key in ("top1", "interval")} | {"by_labels": found, "protocol": protocol}


def score_label_free(data: ProbeData, settings: ProbeSettings) -> Result:
    """RankMe, uniformity and neighbour purity of the train features."""
    found = label_free(data.train, data.train_label, settings.label_free, settings.seed, settings.device)
    protocol = {
        "images": f"{found.pop('images'):,} of train, spread evenly",
        "k": settings.label_free.k,
        "interval": "of the purity, bootstrap over images",
    }
    return {**found, "protocol": protocol}


LABELLED_IMAGES = ("linear_paper", "linear_mae", "attentive", "finetune", "corruptions")
"""Probes that need the images and their labels, see `image_probes`."""

DENSE_PROBES = ("segmentation", "localisation")
"""Probes that need masks or boxes; localisation learns nothing."""

TEXT_PROBES = ("zeroshot", "retrieval")
"""Probes that compare images with texts (`text_probes`); they learn nothing and need no train images."""

PROBES: dict[str, Callable[[ProbeData, ProbeSettings], Result]] = {
    "knn": score_knn,
    "linear": score_linear,
    "attributes": score_attributes,
    "few_shot": score_few_shot,
    "label_free": score_label_free,
}


class Chosen(NamedTuple):
    """Names of probes: those that learn from labelled images, those for masks and boxes, those that compare texts."""

    learned: tuple[str, ...]
    dense: tuple[str, ...]
    paired: tuple[str, ...]


def check_probes(names: Sequence[str]) -> Chosen:
    """The probes without repeats; EvaluationError for none, or one that is unknown."""
    learned = (*PROBES, *LABELLED_IMAGES)
    unknown = [name for name in names if name not in (*learned, *DENSE_PROBES, *TEXT_PROBES)]
    if unknown or not names:
        what = f"unknown probe {unknown[0]!r}" if unknown else "no probe given"
        raise EvaluationError(f"{what}: there are {', '.join((*learned, *DENSE_PROBES, *TEXT_PROBES))}")
    once = tuple(dict.fromkeys(names))
    return Chosen(*(tuple(name for name in once if name in kind) for kind in (learned, DENSE_PROBES, TEXT_PROBES)))


def tops(rank: NDArray[np.int64], data: Scored) -> Result:
    """Top-1, top-5 with more than five classes, mean over classes, and intervals of first and last; rank [t].

    Images that are `UNSEEN` do not count.
    """
    seen = rank != UNSEEN
    rank, truth = rank[seen], data.test_label[seen]
    five = {"top5": top(rank, 5)} if data.classes > 5 else {}
    return {
        "top1": top(rank),
        **five,
        "mean_per_class": mean_per_class(rank, truth),
        "interval": interval(rank),
        "mean_per_class_interval": mean_per_class_interval(rank, truth),
    }
