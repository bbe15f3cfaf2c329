"""What jsonargparse has to say about a setting, in one line that tells what to write instead."""

import re
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import isclass, signature
from typing import Any, get_args, get_type_hints

TASKS = ("tasks.mae_task.MAETask", "tasks.dino_task.DINOTask", "tasks.clip_task.CLIPTask")
RECIPES = tuple(f"datamodules.recipes.{name}" for name in ("MAERecipe", "DINORecipe", "CLIPRecipe"))
_NOISE = (
    "Parser key", "Does not validate", "Subtypes:", "Errors:", "Given value type:", "Problem with given",
    "Given value: NestedArg", "Given value: {", "Expected a NoneType",
)  # fmt: skip


def shorten(message: str) -> str:
    """The cause in one line: jsonargparse reports a bad key inside a class as a union of every type that it tried."""
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    owner = re.findall(r"Problem with given class_path '([^']+)'", message)
    unknown = re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: (\S+)", message)
    if unknown:
        name = (unknown[1] or unknown[2]).split("=")[0].lstrip("-")
        where = f"{key}: {owner[-1]} has" if owner else "there is"
        return f"{where} no setting {name!r}{_did_you_mean(name, owner)}"
    value = re.search(r"(?:Given value|Got value): *(.+?)\s*$", message, re.MULTILINE)
    if value and not value[1].startswith(("{", "NestedArg", "Namespace")):
        given = {"True": "true", "False": "false"}.get(value[1], value[1])
        if owner and (example := _example(key, owner[-1])):
            return f"{key} takes settings, not {given}: {example}"
        if words := _words(message):
            return f"{key} must be one of {', '.join(words)}, not {given}"
    causes = []
    for line in message.splitlines():
        line = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line.strip(" -\t")).replace("typing.", "")
        if line and not line.startswith(_NOISE):
            causes.append(line.replace("Expected a ", "expected ").replace("Got value:", "got"))
    text = "; ".join(dict.fromkeys(causes))
    text = f"{text[:300]}..." if len(text) > 300 else text
    return ": ".join(part for part in (key, *owner[-1:], text) if part)


def help_of_a_mapping(arguments: list[str]) -> list[str] | None:
    """`--model.ibot.help` as jsonargparse wants it, behind the `--model.help` of a class that has it; None: not asked.

    A mapping within a mapping (`--model.ibot.head.help`) stands behind the help of that.
    """
    for argument in arguments:
        asked = re.fullmatch(r"--(model|data\.recipe)\.(?:init_args\.)?([\w.]+)\.help", argument)
        if asked is None or f"--{asked[1]}.help" in arguments:
            continue
        names = asked[2].split(".")
        for path in TASKS if asked[1] == "model" else RECIPES:
            if names[0] in signature(_class_at(path)).parameters:
                found = [f"--{asked[1]}.help", path]
                for n in range(1, len(names) + 1):
                    # Only of what may be null jsonargparse keeps the fields apart; and it skips the word behind a help.
                    if _may_be_null(_type_of(_class_at(path), ".".join(names[:n]))):
                        option = f"--{asked[1]}.{'.'.join(names[:n])}.help"
                        found += [option, option] if n < len(names) else [option]
                return found
    return None


def _words(message: str) -> list[str]:
    """All that the Literals of a type take; none where it takes other words, too."""
    others = re.findall(r"Expected a (?!(?:typing\.)?Literal|(?:<class ')?(?:NoneType|int)\b)", message)
    literals = re.findall(r"Expected a (?:typing\.)?Literal\[(.*?)\]", message)
    return [] if others else list(dict.fromkeys(w.strip(" '\"") for literal in literals for w in literal.split(",")))


def _did_you_mean(name: str, owner: list[str]) -> str:
    if not owner:
        return "; see trivit pretrain --help"
    parent, dot, leaf = name.rpartition(".")
    cls = _class_at(owner[-1])
    mapping = _dataclass_in(_type_of(cls, parent)) if parent else None
    known = list(signature(mapping or cls).parameters)
    within = [f"{each}.{leaf}" for each in known if leaf in _names(_dataclass_in(_type_of(mapping or cls, each)))]
    others = [path for path in (*TASKS, *RECIPES) if not parent and leaf in signature(_class_at(path)).parameters]
    told = f"; did you mean {' or '.join(within)}?" if within else ""
    if others:
        return f"{told}{' Alone it' if told else ', which'} is an option of {', '.join(others)}"
    if near := get_close_matches(leaf, known, n=1) or [each for each in known if each.startswith(leaf)]:
        return f"; did you mean {parent}{dot}{near[0]}?"
    return told or f"; it has {', '.join(known)}"


def _example(key: str, owner: str) -> str | None:
    """How a dataclass that `owner` takes under this key is given on the command line; None: it takes something else."""
    names = re.sub(r"^(model|data\.recipe)\.(init_args\.)?", "", key)
    found = _type_of(_class_at(owner), names) or _type_of(_class_at(owner), names.rpartition(".")[2])
    if (mapping := _dataclass_in(found)) is None:
        return None
    first, *rest = fields(mapping)
    value = "VALUE" if first.default is MISSING else first.default
    others = f" (also {', '.join(field.name for field in rest)}: --{key}.help)" if rest else ""
    null = ", or null" if _may_be_null(found) else ""
    return f'give --{key}.{first.name} {value}{others}, --{key} "{{}}" for the defaults{null}'


def _may_be_null(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _type_of(cls: Any, name: str) -> Any:
    """Annotation of a parameter, or by dots of a field of the dataclass that it is; None where there is none."""
    annotation: Any = cls
    for part in name.split("."):
        within = _dataclass_in(annotation) or annotation
        annotation = get_type_hints(within.__init__).get(part) if isclass(within) else None
    return annotation


def _dataclass_in(annotation: Any) -> Any:
    return next((each for each in (annotation, *get_args(annotation)) if isclass(each) and is_dataclass(each)), None)


def _names(mapping: Any) -> list[str]:
    return [] if mapping is None else [field.name for field in fields(mapping)]


def _class_at(path: str) -> Any:
    """The class of that name, None where there is none: what is said of it is all that is wrong then."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
