"""Which classes a zero-shot classifier takes for which: the pairs behind its score, and a picture of all of them."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.run_files import Run
from evaluation.svg import INK, figure, to_svg

MOST_PAIRS = 12
MOST_NAMES = 40


class Confusions(NamedTuple):
    """The most frequent mistakes (true class, taken for, images), and the whole matrix as SVG, empty without one.

    `classes`: top-1 in percent of each class and, where the matrix tells, its images; the worst first.
    """

    pairs: list[tuple[str, str, int]]
    picture: Any
    classes: list[tuple[str, float, int | None]]


def confusions(run: Run) -> Confusions:
    """What `zeroshot` left in the results of a run."""
    from markupsafe import Markup

    found = run.results["zeroshot"]
    pairs = [(str(true), str(taken), int(count)) for true, taken, count in found.get("confusions", [])[:MOST_PAIRS]]
    matrix = found.get("confusion")
    picture = Markup("" if matrix is None else draw_confusion(np.array(matrix), list(found["classes"])))
    images = {} if matrix is None else dict(zip(found["classes"], map(sum, matrix), strict=True))
    classes = [(str(name), float(top1), images.get(name)) for name, top1 in found.get("per_class", {}).items()]
    return Confusions(pairs, picture, sorted(classes, key=lambda each: each[1]))


def draw_confusion(matrix: NDArray[np.int64], classes: list[str]) -> str:
    """Images by true (row) and predicted class (column), [c c], as SVG: the darker, the larger the share of its row."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    with figure(420, 420) as (drawing, axes):
        rows, columns = np.nonzero(share)
        size = (300 / len(classes)) ** 2
        axes.scatter(columns, rows, s=size, c=INK, alpha=share[rows, columns], marker="s", linewidths=0)
        axes.set(xlim=(-0.5, len(classes) - 0.5), ylim=(len(classes) - 0.5, -0.5), aspect="equal")
        axes.set(xlabel="taken for", ylabel="class", title="Zero-shot confusion")
        axes.grid(False)
        named = range(len(classes)) if len(classes) <= MOST_NAMES else []
        small = {"fontsize": 7 if len(classes) > 15 else 9}
        axes.set_yticks(named, [classes[i][:16] for i in named], **small)
        axes.set_xticks(named, [classes[i][:16] for i in named], rotation=90, **small)
        return to_svg(drawing, "confusion of classes: most images should lie on the diagonal")
