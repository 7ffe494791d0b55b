"""One private step, what it released, and the same by a slow loop over users."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.dpsgd.chance import Chance
from shared.dpsgd.engine import DpSgd
from shared.dpsgd.engines import ENGINES
from shared.privacy.releases import DpSgdRelease

TINY = 1e-18  # a noise multiplier that leaves the sum as it is
MAX_USERS = 20
SAMPLE_RATE = 0.5

MakeEngine = Callable[..., DpSgd]  # one of ENGINES, or a broken one
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A module and the losses of users, who are given by their positions: ``losses(module, positions)``."""

    module: nn.Module
    losses: Callable[[Any, Tensor], Tensor]


class Descent(torch.optim.SGD):
    """Plain descent that shows what it was given: all that leaves the private part of a step."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module.parameters(), lr=1.0)
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        self.given: list[Sums] = []

    def step(self, closure: None = None) -> None:
        trained = {name: p for p, name in self.names.items() if p.requires_grad}
        self.given.append(
            {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}
        )
        super().step()


def release_of(
    num_steps: int = 1, *, noise_multiplier: float = TINY, max_users: int = MAX_USERS, sample_rate: float = SAMPLE_RATE
) -> DpSgdRelease:
    return DpSgdRelease(
        noise_multiplier=noise_multiplier, sample_rate=sample_rate, num_steps=num_steps, max_users=max_users
    )


def steps(
    make: MakeEngine,
    case: Case,
    batches: Sequence[Sequence[int]],
    *,
    max_grad_norm: float = 1.0,
    noise_multiplier: float = TINY,
    max_users: int = MAX_USERS,
    seed: int = 0,
) -> tuple[list[Sums], DpSgd, nn.Module]:
    """The sums that a release of ``len(batches)`` steps applies, and the engine and the module after them."""
    module = copy.deepcopy(case.module)
    release = release_of(len(batches), noise_multiplier=noise_multiplier, max_users=max_users)
    descent = Descent(module)
    engine = make(module, descent, release, max_grad_norm=max_grad_norm, chance=Chance.seeded(seed, "noise"))
    for batch in batches:
        engine.step(torch.tensor(list(batch), dtype=torch.int64), lambda users: case.losses(module, users))
    sums = [{name: value * release.expected_batch for name, value in given.items()} for given in descent.given]
    return sums, engine, module


def released(make: MakeEngine, case: Case, users: Sequence[int], **options: Any) -> Sums:
    """The sum that one step over ``users`` applies."""
    return steps(make, case, [users], **options)[0][0]


def by_hand(case: Case, users: Sequence[int], *, max_grad_norm: float = 1.0) -> tuple[Sums, float]:
    """The clipped sum by one backward pass per user, and the largest number in it."""
    module = copy.deepcopy(case.module)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    largest = 0.0
    for user in users:
        module.zero_grad()
        case.losses(module, torch.tensor([user])).sum().backward()
        gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
        factor = min(1.0, max_grad_norm / (norm(gradient) + 1e-6))
        for name, value in gradient.items():
            total[name] += value * factor
            largest = max(largest, float(value.abs().max()) * factor)
    return total, largest


def norm(sums: Sums) -> float:
    """L2 norm over all parameters."""
    return float(flat(sums).norm())


def flat(sums: Sums) -> Tensor:
    return torch.cat([value.reshape(-1).double() for value in sums.values()])


def difference(one: Sums, other: Sums) -> Sums:
    return {name: one[name].double() - other[name].double() for name in one}


def largest_gap(one: Sums, other: Sums) -> float:
    return float(flat(difference(one, other)).abs().max())


ALL_ENGINES = tuple(ENGINES)
