"""A generative adversarial network of user histories, whose generator learns from its discriminator alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.data.histories import Histories
from shared.dpsgd.bags import Bags
from shared.dpsgd.chance import Chance
from shared.dpsgd.layers import ScaledBiasLinear
from shared.generators.bags import draw_bags
from shared.generators.base import GeneratorModel, IntArray, Spec

_LARGEST = 10_000
_LEAK = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class GanSpec(Spec):
    """Sizes and loss of a :class:`Gan`.

    Args:
        hidden_size: width of the generator.
        discriminator_size: width of the discriminator's two layers.
        loss: ``bce`` with the generator's part that does not saturate, ``hinge``, or ``wasserstein``, for which every
            weight of the discriminator is kept within ``weight_clip``.
        fakes: rows of the generator in every step, whoever is drawn; about as many as users are expected.
        generator_steps: of the generator after each step of the discriminator.
        generator_rate_share: the generator's learning rate ÷ the discriminator's.
        items_shown: public mean length of what the discriminator is shown of a user or a fake; best below the length of
            most histories, since a user who has fewer items than asked for is told from fakes by that.
        popularity_scale: how much the bias of an item's logit counts.
        input_scale: L2 norm of what the discriminator is shown.
        discriminators: ``aggregated`` travel and are averaged as the generator is; ``local`` stay at their owners, and
            are charged all the same, since the generator carries what they learn.
    """

    kind: ClassVar[str] = "gan"
    WHOLE: ClassVar[Mapping[str, int]] = {
        "hidden_size": _LARGEST,
        "latent_size": _LARGEST,
        "discriminator_size": _LARGEST,
        "fakes": _LARGEST,
        "generator_steps": 100,
        "items_shown": _LARGEST,
    }
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        "weight_clip": (1e-6, 1000.0),
        "generator_rate_share": (0.0, 1000.0),
        "popularity_scale": (0.0, 1000.0),
        "input_scale": (1e-3, 1000.0),
    }
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "loss": ("bce", "hinge", "wasserstein"),
        "discriminators": ("aggregated", "local"),
    }

    hidden_size: int
    latent_size: int
    discriminator_size: int
    loss: str
    weight_clip: float
    fakes: int
    generator_steps: int
    generator_rate_share: float
    items_shown: int
    popularity_scale: float
    input_scale: float
    discriminators: str


@dataclass(frozen=True, slots=True)
class UsersAndFakes:
    """Rows of one step: the users drawn, followed by a public number of fakes that the loss makes up."""

    users: Bags
    num_fakes: int

    def __len__(self) -> int:
        return len(self.users) + self.num_fakes

    def __getitem__(self, kept: Tensor) -> Self:
        """The rows where ``kept``, bool of shape ``(len(self),)``, is true."""
        return type(self)(self.users[kept[: len(self.users)]], int(kept[len(self.users) :].sum()))

    def to(self, device: torch.device) -> Self:
        return type(self)(self.users.to(device), self.num_fakes)


@dataclass(frozen=True, slots=True)
class EncodedForGan:
    """Users as rows of a binary matrix of shape ``(num_users, num_items)``, with the fakes of every batch."""

    matrix: sp.csr_matrix
    num_fakes: int

    def batch(self, drawn: IntArray) -> UsersAndFakes:
        return UsersAndFakes(Bags.from_rows(self.matrix, drawn), self.num_fakes)


class _Generator(nn.Module):
    """Item logits of shape ``(num_users, num_items)`` from latents; their bias is the items' popularity."""

    def __init__(self, spec: GanSpec) -> None:
        super().__init__()
        self.from_latent = nn.Linear(spec.latent_size, spec.hidden_size)
        self.to_logits = ScaledBiasLinear(spec.hidden_size, spec.num_items, bias_scale=spec.popularity_scale)

    def forward(self, latent: Tensor) -> Tensor:
        logits: Tensor = self.to_logits(torch.tanh(self.from_latent(latent)))
        return logits


class _Discriminator(nn.Module):
    """One score per row of shape ``(num_items,)``, a function of that row alone: high for users, low for fakes."""

    def __init__(self, spec: GanSpec) -> None:
        super().__init__()
        self.from_items = nn.Linear(spec.num_items, spec.discriminator_size)
        self.between = nn.Linear(spec.discriminator_size, spec.discriminator_size)
        self.to_score = nn.Linear(spec.discriminator_size, 1)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = F.leaky_relu(self.from_items(rows), _LEAK)
        hidden = F.leaky_relu(self.between(hidden), _LEAK)
        scores: Tensor = self.to_score(hidden)[:, 0]
        return scores


