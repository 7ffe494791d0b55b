"""Let no run begin before its owner has seen what it asks and what it costs."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from client.policy import Policy
from client.rules import Refusal, mib_of, num_weights, shown
from shared.errors import InputError
from shared.files import finite, sha256, write_atomically, write_json
from shared.generators.family import GeneratorSpec, spec_from_dict
from shared.sketch.statistic import sketch_shapes
from shared.wire.arrays import num_numbers
from shared.wire.messages import TrainJob
from shared.wire.plan import RoundPlan

# Proposals come from strangers and must not fill the disk. Where there are more, the oldest make room.
_MOST_PROPOSALS = 100
_LARGEST_PROPOSAL = 16 * 2**10
_STATISTICS = {
    "popularity": "how popular each item is, and how long histories are",
    "cooccurrence": "how often two items are in one history",
    "both": "how popular each item is, how often two are in one history, and how long histories are",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A whole run as an owner decides on it.

    Args:
        plan: of round 1; later rounds differ in ``server_round`` alone.
        first_seen: when this owner was first asked, in UTC.
        delta: at which both epsilons are read.
        epsilon_of_run: of all its rounds, alone.
        epsilon_after: for life, once the run is over: everything on the ledger and the rounds still to come.
    """

    run_id: str
    plan: RoundPlan
    spec: GeneratorSpec
    catalogue_hash: str
    noise_seed: int | None
    collect_metrics: bool
    first_seen: datetime
    delta: float
    epsilon_of_run: float
    epsilon_after: float

    @classmethod
    def of(
        cls, job: TrainJob, *, now: datetime, delta: float, epsilon_of_run: float, epsilon_after: float
    ) -> "Proposal":
        """The run that ``job`` is a round of; ``now`` is used the first time only."""
        return cls(
            run_id=job.run_id,
            plan=replace(job.plan, server_round=1),
            spec=job.spec,
            catalogue_hash=job.catalogue_hash,
            noise_seed=job.noise_seed,
            collect_metrics=job.collect_metrics,
            first_seen=now,
            delta=delta,
            epsilon_of_run=epsilon_of_run,
            epsilon_after=epsilon_after,
        )

    @property
    def terms_digest(self) -> str:
        """SHA-256 of all that the server asks for, and so equal in every round of a run that keeps its terms.

        Not of the epsilons: they are read off the terms and the owner's own ledger.
        """
        asked = ("run_id", "catalogue_hash", "noise_seed", "collect_metrics")
        terms = {name: getattr(self, name) for name in asked}
        terms |= {"plan": self.plan.to_dict(), "spec": self.spec.to_dict()}
        return sha256(json.dumps(terms, sort_keys=True, allow_nan=False).encode())

    def in_words(self) -> str:
        """What the owner is asked to approve, for people who do not know the names."""
        plan, lines = self.plan, []
        parts = [f"{len(plan.sketches)} release(s) of statistics"] if plan.sketches else []
        if plan.num_training_rounds:
            parts.append(f"{plan.num_training_rounds:,} rounds of {plan.num_steps:,} training step(s) each")
        lines.append(f"Run {shown(self.run_id)}, planned with {plan.num_owners} owners: {', then '.join(parts)}.")
        if not plan.is_private:
            lines.append("No noise is added: nothing about your users is protected.")
        for number, sketch in enumerate(plan.sketches, 1):
            size = num_numbers(sketch_shapes(sketch, self.spec.num_items))
            noise = f", with noise of {sketch.release.noise_multiplier:.4g} times that" if sketch.release else ""
            lines.append(
                f"Statistic {number} ({_STATISTICS[sketch.statistic]}) sums over all your users, of whom one can change"
                f" the sum by a bounded length{noise}; {size:,} numbers ({mib_of(size):,.1f} MiB) leave this machine."
            )
        if plan.release is not None:
            lines.append(
                f"In a step every user takes part with a chance of {plan.release.sample_rate:.3g}. What one user can"
                f" add is bounded, and noise of {plan.release.noise_multiplier:.4g} times that bound covers it."
            )
        if plan.is_private and self.noise_seed is not None:
            lines.append("The noise comes from a seed, so it is NOT private: who knows the seed can subtract it.")
        if plan.num_training_rounds:
            size = num_weights(self.spec)
            lines.append(
                f"After every round of training the weights of a {self.spec.kind} generator over"
                f" {self.spec.num_items:,} items ({size:,} numbers, {mib_of(size):,.1f} MiB) leave this machine."
            )
        lines.append(
            "Losses and user counts leave too."
            if self.collect_metrics
            else "No exact count, no loss and no row leaves."
        )
        told = "\n".join(lines)
        return (
            f"{told}\n"
            f"Price: epsilon {self.epsilon_of_run:.4g} for this run alone, {self.epsilon_after:.4g} for life once it is"
            f" over, at delta {self.delta:g}."
        )

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = finite(
            {
                **asdict(self),
                "plan": self.plan.to_dict(),
                "spec": self.spec.to_dict(),
                "first_seen": self.first_seen.isoformat(),
            }
        )
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read :meth:`to_dict`'s form; InputError, KeyError, TypeError or ValueError where it is another."""
        numbers = {name: float(values[name]) for name in ("delta", "epsilon_of_run", "epsilon_after")}
        read = {
            "plan": RoundPlan.from_dict(values["plan"]),
            "spec": spec_from_dict(values["spec"]),
            "first_seen": datetime.fromisoformat(values["first_seen"]),
        }
        return cls(**{**values, **read, **numbers})


