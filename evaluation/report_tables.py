"""The tables of a report: facts, scores beside their floors, bad samples, differences between configs, protocols."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evaluation.probe_lines import class_mean_words
from evaluation.run_files import Run
from evaluation.scoring_terms import Protocol, Score, alike, other_terms, score_of, unusual_terms
from evaluation.verdict import PROBE_NAMES

FLOOR_ROWS = {"untrained": "Untrained encoder", "raw_pixels": "Raw pixels", "chance": "Chance"}


def facts(run: Run) -> list[tuple[str, str]]:
    """What happened, in a few numbers: (what, value)."""
    metrics, found = run.metrics, list[tuple[str, str]]()
    batch = run.get("data.global_batch_size")
    for name, what in (("init_encoder", "encoder from"), ("init_checkpoint", "weights from")):
        if source := run.get(f"model.{name}"):
            found.append((what, str(source)))
    if run.step:
        found.append(("steps", f"{run.step:,}"))
        if isinstance(batch, int):
            found.append(("images seen", f"{run.step * batch:,}"))
        if len(metrics.get("epoch", ())):
            found.append(("epochs", f"{metrics['epoch'][-1]:.3g}"))
        if len(metrics.get("seconds", ())):
            found.append(("training time", duration(metrics["seconds"][-1])))
        for name, label, form in (
            ("train/images_per_second", "images per second", "{:,.0f}"),
            ("time/data", "waiting for data", "{:.1%}"),
        ):
            if len(metrics.get(name, ())) and np.isfinite(metrics[name]).any():
                found.append((label, form.format(float(np.nanmedian(metrics[name])))))
        if np.isfinite(memory := metrics.get("train/peak_memory", np.array([np.nan]))).any():
            found.append(("peak memory of a process", f"{np.nanmax(memory):.1f} GiB"))
    return found


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def score_table(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Columns (probes) and rows (name, kind, cells) of the score table; None when nothing was evaluated."""
    probes = [probe for probe in PROBE_NAMES if any(probe in run.results for run in runs)]
    if not probes:
        return None
    main = {p: score_of(alike(runs, p)[0][0], p) for p in probes}
    usual = {p: protocol for p, (_, protocol) in main.items()}
    rows: list[dict[str, Any]] = [
        {"name": run.name, "kind": "run", "cells": [_cell(run.results.get(p), main[p], run) for p in probes]}
        for run in runs
    ]
    found: dict[Any, tuple[str, list[Any], list[str]]] = {}
    for run in runs:
        for floor, label in FLOOR_ROWS.items():
            cells = [_cell(run.results.get("floors", {}).get(floor, {}).get(p), main[p], run) for p in probes]
            identity = (label, *((cell["top1"], *cell["terms"]) if cell else None for cell in cells))
            if any(cells):
                found.setdefault(identity, (label, cells, []))[2].append(run.name)
    for label, cells, names in found.values():
        whose = "" if len(names) == len(runs) else f" ({', '.join(names)})"
        rows.append({"name": label + whose, "kind": "floor", "cells": cells})
    largest = max((cell["top1"] for row in rows for cell in row["cells"] if cell and not cell["foreign"]), default=0)
    protocol = usual[probes[0]]
    return {
        "probes": [_heading(p, usual[p], protocol) for p in probes],
        "rows": rows,
        "scale": max(largest, 1e-9),
        "majority": protocol.get("majority_class"),
        "classes": protocol.get("classes"),
        "images": protocol.get("test", {}).get("images"),
        "k": usual.get("knn", {}).get("k"),
        "class_means": _class_means(runs),
    }


def _class_means(runs: Sequence[Run]) -> list[str]:
    """A sentence for each score whose mean over classes is another number."""
    found = [(run, probe, class_mean_words(run.results[probe])) for probe in PROBE_NAMES for run in runs
             if probe in run.results]  # fmt: skip
    return [
        f"{PROBE_NAMES[probe]}{f' of {run.name}' if len(runs) > 1 else ''}: {words}."
        for run, probe, words in found if words
    ]  # fmt: skip


def _heading(probe: str, own: Protocol, main: Protocol) -> str:
    """A probe's name, with classes and images where they are others than those that the table's caption names."""
    classes, test = own.get("classes"), own.get("test", {})
    images = test.get("images", 0)
    if (classes, images) != (main.get("classes"), main.get("test", {}).get("images", 0)):
        return f"{PROBE_NAMES[probe]} ({classes} classes, {images:,} images)"
    same = test.get("hash") == main.get("test", {}).get("hash")
    return PROBE_NAMES[probe] + ("" if same else f" ({images:,} other images)")