class Gan(GeneratorModel):
    """A generator of item sets, and a discriminator that tells them from the sets of users.

    DP-SGD trains the discriminator. Fakes are rows of its batch: their number is public, one forward pass scores users
    and fakes, each row is clipped by itself, and noise is added once, so that a user moves the sum by at most one clip
    and no step is empty. The generator then follows the noised discriminator.

    Guarantee:
        The generator is post-processing of the discriminator's releases: it is trained on latents, weights and public
        numbers, and no row of a user ever enters it. That needs all the noise of a release in the owner's own
        discriminator: where owners add shares of it, the generator may only be trained on their sum.
    Source: Goodfellow et al. 2014, arXiv:1406.2661 (``bce``); Lim & Ye 2017, arXiv:1705.02894 (``hinge``); Arjovsky et
    al. 2017, arXiv:1701.07875 (``wasserstein``); Xie et al. 2018, arXiv:1802.06739 (noise for the discriminator alone).
    """

    def __init__(self, spec: GanSpec) -> None:
        super().__init__()
        self.spec = spec
        self.generator = _Generator(spec)
        self.discriminator = _Discriminator(spec)

    @property
    def private_part(self) -> nn.Module:
        return self.discriminator

    def encode(self, histories: Histories) -> EncodedForGan:
        return EncodedForGan(histories.to_csr(), self.spec.fakes)

    def loss(self, users: UsersAndFakes, *, share_done: float, chance: Chance) -> Tensor:
        """The discriminator's loss for each user, then for each fake, shape ``(len(users),)``.

        A user is shown by so many random items of its history as a fake might have: else the discriminator would tell
        them by their lengths, which the generator cannot change.
        """
        with torch.no_grad():
            # Fakes take from chance before any user does, so that who is drawn moves no fake.
            fakes = self._fakes(users.num_fakes, chance)
            real = self._rows_of(users.users, chance)
        scores = self.discriminator(torch.cat([real, fakes]))
        of_users, of_fakes = scores[: len(real)], scores[len(real) :]
        return torch.cat([self._margin_loss(of_users), self._margin_loss(-of_fakes)])

    def _margin_loss(self, margins: Tensor) -> Tensor:
        """Falls in ``margins``, how far each row is on its own side."""
        if self.spec.loss == "bce":
            return F.softplus(-margins)
        return F.relu(1.0 - margins) if self.spec.loss == "hinge" else -margins

    def after_step(self, *, learning_rate: float, share_done: float, chance: Chance) -> None:
        """Clip the discriminator's weights, where the loss asks for it, then descend with the generator."""
        if self.spec.loss == "wasserstein":
            with torch.no_grad():
                for parameter in self.discriminator.parameters():
                    parameter.clamp_(-self.spec.weight_clip, self.spec.weight_clip)
        trained = list(self.generator.parameters())
        for _ in range(self.spec.generator_steps):
            # For the generator's weights alone: what engines keep in the discriminator's `grad` stays as it is.
            gradients = torch.autograd.grad(self._generator_loss(chance), trained)
            with torch.no_grad():
                for parameter, gradient in zip(trained, gradients, strict=True):
                    parameter.sub_(gradient, alpha=learning_rate * self.spec.generator_rate_share)

    def _generator_loss(self, chance: Chance) -> Tensor:
        """How clearly the discriminator tells fresh fakes from users, on average."""
        scores = self.discriminator(self._fakes(self.spec.fakes, chance))
        return (F.softplus(-scores) if self.spec.loss == "bce" else -scores).mean()

    def stays_home(self, name: str) -> bool:
        return self.spec.discriminators == "local" and name.startswith("discriminator.")

    def _fakes(self, count: int, chance: Chance) -> Tensor:
        """Fresh rows of the generator, shape ``(count, num_items)``."""
        weight = self.generator.from_latent.weight
        latent = torch.empty(count, self.spec.latent_size, dtype=weight.dtype, device=weight.device)
        chance.fill_normal(latent, stddev=1.0)
        lengths = self._lengths(torch.from_numpy(chance.uniform(count)).to(weight.device))
        return self._scaled(draw_through(self.decode(latent), lengths, chance), lengths)

    def _rows_of(self, users: Bags, chance: Chance) -> Tensor:
        """Random items of each user, as many as a fake might have, shape ``(len(users), num_items)``."""
        weight, owner = self.generator.from_latent.weight, users.users
        # Each user takes a number for its length, then one per item, before the next user does.
        taken = torch.from_numpy(chance.uniform(len(users) + len(users.items))).to(weight.device)
        lengths = self._lengths(taken[users.starts + torch.arange(len(users), device=weight.device)])
        lengths = torch.minimum(lengths, users.lengths)
        # Sorted by user, and within a user by such a number: the first so many of each are a random subset.
        entries = torch.arange(len(owner), device=weight.device)
        shuffled = torch.argsort(owner + taken[entries + owner + 1])
        shown = shuffled[entries - users.starts[owner] < lengths[owner]]
        rows = torch.zeros(len(users), self.spec.num_items, dtype=weight.dtype, device=weight.device)
        rows[owner[shown], users.items[shown]] = 1.0
        return self._scaled(rows, lengths)

    def _lengths(self, uniform: Tensor) -> Tensor:
        """Geometric with mean ``items_shown``, cut at the catalogue's size; int64, of the shape of ``uniform``."""
        if self.spec.items_shown == 1:
            return torch.ones_like(uniform, dtype=torch.int64)
        lengths = torch.ceil(torch.log(uniform) / math.log1p(-1.0 / self.spec.items_shown))
        return lengths.clamp(max=self.spec.num_items).long()

    def _scaled(self, rows: Tensor, lengths: Tensor) -> Tensor:
        scales: Tensor = self.spec.input_scale * lengths.clamp(min=1).to(rows).rsqrt()
        return rows * scales[:, None]

    def decode(self, latent: Tensor) -> Tensor:
        """Item logits of shape ``(num_users, num_items)``."""
        logits: Tensor = self.generator(latent)
        return logits

    def sample_latent(self, num_users: int, *, generator: torch.Generator) -> Tensor:
        """Standard normals of shape ``(num_users, latent_size)``."""
        return torch.randn(num_users, self.spec.latent_size, generator=generator)

    def draw(
        self, lengths: IntArray, *, generator: torch.Generator, tilt: npt.NDArray[np.float32] | None = None
    ) -> Histories:
        return draw_bags(self, lengths, generator=generator, tilt=tilt)


