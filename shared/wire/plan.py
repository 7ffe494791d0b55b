"""The terms of one round, as the server asks and the owner answers."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from shared.errors import InputError
from shared.privacy.releases import DpSgdRelease, Release
from shared.sketch.terms import SketchTerms

# Far above any use; it keeps training finite, whoever the users are.
_LARGEST_STEP = 1e6
# Requests come from strangers: up to here arithmetic in floats is exact, or at least finite.
_LARGEST_COUNT, _LARGEST_NUMBER = 2**53, 1e100


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """What the server asks of every owner in one round; public numbers only.

    The first rounds of a run may each be a sketch, one release of statistics; all others train by DP-SGD.

    Args:
        server_round: 1 to ``num_rounds``.
        num_owners: owners that the run is planned with; theirs to refuse when too few.
        num_steps: optimizer steps in this round.
        sample_rate: chance that a user is in a batch.
        max_users: public bound on the users of one owner; sets the normaliser.
        max_grad_norm: L2 bound on the gradient of one user.
        learning_rate: of the owner's SGD.
        proximal_mu: FedProx's pull towards the weights received; 0 for none.
        release: of one round of training; None without privacy (simulations only), or where nothing is trained.
        sketches: what the first rounds ask for.
    Raises:
        InputError: a number is out of range, the release does not describe the steps asked for, or some rounds are
            private but not all.
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
    sketches: tuple[SketchTerms, ...] = ()

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
        if len(self.sketches) > self.num_rounds:
            raise InputError(f"round plan: {len(self.sketches)} sketches in only {self.num_rounds} round(s)")
        if self.num_training_rounds == 0 and self.release is not None:
            raise InputError("round plan: a release of training, but no round that trains")
        if len({release is None for release in self._round_releases()}) > 1:
            raise InputError("round plan: a run is private in all its rounds or in none")
        if any(sketch.release and sketch.release.max_users != self.max_users for sketch in self.sketches):
            raise InputError(f"round plan: a sketch is priced for another max_users than {self.max_users}")
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
    def num_training_rounds(self) -> int:
        """Rounds that train by DP-SGD: all but the sketches."""
        return self.num_rounds - len(self.sketches)

    @property
    def sketch(self) -> SketchTerms | None:
        """What this round asks for, where it is a sketch."""
        return self.sketches[self.server_round - 1] if self.server_round <= len(self.sketches) else None

    @property
    def is_private(self) -> bool:
        """Whether what leaves is noised, in every round."""
        return None not in self._round_releases()

    @property
    def round_release(self) -> Release | None:
        """What this round releases; None without privacy."""
        return self.release if self.sketch is None else self.sketch.release

    @property
    def rest_of_run(self) -> tuple[Release | None, ...]:
        """What this round and those after it release, the rounds of training joined; None for what is not private.

        Raises:
            InputError: more steps than a release can have.
        """
        return self._releases_from(self.server_round)

    @property
    def whole_run(self) -> tuple[Release | None, ...]:
        """:attr:`rest_of_run` from round 1 on."""
        return self._releases_from(1)

    def share_done(self, step: int) -> float:
        """The part of the training that lies behind at ``step`` of this round, both from 0."""
        done = (self.server_round - len(self.sketches) - 1) * self.num_steps + step
        return done / (self.num_training_rounds * self.num_steps)

    def _round_releases(self) -> list[Release | None]:
        """Of each kind of round."""
        sketches: list[Release | None] = [sketch.release for sketch in self.sketches]
        return [*sketches, self.release] if self.num_training_rounds else sketches

    def _releases_from(self, server_round: int) -> tuple[Release | None, ...]:
        sketches: tuple[Release | None, ...] = tuple(s.release for s in self.sketches[server_round - 1 :])
        to_come = self.num_rounds - max(server_round - 1, len(self.sketches))
        if to_come == 0:
            return sketches
        if self.release is None:
            return (*sketches, None)
        return (*sketches, replace(self.release, num_steps=self.num_steps * to_come))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sketches": [sketch.to_dict() for sketch in self.sketches]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read :meth:`to_dict`'s form; InputError where a field is unknown, missing or out of range."""
        release, sketches = values.get("release"), values.get("sketches", [])
        if not isinstance(sketches, list) or not all(isinstance(sketch, dict) for sketch in sketches):
            raise InputError("round plan: sketches must be a list of terms")
        read = {
            "release": DpSgdRelease.from_dict(release) if release else None,
            "sketches": tuple(map(SketchTerms.from_dict, sketches)),
        }
        try:
            return cls(**{**values, **read})
        except TypeError as error:
            raise InputError(f"round plan: {error}") from None
