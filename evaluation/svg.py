"""Matplotlib figures as inline SVG that takes its colours from the page, so that they follow light, dark and print."""

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INK, FAINT = "#0a0b01", "#0a0b02"
SERIES = ("#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14", "#0a0b15", "#0a0b16")
_VARIABLES = {INK: "--ink", FAINT: "--rule", **{colour: f"--series-{i}" for i, colour in enumerate(SERIES, 1)}}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trivit",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
}


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """A figure of that many CSS pixels with one axes, in the style of the report; drawn without a display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        drawing = Figure(figsize=(width / 72, height / 72), layout="constrained")
        FigureCanvasSVG(drawing)
        yield drawing, drawing.subplots()


def to_svg(drawing: Any, label: str) -> str:
    """The figure as an <svg> element without ids that could collide, links or metadata; `label` is read aloud."""
    file = io.StringIO()
    drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\sid="[\w.]*_\d+"', "", text)  # figure_1, axes_1, ...; what is referred to has a hash instead
    own = hashlib.sha256(label.encode()).hexdigest()[:6]
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{own}", text)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1
    )
    text = text.replace("sans-serif", "inherit")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()
