"""DP-SGD through Opacus' ghost clipping: per-user norms without per-user gradients."""

import warnings
from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.optimizers.optimizer import _mark_as_processed
from torch import Tensor, nn

from shared.dpsgd.chance import Chance
from shared.errors import RefusedError
from shared.privacy.releases import DpSgdRelease

# The first layer's input is data and needs no gradient, which is what this warning is about; Opacus hooks what it must.
warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)


class _Optimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]  # Opacus has no types
    """Opacus' optimizer with noise from :class:`Chance` in place of torch's generator."""

    chance: Chance

    def add_noise(self) -> None:
        for parameter in self.params:
            drawn = torch.from_numpy(self.chance.normal(parameter.numel())).view_as(parameter)
            noise = drawn.to(parameter) * (self.noise_multiplier * self.max_grad_norm)
            parameter.grad = parameter.summed_grad + noise
            _mark_as_processed(parameter.summed_grad)


class GhostDpSgd:
    """Takes the noisy steps that ``release`` describes, and no more.

    Args:
        module: Linear layers, each called once per loss.
        optimizer: sees noised gradients only, whatever it remembers.
        release: its noise multiplier, public normaliser and number of steps are the ones used.
        max_grad_norm: L2 bound on the gradient of one user.
        chance: the source of the noise.
    Guarantee:
        One user moves the sum of gradients by at most ``max_grad_norm``, for any input: a user whose loss or gradient
        is not finite counts as zero. The sum is divided by the public ``release.expected_batch``, never by the users
        drawn.
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
        self.num_steps = 0
        self._max_steps = release.num_steps
        self._hooked = GradSampleModuleFastGradientClipping(
            module, max_grad_norm=max_grad_norm, use_ghost_clipping=True, loss_reduction="sum"
        )
        self._hooked.train()
        self._optimizer = _Optimizer(
            optimizer,
            noise_multiplier=release.noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=release.expected_batch,
        )
        self._optimizer.chance = chance

    def step(
        self, users: Tensor, losses: Callable[[Tensor], Tensor], *, after_noise: Callable[[], None] | None = None
    ) -> Tensor:
        """Clip each user's gradient, sum, add noise, divide, and move the weights.

        Args:
            users: one row per user drawn; none is a step of noise alone.
            losses: of such rows, shape ``(num_rows,)``.
            after_noise: adds terms that look at no user, such as FedProx's, to the noised gradients.
        Returns: the losses of the users that counted. Private.
        Raises:
            RefusedError: the release allows no further step.
            ValueError: ``losses`` does not give one number per user.
        """
        if self.num_steps == self._max_steps:
            raise RefusedError(
                f"the release prices {self._max_steps} step(s) and they are done; plan and charge another release."
            )
        self.num_steps += 1
        counted, coefficients = self._forward(users, losses)
        while not bool((keep := torch.isfinite(counted) & torch.isfinite(coefficients)).all()):
            # Clipping cannot mend infinity times zero: the others are computed anew, without these users. That draws
            # new latents, which may overflow for one more; every turn leaves fewer users, so it ends.
            users = users[keep]
            counted, coefficients = self._forward(users, losses)
        self._hooked.disable_hooks()
        (coefficients * counted).sum().backward()  # type: ignore[no-untyped-call]
        self._hooked.enable_hooks()
        self._optimizer.pre_step()
        if after_noise is not None:
            after_noise()
        self._optimizer.original_optimizer.step()
        self._optimizer.zero_grad()
        return counted.detach()

    def _forward(self, users: Tensor, losses: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Losses with their graph, and the factor that clips each user's gradient."""
        counted = losses(users)
        if counted.dim() != 1 or len(counted) != len(users):
            raise ValueError(f"expected one loss for each of {len(users)} users, got shape {tuple(counted.shape)}")
        counted.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        norms = self._hooked.get_norm_sample()
        if len(norms) != len(users):
            raise ValueError(f"expected one gradient norm for each of {len(users)} users, got {len(norms)}")
        coefficients = self._hooked.get_clipping_coef()
        self._optimizer.zero_grad()
        # A norm that overflows gives the factor 0, and zero times infinity is no number: such a user must go.
        return counted, torch.where(torch.isfinite(norms), coefficients, torch.nan)
