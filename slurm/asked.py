"""What a command line of `trivit pretrain` asks for, as far as plain words and YAML tell: torch is not there to ask."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from slurm.errors import SlurmError

SHIPPED = Path(__file__).resolve().parent.parent / "configs"


class Asked:
    """The words of a command line, `--name value`, over the config that it names.

    Raises:
        SlurmError: no config, or one that is not there or no YAML.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = _separate(words)
        self._config = _read(self.word("--config", "give a YAML file or the name of a shipped one"))

    def word(self, name: str, advice: str = "") -> str:
        """The last one given on the command line; without `advice` it need not be given and is then empty."""
        given = [value for word, value in pairwise(self.words) if word == name]
        if advice and not given:
            raise SlurmError(f"{name} is missing: {advice}")
        return given[-1] if given else ""

    def tells(self, key: str) -> bool:
        """Whether what is asked for `key`, dotted, can be seen here.

        Not where a whole group is given (`--data "{...}"`) or several configs, which only the job will put together.
        """
        parts = key.split(".")
        groups = {"--" + ".".join(parts[:count]) for count in range(1, len(parts))}
        return not groups & set(self.words) and self.words.count("--config") == 1

    def value(self, key: str) -> Any:
        """Of `key`: from the command line, else from the config; None where neither says it, or it cannot be seen."""
        if not self.tells(key):
            return None
        if word := self.word(f"--{key}"):
            try:
                return yaml.safe_load(word)
            except yaml.YAMLError:
                return None
        found: Any = self._config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def text(self, key: str) -> str:
        """Of `key`, as it was written; empty where there is none to be seen."""
        return self.word(f"--{key}") or str(self.value(key) or "")

    def number(self, key: str) -> float | None:
        """`value`, if it is a positive number."""
        value = self.value(key)
        return value if isinstance(value, int | float) and value > 0 else None


def _separate(words: Sequence[str]) -> list[str]:
    """--name=value as two words."""
    result: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        result += [name, value] if equals and word.startswith("--") else [word]
    return result


def _read(config: str) -> Any:
    path = Path(config)
    if not path.is_file():
        path = SHIPPED / f"{config.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
        raise SlurmError(f"--config {config}: no such file, and no shipped config of that name ({shipped})")
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SlurmError(f"--config {config}: not valid YAML ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise SlurmError(f"--config {config} cannot be read: {error.strerror}") from error
