"""A variational autoencoder of user histories with a multinomial likelihood and a learnt prior."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shared.dpsgd.bags import Bags
from shared.dpsgd.chance import Chance
from shared.dpsgd.layers import ScaledBiasLinear, SparseBag
from shared.errors import InputError
from shared.generators.likelihood import multinomial_log_likelihood
from shared.rng import torch_stream

Weights = dict[str, npt.NDArray[np.float32]]

# An owner builds what a server asks for, so sizes have an end.
_LARGEST = {"num_items": 10_000_000, "hidden_size": 10_000, "latent_size": 10_000, "num_components": 10_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorSpec:
    """The architecture and the loss, all public; two owners with one spec build one model."""

    num_items: int
    hidden_size: int
    latent_size: int
    prior: Literal["gaussian", "mixture"]
    num_components: int
    kl_weight: float
    kl_anneal_share: float
    dropout: float
    popularity_scale: float
    kind: Literal["vae"] = "vae"

    def __post_init__(self) -> None:
        for name in ("num_items", "hidden_size", "latent_size", "num_components"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST[name]:
                raise InputError(
                    f"generator spec: {name} must be a whole number from 1 to {_LARGEST[name]}, not {value!r}"
                )
        ranges = {"kl_weight": 100.0, "kl_anneal_share": 1.0, "dropout": 0.99, "popularity_scale": 1000.0}
        for name, limit in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= limit:
                raise InputError(f"generator spec: {name} must lie between 0 and {limit:g}, not {value!r}")
        if self.prior not in ("gaussian", "mixture") or self.kind != "vae":
            raise InputError(f"generator spec: unknown prior {self.prior!r} or kind {self.kind!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read :meth:`to_dict`'s form; InputError where a field is unknown or missing."""
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"generator spec: {error}") from None


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


class MultVAE(nn.Module):
    """Encoder, prior and decoder over ``num_items``.

    The prior is part of the model, so that DP-SGD trains it with everything else, and
    sampling it touches no user again. ``mixture`` has ``num_components`` diagonal Gaussians;
    ``gaussian`` is the standard normal and has nothing to train.

    Source: Liang et al. 2018, arXiv:1802.05814 (likelihood, annealing); Dilokthanakul et al. 2016,
    arXiv:1611.02648, and Tomczak & Welling 2018, arXiv:1705.07120 (mixture priors).
    """

    def __init__(self, spec: GeneratorSpec) -> None:
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

    def loss(self, histories: Bags, *, kl_weight: float, chance: Chance) -> Tensor:
        """Each user's negative evidence bound divided by the length of its history, shape ``(num_users,)``.

        Args:
            kl_weight: weight of the divergence from the prior at this step of the annealing.
            chance: of dropout and of the latent draw. Users take from it in turn, so one more user moves the draws of
                those behind: the bound on a user's influence holds because nobody can know them.
        """
        lengths = histories.lengths.clamp(min=1).to(self.to_logits.weight)
        inputs = lengths.rsqrt()[histories.users]
        if self.spec.dropout:
            kept = torch.from_numpy(chance.uniform(len(inputs)) >= self.spec.dropout)
            inputs = inputs * kept.to(inputs) / (1.0 - self.spec.dropout)
        hidden = torch.tanh(self.encoder(histories.items, inputs, histories.starts))
        mean, log_variance = self.to_mean(hidden), self.to_log_variance(hidden)
        drawn = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
        chance.fill_normal(drawn, stddev=1.0)
        latent = mean + torch.exp(0.5 * log_variance) * drawn
        likelihood = multinomial_log_likelihood(self.decode(latent), histories)
        return (kl_weight * self._divergence(latent, mean, log_variance) - likelihood) / lengths

    def decode(self, latent: Tensor) -> Tensor:
        """Item logits of shape ``(num_users, num_items)``; their bias is the items' popularity."""
        logits: Tensor = self.to_logits(torch.tanh(self.decoder(latent)))
        return logits

    def _divergence(self, latent: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        if self.spec.prior == "gaussian":
            return 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance).sum(1)
        # No closed form against a mixture: log q(z) - log p(z) at the latent drawn, up to the
        # constants of the two Gaussians, which are equal.
        users, size, components = len(latent), self.spec.latent_size, self.spec.num_components
        posterior = -0.5 * ((latent - mean) ** 2 / log_variance.exp() + log_variance).sum(1)
        means = self.prior_means(users).view(users, components, size)
        variances = self.prior_log_variances(users).view(users, components, size)
        shares = torch.log_softmax(self.prior_logits(users), dim=1)
        densities = -0.5 * ((latent[:, None] - means) ** 2 / variances.exp() + variances).sum(2)
        return posterior - torch.logsumexp(shares + densities, dim=1)

    @torch.no_grad()
    def sample_latent(self, num_users: int, *, generator: torch.Generator) -> Tensor:
        """Draws from the prior, shape ``(num_users, latent_size)``; no user is looked at."""
        normal = torch.randn(num_users, self.spec.latent_size, generator=generator)
        if self.spec.prior == "gaussian":
            return normal
        size, components = self.spec.latent_size, self.spec.num_components
        shares = torch.softmax(self.prior_logits(1)[0], dim=0)
        chosen = torch.multinomial(shares, num_users, replacement=True, generator=generator)
        means = self.prior_means(1).view(components, size)[chosen]
        spread = torch.exp(0.5 * self.prior_log_variances(1).view(components, size)[chosen])
        latent: Tensor = means + spread * normal
        return latent


def kl_weight_at(spec: GeneratorSpec, *, share_done: float) -> float:
    """The annealed weight: from 0 to ``kl_weight`` over the first ``kl_anneal_share`` of the training."""
    if spec.kl_anneal_share == 0:
        return spec.kl_weight
    return spec.kl_weight * min(1.0, share_done / spec.kl_anneal_share)


def initial_weights(spec: GeneratorSpec, seed: int) -> Weights:
    """Weights before training, from ``seed`` and public sizes alone: float32, in a fixed order."""
    generator = torch_stream(seed, "initial-weights")
    weights: Weights = {}
    for name, parameter in MultVAE(spec).state_dict().items():
        shape = tuple(parameter.shape)
        if name.startswith("prior_means"):
            values = torch.randn(shape, generator=generator)
        elif name.endswith("bias") or name.startswith("prior_"):
            values = torch.zeros(shape)
        else:
            # Glorot & Bengio 2010: keeps the scale of a signal through tanh layers.
            values = torch.randn(shape, generator=generator) * (2.0 / sum(shape)) ** 0.5
        weights[name] = values.numpy().astype(np.float32)
    return weights


def model_from(spec: GeneratorSpec, weights: Weights) -> MultVAE:
    """A model with ``weights``.

    Raises:
        InputError: names or shapes are not those of ``spec``, or a number is not finite.
    """
    model = MultVAE(spec)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != given:
        odd = sorted(set(expected.items()) ^ set(given.items()))[0]
        raise InputError(f"generator weights do not fit the spec: first difference at {odd[0]} {odd[1]}.")
    if any(not np.isfinite(value).all() for value in weights.values()):
        raise InputError("generator weights hold a number that is not finite; use the last good checkpoint.")
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    return model
