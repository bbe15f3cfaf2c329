"""`trivit evaluate` and `trivit report`."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pretrain.commands import Commands, add_command


def add_evaluate(commands: Commands) -> None:
    """Scores of an encoder."""
    evaluate = add_command(commands, "evaluate", _evaluate, "score an encoder with probes")
    evaluate.add_argument("source", metavar="RUN_OR_CHECKPOINT")
    evaluate.add_argument("--train", metavar="DIR", help="labelled tars or class folders to learn from (knn, linear)")
    evaluate.add_argument("--test", metavar="DIR", help="labelled tars or class folders to score on")
    evaluate.add_argument(
        "--suite", metavar="FILE", help="instead of --train, --test and --probes: a YAML or TSV that names tasks"
    )
    evaluate.add_argument(
        "--probes",
        help="comma-separated: knn,linear (default), few_shot, label_free, attributes, linear_paper, linear_mae, "
        "attentive, finetune, corruptions, segmentation, localisation; for a CLIP also zeroshot, retrieval",
    )
    evaluate.add_argument(
        "--pool", choices=("cls", "mean", "cls+mean"), help="tokens that are probed (default: as the run says)"
    )
    evaluate.add_argument(
        "--image-size",
        type=_pixels,
        metavar="N",
        help="side of the images in pixels (default: as the encoder was trained)",
    )
    evaluate.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of the features (default float32)"
    )
    evaluate.add_argument(
        "--templates", metavar="FILE", help="of zeroshot: imagenet (80), simple (7), or a file with {} for the name"
    )
    evaluate.add_argument("--class-names", metavar="FILE", help="of zeroshot: a table of what the classes are called")
    evaluate.add_argument(
        "--class-fields",
        metavar="NAMES",
        help="of zeroshot: comma-separated fields of the samples' .json; the classes are all combinations of values",
    )
    evaluate.add_argument(
        "--captions",
        metavar="WHERE",
        help="of retrieval: txt, json:FIELD, or templates with the classes' names (default: as the run was trained)",
    )
    evaluate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="options",
        help="a setting of a probe, such as ks=5,10 or few_shot.draws=3 (repeat it for several)",
    )
    evaluate.add_argument(
        "--no-floors", action="store_true", help="leave out raw pixels and the untrained encoder, the same for all runs"
    )
    evaluate.add_argument(
        "--drop-unknown-classes",
        action="store_true",
        help="leave test images out whose class train lacks, and say how many (default: refuse)",
    )
    evaluate.add_argument("--output", metavar="DIR", help="where results.json goes (default: the run)")
    evaluate.add_argument(
        "--by-step", action="store_true", help="of a run that trains: to RUN/evaluations/step_N, once a checkpoint"
    )


def _pixels(text: str) -> int:
    """A side of images; argparse puts the option's name before what is wrong."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of pixels: give 1 or more")
    return int(text)


def _evaluate(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from evaluation.probe_options import with_options
    from evaluation.probes import ProbeSettings

    how = {name: getattr(arguments, name) for name in ("output", "pool", "image_size", "precision")}
    how["drop_unknown_classes"] = arguments.drop_unknown_classes
    how["floors"] = not arguments.no_floors
    if arguments.suite is not None:
        from evaluation.score_suite import evaluate_suite

        of_tasks = ("train", "test", "probes", "templates", "class_names", "class_fields", "captions")
        if arguments.by_step:
            arguments.parser.error("--by-step is for one task: leave --suite out")
        if given := [name for name in of_tasks if getattr(arguments, name) is not None]:
            arguments.parser.error(f"--{given[0].replace('_', '-')} is for one task: the file of --suite says it")
        found = evaluate_suite(arguments.source, arguments.suite, settings=arguments.options, **how)
        return 1 if found.get("failed") else 0
    if arguments.test is None:
        arguments.parser.error("give --test, or --suite")
    probes = "knn,linear" if arguments.probes is None else arguments.probes
    if not probes.strip(", "):
        arguments.parser.error("--probes names none: give one, or leave it out for knn,linear")
    from evaluation.together import evaluate_together

    score: Callable[..., object] = partial(evaluate_together, arguments.source)
    if arguments.by_step:
        from pretrain.evaluate_steps import evaluate_step

        if how.pop("output") is not None:
            arguments.parser.error("--by-step says itself where the results go: leave --output out")
        score = partial(evaluate_step, Path(arguments.source), evaluate_together)
    score(
        train=arguments.train,
        test=arguments.test,
        probes=tuple(filter(None, map(str.strip, probes.split(",")))),
        settings=with_options(ProbeSettings(), arguments.options),
        templates=arguments.templates,
        class_names=arguments.class_names,
        class_fields=arguments.class_fields and [name.strip() for name in arguments.class_fields.split(",")],
        captions=arguments.captions,
        **how,
    )
    return 0


def add_report(commands: Commands) -> None:
    """A page of what came of runs."""
    report = add_command(commands, "report", _report, "one self-contained report.html for one or several runs")
    report.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="folders of runs, or what `trivit evaluate ... --output DIR` wrote of an encoder that is no run",
    )  # fmt: skip
    report.add_argument(
        "--output",
        metavar="FILE",
        help="default: report.html in the run; of several, report_with_OTHERS.html in the first",
    )


def _report(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from evaluation.report import report

    print(report(arguments.runs, output=arguments.output))
    return 0
