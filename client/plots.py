"""Draw what an owner's data has cost, and what runs to come would."""

import io
import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from client.statement import Statement, as_number
from shared.drawing import INK, figure, style, svg
from shared.page import templates
from shared.privacy.planning import PlanPoint

_BLUE, _RED = "#2f86d6", "#d2453b"
_COLOURS = (_BLUE, "#d08a1d", "#9b6fc4", "#3f9d74", "#7c8794", "#b35c8b", "#5c9fb3", "#a08a3c")
_STYLES = ("-", "--", ":", "-.")


def spending(points: Sequence[tuple[datetime, float]], *, ceiling: float | None) -> str:
    """Epsilon after charges, over time; where it is infinite, the line ends."""
    drawing, axes = figure(2.8)
    finite = [(when, epsilon) for when, epsilon in points if math.isfinite(epsilon)]
    if finite:
        times, values = zip(*finite, strict=True)
        # Charged means spent from that moment on: a line between two points would say less than that.
        axes.step([times[0], *times], [0.0, *values], where="post", color=_BLUE, linewidth=2.2)
        axes.fill_between([times[0], *times], [0.0, *values], step="post", color=_BLUE, alpha=0.15, linewidth=0)
        axes.plot(times[-1], values[-1], "o", color=_BLUE, markersize=7)
        axes.annotate(
            f"{as_number(values[-1])}",
            (times[-1], values[-1]),
            (-6, 7),
            textcoords="offset points",
            ha="right",
            color=INK,
            fontsize=9,
        )
        if times[-1] - times[0] < timedelta(hours=1):
            axes.set_xlim(times[0] - timedelta(hours=1), times[-1] + timedelta(hours=1))
    if ceiling is not None:
        _line(axes, ceiling, f"ceiling {ceiling:g}")
    axes.set_ylim(0, 1.15 * max([ceiling or 0.0, *(epsilon for _, epsilon in finite), 0.1]))
    axes.set_ylabel("ε spent")
    locator = AutoDateLocator(minticks=3, maxticks=7)
    axes.xaxis.set_major_locator(locator)
    formatter = ConciseDateFormatter(locator)
    axes.xaxis.set_major_formatter(formatter)
    axes.xaxis.get_offset_text().set_color(INK)
    last = as_number(points[-1][1]) if points else "0"
    return svg(drawing, "spending", f"Epsilon spent over time, now {last}, ceiling {ceiling or 'none'}.")


def plan_png(points: Sequence[PlanPoint], *, statement: Statement, verdict: str) -> bytes:
    """The plot of :func:`plan_page` as a picture."""
    drawing = _plan(points, spent=statement.spent, ceiling=statement.ceiling)
    content = io.BytesIO()
    drawing.savefig(content, format="png", dpi=150, facecolor="white", metadata={"Description": verdict})
    return content.getvalue()


def plan_page(points: Sequence[PlanPoint], *, statement: Statement, verdict: str) -> bytes:
    """Epsilon for life against rounds, for every noise and rate, as a page that loads nothing."""
    drawing = _plan(points, spent=statement.spent, ceiling=statement.ceiling)
    text = f"Epsilon for life after a run, against its rounds. {verdict}"
    page = (
        templates(Path(__file__).parent)
        .get_template("plan.html")
        .render(
            data_source=statement.data_source,
            verdict=verdict,
            spent=as_number(statement.spent),
            ceiling="none" if statement.ceiling is None else f"{statement.ceiling:g}",
            delta=f"{statement.delta:g}",
            warnings=statement.warnings,
            plot=Markup(svg(drawing, "plan", text)),
        )
    )
    return page.encode()


def _plan(points: Sequence[PlanPoint], *, spent: float, ceiling: float | None) -> Figure:
    """Each curve begins at what is spent, which is the price of no rounds at all."""
    drawing = Figure(figsize=(8, 4.2), layout="constrained")
    axes = drawing.subplots()
    style(axes)
    curves: dict[tuple[float, float], list[tuple[int, float]]] = {}
    for point in points:
        curves.setdefault((point.noise_multiplier, point.sample_rate), []).append((point.rounds, point.epsilon_after))
    noises, rates = sorted({noise for noise, _ in curves}), sorted({rate for _, rate in curves})
    for (noise, rate), curve in sorted(curves.items()):
        finite = [(rounds, epsilon) for rounds, epsilon in sorted([(0, spent), *curve]) if math.isfinite(epsilon)]
        if len(finite) > 1:
            axes.plot(
                *zip(*finite, strict=True),
                linestyle=_STYLES[rates.index(rate) % len(_STYLES)],
                color=_COLOURS[noises.index(noise) % len(_COLOURS)],
                linewidth=2,
                marker="o",
                markersize=4,
                label=f"noise {noise:g}, rate {rate:g}",
            )
    known = [epsilon for epsilon in (spent, *(point.epsilon_after for point in points)) if math.isfinite(epsilon)]
    top = 1.1 * max([*known, 0.1])
    if ceiling is not None:
        # The dearest plans would press all that fits into the lowest line.
        top = min(max(top, 1.15 * ceiling), 1.8 * ceiling)
        if spent < ceiling:
            axes.axhspan(spent, ceiling, color=_BLUE, alpha=0.08, linewidth=0)
        _line(axes, ceiling, f"ceiling {ceiling:g}")
    if math.isfinite(spent) and spent > 0:
        axes.axhline(spent, color=INK, linewidth=0.9, linestyle=":")
        _name(axes, spent, f"spent {as_number(spent)}", colour=INK, above=False)
    axes.set_ylim(0, top)
    axes.set_xlim(left=0)
    axes.set_xlabel("rounds of the run")
    axes.set_ylabel("ε for life once it is over")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, labelcolor=INK, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=3.5
        )
    return drawing


def _line(axes: Axes, height: float, text: str) -> None:
    axes.axhline(height, color=_RED, linewidth=1.2)
    _name(axes, height, text, colour=_RED)


def _name(axes: Axes, height: float, text: str, *, colour: str, above: bool = True) -> None:
    """Write ``text`` at the line at ``height``, at its right end."""
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
    axes.annotate(text, (1.0, height), (0, 4 if above else -12), color=colour, fontsize=9, **place)
