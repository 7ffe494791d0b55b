"""Put the outcomes of all seeds into study.json, with a table for people."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from shared.rng import stream
from simulations.outcomes import OwnerOutcome, SeedOutcome
from simulations.statistics import Estimate, paired_bootstrap

BASELINE, CEILING = "local", "central"

ARM_TITLES = {
    "local": "own users only",
    "federated": "augmented",
    "federated_no_dp": "augmented, no privacy",
    "central": "all data pooled",
}
_NARROW_TITLES = {"local": "local", "federated": "augmented", "federated_no_dp": "without DP", "central": "pooled"}


def arm_title(arm: str) -> str:
    return ARM_TITLES.get(arm, arm.replace("_", " "))


def collect(
    outcomes: Sequence[SeedOutcome],
    *,
    metric: str,
    epsilon: float,
    delta: float,
    num_resamples: int,
    peak_rss_mib: float,
) -> dict[str, Any]:
    """The content of study.json.

    ``lift.*.ci95`` belongs to ``relative``. ``gap_closed`` is null where pooling all data brings no gain beyond doubt,
    since there is then no gap to close. An infinite ``epsilon`` is the string ``"inf"``: JSON has no such number.

    Raises:
        InputError: there is no outcome, or seeds differ in their arms.
    """
    means = paired_bootstrap(outcomes, num_resamples=num_resamples, rng=stream(outcomes[0].seed, "study", "bootstrap"))
    lift: dict[str, Any] = {}
    for arm in means.measured:
        if arm == BASELINE or BASELINE not in means.measured:
            continue
        relative = means.relative_lift(arm, BASELINE)
        closed = means.gap_closed(arm, BASELINE, CEILING) if CEILING in means.measured else None
        lift[arm] = {
            "relative": relative and relative.value,
            "ci95": relative and [relative.low, relative.high],
            "gap_closed": closed and closed.value,
            "gap_closed_ci95": closed and [closed.low, closed.high],
        }
    return {
        "metric": metric,
        "epsilon": _number(epsilon),
        "delta": delta,
        "privacy_unit": "user",
        "seeds": [outcome.seed for outcome in outcomes],
        "arms": {arm: _arm(means.mean(arm)) for arm in sorted(means.measured, key=list(ARM_TITLES).index)},
        "lift": lift,
        "owners": _owners(outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "peak_rss_mib": round(peak_rss_mib, 1),
    }


def _arm(estimate: Estimate) -> dict[str, Any]:
    return {"mean": estimate.value, "ci95": [estimate.low, estimate.high]}


def _owners(outcomes: Sequence[SeedOutcome]) -> list[dict[str, Any]]:
    """One entry per owner name, averaged over the seeds it took part in."""
    by_name: dict[str, list[OwnerOutcome]] = {}
    for outcome in outcomes:
        for owner in outcome.owners:
            by_name.setdefault(owner.name, []).append(owner)
    entries = []
    for name, found in sorted(by_name.items()):
        weights = [owner.chosen_weight["federated"] for owner in found if "federated" in owner.chosen_weight]
        entries.append(
            {
                "name": name,
                "num_users": round(np.mean([owner.num_users for owner in found])),
                "epsilon": _number(max(owner.epsilon for owner in found)),
                "arms": {
                    arm: float(np.mean([owner.per_user[arm].mean() for owner in found])) for arm in found[0].per_user
                },
                "coverage": {
                    arm: float(np.mean([owner.coverage[arm] for owner in found])) for arm in found[0].coverage
                },
                "chosen_weight": float(np.mean(weights)) if weights else None,
            }
        )
    return entries


def _number(value: float) -> float | str:
    return "inf" if math.isinf(value) else value


def owners_table(study: dict[str, Any]) -> Table:
    """Per owner: users, ε spent, the metric under each arm, chosen weight; the last row is the mean over all users."""
    arms = [arm for arm in ARM_TITLES if arm in study["arms"]]
    table = Table(
        title=f"{study['metric'].upper()} on held-out users", show_footer=True, box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("owner", footer="all owners", no_wrap=True)
    table.add_column("users", justify="right", footer=f"{sum(owner['num_users'] for owner in study['owners']):,}")
    table.add_column("ε spent", justify="right", footer=f"≤ {float(study['epsilon']):.4g}")
    for arm in arms:
        table.add_column(_NARROW_TITLES[arm], justify="right", footer=f"{study['arms'][arm]['mean']:.4f}")
    table.add_column("weight", justify="right")
    for owner in study["owners"]:
        scores = [_coloured(owner["arms"], arm) for arm in arms]
        weight = "–" if owner["chosen_weight"] is None else f"{owner['chosen_weight']:.2g}"
        table.add_row(owner["name"], f"{owner['num_users']:,}", f"{float(owner['epsilon']):.2f}", *scores, weight)
    return table


def _coloured(arms: dict[str, float], arm: str) -> str:
    value = f"{arms[arm]:.4f}"
    if arm != "federated" or BASELINE not in arms or math.isclose(arms[arm], arms[BASELINE]):
        return value
    return f"[green]{value}[/green]" if arms[arm] > arms[BASELINE] else f"[red]{value}[/red]"


def percent(value: float) -> str:
    """A change, with its sign: 0.0312 is ``+3.1 %``."""
    return f"{100 * value:+.1f} %".replace("-", "−")


def share(value: float) -> str:
    """A part of a whole: 0.24 is ``24 %``."""
    return f"{100 * value:.0f} %".replace("-", "−")


def arms_table(study: dict[str, Any]) -> Table:
    """Per arm: mean with its interval, lift over the owners' own users, share of the gap to pooling that is closed."""
    table = Table(
        title=f"{study['metric'].upper()}, {len(study['seeds'])} seed(s), 95 % intervals",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for title in ("arm", "mean", "95 %", "lift", "95 %", "gap closed"):
        table.add_column(title, justify="left" if title == "arm" else "right", no_wrap=True)
    for arm, entry in study["arms"].items():
        lift = study["lift"].get(arm, {})
        known = lift.get("relative") is not None
        table.add_row(
            _NARROW_TITLES.get(arm, arm_title(arm)),
            f"{entry['mean']:.4f}",
            " … ".join(f"{bound:.4f}" for bound in entry["ci95"]),
            percent(lift["relative"]) if known else "",
            " … ".join(map(percent, lift["ci95"])) if known else "",
            share(lift["gap_closed"]) if lift.get("gap_closed") is not None else "",
        )
    return table


def verdict(study: dict[str, Any]) -> str:
    """One sentence that says what happened to the augmented recommenders, whichever way it went."""
    lift = study["lift"].get("federated", {})
    if lift.get("relative") is None:
        return "There is no augmented arm to compare with the owners' own users."
    relative, (low, high) = lift["relative"], lift["ci95"]
    numbers = f"{study['metric'].upper()} {percent(relative)} (95 % interval {percent(low)} to {percent(high)})"
    weights = [owner["chosen_weight"] for owner in study["owners"]]
    if all(weight == 0 for weight in weights):
        return "Every owner declined the synthetic users (weight 0), so augmentation changed nothing."
    if low > 0:
        text = f"Augmentation helped: {numbers} against the owners' own users alone."
    elif high < 0:
        text = f"Augmentation hurt: {numbers} against the owners' own users alone."
    else:
        text = f"No clear effect of augmentation: {numbers} against the owners' own users alone."
    if low > 0 and lift.get("gap_closed") is not None:
        text += f" That is {share(lift['gap_closed'])} of what pooling everyone's data would bring."
    if (declined := sum(weight == 0 for weight in weights)) > 0:
        text += f" {declined} of {len(weights)} owners declined the synthetic users (weight 0)."
    if len(study["seeds"]) == 1:
        text += " This is one seed, so the interval speaks of users only: `fedaug study` repeats split and noise."
    return text
