"""A DP release: the one value that the mechanism runs on and the accountant reads."""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

from shared.errors import InputError

# Up to here a float holds every whole number, and the accountants compute in floats. More steps than a million
# would only keep them busy.
_LARGEST = {"num_steps": 10**6, "max_users": 2**53, "max_batch": 2**53}
_LONGEST_NAME = 100
_BATCH = ("sample_rate", "num_steps", "max_batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class DpSgdRelease:
    """DP-SGD steps over users, Poisson-sampled, whose result leaves the owner.

    Args:
        noise_multiplier: noise standard deviation divided by the clipping norm; no unit.
        sample_rate: chance that a user is drawn, independently for each user and step.
        num_steps: optimizer steps.
        max_batch: hard cap on a batch, in users: where more are drawn, a uniformly random subset of that size
            is kept and the others sit the step out. None where batches are not capped.
        max_users: public bound on the users of the owner; sets the normaliser, never the private count.
    Raises:
        InputError: a number is missing, not finite, not whole or out of range.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int
    max_users: int
    max_batch: int | None = None
    mechanism: Literal["dp_sgd_poisson"] = "dp_sgd_poisson"

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        if isinstance(self.sample_rate, bool) or not 0 < self.sample_rate <= 1:
            raise InputError(f"release: sample_rate must lie in (0, 1], not {self.sample_rate!r}")
        _check_count("num_steps", self.num_steps)
        _check_count("max_users", self.max_users)
        if self.max_batch is not None:
            _check_count("max_batch", self.max_batch)
            if self.max_batch > self.max_users:
                raise InputError(
                    f"release: max_batch {self.max_batch} is above max_users {self.max_users}, which no batch can"
                    f" exceed. Use max_batch={self.max_users}, or none."
                )
        if self.mechanism != "dp_sgd_poisson":
            raise InputError(f"release: unknown mechanism {self.mechanism!r}")

    @property
    def expected_batch(self) -> float:
        """The public normaliser of a batch, in users; a cap does not change it."""
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
        except (TypeError, OverflowError) as error:
            raise InputError(f"release: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianRelease:
    """A statistic of all users that leaves the owner once, with Gaussian noise.

    To the accountants it is one step of DP-SGD over every user, and :meth:`to_dict` writes it so.

    Args:
        statistic: its short public name, such as ``"popularity"``; printable, at most 100 characters.
        noise_multiplier: noise standard deviation divided by the L2 sensitivity to adding or removing one user;
            no unit.
        max_users: public bound on the users of the owner.
    Raises:
        InputError: a number is not finite, not whole or out of range, or the name is none.
    """

    statistic: str
    noise_multiplier: float
    max_users: int
    mechanism: Literal["gaussian"] = "gaussian"

    # One batch, of every user.
    sample_rate: ClassVar[float] = 1.0
    num_steps: ClassVar[int] = 1
    max_batch: ClassVar[None] = None

    def __post_init__(self) -> None:
        name = self.statistic
        if not (isinstance(name, str) and name.strip() and len(name) <= _LONGEST_NAME and name.isprintable()):
            raise InputError(f"release: statistic must be a name of 1 to {_LONGEST_NAME} printable characters")
        _check_noise(self.noise_multiplier)
        _check_count("max_users", self.max_users)
        if self.mechanism != "gaussian":
            raise InputError(f"release: unknown mechanism {self.mechanism!r}")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), **{name: getattr(self, name) for name in _BATCH}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read :meth:`to_dict`'s form.

        Raises:
            InputError: a field is unknown, missing, out of range or not that of a single full batch.
        """
        try:
            own = {**values}
            for name in _BATCH:
                got, must = own.pop(name, getattr(cls, name)), getattr(cls, name)
                if isinstance(got, bool) or got != must:
                    raise InputError(f"release: {name} of a Gaussian mechanism is {must!r}, not {got!r}")
            return cls(**own)
        except (TypeError, OverflowError) as error:
            raise InputError(f"release: {error}") from None


Release = DpSgdRelease | GaussianRelease


def release_from_dict(values: dict[str, Any]) -> Release:
    """Read ``to_dict``'s form of whichever release it is.

    Raises:
        InputError: the mechanism is unknown, or a field is unknown, missing or out of range.
    """
    if not isinstance(values, dict):
        raise InputError(f"release: fields by name are needed, not {type(values).__name__}")
    match values.get("mechanism"):
        case "dp_sgd_poisson":
            return DpSgdRelease.from_dict(values)
        case "gaussian":
            return GaussianRelease.from_dict(values)
        case unknown:
            raise InputError(
                f"release: unknown mechanism {unknown!r}. Known are dp_sgd_poisson and gaussian; what a newer version"
                " released can only be priced by that version."
            )


def _check_noise(noise_multiplier: object) -> None:
    # Releases come from strangers, and to Python True is a 1.
    if isinstance(noise_multiplier, bool) or not isinstance(noise_multiplier, int | float):
        raise InputError(f"release: noise_multiplier must be a number, not {noise_multiplier!r}")
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise InputError(f"release: noise_multiplier must be finite and greater than 0, not {noise_multiplier!r}")


def _check_count(name: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _LARGEST[name]:
        raise InputError(f"release: {name} must be a whole number from 1 to {_LARGEST[name]}, not {count!r}")
