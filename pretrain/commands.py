"""How a command of `trivit` is told to its parser: beside what it does, which imports what it needs when it runs."""

import argparse
from collections.abc import Callable
from typing import NoReturn, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace, list[str]], int | None]
"""Its options, and the words that are no option of it -> exit code, or None for 0."""


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, not under the usage of a whole command."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"trivit: {message}; see {self.prog} --help\n")


def add_command(commands: Commands, name: str, run: Run, text: str, rest: bool = False) -> argparse.ArgumentParser:
    """A command `name` that calls `run`; `text` begins small. With `rest`, words it does not know are handed on."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", add_help=not rest)
    parser.set_defaults(run=run, takes_rest=rest, parser=parser)
    return parser


def add_group(commands: Commands, name: str, text: str) -> Commands:
    """A command that is made of others."""
    group = commands.add_parser(name, help=text)
    return group.add_subparsers(title="commands", required=True, metavar="COMMAND")
