"""Ask an owner which runs may use its data, for the command line."""

import getpass
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from client.approvals import Proposal, approve, approves_itself, is_approved, proposals, withdraw
from client.policy import Policy
from client.rules import shown
from client.screen import print_json, results, say, warn
from client.security_log import SecurityLog
from client.state import require_folder
from client.statement import Statement, as_number, read_statement
from shared.errors import InputError


def list_proposals(directory: Path, *, as_json: bool) -> None:
    policy = _policy(directory)
    listed = [(proposal, _standing(directory, policy, proposal)) for proposal in proposals(directory)]
    if as_json:
        print_json({"proposals": [_described(proposal, standing) for proposal, standing in listed]})
        return
    if not listed:
        print("No run was proposed. Runs appear here once a server asks this owner's agent.")
        return
    results().print(_table(listed))
    if any(standing == "waiting" for _, standing in listed):
        say(f"Read one and decide: fedaug client approve RUN --state {directory}")


def approve_run(directory: Path, run: str, *, yes: bool, by: str | None, as_json: bool) -> None:
    """Show what the run asks and costs, ask, and approve the terms that were shown."""
    policy = _policy(directory)
    proposal = _proposal(directory, run)
    already = is_approved(directory, proposal.terms_digest)
    talk = say if as_json else print  # the object is all that stdout holds
    talk(proposal.in_words())
    talk(_against_ceilings(policy, proposal))
    approved = already
    if already:
        talk("Approved already, on exactly these terms.")
    elif yes or _confirmed(proposal):
        approve(directory, proposal.run_id, shown_digest=proposal.terms_digest, by=by or _me())
        approved = True
        talk(f"Approved. To take it back: fedaug client withdraw {proposal.run_id} --state {directory}")
    else:
        talk("Not approved. Nothing of this run is answered until it is.")
    if as_json:
        print_json({**_described(proposal, "approved" if approved else "waiting"), "approved": approved})


def withdraw_run(directory: Path, run: str, *, by: str | None, as_json: bool) -> None:
    require_folder(directory)
    names = {shown(proposal.run_id): proposal.run_id for proposal in proposals(directory)}
    run_id = names.get(run, run)
    known = withdraw(directory, run_id, by=by or _me())
    if as_json:
        print_json({"run_id": run_id, "withdrawn": True, "known": known})
    else:
        print(f"Run {shown(run_id)} is withdrawn: its further requests are refused. What was charged stays spent.")
    if not known:
        warn(
            "No such run was proposed here, so check the name: `fedaug client approve` lists them. Should it ever come,"
            " it will be refused."
        )


def status(directory: Path, *, last: int, as_json: bool) -> None:
    policy = _policy(directory)
    statement = read_statement(directory)
    listed = [(proposal, _standing(directory, policy, proposal)) for proposal in proposals(directory)]
    waiting = [(proposal, standing) for proposal, standing in listed if standing == "waiting"]
    lines = list(SecurityLog(directory).lines())[-last:] if last else []
    if as_json:
        print_json(
            {
                "policy": _policy_values(policy),
                "epsilon_spent": statement.spent,
                "epsilon_ceiling": statement.ceiling,
                "epsilon_remaining": statement.remaining,
                "delta": statement.delta,
                "num_charges": len(statement.lines),
                "verifies": statement.verification.ok,
                "not_private": statement.not_private,
                "open_proposals": [_described(*each) for each in waiting],
                "log": lines,
            }
        )
    else:
        _print_status(policy, statement, waiting, lines)
    for text in statement.warnings:
        warn(text)


