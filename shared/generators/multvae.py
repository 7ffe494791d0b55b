"""A variational autoencoder of user histories with a multinomial likelihood and a learnt prior."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shared.data.histories import Histories
from shared.dpsgd.bags import Bags
from shared.dpsgd.chance import Chance
from shared.dpsgd.layers import ScaledBiasLinear, SparseBag
from shared.errors import InputError
from shared.generators.bags import EncodedBags, draw_bags
from shared.generators.base import GeneratorModel, IntArray, Spec
from shared.generators.likelihood import multinomial_log_likelihood

_LARGEST = 10_000
_COUPLINGS = 4  # even: the halves of a latent end where they began


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeSpec(Spec):
    """Sizes and loss of a :class:`MultVAE`; ``num_components`` is read by the mixture alone."""

    kind: ClassVar[str] = "vae"
    WHOLE: ClassVar[Mapping[str, int]] = {
        "hidden_size": _LARGEST,
        "latent_size": _LARGEST,
        "num_components": _LARGEST,
    }
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        "kl_weight": (0.0, 100.0),
        "kl_anneal_share": (0.0, 1.0),
        "dropout": (0.0, 0.99),
        "popularity_scale": (0.0, 1000.0),
    }
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {"prior": ("gaussian", "mixture", "flow")}

    hidden_size: int
    latent_size: int
    prior: str
    num_components: int
    kl_weight: float
    kl_anneal_share: float
    dropout: float
    popularity_scale: float

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        if self.prior == "flow" and self.latent_size < 2:
            raise InputError("generator spec: a flow prior moves halves of a latent; latent_size must be at least 2.")


class _Constant(nn.Module):
    """``size`` trainable numbers, repeated for each user.

    A Linear layer on a constant input: so the numbers get a per-user gradient by the same rule as
    every other layer, instead of being a bare parameter that DP-SGD engines treat apart.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.values = nn.Linear(1, size, bias=False)

    def forward(self, num_users: int) -> Tensor:
        like = self.values.weight
        repeated: Tensor = self.values(torch.ones(num_users, 1, dtype=like.dtype, device=like.device))
        return repeated


