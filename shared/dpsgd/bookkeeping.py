"""DP-SGD by book-keeping: one backward pass, no gradient per user, noise in place."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor, nn

from shared.dpsgd.attach import attach, watching
from shared.dpsgd.chance import Chance
from shared.dpsgd.engine import LARGEST_NORM, DpSgd, Users, one_per_user
from shared.dpsgd.rules import Rule
from shared.errors import RefusedError


class BookKeepingOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]  # Opacus has no types
    """Opacus' optimizer for fast clipping, which clips by ``rules`` and draws its noise from ``chance``.

    Opacus keeps the order of a step and its hook, from which its accountants count. Noise is written first, into the
    gradients that stay allocated, and the clipped sums are added to it: no second copy of the parameters is needed.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        rules: list[Rule],
        chance: Chance,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self._rules = rules
        self._chance = chance
        self._factors: Tensor | None = None

    def clip_by(self, factors: Tensor | None) -> None:
        """Set each user's factor for the sum of this step; None where nobody was drawn."""
        self._factors = factors

    def accumulate(self) -> None:
        """Noise of the release's spread plus the clipped sum, over the public batch size, in every ``grad``."""
        # Divided here and not in scale_grad: that would be one more pass over every parameter.
        stddev = self.noise_multiplier * self.max_grad_norm / self.expected_batch_size
        with torch.no_grad():
            for parameter in self.params:
                if parameter.grad is None:
                    parameter.grad = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                self._chance.fill_normal(parameter.grad, stddev=stddev)
            for rule in self._rules:
                rule.erase_noise()
                if self._factors is not None and rule.recorded:
                    rule.add_clipped(self._factors / self.expected_batch_size)

    def add_noise(self) -> None:
        """Nothing: :meth:`accumulate` began with it."""

    def scale_grad(self) -> None:
        """Nothing: :meth:`accumulate` divided already."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Forget the batch; the gradients stay allocated."""
        self._factors = None
        for rule in self._rules:
            rule.clear()


class BookKeepingDpSgd(DpSgd):
    """By the rules of :mod:`shared.dpsgd.rules`: one backward pass, no gradient per user."""

    def _prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, terms: dict[str, float], chance: Chance
    ) -> DPOptimizer:
        self._rules = attach(module)
        return BookKeepingOptimizer(optimizer, rules=self._rules, chance=chance, **terms)

    def _backward(self, users: Users, losses: Callable[[Any], Tensor]) -> Tensor:
        self._optimizer.zero_grad()
        if not len(users):
            return torch.zeros(0)
        with watching(self._rules):
            counted = one_per_user(losses(users), users)
            counted.sum().backward()  # type: ignore[no-untyped-call]
            counted = counted.detach()
            with torch.no_grad():
                return self._clip(counted)

    def _clip(self, counted: Tensor) -> Tensor:
        used = [rule for rule in self._rules if rule.recorded]
        for rule in used:
            if rule.num_users != len(counted):
                raise ValueError(
                    f"layer {rule.name!r} saw {rule.num_users} rows for {len(counted)} users. Its inputs must have the"
                    " user as their first dimension."
                )
        norms = _norms(used, counted)
        keep = torch.isfinite(counted) & (norms <= LARGEST_NORM)
        # Whatever must be known on the host is fetched at once: on a GPU the only wait of a step.
        problems = [problem for rule in used if (problem := rule.problem()) is not None]
        all_kept, *found = torch.stack([keep.all(), *(flag for flag, _ in problems)]).tolist()
        for (_, message), flag in zip(problems, found, strict=True):
            if flag:
                raise RefusedError(message)
        if not all_kept:
            for rule in used:
                rule.drop(keep)
            norms = _norms(used, counted)
            counted = counted[keep]
        self._optimizer.clip_by((self._optimizer.max_grad_norm / (norms + 1e-6)).clamp(max=1.0))
        return counted


def _norms(rules: Sequence[Rule], like: Tensor) -> Tensor:
    squares = torch.zeros_like(like)
    for rule in rules:
        squares = squares + rule.squared_norms()
    return squares.sqrt()
