"""DP-SGD through Opacus' ghost clipping: per-user norms without per-user gradients."""

import warnings
from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

from shared.privacy.releases import DpSgdRelease

# The first layer's input is data and needs no gradient, which is what this warning is about; Opacus hooks what it must.
warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)


class GhostDpSgd:
    """Takes the noisy steps that ``release`` describes, and counts them.

    Args:
        module: Linear layers, each called once per loss.
        optimizer: sees noised gradients only, whatever it remembers.
        release: its noise multiplier and public normaliser are the ones used.
        max_grad_norm: L2 bound on the gradient of one user.
        noise: the stream of the noise.
    Guarantee:
        One user moves the sum of gradients by at most ``max_grad_norm``; the sum is divided by
        the public ``release.expected_batch``, never by the users drawn.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        release: DpSgdRelease,
        *,
        max_grad_norm: float,
        noise: torch.Generator,
    ) -> None:
        self.num_steps = 0
        self._hooked = GradSampleModuleFastGradientClipping(
            module, max_grad_norm=max_grad_norm, use_ghost_clipping=True, loss_reduction="sum"
        )
        self._hooked.train()
        self._optimizer = DPOptimizerFastGradientClipping(
            optimizer,
            noise_multiplier=release.noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=release.expected_batch,
            generator=noise,
        )

    def step(self, loss_per_user: Tensor, *, after_noise: Callable[[], None] | None = None) -> None:
        """Clip each user's gradient, sum, add noise, divide, and move the weights.

        Args:
            loss_per_user: shape ``(num_users_drawn,)``; an empty batch is a step of noise alone.
            after_noise: adds terms that look at no user, such as FedProx's, to the noised gradients.
        """
        if loss_per_user.dim() != 1:
            raise ValueError(f"expected one loss per user, got shape {tuple(loss_per_user.shape)}")
        self._hooked.enable_hooks()
        DPTensorFastGradientClipping(self._hooked, self._optimizer, loss_per_user, loss_reduction="sum").backward()
        self._optimizer.pre_step()
        if after_noise is not None:
            after_noise()
        self._optimizer.original_optimizer.step()
        self._optimizer.zero_grad()
        self.num_steps += 1
