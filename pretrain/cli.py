"""The `trivit` command: one parser, no heavy import before a command has been chosen.

Exit codes: 0 done, 1 findings or failure, 2 the user's input, 99 please requeue, 130 interrupted (saved).
"""

import argparse
import errno
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

ROOMS_WITH_ERRORS = ("pretrain", "evaluation", "tasks", "datamodules", "slurm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `trivit` command and return its exit code; a user's mistake becomes one line on stderr and code 2.

    Args:
        argv: of a caller that goes on afterwards; None: the command line of this process, which ends with it.
    """
    try:
        arguments, rest = build_parser().parse_known_args(argv)
        if rest and not arguments.takes_rest:
            arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.last = argv is None
        return int(arguments.run(arguments, rest) or 0)
    except KeyboardInterrupt as interrupt:
        told = str(interrupt) or "interrupted; the same command goes on or begins anew"
        print(f"trivit: {told}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        line = user_message(error)
        if line is None:
            raise
        rank = import_module("pretrain.run_directory").launched_rank()
        if rank == 0:
            print(f"trivit: {line}", file=sys.stderr)
        elif not getattr(error, "told_once", False):
            print(f"trivit: rank {rank} on {platform.node()}: {line}", file=sys.stderr)
        return getattr(error, "exit_code", 2)


def user_message(error: Exception) -> str | None:
    """The line for a mistake that a user can repair, or None when the error is a bug of ours."""
    kinds = [import_module(f"{room}.errors") for room in ROOMS_WITH_ERRORS]
    names = ("RunError", "EvaluationError", "TaskError", "DataError", "SlurmError")
    known = tuple(getattr(kind, name) for kind, name in zip(kinds, names, strict=True))
    if isinstance(error, known):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.filename or 'while writing'}); free some space and run the same command again"
    if isinstance(error, PermissionError):
        return f"permission denied: {error.filename}"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{error.filename} lies on a disk that can only be read: name another --output"
    return None


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, not under the usage of a whole command."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"trivit: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options; `pretrain` keeps its own (LightningCLI), shown by `trivit pretrain --help`."""
    parser: argparse.ArgumentParser = Parser(
        prog="trivit", description="Pretrain Vision Transformers without labels, and say honestly how good they are."
    )
    parser.add_argument("--version", action="version", version=f"trivit {version('trivit')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_shards(commands)
    _add_pretrain(commands)
    _add_evaluate(commands)
    _add_report(commands)
    _add_export(commands)
    _add_tokenizer(commands)
    _add_slurm(commands)
    _add_doctor(commands)
    return parser


Run = Callable[[argparse.Namespace, list[str]], int | None]


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: Run, text: str, rest: bool = False
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", add_help=not rest)
    parser.set_defaults(run=run, takes_rest=rest, parser=parser)
    return parser


def _add_shards(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    shards = commands.add_parser("shards", help="write, check and look at tar shards")
    kinds = shards.add_subparsers(title="commands", required=True, metavar="COMMAND")

    synth = _command(kinds, "synth", _synth, "draw captioned, labelled images with masks by a program")
    synth.add_argument("directory", metavar="DIR")
    synth.add_argument("--samples", type=int, default=20_000)
    synth.add_argument("--size", type=int, default=64, help="pixels per side (default 64)")
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument(
        "--split", default="all", help="train, test or test_unseen leave pairs of shape and colour out (default: all)"
    )
    synth.add_argument(
        "--only",
        metavar="NAME=VALUE,...",
        default="",
        help="what all images have, as background=gradient: size, place, texture, background, rotation",
    )
    synth.add_argument("--samples-per-shard", type=int, help="default 1,000; fewer for a small set")

    pack = _command(kinds, "pack", _pack, "pack class folders, a flat folder, a tar of either, or a table into shards")
    pack.add_argument("source", metavar="SRC", help="a folder, a .tar, or a table of paths (.csv .tsv .jsonl .parquet)")
    pack.add_argument("directory", metavar="DIR")
    pack.add_argument("--resize", type=int, help="shorter side in pixels (default: bytes stay as they are)")
    pack.add_argument("--quality", type=int, default=90, help="JPEG quality when resizing (default 90)")
    pack.add_argument("--captions", help="table of file names and captions (default: the .txt, .json beside images)")
    for column in ("image", "caption", "label"):
        pack.add_argument(f"--{column}-column", metavar="NAME", help="of the table SRC (default: guessed, and said)")
    pack.add_argument("--samples-per-shard", type=int, help="default 1,000; fewer for a small set, so that cores share")
    pack.add_argument("--extend", action="store_true", help="add to the set in DIR; its shards and labels stay")

    verify = _command(kinds, "verify", _verify, "read everything and tell what is wrong and where (exit code 1)")
    verify.add_argument("directory", metavar="DIR")

    inspect = _command(kinds, "inspect", _inspect, "counts, sizes, keys and a contact sheet")
    inspect.add_argument("directory", metavar="DIR")
    inspect.add_argument("--sheet", help="where to write the contact sheet (default DIR/contact_sheet.png)")

    stats = _command(kinds, "stats", _stats, "mean and standard deviation of each channel, for --data.mean and .std")
    stats.add_argument("directory", metavar="DIR")
    stats.add_argument("--samples", type=int, default=10_000, help="images to read, drawn at random (default 10,000)")
    stats.add_argument("--channels", type=int, default=3, help="of the images (default 3)")
    stats.add_argument("--bits", type=int, default=8, choices=(8, 16), help="of a channel (default 8)")


def _add_pretrain(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    _command(commands, "pretrain", _pretrain, "train an encoder; the same command with the same output resumes", True)


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluate = _command(commands, "evaluate", _evaluate, "score an encoder with probes")
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


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    report = _command(commands, "report", _report, "one self-contained report.html for one or several runs")
    report.add_argument("runs", nargs="+", metavar="RUN")
    report.add_argument(
        "--output",
        metavar="FILE",
        help="default: report.html in the run; of several, report_with_OTHERS.html in the first",
    )


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    export = _command(
        commands, "export", _export, "write the encoder of a run or checkpoint for others, and read it back"
    )
    export.add_argument("source", metavar="CHECKPOINT")
    export.add_argument("output", metavar="OUT", help="a name.safetensors or name.onnx; a folder for timm, open_clip")
    export.add_argument(
        "--format",
        choices=["safetensors", "timm", "onnx", "open_clip"],
        default="safetensors",
        help="default safetensors; timm: a folder for timm.create_model; open_clip: a folder, both towers of a CLIP",
    )
    export.add_argument(
        "--whole",
        action="store_true",
        help="not the encoder alone: heads, teacher, student, decoder, texts (safetensors)",
    )


def _add_tokenizer(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tokenizer = commands.add_parser("tokenizer", help="a vocabulary of your own for CLIP")
    kinds = tokenizer.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train = _command(kinds, "train", _train_tokenizer, "learn a vocabulary (byte-level BPE) from the captions of a set")
    train.add_argument("source", metavar="SHARDS", help="shards, or images with texts beside them")
    train.add_argument("output", metavar="OUT", help="the file to write, NAME.json; for --model.text.tokenizer")
    train.add_argument("--size", type=int, default=8192, help="at most so many ids (default 8,192)")
    train.add_argument("--captions", metavar="WHERE", help="txt (default; else captions in .json) or json:FIELD")
    train.add_argument(
        "--clean",
        choices=("lower", "canonicalize", "whitespace"),
        default="lower",
        help="small letters (default), also without punctuation, or as they are; as --model.text.clean",
    )


def _add_slurm(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from slurm.submit import add_options

    slurm = commands.add_parser("slurm", help="run on a SLURM cluster")
    kinds = slurm.add_subparsers(title="commands", required=True, metavar="COMMAND")
    submit = _command(
        kinds,
        "submit",
        _submit,
        "write the batch script of a run and submit it; what is not listed here goes to trivit pretrain",
    )
    submit.set_defaults(takes_rest=True)
    submit.allow_abbrev = False  # or --acc would not reach trivit pretrain
    add_options(submit)


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from pretrain.doctor_options import add_options

    doctor = _command(
        commands,
        "doctor",
        _doctor,
        "what is here, what a run will need, what is wrong with it; what is not listed here is of trivit pretrain",
    )
    doctor.set_defaults(takes_rest=True)
    doctor.allow_abbrev = False
    add_options(doctor)


def _synth(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from datamodules.synth import synth

    pairs = [pair.partition("=") for pair in arguments.only.split(",") if pair]
    synth(
        arguments.directory,
        samples=arguments.samples,
        size=arguments.size,
        seed=arguments.seed,
        split=arguments.split,
        only=[(name.strip(), value.strip()) for name, _, value in pairs],
        samples_per_shard=arguments.samples_per_shard,
    )
    return 0


def _pack(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from datamodules.pack import pack

    pack(
        arguments.source,
        arguments.directory,
        resize=arguments.resize,
        quality=arguments.quality,
        captions=arguments.captions,
        columns={"image": arguments.image_column, "caption": arguments.caption_column, "label": arguments.label_column},
        samples_per_shard=arguments.samples_per_shard,
        extend=arguments.extend,
    )
    return 0


def _verify(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from datamodules.verify import verify_command

    return verify_command(arguments.directory)


def _inspect(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from datamodules.inspect_shards import inspect_command

    return inspect_command(arguments.directory, sheet=arguments.sheet)


def _stats(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from datamodules.stats import stats_command

    return stats_command(
        arguments.directory, samples=arguments.samples, channels=arguments.channels, bits=arguments.bits
    )


def _pretrain(arguments: argparse.Namespace, rest: list[str]) -> int | None:
    # Or torch prints its own stack at each try to reach a rank that is not there; `watchdog` tells it in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from pretrain.run import pretrain_command

    return pretrain_command(rest, arguments.last)


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


def _report(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from evaluation.report import report

    print(report(arguments.runs, output=arguments.output))
    return 0


def _export(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from tasks.export import export

    done = export(arguments.source, arguments.output, arguments.format, whole=arguments.whole)
    print(arguments.output)
    print(f"reloaded: largest difference {done.difference:.1e} of {done.what}")
    return 0


def _doctor(arguments: argparse.Namespace, rest: list[str]) -> int | None:
    from pretrain.doctor import doctor

    return doctor(arguments, rest)


def _train_tokenizer(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from pretrain.train_tokenizer import tokenizer_command

    tokenizer_command(arguments.source, arguments.output, arguments.size, arguments.captions, arguments.clean)
    return 0


def _submit(arguments: argparse.Namespace, rest: list[str]) -> int | None:
    from pretrain.run_place import check_before_queue
    from slurm.submit import submit

    return submit(arguments, rest, check_before_queue)


if __name__ == "__main__":
    sys.exit(main())
