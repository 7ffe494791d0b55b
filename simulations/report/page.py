"""Fill the report's template: numbers become sentences, tables and drawings."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from shared.page import templates
from shared.privacy.noise import NO_NOISE, SEEDED_NOISE
from simulations.report import plots
from simulations.study import ARM_TITLES, arm_title, percent, share, verdict


def render_report(study: dict[str, Any], run: dict[str, Any]) -> str:
    """The page as one string of HTML; it loads nothing and runs no script.

    Args:
        study: the content of study.json.
        run: the content of run.json, of which ``noise``, ``regime``, ``rounds`` and ``catalogue`` are shown.
    """
    environment = templates(Path(__file__).parent)
    environment.filters |= {"percent": percent, "share": share, "score": "{:.4f}".format, "arm_title": arm_title}
    losses = [
        (entry["server_round"], entry["simulation_only"]["loss"])
        for entry in run.get("rounds", [])
        if entry.get("simulation_only", {}).get("loss") is not None  # a sketch has none
    ]
    return environment.get_template("template.html").render(
        study=study,
        run=run,
        metric=study["metric"].upper(),
        verdict=verdict(study),
        privacy=_privacy(study, run),
        warnings=_warnings(study, run),
        regime=run.get("regime", {}).get("sentence", ""),
        owner_arms=[arm for arm in ARM_TITLES if arm in study["arms"]],
        arms_plot=Markup(plots.arms(study)),
        owners_plot=Markup(plots.owners(study)),
        loss_plot=Markup(plots.losses(losses)) if losses else None,
        num_rounds=len(losses),
    )


def _privacy(study: dict[str, Any], run: dict[str, Any]) -> str:
    epsilon = float(study["epsilon"])
    if epsilon == float("inf"):
        return "ε is infinite: the generator was trained without privacy."
    spent = max(float(owner["epsilon"]) for owner in study["owners"])
    return (
        f"The generator was trained for ε = {epsilon:.2f} at δ = {study['delta']:.2g} per {study['privacy_unit']}, with"
        f" all interactions of a {study['privacy_unit']} at an owner; no owner spent more than ε = {spent:.2f}."
    )


def _warnings(study: dict[str, Any], run: dict[str, Any]) -> list[str]:
    found = []
    if run.get("noise") == SEEDED_NOISE:
        found.append(
            "Noise: seeded, not private. The noise of this simulation can be repeated from its seed, so it protects"
            " nobody; ε says what the same run would promise with fresh noise."
        )
    elif run.get("noise") == NO_NOISE or study["epsilon"] == "inf":
        found.append("Noise: none, not private. This generator must not leave the simulation.")
    if run.get("catalogue") == "assumed public":
        found.append(
            "Catalogue: assumed public. It was taken from the data of all owners, which only a simulation may do;"
            " a real federation brings a public catalogue."
        )
    return found
