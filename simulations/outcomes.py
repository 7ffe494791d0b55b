"""What one seed of a simulation found out, kept so that a killed study goes on at the next seed."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import InputError
from shared.files import write_atomically

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class OwnerOutcome:
    """One owner under every arm. Simulation only: a real owner keeps all of this at home.

    Args:
        num_users: users of the owner, trained on or tested.
        epsilon: what its ledger had spent at the end.
        chosen_weight: by arm that augments.
        chosen_schedule: by arm that augments: how that weight runs over a recommender's epochs.
        per_user: by arm, the metric of every test user, in one order for all arms.
        coverage: by arm.
    """

    name: str
    num_users: int
    epsilon: float
    chosen_weight: dict[str, float]
    chosen_schedule: dict[str, str]
    per_user: dict[str, FloatArray]
    coverage: dict[str, float]

    def __post_init__(self) -> None:
        sizes = {arm: len(values) for arm, values in self.per_user.items()}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise InputError(f"{self.name}: arms must score the same test users, one or more, but scored {sizes}.")


@dataclass(frozen=True, slots=True, eq=False)
class SeedOutcome:
    """All owners under one seed."""

    seed: int
    owners: tuple[OwnerOutcome, ...]
    seconds: float

    def save(self, path: Path) -> None:
        """Write JSON; a crash leaves the old file or the new one, never half of one."""
        content = json.dumps({"simulation_only": True, **asdict(self)}, default=_plain)
        write_atomically(path, content.encode())

    @classmethod
    def load(cls, path: Path) -> "SeedOutcome":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing or is not one of ours.
        """
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            owners = tuple(_owner(owner) for owner in stored["owners"])
            return cls(int(stored["seed"]), owners, float(stored["seconds"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: not the outcome of a seed ({error!r}). Delete it to run that seed again."
            ) from None


def _owner(stored: dict[str, Any]) -> OwnerOutcome:
    per_user = {arm: np.asarray(values, dtype=np.float64) for arm, values in stored["per_user"].items()}
    return OwnerOutcome(**{**stored, "epsilon": float(stored["epsilon"]), "per_user": per_user})


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.floating | np.integer):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")
