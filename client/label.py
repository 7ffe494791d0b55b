"""Say in plain language what was released of an owner's data, for those who answer for it."""

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from client.plots import spending
from client.statement import Run, Statement, as_number, in_short
from shared.page import templates
from shared.privacy.accounting import certified_epsilon, opacus_epsilon, rdp_epsilon

_MOST_POINTS = 24
# Above this the worst-case bound lets somebody who guesses be right 99 times in 100.
_WEAK = math.log(99)
_NOT_SO = "What follows would hold had all noise been secret. It was not, so it does NOT hold. "


def privacy_label(statement: Statement, *, now: datetime) -> dict[str, Any]:
    """Everything the statement for a privacy officer says, as JSON can hold it, but for infinity.

    Guarantee:
        Nothing in it depends on the owner's users, but for what was released of them: no count of users left out, no
        fingerprint, no digest of data.
    Raises:
        FedAugError: the accountants disagree, and no epsilon may be reported.
    """
    epsilon, ceiling, delta = statement.spent, statement.ceiling, statement.delta
    releases = [line.release for line in statement.lines]
    priced = [release for release in releases if release is not None]
    is_private = len(priced) == len(releases)
    runs, points = _history(statement)
    return {
        "title": f"Privacy statement for the data source {statement.data_source}",
        "made_at": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "verdict": _verdict(statement),
        "warnings": statement.warnings,
        "data_source": statement.data_source,
        "privacy_unit": "user",
        "epsilon_spent": epsilon,
        "epsilon_ceiling": ceiling,
        "epsilon_remaining": statement.remaining,
        "delta": delta,
        "protection": _protection(statement),
        "assumptions": _assumptions(statement),
        "epsilon_in_words": (_NOT_SO if statement.not_private else "") + _epsilon_in_words(epsilon, delta),
        "delta_in_words": _delta_in_words(statement),
        "remaining_in_words": _remaining(statement),
        "runs": runs,
        "spending": points,
        "accountants": {
            "certified": certified_epsilon(priced, delta) if is_private else math.inf,
            "pld": epsilon,
            "prv_opacus": opacus_epsilon(priced, delta) if is_private else math.inf,
            "rdp": rdp_epsilon(priced, delta) if is_private else math.inf,
            "caps": any(release.max_batch is not None for release in priced),
        },
        "ledger": {
            "verifies": statement.verification.ok,
            "problems": list(statement.verification.problems),
            "entries": statement.verification.entries,
            "charges": statement.verification.reserved,
            "committed": statement.verification.committed,
            "public_keys": list(statement.verification.public_keys),
            "receipt": statement.receipt.to_dict(),
        },
    }


def render_label(label: dict[str, Any]) -> str:
    """``label`` as one page that loads nothing and runs no script."""
    environment = templates(Path(__file__).parent)
    environment.filters["epsilon"] = as_number
    points = [(datetime.fromisoformat(point["at"]), point["epsilon"]) for point in label["spending"]]
    ceiling = label["epsilon_ceiling"]
    return environment.get_template("label.html").render(
        label=label,
        receipt=json.dumps(label["ledger"]["receipt"], indent=1),
        plot=Markup(spending(points, ceiling=ceiling)) if points else None,
        share=min(100.0, 100 * label["epsilon_spent"] / ceiling) if ceiling else None,
    )


def _verdict(statement: Statement) -> str:
    if not statement.verification.ok:
        return "This ledger does not verify: none of the figures below can be relied on."
    if not statement.lines:
        return "Nothing was ever released from this data."
    if statement.not_private:
        return "Part of what was released is not protected: see the warning."
    spent, ceiling, delta = as_number(statement.spent), statement.ceiling, statement.delta
    if statement.restored:
        return f"At least ε = {spent} was spent of every user, at δ = {delta:g}: part of the record is lost."
    if ceiling is not None and not statement.spent <= ceiling:
        return f"More was spent of every user than is allowed: ε = {spent}, above {ceiling:g}, at δ = {delta:g}."
    limit = "" if ceiling is None else f" of at most {ceiling:g}"
    return (
        f"Every user is protected with ε = {spent}{limit}, at δ = {delta:g}, over everything that was ever released"
        " from this data through fedaug."
    )


