"""One self-contained HTML page about one run or several: verdict, scores, curves, pictures, settings."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from datamodules.sidecars import cannot_write, write_aside
from evaluation.attribute_table import attribute_rows, attribute_sentences
from evaluation.confusion import confusions
from evaluation.curves import constant, constant_words, curves, draw_curves
from evaluation.errors import EvaluationError
from evaluation.health_words import NUMBERS, loss_words, meaning_for, missing_words
from evaluation.loss_terms import guess_level, term_words
from evaluation.overlap import no_verdict
from evaluation.probe_lines import ProbeRow, probe_rows
from evaluation.probe_tables import ProbeTable, probe_tables
from evaluation.ranks import one_decimal
from evaluation.report_compare import run_comparisons
from evaluation.report_inside import inside_sections
from evaluation.report_pictures import neighbour_section, reconstruction_section, retrieval_section
from evaluation.report_tables import (
    bad_counts,
    data_words,
    differences,
    facts,
    outdated,
    protocols,
    score_table,
    test_set,
)
from evaluation.run_files import Run, read_run
from evaluation.scoring_terms import unusual_terms
from evaluation.text_lines import retrieval_words
from evaluation.time_shares import bottleneck, draw_time_shares
from evaluation.verdict import judge

RECONSTRUCTIONS, INSIDE, QUERIES = 9, 6, 8
RECONSTRUCTIONS_OF_SEVERAL, INSIDE_OF_SEVERAL, QUERIES_OF_SEVERAL = 3, 3, 4
MOST_BAD = 30
MOST_NAME = 150  # bytes; file systems take 255, and a file is written under a longer name first


def report(
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    cache_dir: Path | None = None,
) -> Path:
    """Write the page and return its path.

    Pictures need the test images of the last `trivit evaluate`, neighbours also the features it left in the cache;
    what is missing is left out, and the page says why.

    Args:
        runs: folders of runs, or of scores that `evaluate` wrote to an `output`, of encoders that are no run (exports,
            timm models, files of other authors); several are compared side by side.
        output: the file, or a folder; None: report.html in the run, of several runs `report_with_OTHERS.html` in the
            first one, whose own report stays.
        cache_dir: where evaluation keeps features; None: the user's cache.

    Raises:
        EvaluationError: no run, a folder that is none, or nowhere to write.
    """
    if not runs:
        raise EvaluationError("name at least one run")
    loaded = unique_names([read_run(Path(run)) for run in runs])
    place = Path(output) if output is not None else loaded[0].path / file_name([run.name for run in loaded[1:]])
    if place.is_dir():
        place = place / "report.html"
    page = render(loaded, cache_dir)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_aside(place, page.encode())
    except OSError as error:
        raise EvaluationError(cannot_write(place, error)) from error
    return place


def file_name(others: Sequence[str]) -> str:
    """Of a report without a given place, in the folder of the first run; `others`: names of those beside it."""
    if not others:
        return "report.html"
    told = "_".join(others).replace("/", "_")
    if len(told.encode()) > MOST_NAME:
        told = f"{len(others)}_others_{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    return f"report_with_{told}.html"


def render(runs: Sequence[Run], cache_dir: Path | None = None) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("evaluation", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["one_decimal"] = one_decimal
    environment.globals["unusual_terms"] = unusual_terms
    names = [run.name for run in runs]
    single = len(runs) == 1
    rebuilt = RECONSTRUCTIONS if single else RECONSTRUCTIONS_OF_SEVERAL
    queries = QUERIES if single else QUERIES_OF_SEVERAL
    test_data = next((protocol["test"]["path"] for protocol in map(test_set, runs) if protocol), None)
    columns = curves(runs)
    same = {name: constant_words(name, each) for name, each in columns.items() if constant(each)}
    found = {name: each for name, each in columns.items() if name not in same}
    drawn = {name: Markup(draw_curves(name, each, names, guess_level(name, runs))) for name, each in found.items()}
    return environment.get_template("report.html.jinja").render(
        title=" · ".join(names),
        css=Markup((Path(__file__).parent / "report.css").read_text()),
        version=version("trivit"),
        made=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        runs=runs,
        verdicts=[(run, judge(run), [*data_words(run), *outdated(run)], facts(run)) for run in runs],
        trained=[run for run in runs if not run.scores_only],
        scores=score_table(runs),
        compared=run_comparisons(runs),
        further=[(run, rows, tables) for run, rows, tables in map(_further, runs) if rows or tables],
        attributes=[
            (run, rows, attribute_sentences(rows, no_verdict(run.results["attributes"])))
            for run in runs
            if (rows := attribute_rows(run.results))
        ],
        health=[(drawn[name], meaning_for(name, runs)) for name in NUMBERS if name in drawn],
        health_constants=[
            *(f"{same[name]} ({meaning_for(name, runs)})." for name in NUMBERS if name in same),
            *missing_words(runs),
        ],
        constants=[f"{words}." for name, words in same.items() if name not in NUMBERS],
        panels=[
            (panel, loss_words(runs) if name == "train/loss" else term_words(name, runs))
            for name, panel in drawn.items()
            if name not in NUMBERS
        ],
        with_curves={curve.run for each in columns.values() for curve in each},
        times=[(run, told.sentence, Markup(draw_time_shares(run))) for run in runs if (told := bottleneck(run))],
        reconstructions=[reconstruction_section(run, rebuilt, test_data) for run in runs],
        inside=[inside_sections(run, INSIDE if single else INSIDE_OF_SEVERAL, test_data) for run in runs],
        confused=[(run, confusions(run)) for run in runs if "zeroshot" in run.results],
        retrieval_words=retrieval_words,
        retrieved=[(run, retrieval_section(run)) for run in runs if "retrieval" in run.results],
        neighbours=[neighbour_section(run, queries, cache_dir) for run in runs],
        bad=[(run, bad_counts(run), run.bad[:MOST_BAD]) for run in runs],
        differences=differences(runs),
        protocols=[(run, protocols(run)) for run in runs],
    )


def _further(run: Run) -> tuple[Run, list[ProbeRow], list[ProbeTable]]:
    """Probes beside kNN and linear: those of one number as rows, the others as tables."""
    tables = probe_tables(run.results)
    named = {each.probe for each in tables}
    return run, [row for row in probe_rows(run.results) if row.name not in named], tables


def unique_names(runs: Sequence[Run]) -> list[Run]:
    """Runs of the same folder name get as much of their path as tells them apart; a run named twice is left out."""
    different = list({run.path.resolve(): run for run in runs}.values())
    for depth in range(1, 20):
        names = ["/".join(run.path.resolve().parts[-depth:]) for run in different]
        if len(set(names)) == len(names):
            break
    return [replace(run, name=name) for run, name in zip(different, names, strict=True)]
