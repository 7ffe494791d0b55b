"""Draw the report's figures."""

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shared.drawing import INK, figure, style, svg
from simulations.study import BASELINE, arm_title

COLOURS = {"local": "#7c8794", "federated": "#2f86d6", "federated_no_dp": "#d08a1d", "central": "#9b6fc4"}
_OTHER_COLOUR = "#3f9d74"


def arms(study: dict[str, Any]) -> str:
    """Mean and 95 % interval of every arm."""
    names = list(study["arms"])
    drawing, axes = figure(0.7 + 0.42 * len(names))
    for place, name in enumerate(names):
        entry, colour = study["arms"][name], COLOURS.get(name, _OTHER_COLOUR)
        low, high = entry["ci95"]
        axes.plot([low, high], [place, place], color=colour, linewidth=3, solid_capstyle="round")
        axes.plot(entry["mean"], place, "o", color=colour, markersize=9)
        axes.annotate(
            f"{entry['mean']:.4f}", (entry["mean"], place), (0, 9), textcoords="offset points", ha="center", color=INK
        )
    if BASELINE in study["arms"]:
        start = names.index(BASELINE)
        axes.plot(
            [study["arms"][BASELINE]["mean"]] * 2, [start, len(names) - 0.4], color=INK, linewidth=0.9, linestyle=":"
        )
    _rows(axes, [arm_title(name) for name in names])
    axes.margins(x=0.08)
    axes.set_xlabel(study["metric"].upper())
    means = ", ".join(f"{arm_title(name)} {study['arms'][name]['mean']:.4f}" for name in names)
    return svg(drawing, "arms", f"Mean {study['metric']} by arm with 95 % intervals: {means}.")


def owners(study: dict[str, Any]) -> str:
    """Lift of every owner over its own users alone, beside the weight it chose."""
    found = [owner for owner in study["owners"] if owner["arms"].get(BASELINE, 0) > 0]
    shown = [arm for arm in ("federated", "federated_no_dp") if arm in study["arms"]]
    drawing = Figure(figsize=(8, 1.0 + 0.34 * max(len(found), 2)), layout="constrained")
    lifts, weights = drawing.subplots(1, 2, sharey=True, width_ratios=[3, 1], gridspec_kw={"wspace": 0.08})
    for axes in (lifts, weights):
        style(axes)
    spoken = []
    for arm, marker in zip(shown, ("o", "D"), strict=False):
        values = [100 * (owner["arms"][arm] / owner["arms"][BASELINE] - 1) for owner in found]
        if arm == "federated":
            lifts.hlines(range(len(found)), 0, values, color=COLOURS[arm], linewidth=3)
        lifts.plot(values, range(len(found)), marker, color=COLOURS[arm], markersize=6.5, label=arm_title(arm))
        above = sum(value > 0 for value in values)
        spoken.append(f"{arm_title(arm)} is above own users only at {above} of {len(found)} owners")
    lifts.axvline(0, color=INK, linewidth=0.8)
    lifts.set_xlabel(f"{study['metric'].upper()} against own users only, %")
    lifts.margins(x=0.08)
    if shown:
        lifts.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, labelcolor=INK, handletextpad=0.2
        )
    chosen = [owner["chosen_weight"] or 0.0 for owner in found]
    weights.barh(range(len(found)), chosen, height=0.55, color=COLOURS["federated"])
    for place, value in enumerate(chosen):
        weights.annotate(
            f"{value:.2g}", (value, place), (4, 0), textcoords="offset points", va="center", color=INK, fontsize=9
        )
    weights.set_xlim(0, 1.25 * max([*chosen, 0.1]))
    weights.set_xlabel("chosen weight")
    _rows(lifts, [owner["name"] for owner in found])
    weights.tick_params(axis="y", left=False, labelleft=False)
    declined = sum(value == 0 for value in chosen)
    return svg(drawing, "owners", f"{'; '.join(spoken)}. {declined} of {len(found)} owners chose weight zero.")


def losses(values: Sequence[tuple[int, float]]) -> str:
    """Mean training loss of the owners after every round."""
    drawing, axes = figure(2.6)
    rounds, loss = zip(*values, strict=True)
    axes.plot(rounds, loss, color=COLOURS["federated"], linewidth=2, marker="o" if len(values) < 30 else None)
    axes.set_xlabel("round")
    axes.set_ylabel("training loss")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    return svg(drawing, "losses", f"Training loss from {loss[0]:.3g} in the first round to {loss[-1]:.3g} in the last.")


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.65)
