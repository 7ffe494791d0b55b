"""Draw figures as SVG that takes its ink from the page around it, so that it reads on light and on dark."""

import io
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"  # replaced by the page's own text colour


def figure(height: float) -> tuple[Figure, Axes]:
    """One empty drawing, ``height`` inches high."""
    drawing = Figure(figsize=(8, height), layout="constrained")
    axes = drawing.subplots()
    style(axes)
    return drawing, axes


def style(axes: Axes) -> None:
    """Only the lines that are needed, in the page's ink."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def svg(figure: Figure, name: str, description: str) -> str:
    """``figure`` as text to put into a page; ``description`` is what a screen reader says."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # the same names in every drawing, and nothing refers to them
    # Inside a page names of namespaces mean nothing, and without them no address stands in it.
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r' xmlns(:\w+)?="[^"]*"', "", drawing)
    text = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return drawing.replace("<svg", f'<svg role="img" aria-label="{text}"', 1)
