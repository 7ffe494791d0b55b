"""What an owner allows, whatever a server asks for."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, get_args

from shared.config import EngineName
from shared.errors import InputError
from shared.files import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """An owner's own terms.

    Args:
        epsilon: ceiling over every release ever made from this data; None for no ceiling, which
            only a simulated owner may have.
        delta: at which epsilon is read.
        catalogue_hash: of the public catalogue that the owner's item positions refer to.
        max_users: public bound on its users, which the server's plan must name. Were it the server's to choose,
            refusals would tell the private count.
        dpsgd_engine: how users' gradients are clipped; all engines give the same sums.
        dpsgd_device: where the generator is trained.
        simulated: written by simulations only; without it no run may seed the noise or ask for private figures.
    Raises:
        InputError: a number is missing or out of range.
    """

    epsilon: float | None
    delta: float
    catalogue_hash: str
    max_users: int
    dpsgd_engine: EngineName = "bookkeeping"
    dpsgd_device: str = "cpu"
    simulated: bool = False

    def __post_init__(self) -> None:
        if self.epsilon is not None and not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InputError(
                f"policy: epsilon must be finite and greater than 0, or null for none; not {self.epsilon!r}"
            )
        if not (math.isfinite(self.delta) and 0 < self.delta < 1):
            raise InputError(f"policy: delta must lie between 0 and 1, both excluded; not {self.delta!r}")
        if isinstance(self.max_users, bool) or not isinstance(self.max_users, int) or self.max_users < 1:
            raise InputError(f"policy: max_users must be a whole number of at least 1, not {self.max_users!r}")
        if self.dpsgd_engine not in get_args(EngineName):
            raise InputError(
                f"policy: unknown dpsgd_engine {self.dpsgd_engine!r}; choose one of {', '.join(get_args(EngineName))}"
            )
        if not isinstance(self.simulated, bool):
            raise InputError(f"policy: simulated must be true or false, not {self.simulated!r}")
        if not self.catalogue_hash:
            raise InputError("policy: catalogue_hash is empty")

    def save(self, directory: Path) -> None:
        write_json(directory / "policy.json", asdict(self))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read ``directory/policy.json``.

        Raises:
            InputError: it is missing, unreadable, or has a field too few or too many.
        """
        path = directory / "policy.json"
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"no usable policy at {path} ({error}): nothing is trained without one.") from None
