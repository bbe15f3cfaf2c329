"""From the classes of a data set to texts: what classes are called, put into templates."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.class_names import read_class_names, refuse_codes
from evaluation.errors import EvaluationError

PLAIN = ("a photo of a {}.",)
_IMAGENET_CLASSES = 1000


class Prompts(NamedTuple):
    """Texts, the class of each (int64 [p]), what people call each class, and how the texts were made.

    `called` has the first name of each class; the classes themselves where such names would be the same.
    """

    texts: list[str]
    classes: NDArray[np.int64]
    called: tuple[str, ...]
    templates: tuple[str, ...]
    names: str


def make_prompts(
    classes: Sequence[str], templates: str | Sequence[str] | None = None, class_names: str | None = None
) -> Prompts:
    """Every template with every name of every class; a class's synonyms count alike.

    Args:
        classes: as the data set calls them.
        templates: `imagenet` (the 80 of CLIP), `simple` (7 of them), a file with one template on each line, or the
            templates themselves; {} stands for the name. None: "a photo of a {}.".
        class_names: a table, see `read_class_names`; None: the classes' own names, and for the 1,000 WordNet codes of
            ImageNet-1k the names that open_clip gives them.

    Raises:
        EvaluationError: no classes, or templates that are none.
        DataError: a table that does not name every class, or classes that have codes of WordNet for names.
    """
    if not classes:
        raise EvaluationError(
            "zero-shot needs the names of the classes, but the test data has none: class folders have"
        )
    if class_names is not None:
        names, told = read_class_names(class_names, classes), class_names
    elif len(classes) == _IMAGENET_CLASSES and all(len(c) == 9 and c[0] == "n" and c[1:].isdigit() for c in classes):
        from open_clip import IMAGENET_CLASSNAMES

        place = {code: i for i, code in enumerate(sorted(classes))}  # its order is that of the codes
        names, told = [[IMAGENET_CLASSNAMES[place[code]]] for code in classes], "open_clip's ImageNet names"
    else:
        names, told = [[name.replace("_", " ")] for name in classes], "as in the data set"
    refuse_codes(names)
    chosen = read_templates(templates)
    pairs = [(template.replace("{}", name), i) for i, each in enumerate(names) for name in each for template in chosen]
    called = tuple(each[0] for each in names)
    called = called if len(set(called)) == len(called) else tuple(classes)
    return Prompts([text for text, _ in pairs], np.array([i for _, i in pairs], np.int64), called, chosen, told)


def read_templates(templates: str | Sequence[str] | None) -> tuple[str, ...]:
    """The templates that `make_prompts` is told; EvaluationError when they are none."""
    if templates is None:
        return PLAIN
    if templates in ("imagenet", "simple"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        lists = {"imagenet": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
        return tuple(template("{}") for template in lists[str(templates)])
    if isinstance(templates, str):
        try:
            lines = Path(templates).expanduser().read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise EvaluationError(f"the templates {templates} are no UTF-8 text: save them as such") from error
        except OSError as error:
            raise EvaluationError(
                f"cannot read the templates {templates} ({error.strerror}): give imagenet, simple, or a file with one "
                "template on each line"
            ) from error
        templates = [line.strip() for line in lines if line.strip()]
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise EvaluationError(
            f"the template {wrong[0]!r} must have exactly one {{}} for the name of the class" if wrong
            else "there are no templates: give one on each line, with {} for the name of the class"
        )  # fmt: skip
    return tuple(templates)
