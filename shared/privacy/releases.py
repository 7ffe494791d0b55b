"""A DP release: the one value that the mechanism runs on and the accountant reads."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from shared.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class DpSgdRelease:
    """DP-SGD steps over users, Poisson-sampled, whose result leaves the owner.

    Args:
        noise_multiplier: noise standard deviation divided by the clipping norm; no unit.
        sample_rate: chance that a user is in a batch, independently for each user and step.
        num_steps: optimizer steps.
        max_batch: hard cap on a batch, or None where batches are not capped.
        max_users: public bound on the users of the owner; sets the normaliser, never the private count.
    Raises:
        InputError: a number is missing, not finite or out of range.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int
    max_users: int
    max_batch: None = None
    mechanism: Literal["dp_sgd_poisson"] = "dp_sgd_poisson"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise InputError(
                f"release: noise_multiplier must be finite and greater than 0, not {self.noise_multiplier!r}"
            )
        if not 0 < self.sample_rate <= 1:
            raise InputError(f"release: sample_rate must lie in (0, 1], not {self.sample_rate!r}")
        if self.num_steps < 1 or self.max_users < 1:
            raise InputError(
                f"release: num_steps and max_users must be at least 1, not {self.num_steps}, {self.max_users}"
            )
        if self.mechanism != "dp_sgd_poisson" or self.max_batch is not None:
            raise InputError(f"release: unknown mechanism {self.mechanism!r} with max_batch {self.max_batch!r}")

    @property
    def expected_batch(self) -> float:
        """The public normaliser of a batch, in users."""
        return self.sample_rate * self.max_users

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read :meth:`to_dict`'s form.

        Raises:
            InputError: a field is unknown, missing or out of range.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"release: {error}") from None
