"""`--set NAME=VALUE`: settings of the probes as a user writes them, `ks=5,10`, `few_shot.draws=3`."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import yaml

from evaluation.errors import EvaluationError
from evaluation.probes import ProbeSettings

NOT_SETTINGS = ("device", "progress")
Config = TypeVar("Config")


def with_options(settings: ProbeSettings, pairs: Sequence[str]) -> ProbeSettings:
    """The settings with some changed; several numbers are separated by commas.

    Raises:
        EvaluationError: no such setting, or a value of another kind than it has.
    """
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found:
            raise EvaluationError(f"--set {pair}: give NAME=VALUE, such as ks=5,10 or few_shot.draws=3")
        settings = _changed(settings, name.strip().split("."), value.strip(), name.strip())
    return settings


def setting_names(settings: Any, prefix: str = "") -> list[str]:
    """Every name that `--set` takes."""
    names: list[str] = []
    for field in fields(settings):
        if field.name in NOT_SETTINGS:
            continue
        value = getattr(settings, field.name)
        inner = is_dataclass(value) and not isinstance(value, type)
        names += setting_names(value, f"{prefix}{field.name}.") if inner else [prefix + field.name]
    return names


def _changed(config: Config, path: list[str], text: str, name: str) -> Config:
    head, rest = path[0], path[1:]
    known = [field.name for field in fields(config) if field.name not in NOT_SETTINGS]  # type: ignore[arg-type]
    if head not in known:
        raise EvaluationError(f"--set {name}: there is no {head}, but {', '.join(known)}")
    old = getattr(config, head)
    if is_dataclass(old) and not isinstance(old, type):
        if not rest:
            inner = ", ".join(f"{head}.{field.name}" for field in fields(old))
            raise EvaluationError(f"--set {name}: say which of {inner}")
        return replace(config, **{head: _changed(old, rest, text, name)})  # type: ignore[type-var]
    if rest:
        raise EvaluationError(f"--set {name}: {head} has no {rest[0]}")
    return replace(config, **{head: _value(text, old, name, head)})  # type: ignore[type-var]


def _value(text: str, old: Any, name: str, head: str) -> Any:
    if isinstance(old, str):
        return text  # as it is: YAML would see a date in one and nothing in ''
    several = isinstance(old, tuple | list) or head == "ks"
    try:
        parts = (
            [yaml.safe_load(part) for part in text.split(",") if part.strip()] if several else [yaml.safe_load(text)]
        )
    except yaml.YAMLError as error:
        raise EvaluationError(f"--set {name}={text} cannot be read") from error
    kind: type = type(old[0]) if several and old else int if several else type(old)
    values = [_number(part) if kind in (int, float) else part for part in parts]
    values = [float(value) if kind is float and type(value) is int else value for value in values]
    if any(type(value) is not kind for value in values) or not (values or several):
        raise EvaluationError(f"--set {name}={text}: it takes {'several of ' if several else ''}{kind.__name__}")
    return tuple(values) if several else values[0]


def _number(value: Any) -> Any:
    """YAML takes 1e-3 for a text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
