"""Take the noisy steps that a release describes, and no more."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from opacus.accountants import PRVAccountant
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from shared.dpsgd.chance import Chance
from shared.errors import FedAugError, RefusedError
from shared.privacy.releases import DpSgdRelease

# Beyond this norm a float32 factor has lost its digits, so such a gradient is as good as infinite.
LARGEST_NORM = 1e30


class Users(Protocol):
    """A batch with one row per user: a tensor, or :class:`~shared.dpsgd.bags.Bags`."""

    def __len__(self) -> int: ...

    def __getitem__(self, kept: Tensor, /) -> Self: ...

    def to(self, device: torch.device) -> Self: ...


class DpSgd(ABC):
    """Clips each user's gradient, sums, adds noise, divides by a public number, and moves the weights.

    Args:
        module: mixes no users; each layer is called once per loss.
        optimizer: sees noised gradients only, whatever it remembers.
        release: its noise multiplier, public normaliser and number of steps are the ones used.
        max_grad_norm: L2 bound on the gradient of one user.
        chance: the source of the noise.
    Guarantee:
        One user moves the sum of gradients by at most ``max_grad_norm``, up to rounding, for any input: a user whose
        loss or gradient is not finite counts as zero. The sum is divided by the public ``release.expected_batch``,
        never by the users drawn. Opacus' accountant is told of every step by its optimizer's hook, and
        :meth:`executed` is what it was told.
    Raises:
        RefusedError: the engine cannot clip ``module`` by user, or ``optimizer`` moves other parameters than its.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        release: DpSgdRelease,
        *,
        max_grad_norm: float,
        chance: Chance,
    ) -> None:
        _refuse_other_parameters(module, optimizer)
        self.num_zeroed = 0
        """Users that counted as zero because a number was not finite, over all steps. Private."""
        self._release = release
        self._num_steps = 0
        self._accountant = PRVAccountant()
        terms = {
            "noise_multiplier": release.noise_multiplier,
            "max_grad_norm": max_grad_norm,
            "expected_batch_size": release.expected_batch,
        }
        self._optimizer = self._prepare(module, optimizer, terms, chance)
        self._optimizer.attach_step_hook(self._accountant.get_optimizer_hook_fn(release.sample_rate))

    def step(
        self, users: Users, losses: Callable[[Any], Tensor], *, after_noise: Callable[[], None] | None = None
    ) -> Tensor:
        """Take one step.

        Args:
            users: those drawn; none is a step of noise alone.
            losses: of such users, shape ``(num_users,)``; a function of each user alone.
            after_noise: adds terms that look at no user, such as FedProx's, to the noised gradients.
        Returns: the losses of the users that counted. Private.
        Raises:
            RefusedError: the release allows no further step, or a layer was used in a way that clipping would miss.
            ValueError: ``losses`` does not give one number per user.
        """
        if self._num_steps == self._release.num_steps:
            raise RefusedError(
                f"the release prices {self._release.num_steps} step(s) and they are done; plan and charge another"
                " release."
            )
        self._num_steps += 1
        counted = self._backward(users, losses)
        self._optimizer.pre_step()
        if after_noise is not None:
            after_noise()
        self._optimizer.original_optimizer.step()
        self._optimizer.zero_grad()
        self.num_zeroed += len(users) - len(counted)
        return counted

    def executed(self) -> DpSgdRelease:
        """The release whose steps were all taken, by Opacus' accountant.

        Raises:
            FedAugError: it counted other steps than the release prices; nothing may be released then.
        """
        promised = [(self._release.noise_multiplier, self._release.sample_rate, self._release.num_steps)]
        if self._accountant.history != promised:
            raise FedAugError(
                f"the release prices (noise multiplier, sample rate, steps) {promised}, but {self._accountant.history}"
                " were taken. Nothing may be released; report this as a bug."
            )
        return self._release

    @abstractmethod
    def _prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, terms: dict[str, float], chance: Chance
    ) -> DPOptimizer:
        """Make ``module`` ready and wrap ``optimizer``, whose Opacus twin takes ``terms``."""

    @abstractmethod
    def _backward(self, users: Users, losses: Callable[[Any], Tensor]) -> Tensor:
        """Leave the optimizer ready for its ``pre_step``; return the finite users' losses, without a graph."""


def _refuse_other_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    trained = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    moved = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if trained != moved:
        raise RefusedError(
            f"the optimizer moves {len(moved - trained)} parameter(s) that the model does not train, and leaves out"
            f" {len(trained - moved)} that it does: they would be noised or trained without a clip. Build the optimizer"
            " from model.parameters()."
        )


def one_per_user(losses: Tensor, users: Users) -> Tensor:
    """``losses``, unless they are not one number per user.

    Raises:
        ValueError: they have another shape.
    """
    if losses.dim() != 1 or len(losses) != len(users):
        raise ValueError(
            f"expected one loss for each of {len(users)} users, got shape {tuple(losses.shape)}. Do not reduce them:"
            " what is clipped is the gradient of each."
        )
    return losses