def require_approval(directory: Path, proposal: Proposal, policy: Policy) -> None:
    """Return if the run may go on; otherwise keep the proposal for the owner to read.

    To be asked in every round, with the ledger's figures of that round: approval within limits is not stored, so that
    two runs begun side by side cannot both use up what was left.

    Raises:
        Refusal: the owner has not approved these terms, or withdrew the run.
        InputError: the proposal cannot be stored.
    """
    run = shown(proposal.run_id)
    if _withdrawal(directory, proposal.run_id).exists():
        raise Refusal(
            "not-approved",
            asked=f"run {run}",
            allowed="not this run: the owner withdrew it",
            advice=f"To let it go on: `fedaug client approve {run}`.",
        )
    if not policy.simulated:
        propose(directory, proposal)
    if not (is_approved(directory, proposal.terms_digest) or approves_itself(policy, proposal)):
        raise Refusal(
            "not-approved",
            asked=f"run {run} at epsilon {proposal.epsilon_of_run:.4g}",
            allowed="what the owner approved, on exactly its terms",
            advice=f"Read the proposal and decide: `fedaug client approve {run}`.",
        )


def approves_itself(policy: Policy, proposal: Proposal) -> bool:
    """Whether the policy lets the run begin unseen: a simulation's always, an owner's within its stated limits."""
    if policy.simulated:
        return True
    approval = policy.approval
    if not approval.auto_approve or approval.auto_epsilon_per_run is None or approval.auto_epsilon_total is None:
        return False
    # Written so that NaN is no.
    return (
        proposal.epsilon_of_run <= approval.auto_epsilon_per_run
        and proposal.epsilon_after <= approval.auto_epsilon_total
    )


def propose(directory: Path, proposal: Proposal) -> None:
    """Keep ``proposal`` until the owner decides; with the same terms again, only its figures are renewed.

    Raises:
        InputError: it is too large, or the disk is full.
    """
    path = _proposal(directory, proposal.run_id)
    known = _read(path)
    if known is not None and known.terms_digest == proposal.terms_digest:
        proposal = replace(proposal, first_seen=known.first_seen)
    if proposal == known:
        return
    content = json.dumps(proposal.to_dict(), indent=1, allow_nan=False).encode()
    if len(content) > _LARGEST_PROPOSAL:
        raise InputError(
            f"the proposal of a run takes {len(content):,} bytes, above {_LARGEST_PROPOSAL:,}. Ask the server's"
            " operator for shorter names."
        )
    others = [other for other in _oldest_first(path.parent) if other != path]
    for other in others[: max(0, len(others) + 1 - _MOST_PROPOSALS)]:
        other.unlink(missing_ok=True)
    write_atomically(path, content)


