"""What the rounds of one run need to know, fixed before the first of them."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from shared.errors import InputError
from shared.files import sha256, write_atomically
from shared.generators.family import GeneratorSpec, spec_from_dict
from shared.wire.plan import RoundPlan

STRATEGIES = ("fedavg", "fedavgm", "fedadam", "fedprox")


@dataclass(frozen=True, slots=True, kw_only=True)
class FederationPlan:
    """A run's rounds, from public numbers only.

    Args:
        run_id: names the run on the owners' ledgers; a resumed run keeps it.
        seed: of the initial weights.
        terms: the plan of round 1; later rounds differ in ``server_round`` alone.
        server_momentum: FedAvgM's momentum, FedAdam's first decay.
        average_decay: of the average of the weights over the rounds, which is what is delivered; 0 for the last ones.
        owners: the names expected to say hello; no other is heard.
        weights: public weight of an owner in the average; 1 where it is not named.
        noise_seed: repeatable and so not private noise, for simulations.
        collect_metrics: ask simulated owners for their private figures.
        deadline_seconds: how long to wait for owners to connect, and for the replies of a round.
    Raises:
        InputError: a term is out of range or two contradict each other.
    """

    run_id: str
    seed: int
    spec: GeneratorSpec
    terms: RoundPlan
    strategy: Literal["fedavg", "fedavgm", "fedadam", "fedprox"]
    server_learning_rate: float
    server_momentum: float
    catalogue_hash: str
    owners: tuple[str, ...]
    min_owners: int
    deadline_seconds: float
    noise_seed: int | None
    collect_metrics: bool
    average_decay: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InputError(f"plan: unknown strategy {self.strategy!r}; choose one of {', '.join(STRATEGIES)}.")
        if self.terms.proximal_mu and self.strategy != "fedprox":
            raise InputError(
                f"plan: proximal_mu={self.terms.proximal_mu:g} has no effect with {self.strategy}; set"
                " federation.strategy to fedprox, or proximal_mu to 0."
            )
        if len(set(self.owners)) != len(self.owners) or not 1 <= self.min_owners <= len(self.owners):
            raise InputError(
                f"plan: {len(set(self.owners))} different owners for min_owners={self.min_owners}. Lower"
                " federation.min_owners, or bring more owners."
            )
        if set(self.weights) - set(self.owners) or not all(math.isfinite(w) and w > 0 for w in self.weights.values()):
            raise InputError("plan: weights must be finite, greater than 0, and of owners in the plan.")
        if self.terms.num_owners != len(self.owners):
            raise InputError(
                f"plan: the terms say {self.terms.num_owners} owners, the plan names {len(self.owners)}. Owners decide"
                " by that number; give the same."
            )
        if not 0 <= self.average_decay < 1:
            raise InputError(f"plan: average_decay must lie in [0, 1), not {self.average_decay!r}.")
        if self.terms.server_round != 1:
            raise InputError(f"plan: terms must be those of round 1, not {self.terms.server_round}.")

    @property
    def num_rounds(self) -> int:
        return self.terms.num_rounds

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the weights; a checkpoint of another plan must not be continued."""
        waiting = {"min_owners", "deadline_seconds"}
        return sha256(_dump({name: value for name, value in self._values().items() if name not in waiting}).encode())

    def _values(self) -> dict[str, Any]:
        return {**asdict(self), "spec": self.spec.to_dict(), "terms": self.terms.to_dict()}

    def save(self, run_dir: Path) -> None:
        write_atomically(run_dir / "plan.json", _dump(self._values()).encode())

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """Read ``run_dir/plan.json``.

        Raises:
            InputError: it is missing, unreadable or out of range.
        """
        path = run_dir / "plan.json"
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            values["spec"] = spec_from_dict(values["spec"])
            values["terms"] = RoundPlan.from_dict(values["terms"])
            values["owners"] = tuple(values["owners"])
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"no usable plan at {path} ({error}); prepare the run again.") from None


def _dump(values: object) -> str:
    return json.dumps(values, sort_keys=True, indent=2, allow_nan=False)
