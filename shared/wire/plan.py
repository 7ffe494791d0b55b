"""The terms of one round, as the server asks and the owner trains."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from shared.errors import InputError
from shared.privacy.releases import DpSgdRelease

# Far above any use; it keeps training finite, whoever the users are.
_LARGEST_STEP = 1e6
# Requests come from strangers: up to here arithmetic in floats is exact, or at least finite.
_LARGEST_COUNT, _LARGEST_NUMBER = 2**53, 1e100


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """What the server asks of every owner in one round; public numbers only.

    Args:
        server_round: 1 to ``num_rounds``.
        num_owners: owners that the run is planned with; theirs to refuse when too few.
        num_steps: optimizer steps in this round.
        sample_rate: chance that a user is in a batch.
        max_users: public bound on the users of one owner; sets the normaliser.
        max_grad_norm: L2 bound on the gradient of one user.
        learning_rate: of the owner's SGD.
        proximal_mu: FedProx's pull towards the weights received; 0 for none.
        release: this round's release, or None to train without privacy (simulations only).
    Raises:
        InputError: a number is out of range, or the release does not describe the steps asked for.
    """

    server_round: int
    num_rounds: int
    num_owners: int
    num_steps: int
    sample_rate: float
    max_users: int
    max_grad_norm: float
    learning_rate: float
    proximal_mu: float
    release: DpSgdRelease | None

    def __post_init__(self) -> None:
        counts = {
            name: getattr(self, name) for name in ("server_round", "num_rounds", "num_owners", "num_steps", "max_users")
        }
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _LARGEST_COUNT:
                raise InputError(f"round plan: {name} must be a whole number from 1 to {_LARGEST_COUNT}")
        if self.server_round > self.num_rounds:
            raise InputError(f"round plan: round {self.server_round} of only {self.num_rounds}")
        for name in ("sample_rate", "max_grad_norm", "learning_rate", "proximal_mu"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST_NUMBER:
                raise InputError(f"round plan: {name} must be finite, not negative and at most {_LARGEST_NUMBER:g}")
        if not 0 < self.sample_rate <= 1:
            raise InputError(f"round plan: sample_rate must lie in (0, 1], not {self.sample_rate!r}")
        if self.max_grad_norm == 0 or self.learning_rate == 0:
            raise InputError("round plan: max_grad_norm and learning_rate must be greater than 0")
        step = self.learning_rate * self.max_grad_norm / (self.sample_rate * self.max_users)
        if step > _LARGEST_STEP:
            raise InputError(
                f"round plan: one user could move the weights by {step:g} in a step (learning_rate x max_grad_norm /"
                f" expected batch), above {_LARGEST_STEP:g}. Lower learning_rate or max_grad_norm."
            )
        if self.release is None:
            return
        planned = (self.num_steps, self.sample_rate, self.max_users)
        priced = (self.release.num_steps, self.release.sample_rate, self.release.max_users)
        if planned != priced:
            raise InputError(
                f"round {self.server_round} plans (steps, sample rate, max_users) {planned} but its release"
                f" prices {priced}. They must be equal: what runs is what is charged."
            )

    @property
    def rounds_to_come(self) -> int:
        """This round and those after it."""
        return self.num_rounds - self.server_round + 1

    @property
    def rest_of_run(self) -> DpSgdRelease | None:
        """What they release together; None without privacy.

        Raises:
            InputError: more steps than a release can have.
        """
        if self.release is None:
            return None
        return replace(self.release, num_steps=self.num_steps * self.rounds_to_come)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read :meth:`to_dict`'s form; InputError where a field is unknown, missing or out of range."""
        release = values.get("release")
        try:
            return cls(**{**values, "release": DpSgdRelease.from_dict(release) if release else None})
        except TypeError as error:
            raise InputError(f"round plan: {error}") from None