def _protection(statement: Statement) -> list[dict[str, str]]:
    policy = statement.policy
    items = f", of which the newest {policy.max_items_per_user:,} are used" if policy else ""
    users = (
        f"at most {policy.max_users:,}, a public bound; the true number is not published" if policy else "not stated"
    )
    return [
        {"what": "Who is protected", "how": f"Each user, with all interactions at this owner{items}."},
        {
            "what": "Against what",
            "how": "Against anybody learning whether this user was in the data at all, and so anything about the user.",
        },
        {
            "what": "From whom",
            "how": "From everyone who sees what left this owner: the coordinating server, the other owners, whoever"
            " receives a generator or synthetic users, now or later, alone or together, whatever else they know.",
        },
        {"what": "Not from whom", "how": "Not from this owner, who holds the data, nor from who controls its machine."},
        {"what": "Users", "how": f"{users[0].upper()}{users[1:]}."},
        {
            "what": "How",
            "how": "Only trained weights leave. Each is trained on a random sample of users, what one user can add is"
            " bounded, and "
            + ("random noise covers it." if not statement.not_private else "noise should cover it. HERE IT DOES NOT."),
        },
    ]


def _assumptions(statement: Statement) -> list[str]:
    simulated = statement.policy is not None and statement.policy.simulated
    return [
        "A person is one user. Somebody who is a user here under k names, or of k owners in the federation, pays k"
        " times: the epsilons of all of them add up for that person.",
        "All that left was charged to this ledger. What this owner publishes by other means is not counted, among it"
        " recommendations shown to users.",
        "The noise was drawn in secret and used once. "
        + (
            "This is a simulation, where it is NOT so."
            if simulated
            else "Nobody can look it up or draw it again. On a GPU its generator is not a cryptographic one."
        ),
        "Program and machine do what they should. Sums are 32-bit floats, and attacks on their last digits are not"
        " addressed; nor is the time that an answer takes.",
        "The ledger is whole. It is chained and signed; that it is no older copy of itself, only a receipt tells that"
        " somebody else kept.",
    ]


def _epsilon_in_words(epsilon: float, delta: float) -> str:
    if math.isinf(epsilon):
        return "ε is infinite: something was released that protects nobody."
    # Of all tests, none errs less than (1 - delta) / (1 + e^epsilon) on both sides (Kairouz et al. 2015,
    # arXiv:1311.0776, theorem 2.1).
    right = 1 - (1 - delta) / (1 + math.exp(epsilon))
    # Rounded up: a bound that is rounded down is none.
    percent = min(100.0, math.ceil(right * 1e4) / 100)
    text = (
        f"ε bounds how well anybody can tell whether a certain user was in the data. With ε = {as_number(epsilon)},"
        f" somebody who sees all that was released, who knows everything about the user and about all others, and for"
        f" whom yes and no are equally likely beforehand, guesses right in at most {percent:g} % of cases. Tossing a"
        " coin gives 50 %."
    )
    if epsilon > _WEAK:
        text += (
            " At this ε the guarantee for the worst case is weak. Attacks that are known do far worse than it allows,"
            " but that is experience, not proof."
        )
    return text


def _delta_in_words(statement: Statement) -> str:
    text = (
        f"δ = {statement.delta:g} is the small chance, about 1 in {1 / statement.delta:,.0f}, that the bound given by ε"
        " does not hold for a user."
    )
    if statement.policy and statement.delta <= 1 / statement.policy.max_users:
        text += f" It lies below one in the {statement.policy.max_users:,} users there may be, as it should."
    return text


def _remaining(statement: Statement) -> str:
    if statement.policy is None:
        return "No policy could be read, so how much may be spent is not known."
    ceiling = statement.ceiling
    if ceiling is None:
        return "The policy sets no ceiling for life, which only a simulation may do."
    if not statement.spent <= ceiling:
        return f"Nothing remains: ε = {as_number(statement.spent)} lies above the ceiling of {ceiling:g}."
    of_run = statement.policy.ceilings.epsilon_per_run
    return (
        f"Of the ceiling of {ceiling:g} for life, {as_number(ceiling - statement.spent)} remains"
        + (f"; one run may cost at most {of_run:g}" if of_run is not None else "")
        + ". What would exceed it is refused by this owner's own program, whatever a server asks for."
    )


def _history(statement: Statement) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every run with the epsilon after it; and the epsilon after some charges, evenly spread, the last among them."""
    lines, runs = statement.lines, statement.runs
    spread = {math.ceil(len(lines) * step / _MOST_POINTS) for step in range(1, _MOST_POINTS + 1)} if lines else set()
    counts = sorted({*spread, *(run.end for run in runs)})
    epsilons = dict(zip(counts, statement.epsilons(counts), strict=True))
    return (
        [{**run.to_dict(), "in_words": _in_words(run), "epsilon_after": epsilons[run.end]} for run in runs],
        [{"at": lines[count - 1].at, "charges": count, "epsilon": epsilons[count]} for count in counts],
    )


def _in_words(run: Run) -> list[str]:
    return [
        f"{entry['times']:,} × {in_short(release)}" if entry["times"] > 1 else in_short(release)
        for entry, release in zip(run.to_dict()["releases"], dict.fromkeys(run.releases), strict=True)
    ]
