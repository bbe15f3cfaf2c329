"""The `trivit` command: one parser, no heavy import before a command has been chosen.

Exit codes: 0 done, 1 findings or failure, 2 the user's input, 99 please requeue, 130 interrupted (saved).
"""

import argparse
import errno
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from pretrain.commands import Parser
from pretrain.evaluate_commands import add_evaluate, add_report
from pretrain.export_commands import add_export, add_tokenizer
from pretrain.run_commands import add_doctor, add_pretrain, add_slurm
from pretrain.shard_commands import add_shards

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


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options; `pretrain` keeps its own (LightningCLI), shown by `trivit pretrain --help`."""
    parser: argparse.ArgumentParser = Parser(
        prog="trivit", description="Pretrain Vision Transformers without labels, and say honestly how good they are."
    )
    parser.add_argument("--version", action="version", version=f"trivit {version('trivit')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_shards(commands)
    add_pretrain(commands)
    add_evaluate(commands)
    add_report(commands)
    add_export(commands)
    add_tokenizer(commands)
    add_slurm(commands)
    add_doctor(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
