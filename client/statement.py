"""Read an owner's ledger as its owner does: by run, with the epsilon after each."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from client.policy import Policy
from client.state import ledger_in, public_key_in
from client.store.lifetime import LifetimeLedger
from client.store.verification import Verification, verify
from shared.errors import InputError
from shared.privacy.accounting import check_delta
from shared.privacy.chain import Commit, Entry, Raise, Receipt, Reserve
from shared.privacy.noise import LOCAL_NOISE, NoiseKind
from shared.privacy.releases import Release
from shared.privacy.running import RunningCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One charge.

    Args:
        number: of the entry that charged it.
        committed: its reply was on disk; a charge without counts as spent all the same.
        raised: it came from a restored backup.
    """

    number: int
    at: str
    run_id: str
    server_round: int
    release: Release | None
    noise: NoiseKind
    committed: bool = False
    raised: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "at": self.at,
            "run_id": self.run_id,
            "server_round": self.server_round,
            "release": self.release.to_dict() if self.release else None,
            "noise": self.noise,
            "state": state_of([self]),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All charges of one run.

    Args:
        lines: at least one, in the ledger's order.
        end: how many charges the ledger had when it was charged last.
    """

    run_id: str
    lines: tuple[Line, ...]
    end: int

    @property
    def releases(self) -> tuple[Release | None, ...]:
        return tuple(line.release for line in self.lines)

    @property
    def rounds(self) -> tuple[int, int]:
        """The first and the last."""
        numbers = [line.server_round for line in self.lines]
        return min(numbers), max(numbers)

    @property
    def noises(self) -> tuple[NoiseKind, ...]:
        return tuple(dict.fromkeys(line.noise for line in self.lines))

    def to_dict(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "numbers": [self.lines[0].number, self.lines[-1].number],
            "at": [self.lines[0].at, self.lines[-1].at],
            "rounds": list(self.rounds),
            "num_charges": len(self.lines),
            "num_committed": sum(line.committed for line in self.lines),
            "noise": list(self.noises),
            "releases": [
                {"times": times, "release": release.to_dict() if release else None}
                for release, times in Counter(self.releases).items()
            ],
            "state": state_of(self.lines),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A ledger, with the terms it is read under.

    Args:
        policy: None where none can be read.
        delta: at which every epsilon is read.
        restored: when a backup stood in for a lost ledger; what was charged after that backup is missing.
        cost: of all lines.
    """

    data_source: str
    policy: Policy | None
    delta: float
    lines: tuple[Line, ...]
    runs: tuple[Run, ...]
    restored: tuple[str, ...]
    receipt: Receipt
    verification: Verification
    cost: RunningCost

    @property
    def spent(self) -> float:
        return self.cost.epsilon(self.delta)

    @property
    def ceiling(self) -> float | None:
        """None where there is none, or no policy to say so."""
        return self.policy.ceilings.epsilon if self.policy else None

    @property
    def remaining(self) -> float | None:
        """From what is spent to the ceiling; None without one."""
        return None if self.ceiling is None else max(0.0, self.ceiling - self.spent)

    @property
    def not_private(self) -> dict[NoiseKind, int]:
        """How many charges had noise that protects nobody, by kind."""
        return dict(Counter(line.noise for line in self.lines if line.noise != LOCAL_NOISE))

    @property
    def warnings(self) -> list[str]:
        """What must not be overlooked by whoever reads the figures."""
        found = []
        if not self.verification.ok:
            found.append(
                f"THIS LEDGER DOES NOT VERIFY ({self.verification.problems[0]}), so none of its figures can be relied"
                " on. See what is wrong with `fedaug ledger verify`."
            )
        for noise, count in self.not_private.items():
            found.append(
                f"Noise: {noise}, in {count:,} of {len(self.lines):,} charge(s). Epsilon protects nobody there: it says"
                " what the same rounds would promise with secret noise, or is infinite without any."
            )
        for at in self.restored:
            found.append(
                f"A backup took the place of a lost ledger at {at}: what was charged after that backup is missing, so"
                " more may be spent than this says."
            )
        return found

    def epsilons(self, counts: Sequence[int]) -> list[float]:
        """Epsilon after the first so many charges, for each of ``counts``, which must not fall."""
        cost, added, found = RunningCost(), 0, []
        for count in counts:
            for line in self.lines[added:count]:
                cost.add(line.release)
            added = count
            found.append(self.spent if count == len(self.lines) else cost.epsilon(self.delta))
        return found


