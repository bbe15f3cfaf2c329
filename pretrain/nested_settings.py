"""Settings that are mappings (an encoder, a head) on the command line: nulls in them, and what stays of the config's.

A mapping changes the settings that it names and leaves the others as `--config` has them, as jsonargparse does with
all mappings: `--model.encoder "{depth: 4}"` is `--model.encoder.depth 4`. What stays is told, so that nobody trains a
mix of two encoders unawares.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace


def spell_nulls(arguments: list[str]) -> list[str]:
    """`--model.encoder.width null` as `--model.encoder {width: null}`: jsonargparse makes a text of the former."""
    joined: list[str] = []
    for argument in arguments:
        if argument == "null" and joined and re.fullmatch(r"--[\w.]+", joined[-1]):
            joined[-1] += "=null"
        else:
            joined.append(argument)
    nested = re.compile(r"(--model\.(?!init_args\.\w+=).+)\.(\w+)=null")
    return [nested.sub(r"\1={\2: null}", argument) for argument in joined]


def leave_out_sizes(config: Namespace, arguments: list[str]) -> list[str]:
    """A timm model that is chosen on the command line takes the place of the encoder that the config describes.

    Args:
        config: width, depth and heads of its encoder become None, but for those on the command line.
        arguments: of the command line.

    Returns:
        What was taken out.
    """
    encoder = config.get("model.init_args.encoder")
    given = {leaf for path, value in _settings(arguments) for leaf in _leaves(path, value)}
    if encoder is None or "model.encoder.arch" not in given or not encoder.arch.startswith("timm:"):
        return []
    sizes = ("width", "depth", "heads")
    left_out = [name for name in sizes if f"model.encoder.{name}" not in given and encoder[name] is not None]
    for name in left_out:
        encoder[name] = None
    return left_out


def what_stays(resolved: dict[str, Any], arguments: list[str]) -> list[str]:
    """A line for each mapping on the command line beside which settings of a config file stay as they are.

    Args:
        resolved: the whole config, as plain values.
        arguments: of the command line, with the paths of the config files.
    """
    settings = list(_settings(arguments))
    given = [leaf for path, value in settings for leaf in _leaves(path, value)]
    files = [yaml.safe_load(Path(value).read_text()) for path, value in settings if path in ("config", "c")]
    lines = []
    for path, value in settings:
        if not isinstance(value, dict):
            continue
        stays = dict[str, Any]()
        for file in files:
            for leaf in _leaves("", _at(file, path)):
                here = _at(resolved, f"{path}{leaf}")
                named = any(f"{path}{leaf}.".startswith(f"{other}.") for other in given)
                # Of another class those settings stay that it has, too.
                if not named and leaf != ".class_path" and here == _at(file, f"{path}{leaf}"):
                    stays[leaf.removeprefix(".")] = here
        if stays:
            names = ", ".join(leaf.removeprefix(".") for leaf in _leaves("", value)) or "nothing"
            rest = ", ".join(f"{name} {_words(kept)}" for name, kept in stays.items())
            lines.append(f"--{path} sets {names}; what else --config says of it stays: {rest}")
    return lines


def _settings(arguments: list[str]) -> Iterator[tuple[str, Any]]:
    """Name (without `init_args`) and value of each option; of a mapping the dict."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option = re.fullmatch(r"--?([\w.]+)(?:=(.*))?", argument, re.DOTALL)
        if option is None:
            continue
        text = following if option[2] is None else option[2]
        value: Any = text
        if text.lstrip().startswith("{"):
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                continue  # jsonargparse has said so, or it is a text
        yield option[1].replace(".init_args", ""), value


def _leaves(path: str, value: Any) -> list[str]:
    """Names (without `init_args`) of all settings in a mapping of mappings, each behind `path` and a dot."""
    if not isinstance(value, dict):
        return [path]
    below = ((path if name == "init_args" else f"{path}.{name}", inner) for name, inner in value.items())
    return [leaf for name, inner in below for leaf in _leaves(name, inner)]


def _at(tree: Any, path: str) -> Any:
    """The value of a setting in a config, past any `init_args`; {} where there is none."""
    for name in path.split("."):
        if isinstance(tree, dict) and name not in tree:
            tree = tree.get("init_args")
        if not isinstance(tree, dict) or name not in tree:
            return {}
        tree = tree[name]
    return tree


def _words(value: Any) -> str:
    return "null" if value is None else str(value)