def draw_through(logits: Tensor, lengths: Tensor, chance: Chance) -> Tensor:
    """Items drawn without replacement in proportion to the softmax of ``logits``, as rows that have a gradient.

    The largest of logits plus Gumbel noise are the draw (Kool et al. 2019, arXiv:1903.06059). Given the threshold κ
    that they pass, item ``i`` is drawn with chance ``1 - exp(-exp(logits[i] - κ))``; the gradient that comes to a row
    goes on to its logits as if it had come to these chances, while κ follows to keep their sum.

    Args:
        logits: shape ``(num_rows, num_items)``.
        lengths: items of each row, int64, shape ``(num_rows,)``, from 1 to ``num_items``.
    Returns: zeros and ones, of the shape and kind of ``logits``.
    """
    if not len(lengths):
        return torch.zeros_like(logits)
    # float32 would round the largest to 1, whose Gumbel number is infinite.
    uniform = torch.from_numpy(chance.uniform(logits.numel())).to(logits).view(logits.shape).clamp_(1e-20, 1.0 - 1e-7)
    noisy = logits.detach() - torch.log(-torch.log(uniform))
    thresholds = torch.topk(noisy, int(lengths.max()), dim=1).values.gather(1, lengths[:, None] - 1)
    drawn = (noisy >= thresholds).to(logits)
    if not logits.requires_grad:
        return drawn
    rates = torch.exp((logits.detach() - thresholds).clamp(max=20.0))  # e^20 e^-e^20 is zero, and not infinity × zero
    slopes = rates * torch.exp(-rates)
    moved = slopes * (logits - (slopes * logits).sum(1, keepdim=True) / slopes.sum(1, keepdim=True))
    return drawn + (moved - moved.detach())