def _print_status(
    policy: Policy, statement: Statement, waiting: list[tuple[Proposal, str]], lines: list[dict[str, Any]]
) -> None:
    console = results()
    of_run = policy.ceilings.epsilon_per_run
    ceiling = "none" if statement.ceiling is None else f"{statement.ceiling:g}"
    remaining = "" if statement.remaining is None else f", {as_number(statement.remaining)} left"
    approval = policy.approval
    unseen = (
        "always: this is a simulation"
        if policy.simulated
        else f"up to epsilon {approval.auto_epsilon_per_run:g} a run, {approval.auto_epsilon_total:g} for life"
        if approval.auto_approve and approval.auto_epsilon_per_run and approval.auto_epsilon_total
        else "never"
    )
    console.print(
        f"Data source    {policy.data_source}, at most {policy.max_users:,} users\n"
        f"Spent          epsilon {as_number(statement.spent)} of {ceiling} for life{remaining},"
        f" at delta {statement.delta:g}, for each user\n"
        f"Of one run     {'no ceiling of its own' if of_run is None else f'at most epsilon {of_run:g}'}\n"
        f"Noise          at least {policy.limits.min_noise_multiplier:g} clipping norms\n"
        f"Approved alone {unseen}\n"
        f"Answers until  {policy.expires or 'no last day'}",
        markup=False,
        soft_wrap=True,
    )
    if waiting:
        console.print(_table(waiting))
    else:
        print("No run waits for approval.")
    if lines:
        print("Security log, newest last:")
    for line in lines:
        rest = ", ".join(
            f"{key} {value}"
            for key, value in line.items()
            if key not in ("time", "event") and not isinstance(value, dict)
        )
        console.print(f"  {line.get('time')} {line.get('event')}: {rest}", markup=False, soft_wrap=True)


def _policy(directory: Path) -> Policy:
    require_folder(directory)
    return Policy.load(directory)


def _proposal(directory: Path, run: str) -> Proposal:
    found = [proposal for proposal in proposals(directory) if run in (proposal.run_id, shown(proposal.run_id))]
    if not found:
        raise InputError(
            f"no run {shown(run)} was proposed to the owner in {directory}. `fedaug client approve --state {directory}`"
            " lists those that were; a run appears once its server asks this owner's agent."
        )
    # A run that changed its terms is here twice: as approved, and as it asks now.
    return next((proposal for proposal in found if not is_approved(directory, proposal.terms_digest)), found[-1])


def _standing(directory: Path, policy: Policy, proposal: Proposal) -> str:
    if is_approved(directory, proposal.terms_digest):
        return "approved"
    return "within the policy's own limits" if approves_itself(policy, proposal) else "waiting"


def _described(proposal: Proposal, standing: str) -> dict[str, Any]:
    return {
        "run_id": proposal.run_id,
        "standing": standing,
        "terms_digest": proposal.terms_digest,
        "first_seen": proposal.first_seen.isoformat(),
        "num_rounds": proposal.plan.num_rounds,
        "epsilon_of_run": proposal.epsilon_of_run,
        "epsilon_after": proposal.epsilon_after,
        "delta": proposal.delta,
        "words": proposal.in_words(),
    }


def _table(listed: list[tuple[Proposal, str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "first asked (UTC)", "state"):
        table.add_column(name)
    for name in ("rounds", "ε of the run", "ε for life after"):
        table.add_column(name, justify="right")
    for proposal, standing in listed:
        table.add_row(
            shown(proposal.run_id),
            f"{proposal.first_seen:%Y-%m-%d %H:%M}",
            standing,
            f"{proposal.plan.num_rounds:,}",
            as_number(proposal.epsilon_of_run),
            as_number(proposal.epsilon_after),
        )
    return table


def _against_ceilings(policy: Policy, proposal: Proposal) -> str:
    ceilings = policy.ceilings
    asked: Mapping[str, tuple[float, float | None]] = {
        "for life": (proposal.epsilon_after, ceilings.epsilon),
        "for one run": (proposal.epsilon_of_run, ceilings.epsilon_per_run),
    }
    said = [
        f"{as_number(epsilon)} of {ceiling:g} {what}" + ("" if epsilon <= ceiling else ", which is TOO MUCH")
        for what, (epsilon, ceiling) in asked.items()
        if ceiling is not None
    ]
    over = any(ceiling is not None and not epsilon <= ceiling for epsilon, ceiling in asked.values())
    advice = " Approved or not, the rounds above a ceiling will be refused." if over else ""
    return f"Your ceilings: {'; '.join(said) or 'none'}.{advice}"


def _confirmed(proposal: Proposal) -> bool:
    try:
        return typer.confirm(f"Approve run {shown(proposal.run_id)} on these terms?", err=True)
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        raise InputError("nobody was there to answer, and nothing was approved. A script says --yes.") from None


def _me() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise InputError("this session has no user name: say who decides with --by NAME.") from None


def _policy_values(policy: Policy) -> dict[str, Any]:
    kept = ("data_source", "max_users", "simulated", "expires", "ceilings", "limits", "approval")
    return {name: value for name, value in policy.model_dump(mode="json").items() if name in kept}
