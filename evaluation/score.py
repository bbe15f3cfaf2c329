"""`trivit evaluate`: an encoder, labelled train and test images, and out come numbers that carry their protocol."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.manifest import load_manifest
from datamodules.open_shards import open_shards
from datamodules.remote import is_remote
from evaluation.attribute_table import attribute_summary
from evaluation.attributes import Attribute, read_attributes
from evaluation.errors import EvaluationError
from evaluation.features import Features, Featurizer, Precision, extract, pick_device
from evaluation.floors import floors as compute_floors
from evaluation.labels import check_labelled, match_labels
from evaluation.long_probes import alone_words
from evaluation.one_folder import with_only_folder
from evaluation.overlap import overlap
from evaluation.probe_lines import probe_lines
from evaluation.probes import PROBES, ProbeData, ProbeSettings, check_probes
from evaluation.protocol import floor_protocol, protocol_of, versions
from evaluation.results_file import merge, results_file, run_of
from evaluation.score_summary import NAMES, summary
from evaluation.team import Team
from evaluation.text_lines import text_summary
from evaluation.unknown_classes import left_out_words, without_unknown
from tasks.encoder_config import Pool
from tasks.encoder_files import checkpoint_hash, load_encoder


def evaluate(
    source: str | os.PathLike[str],
    *,
    train: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str],
    probes: Sequence[str] = ("knn", "linear"),
    output: str | os.PathLike[str] | None = None,
    settings: ProbeSettings | None = None,
    templates: str | Sequence[str] | None = None,
    class_names: str | None = None,
    class_fields: Sequence[str] | None = None,
    captions: str | None = None,
    pool: Pool | None = None,
    floors: bool = True,
    drop_unknown_classes: bool = False,
    image_size: int | None = None,
    precision: Precision = "float32",
    team: Team = Team(),  # noqa: B008 (frozen)
    device: str | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
    called: str | None = None,
) -> dict[str, Any]:
    """Score an encoder, print a table, and merge the results into `results.json`.

    Args:
        source: a run's directory, a checkpoint, an export, or `timm:NAME`.
        train: labelled images to learn from: tars, class folders, or a tar of them; zeroshot and retrieval need none.
        test: labelled images to score on; classes are matched by name, and nothing is chosen on them.
        probes: names in `probes.PROBES`, `LABELLED_IMAGES`, `DENSE_PROBES`; of a CLIP also `zeroshot`, `retrieval`.
        output: folder of results.json; None: the run, or nothing is written when `source` is not (in) a run.
        settings: of the probes; None: the papers'.
        templates, class_names: of zeroshot, see `make_prompts`; None: those that the run was trained with, if any.
        class_fields: of zeroshot, fields of the samples' `.json`: all combinations of their values are the classes.
        captions: of retrieval, see `chosen_captions`; None: as the run was trained.
        pool: what the probes see, class token, mean of the patch tokens or both (zeroshot and retrieval: always the
            joint space); None: as the encoder's config says.
        floors: score raw pixels and the untrained encoder too (cached per data set).
        drop_unknown_classes: leave test images (of segmentation: pixels) out whose class train lacks, instead of
            refusing; protocols count them.
        image_size: side of the images that the encoder sees, in pixels; None: as it was trained.
        precision: of the matrix products that make features.
        team: processes that help with features, see `evaluate_together`.
        device: None: CUDA if there is one.
        batch_size: images in a forward pass.
        workers: loader processes; None: from the cores there are.
        cache_dir: where features, floors and facts about whole sets are kept; None: the user's cache ($TRIVIT_CACHE).
        progress: show progress bars and print the table.
        called: what protocols say instead of `source`, where that does not stay; None: `source`.

    Returns:
        What these probes found, as in results.json, in percent:
        {"knn": {"top1", "top5", "interval", "by_k", "protocol"}, "linear": {...}, "zeroshot": {...},
        "retrieval": {...}, "floors": {"raw_pixels": ..., ...}}.

    Raises:
        EvaluationError, TaskError, DataError: one line, for what the user can repair.
    """
    learned, dense, paired = check_probes(probes)
    train_given = train is not None
    if not train_given:
        learners = [name for name in (*learned, *dense) if name not in ("localisation", "label_free")]
        if learners:
            learn = "learns" if len(learners) == 1 else "learn"
            raise EvaluationError(f"{', '.join(learners)} {learn} from labelled images: give --train")
        train = test if learned else None  # label_free looks at one set only
    source = str(source)
    place = results_file(source, output)
    encoder = load_encoder(source, image_size=image_size)
    if pool is not None and pool != "mean" and not encoder.config.class_token:
        raise EvaluationError(f"{source} has no class token: use --pool mean")
    if "localisation" in dense and not encoder.config.class_token:
        raise EvaluationError(
            f"{source} has no class token, and localisation looks at where that attends to: leave it out of --probes"
        )
    encoder.config = config = replace(encoder.config, pool=pool or encoder.config.pool)
    device = device or pick_device()
    settings = replace(settings or ProbeSettings(), device=device, progress=progress)
    settings.check((*learned, *dense), config.in_chans)
    if team.size > 1 and progress and (alone := [name for name in (*learned, *dense) if name not in PROBES]):
        print(alone_words(alone, team.size), file=sys.stderr)
    test_root = open_shards(test)
    train_root = open_shards(train) if train is not None and (learned or dense) else None
    features, floor_cache = (cache_dir / name if cache_dir else None for name in ("features", "floors"))
    shared = {
        "source": called or source,
        "checkpoint": checkpoint_hash(source),
        "encoder": config.arch,
        "crop": config.image_size,
        "resize": config.resize,
        "interpolation": "bicubic, antialiased; shorter side, then centre crop",
        "precision": precision,
        "versions": versions(),
    }

    def read(featurizer: Featurizer, root: Path, cache: Path | None = features) -> Features:
        return extract(
            featurizer, root, device=device, batch_size=batch_size, workers=workers, cache_dir=cache,
            precision=precision, team=team, progress=progress,
        )  # fmt: skip

    def comparable(trained: Features, tested: Features) -> tuple[Features, dict[str, int]]:
        """The test images that can be scored, and how many were left out of each class that train lacks."""
        if without_labels and (trained.label < 0).any():
            return tested, {}
        tested = with_only_folder(tested, test, trained.classes)
        check_labelled(trained.label, "train", train or "")
        check_labelled(tested.label, "test", test)
        return without_unknown(trained, tested) if drop_unknown_classes else (tested, {})

    def pair(trained: Features, tested: Features) -> ProbeData:
        if without_labels and (trained.label < 0).any():
            return ProbeData(trained.x, np.full_like(trained.label, -1), tested.x, tested.label, 0, {})
        label, classes = match_labels(trained.classes, trained.label, tested.classes, tested.label)
        return ProbeData(trained.x, trained.label, tested.x, label, len(classes), attributes)

    def take(found: dict[str, Any]) -> None:
        for floor, scores in found.pop("floors", {}).items():
            results.setdefault("floors", {}).setdefault(floor, {}).update(scores)
        results.update(found)

    how: dict[str, Any] = {
        "device": device, "workers": workers, "batch_size": batch_size, "precision": precision, "progress": progress
    }  # fmt: skip
    without_labels = list(learned) == ["label_free"]
    attributes: dict[str, Attribute] = {}
    results: dict[str, Any] = {}
    told: list[str] = []
    if learned and train is not None and train_root is not None:
        on_features, on_images = ([n for n in learned if (n in PROBES) == there] for there in (True, False))
        trained, tested = read(encoder, train_root), read(encoder, test_root)
        both = None if without_labels else overlap(train_root, test_root, len(tested), cache_dir)
        if both and progress:
            print(f"note: {both['note']}", file=sys.stderr)
        tested, left_out = comparable(trained, tested)
        if left_out and progress:
            print(f"note: {left_out_words(left_out)}", file=sys.stderr)
        if "attributes" in learned:
            attributes |= read_attributes(train_root, trained, test_root, tested)
        data = pair(trained, tested)
        about = shared | {
            "pool": config.pool,
            "train": about_data(trained, train),
            "test": about_data(tested, test) | ({"left_out": left_out} if left_out else {}),
            "classes": data.classes,
        }
        if not train_given:
            about["looked_at"] = "the test images, since there was no --train"
        if both:
            about["shared_images"] = both
        if data.classes:
            largest = np.bincount(data.train_label).argmax()
            about["majority_class"] = 100 * float(np.mean(data.test_label == largest))
        for probe in on_features:
            results[probe] = PROBES[probe](data, settings)
            apart = {"shared_images": None} if probe == "label_free" else {}  # it learns nothing from train
            results[probe]["protocol"] = protocol_of(about | apart, results[probe]["protocol"])

        def measure(featurizer: Featurizer, aside: Path) -> ProbeData:
            seen = read(featurizer, train_root, aside)
            return pair(seen, comparable(seen, read(featurizer, test_root, aside))[0])

        if floors and on_features:
            found = compute_floors(
                config, measure, on_features, settings, train_images=len(trained),
                data_hashes=(trained.fingerprint, tested.fingerprint), precision=precision, cache_dir=floor_cache,
            )  # fmt: skip
            for floor, each in found.items():
                of_floor = about | ({"pool": None} if floor == "raw_pixels" else {})
                for result in each.values():
                    result["protocol"] = floor_protocol(of_floor, result["protocol"])
            results["floors"] = found
        if place is not None and (on_images or dense or paired):
            merge(place, results)  # what took hours is not lost when the next one fails
        if on_images:
            from evaluation.score_images import Scoring, labelled_images, score_on_images

            scoring = Scoring(encoder, settings, about, floors, floor_cache, place, after=(*dense, *paired))
            images = labelled_images((train_root, test_root), trained, tested, data, **how)
            hashes = (trained.fingerprint, tested.fingerprint)
            for found in score_on_images(on_images, scoring, images, data, hashes, measure):
                take(found)
                if place is not None:
                    merge(place, results)
        if any(name in NAMES for name in learned):
            told.append(summary(results, about))
        if "attributes" in learned:
            told.append(attribute_summary(results))
    if dense:
        from evaluation.score_images import Scoring, score_dense

        given = {"train": (train, train_root), "test": (test, test_root)}
        about = shared | {
            name: {"path": shown(path), "hash": load_manifest(root).hash}
            for name, (path, root) in given.items()
            if path is not None and root is not None
        }
        if train_root is not None and "segmentation" in dense:
            both = overlap(train_root, test_root, load_manifest(test_root).num_samples, cache_dir)
            if both:
                about["shared_images"] = both
                if progress and not learned:
                    print(f"note: {both['note']}", file=sys.stderr)
        scoring = Scoring(encoder, settings, about, floors, floor_cache, place, after=paired)
        more = {"drop_unknown": drop_unknown_classes, "cache_dir": cache_dir}
        for found in score_dense(dense, scoring, train_root, test_root, **how, **more):
            take(found)
            if place is not None:
                merge(place, results)
    told += ["", *lines] if (lines := probe_lines(results)) else []
    if paired:
        # here, since most users never need the text tower
        from evaluation.text_probes import chosen_captions, score_texts, table_of_the_run, trained_captions
        from tasks.clip_files import load_clip

        trained_with = trained_captions(run_of(source))
        with table_of_the_run(None if class_names else trained_with.class_names):
            found, tested = score_texts(
                load_clip(source, image_size=image_size), test_root, paired, read, device=device,
                templates=trained_with.templates or None if templates is None else templates,
                class_names=class_names or (None if class_fields else trained_with.class_names),
                class_fields=class_fields, captions=chosen_captions(trained_with, captions, templates, class_names),
            )  # fmt: skip
        about = shared | {"test": about_data(tested, test), "classes": len(tested.classes)}
        about |= {"class_fields": list(class_fields)} if class_fields else {}
        for result in found.values():
            result["protocol"] = about | result["protocol"]
        results |= found
        if "zeroshot" in found:
            chance = {"top1": 100 / len(tested.classes), "protocol": found["zeroshot"]["protocol"]}
            results.setdefault("floors", {})["chance"] = {"zeroshot": chance}
        told.append(text_summary(found))
    if place is not None:
        merge(place, results)
    if progress:
        print("\n".join(told))
        print(f"results: {place}" if place else "results were not written: give --output to keep them")
    return results


def about_data(features: Features, given: str | os.PathLike[str]) -> dict[str, Any]:
    """What a protocol says of a data set."""
    return {
        "path": shown(given),
        "images": len(features),
        "bad": features.bad,
        "hash": features.data_hash,
    }


def shown(given: str | os.PathLike[str]) -> str:
    """A data set in a protocol: its URL, or its whole path."""
    return str(given if is_remote(given) else Path(given).resolve())