def approve(directory: Path, run_id: str, *, shown_digest: str, by: str) -> None:
    """Approve the run on the terms that were shown, and no others; what was approved or withdrawn of it before ends.

    Args:
        shown_digest: ``terms_digest`` of the proposal that was read: the server may have changed it since.
        by: who approves.
    Raises:
        InputError: there is no such proposal any more, or ``by`` is no name.
    """
    _check_name(by)
    proposal = _read(_proposal(directory, run_id))
    if proposal is None or proposal.terms_digest != shown_digest:
        state = "has other terms by now" if proposal is not None else "is not proposed (any more)"
        raise InputError(f"run {shown(run_id)} {state}: list the proposals again, and read it before you approve it.")
    _forget(directory, run_id)
    write_json(_approval(directory, shown_digest), {"proposal": proposal.to_dict(), "by": by, "at": _now()})
    _withdrawal(directory, run_id).unlink(missing_ok=True)


def withdraw(directory: Path, run_id: str, *, by: str) -> bool:
    """Let the run go no further, whatever its terms and whoever approved it; what it was given, it keeps.

    Returns: whether such a run is known here; a name with a typing error withdraws nothing that exists.
    Raises:
        InputError: ``by`` is no name, or the disk is full.
    """
    _check_name(by)
    known = any(proposal.run_id == run_id for proposal in proposals(directory))
    write_json(_withdrawal(directory, run_id), {"run_id": run_id, "by": by, "at": _now()})
    _forget(directory, run_id)
    return known


def is_approved(directory: Path, terms_digest: str) -> bool:
    """Whether the owner approved exactly these terms, and has not withdrawn the run since."""
    proposal = _read(_approval(directory, terms_digest))
    # Read again from its own terms: a file from another version, or another's name, approves nothing.
    return (
        proposal is not None
        and proposal.terms_digest == terms_digest
        and not _withdrawal(directory, proposal.run_id).exists()
    )


def proposals(directory: Path) -> tuple[Proposal, ...]:
    """What was proposed or approved and can still be read, oldest first."""
    found = {proposal.terms_digest: proposal for proposal in _all(directory)}
    return tuple(sorted(found.values(), key=lambda proposal: (proposal.first_seen, proposal.run_id)))


def _all(directory: Path) -> Iterator[Proposal]:
    for folder in ("approvals", "proposals"):
        for path in sorted((directory / folder).glob("*.json")):
            if (proposal := _read(path)) is not None:
                yield proposal


def _forget(directory: Path, run_id: str) -> None:
    for path in sorted((directory / "approvals").glob("*.json")):
        proposal = _read(path)
        if proposal is None or proposal.run_id == run_id:
            path.unlink(missing_ok=True)


def _read(path: Path) -> Proposal | None:
    """The proposal in ``path``; None where there is none of this version: nothing is approved then."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Proposal.from_dict(values.get("proposal", values))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
        return None


def _oldest_first(folder: Path) -> list[Path]:
    # By the disk's clock, as the names say nothing; another process may have removed one meanwhile.
    ages = {}
    for path in folder.glob("*.json"):
        try:
            ages[path] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return sorted(ages, key=lambda path: (ages[path], path.name))


def _check_name(by: str) -> None:
    if not (1 <= len(by) <= 100 and by.isprintable()):
        raise InputError("a decision needs the name of who takes it: 1 to 100 printable characters.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# The run's name comes from the server: hashed, so that it cannot name a place of its own.
def _proposal(directory: Path, run_id: str) -> Path:
    return directory / "proposals" / f"{sha256(run_id.encode())[:32]}.json"


def _withdrawal(directory: Path, run_id: str) -> Path:
    return directory / "withdrawals" / f"{sha256(run_id.encode())[:32]}.json"


def _approval(directory: Path, terms_digest: str) -> Path:
    return directory / "approvals" / f"{terms_digest}.json"