def _cell(result: dict[str, Any] | None, usual: Score, run: Run) -> dict[str, Any] | None:
    """A score; `terms`: how it was taken, where that is not as usual; `foreign`: not to be compared in its column."""
    if not result:
        return None
    low, high = result.get("interval", [result["top1"]] * 2)
    own = result.get("protocol", {})
    other = other_terms((run, own), usual)
    terms = dict.fromkeys([*other, *unusual_terms(run, own)])
    return {"top1": result["top1"], "half": (high - low) / 2, "terms": list(terms), "foreign": bool(other)}


def test_set(run: Run) -> dict[str, Any] | None:
    """The protocol of the newest result that names its data; None before any evaluation."""
    return next(
        (
            result["protocol"]
            for result in map(run.results.get, (*PROBE_NAMES, "retrieval"))
            if result and "test" in result.get("protocol", {})
        ),
        None,
    )


def outdated(run: Run) -> list[str]:
    """A warning when what was scored has another checkpoint now: when the run was trained further."""
    from tasks.encoder_files import checkpoint_hash
    from tasks.errors import TaskError

    protocol = test_set(run)
    if protocol is None or "checkpoint" not in protocol:
        return []
    source, here = Path(protocol.get("source", "")).resolve(), (run.path.resolve(), run.checkpoint.resolve())
    if not source.exists() or not (run.scores_only or (source in here and run.checkpoint.exists())):
        return []
    with contextlib.suppress(TaskError):  # a folder that has no checkpoint any more
        if protocol["checkpoint"] != checkpoint_hash(source):
            which = "what was scored" if run.scores_only else "this run"
            return [f"The scores are of an earlier checkpoint of {which}: evaluate it again."]
    return []


def data_words(run: Run) -> list[str]:
    """On which images its scores were taken, a sentence for each pair of sets."""
    probes: dict[str, list[str]] = {}
    for name, result in run.results.items():
        protocol = result.get("protocol", {}) if isinstance(result, dict) else {}
        if name != "floors" and (test := protocol.get("test")):
            classes = f" of {protocol['classes']} classes" if "classes" in protocol else ""
            words = f"cored on {_set_words(test)}{classes}"
            if train := protocol.get("train"):
                words += f", after learning from {_set_words(train)}"
            probes.setdefault(words, []).append(PROBE_NAMES.get(name, name))
    if len(probes) == 1:
        return [f"S{next(iter(probes))}."]
    return [f"{', '.join(names)}: s{words}." for words, names in probes.items()]


def _set_words(data: dict[str, Any]) -> str:
    images = f"{data['images']:,} images" if "images" in data else "the images"
    return f"{images} in {data['path']}" if "path" in data else images


def bad_counts(run: Run) -> list[tuple[str, int]]:
    """Unreadable images by reason, most frequent first, then those that evaluation met."""
    reasons: dict[str, int] = {}
    for entry in run.bad:
        reason = str(entry.get("reason", "unknown"))
        reasons[reason] = reasons.get(reason, 0) + 1
    found = sorted(reasons.items(), key=lambda item: -item[1])
    protocol = test_set(run) or {}
    for which in ("train", "test"):
        count = protocol.get(which, {}).get("bad", 0)
        if count:
            found.append((f"left out in evaluation ({which})", count))
    return found


def flat_config(run: Run) -> dict[str, str]:
    """The config as dotted keys and short values."""
    found: dict[str, str] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                walk(inner, key if name == "init_args" else f"{key}.{name}".lstrip("."))
        else:
            found[key] = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()

    walk(run.config, "")
    return found


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Config keys in which runs differ, with the value of each; of scores without a run there is no config."""
    flat = [flat_config(run) for run in runs if not run.scores_only]
    keys = sorted({key for each in flat for key in each} - {"output"})
    rows = [(key, [each.get(key, "—") for each in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def protocols(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """(probe, rows of its protocol) of every score, floors included."""
    found = [(PROBE_NAMES.get(p, p), r) for p, r in run.results.items() if isinstance(r, dict) and "protocol" in r]
    for floor, each in run.results.get("floors", {}).items():
        found += [(f"{FLOOR_ROWS.get(floor, floor)}, {PROBE_NAMES.get(p, p)}", r) for p, r in each.items()]
    return [(name, [(key, _plain(value)) for key, value in result["protocol"].items()]) for name, result in found]


def _plain(value: Any) -> str:
    if isinstance(value, float):  # results.json has all digits
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)
