"""On what terms a score was taken (images, k, crop, pool, precision), and what of it is other than elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.run_files import Run

Protocol = Mapping[str, Any]
OWN = "own"
OF_ENCODER = {"crop": "image_size", "side": "image_size", "pool": "pool"}
Score = tuple[Run, Protocol]  # whose it is, and how it was taken


def other_terms(one: Score, usual: Score) -> list[str]:
    """What differs between two scores of a probe, as it is of the first one, in a few words; [] if they are alike.

    Scores are compared when they were taken on the same test images and classes, after learning from the same train
    images, with the same k and precision, and with the crop and pool that each encoder has of its own, or with one that
    both were given. What a protocol does not say is taken to be the same.
    """
    own, main = _relative(*one), _relative(*usual)
    told = []
    test = own.get("test", {})
    if _differ(_of(own, "test"), _of(main, "test")) or _differ(own.get("classes"), main.get("classes")):
        told.append(f"{test['images']:,} other images" if "images" in test else "other images")
        if _differ(own.get("classes"), main.get("classes")):
            told.append(f"{own['classes']:,} classes")
    elif _differ(_of(own, "train"), _of(main, "train")):
        images = own["train"].get("images")
        told.append("learnt from other images" if images is None else f"learnt from {images:,} other images")
    return told + _settings(own, main)


def unusual_terms(run: Run, own: Protocol) -> list[str]:
    """In what a score of a run was not taken as `trivit evaluate` does it unasked, in a few words (k: in headings)."""
    usual = {"precision": "float32", **{term: run.get(f"model.encoder.{name}") for term, name in OF_ENCODER.items()}}
    return _settings(own, usual)


def alike(runs: Sequence[Run], probe: str) -> list[list[Run]]:
    """The runs that have this score, in groups that can be compared; the largest group first."""
    groups: list[list[Run]] = []
    for run in (each for each in runs if probe in each.results):
        near = (group for group in groups if not other_terms(score_of(run, probe), score_of(group[0], probe)))
        if (group := next(near, None)) is None:
            groups.append([run])
        else:
            group.append(run)
    return sorted(groups, key=lambda group: -len(group))


def score_of(run: Run, probe: str) -> Score:
    """A run's score of a probe that it has."""
    return run, run.results[probe].get("protocol", {})


def _relative(run: Run, protocol: Protocol) -> Protocol:
    """The protocol, its crop and pool only where they are not the encoder's own."""
    given = {term: run.get(f"model.encoder.{name}") for term, name in OF_ENCODER.items()}
    own = {term: OWN for term, value in given.items() if value is None or protocol.get(term) in (None, value)}
    return {**protocol, **own}


def _of(protocol: Protocol, which: str) -> Any:
    return protocol.get(which, {}).get("hash", protocol.get(which, {}).get("images"))


def _differ(a: Any, b: Any) -> bool:
    return a is not None and b is not None and a != b


def _settings(own: Protocol, main: Protocol) -> list[str]:
    words = {
        "k": "k = {}",
        "crop": "{} px",
        "side": "{} px",
        "pool": "pool {}",
        "precision": "{}",
    }  # resize follows from the crop
    other = [name for name in words if _differ(own.get(name), main.get(name))]
    return [f"its own {name}" if own[name] == OWN else words[name].format(own[name]) for name in other]