def read_statement(directory: Path, *, delta: float | None = None) -> Statement:
    """Read the ledger in ``directory``.

    Args:
        delta: to read epsilon at where there is no policy that says.
    Raises:
        InputError: the ledger cannot be used; or neither a policy nor ``delta`` says where to read epsilon.
    """
    path = ledger_in(directory)
    policy = _policy(directory, delta)
    delta = policy.ceilings.delta if policy else delta
    assert delta is not None
    check_delta(delta)
    with LifetimeLedger(path, data_source=policy.data_source if policy else None) as ledger:
        lines, restored = _lines(ledger.entries())
        data_source, receipt = ledger.data_source, ledger.receipt()
    cost = RunningCost()
    for line in lines:
        cost.add(line.release)
    return Statement(
        data_source=data_source,
        policy=policy,
        delta=delta,
        lines=lines,
        runs=tuple(_runs(lines)),
        restored=restored,
        receipt=receipt,
        verification=verify(path, public_key=public_key_in(directory)),
        cost=cost,
    )


def state_of(lines: Sequence[Line]) -> str:
    """What became of charges, in words."""
    raised = sum(line.raised and not line.committed for line in lines)
    committed = sum(line.committed for line in lines)
    found = {"committed": committed, "reserved": len(lines) - committed - raised, "from a backup": raised}
    if len(lines) in found.values():
        return next(word for word, count in found.items() if count == len(lines))
    return ", ".join(f"{count} {word}" for word, count in found.items() if count)


def in_short(release: Release | None) -> str:
    """A release in the words of a table."""
    if release is None:
        return "trained WITHOUT noise"
    what = release.statistic if release.mechanism == "gaussian" else release.mechanism
    cap = "no cap" if release.max_batch is None else f"cap {release.max_batch:,}"
    noise = f"noise {release.noise_multiplier:g}, rate {release.sample_rate:g}"
    return f"{what}: {noise}, {release.num_steps:,} step(s), {cap}"


def as_number(epsilon: float) -> str:
    return "∞" if math.isinf(epsilon) else f"{epsilon:.4g}"


def _policy(directory: Path, delta: float | None) -> Policy | None:
    try:
        policy = Policy.load(directory)
    except InputError as error:
        if delta is None:
            raise InputError(f"{error}\nTo read the ledger without it, say at which --delta.") from None
        return None
    if delta is not None and delta != policy.ceilings.delta:
        raise InputError(
            f"--delta {delta:g} is for a ledger without policy; the one in {directory} reads epsilon at delta"
            f" {policy.ceilings.delta:g}, and its ceiling holds there only. Leave --delta out."
        )
    return policy


def _lines(entries: Iterator[Entry]) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    lines: dict[int, Line] = {}
    restored = []
    for entry in entries:
        content = entry.content
        if isinstance(content, Commit):
            if content.reserve in lines:  # else it does not verify, and that is said elsewhere
                lines[content.reserve] = replace(lines[content.reserve], committed=True)
            continue
        if isinstance(content, Raise) and content.reserve is None:
            restored.append(content.at)
        reserve = content.reserve if isinstance(content, Raise) else content
        if isinstance(reserve, Reserve):
            lines[entry.number] = Line(
                number=entry.number,
                at=content.at,
                run_id=reserve.run_id,
                server_round=reserve.server_round,
                release=reserve.release,
                noise=reserve.noise,
                raised=isinstance(content, Raise),
            )
    return tuple(lines.values()), tuple(restored)


def _runs(lines: Sequence[Line]) -> list[Run]:
    """By their last charge: two runs may be charged in turns."""
    found: dict[str, list[tuple[int, Line]]] = {}
    for place, line in enumerate(lines, start=1):
        found.setdefault(line.run_id, []).append((place, line))
    runs = [
        Run(run_id=run_id, lines=tuple(line for _, line in placed), end=placed[-1][0])
        for run_id, placed in found.items()
    ]
    return sorted(runs, key=lambda run: run.end)