class _Coupling(nn.Module):
    """Shifts and scales a part of a latent by a function of the rest, which stays: a map that is easy to invert.

    Source: Dinh et al. 2017, arXiv:1605.08803, equations 4 to 8, with scales between 1/e and e.
    """

    def __init__(self, num_kept: int, num_moved: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(num_kept, width)
        self.outer = nn.Linear(width, 2 * num_moved)

    def forward(self, kept: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """``moved`` on its way to the standard normal, and the logarithm of how much that stretched space."""
        shift, log_scale = self._move(kept)
        return moved * log_scale.exp() + shift, log_scale.sum(1)

    def inverse(self, kept: Tensor, moved: Tensor) -> Tensor:
        shift, log_scale = self._move(kept)
        return (moved - shift) * torch.exp(-log_scale)

    def _move(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.outer(torch.tanh(self.inner(kept))).chunk(2, dim=1)
        return shift, torch.tanh(log_scale)


class _Flow(nn.Module):
    """The standard normal of ``size`` numbers, seen through couplings."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self._half = size // 2
        halves = self._half, size - self._half
        self.couplings = nn.ModuleList(
            _Coupling(halves[layer % 2], halves[1 - layer % 2], width) for layer in range(_COUPLINGS)
        )

    def log_density(self, latent: Tensor) -> Tensor:
        """Of each row of ``latent``, up to the constant of a Gaussian, shape ``(num_users,)``."""
        kept, moved = latent[:, : self._half], latent[:, self._half :]
        stretched = torch.zeros_like(latent[:, 0])
        for coupling in self._in_order():
            moved, more = coupling(kept, moved)
            # The halves swap places, so that every number is moved by others.
            kept, moved, stretched = moved, kept, stretched + more
        return stretched - 0.5 * (kept.square().sum(1) + moved.square().sum(1))

    def from_normal(self, normal: Tensor) -> Tensor:
        """The latents whose way to the standard normal ends at ``normal``."""
        kept, moved = normal[:, : self._half], normal[:, self._half :]
        for coupling in reversed(self._in_order()):
            kept, moved = moved, coupling.inverse(moved, kept)
        return torch.cat([kept, moved], dim=1)

    def _in_order(self) -> list[_Coupling]:
        return cast(list[_Coupling], list(self.couplings))


class MultVAE(GeneratorModel):
    """Encoder, prior and decoder over ``num_items``.

    The prior is part of the model, so that DP-SGD trains it with everything else, and
    sampling it touches no user again. ``mixture`` has ``num_components`` diagonal Gaussians;
    ``gaussian`` is the standard normal and has nothing to train; ``flow`` is the standard normal
    seen through coupling layers as wide as the encoder.

    Source: Liang et al. 2018, arXiv:1802.05814 (likelihood, annealing); Dilokthanakul et al. 2016,
    arXiv:1611.02648, and Tomczak & Welling 2018, arXiv:1705.07120 (mixture priors); Huang et al. 2017,
    arXiv:1710.02248 (flow priors).
    """

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = SparseBag(spec.num_items, spec.hidden_size)
        self.to_mean = nn.Linear(spec.hidden_size, spec.latent_size)
        self.to_log_variance = nn.Linear(spec.hidden_size, spec.latent_size)
        self.decoder = nn.Linear(spec.latent_size, spec.hidden_size)
        self.to_logits = ScaledBiasLinear(spec.hidden_size, spec.num_items, bias_scale=spec.popularity_scale)
        if spec.prior == "mixture":
            self.prior_means = _Constant(spec.num_components * spec.latent_size)
            self.prior_log_variances = _Constant(spec.num_components * spec.latent_size)
            self.prior_logits = _Constant(spec.num_components)
        if spec.prior == "flow":
            self.prior_flow = _Flow(spec.latent_size, spec.hidden_size)

    def encode(self, histories: Histories) -> EncodedBags:
        return EncodedBags(histories.to_csr())

    def loss(self, users: Bags, *, share_done: float, chance: Chance) -> Tensor:
        """Each user's negative evidence bound divided by the length of its history, shape ``(num_users,)``.

        The weight of the divergence from the prior rises to ``kl_weight`` over the first ``kl_anneal_share``.
        """
        lengths = users.lengths.clamp(min=1).to(self.to_logits.weight)
        inputs = lengths.rsqrt()[users.users]
        if self.spec.dropout:
            kept = torch.from_numpy(chance.uniform(len(inputs)) >= self.spec.dropout)
            inputs = inputs * kept.to(inputs) / (1.0 - self.spec.dropout)
        hidden = torch.tanh(self.encoder(users.items, inputs, users.starts))
        mean, log_variance = self.to_mean(hidden), self.to_log_variance(hidden)
        drawn = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
        chance.fill_normal(drawn, stddev=1.0)
        latent = mean + torch.exp(0.5 * log_variance) * drawn
        likelihood = multinomial_log_likelihood(self.decode(latent), users)
        kl_weight = kl_weight_at(self.spec, share_done=share_done)
        return (kl_weight * self._divergence(latent, mean, log_variance) - likelihood) / lengths

    def decode(self, latent: Tensor) -> Tensor:
        """Item logits of shape ``(num_users, num_items)``; their bias is the items' popularity."""
        logits: Tensor = self.to_logits(torch.tanh(self.decoder(latent)))
        return logits

    def _divergence(self, latent: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        if self.spec.prior == "gaussian":
            return 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance).sum(1)
        # No closed form: log q(z) - log p(z) at the latent drawn, up to the constants of the two Gaussians, which are
        # equal.
        posterior = -0.5 * ((latent - mean) ** 2 / log_variance.exp() + log_variance).sum(1)
        is_flow = self.spec.prior == "flow"
        return posterior - (self.prior_flow.log_density(latent) if is_flow else self._mixture(latent))

    def _mixture(self, latent: Tensor) -> Tensor:
        users, size, components = len(latent), self.spec.latent_size, self.spec.num_components
        means = self.prior_means(users).view(users, components, size)
        variances = self.prior_log_variances(users).view(users, components, size)
        shares = torch.log_softmax(self.prior_logits(users), dim=1)
        densities = -0.5 * ((latent[:, None] - means) ** 2 / variances.exp() + variances).sum(2)
        return torch.logsumexp(shares + densities, dim=1)

    def draw(
        self, lengths: IntArray, *, generator: torch.Generator, tilt: npt.NDArray[np.float32] | None = None
    ) -> Histories:
        return draw_bags(self, lengths, generator=generator, tilt=tilt)

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if name.startswith("prior_means"):
            return torch.randn(shape, generator=generator)
        if name.startswith("prior_") and "inner" not in name:
            return torch.zeros(shape)  # of a flow: the standard normal to begin with
        return super().initial(name, shape, generator)

    @torch.no_grad()
    def sample_latent(self, num_users: int, *, generator: torch.Generator) -> Tensor:
        """Draws from the prior, shape ``(num_users, latent_size)``; no user is looked at."""
        normal = torch.randn(num_users, self.spec.latent_size, generator=generator)
        if self.spec.prior == "gaussian":
            return normal
        if self.spec.prior == "flow":
            return self.prior_flow.from_normal(normal)
        size, components = self.spec.latent_size, self.spec.num_components
        shares = torch.softmax(self.prior_logits(1)[0], dim=0)
        chosen = torch.multinomial(shares, num_users, replacement=True, generator=generator)
        means = self.prior_means(1).view(components, size)[chosen]
        spread = torch.exp(0.5 * self.prior_log_variances(1).view(components, size)[chosen])
        latent: Tensor = means + spread * normal
        return latent


def kl_weight_at(spec: VaeSpec, *, share_done: float) -> float:
    """The annealed weight: from 0 to ``kl_weight`` over the first ``kl_anneal_share`` of the training."""
    if spec.kl_anneal_share == 0:
        return spec.kl_weight
    return spec.kl_weight * min(1.0, share_done / spec.kl_anneal_share)
