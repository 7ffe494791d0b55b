"""A generator read off released statistics: no user is looked at again, and nothing is trained on users."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shared.data.histories import Histories
from shared.dpsgd.chance import Chance
from shared.errors import InputError
from shared.generators.bags import Tilt, draw_bags
from shared.generators.base import GeneratorModel, IntArray, Spec, Weights
from shared.rng import stream, torch_stream
from shared.sketch.eigenpairs import largest_eigenpairs
from shared.sketch.release import Sketch

Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]

# Of one of the two independent batches of latents in a step of the fit; their sum is what is held in memory.
_LATENTS = 256
_LATENTS_FOR_BIAS = 4096
_BIAS_STEPS = 8
_STEPS = 150
_LEARNING_RATE = 0.02
_MOMENTUM = 0.95
_NEWTON_STEPS = 8
_CLOSE_ENOUGH = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralSpec(Spec):
    """Size of a :class:`Spectral`: ``latent_size`` dimensions of taste."""

    kind: ClassVar[str] = "spectral"
    WHOLE: ClassVar[Mapping[str, int]] = {"latent_size": 1000}

    latent_size: int


class Spectral(GeneratorModel):
    """A normal latent ``z`` per user, and logits ``F z + b`` from vectors ``F`` and biases ``b`` of items.

    In such a log-linear model two items' pointwise mutual information is about the product of their vectors, so that
    ``F`` can be read off a co-occurrence (Arora et al. 2016, arXiv:1502.03520).
    """

    def __init__(self, spec: SpectralSpec) -> None:
        super().__init__()
        self.spec = spec
        self.to_logits = nn.Linear(spec.latent_size, spec.num_items)

    def encode(self, histories: Histories) -> NoReturn:
        raise _never_trained()

    def loss(self, users: Any, *, share_done: float, chance: Chance) -> NoReturn:
        raise _never_trained()

    def sample_latent(self, num_users: int, *, generator: torch.Generator) -> Tensor:
        """Draws from the prior, shape ``(num_users, latent_size)``; no user is looked at."""
        return torch.randn(num_users, self.spec.latent_size, generator=generator)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Item logits of shape ``(num_users, num_items)``."""
        logits: Tensor = self.to_logits(latent)
        return logits

    def draw(self, lengths: IntArray, *, generator: torch.Generator, tilt: Tilt | None = None) -> Histories:
        return draw_bags(self, lengths, generator=generator, tilt=tilt)


def fit_spectral(sketch: Sketch, spec: SpectralSpec, *, seed: int) -> Weights:
    """Weights of a :class:`Spectral` whose users have the statistics of ``sketch``.

    The vectors start as eigenvectors of how much likelier than by chance items are together, and then follow the
    gradient of the squared difference between the model's own co-occurrence and the released one. The biases follow the
    popularity. Items outside the head have no vector.

    Args:
        seed: of the latents that the fit looks at.
    Guarantee:
        Post-processing: a function of ``sketch``, ``spec`` and ``seed``. With one thread the same arguments give the
        same numbers.
    Raises:
        InputError: the sketch is of another catalogue.
    """
    if len(sketch.popularity) != spec.num_items:
        raise InputError(
            f"the sketch is of {len(sketch.popularity)} items, the generator of {spec.num_items}. Use one catalogue."
        )
    vectors = np.zeros((spec.num_items, spec.latent_size), dtype=np.float32)
    bias = np.log(sketch.popularity)
    if sketch.rank:
        vectors[sketch.head] = item_vectors(sketch, spec.latent_size)
        bias -= 0.5 * (vectors.astype(np.float64) ** 2).sum(axis=1)
    fit = _Fit(sketch, vectors, bias, seed)
    if vectors.any():
        for step in range(_STEPS):
            fit.step(step / _STEPS)
    fit.match_popularity()
    return fit.weights()


def item_vectors(sketch: Sketch, size: int) -> Matrix:
    """Vectors of the head's items whose products are how much likelier than by chance two items are together.

    ``c_ij / e_ij - 1``, with ``c`` the denoised co-occurrence and ``e`` what independent items of the same totals would
    have, is the pointwise mutual information to first order; unlike it, it stays finite where ``c`` is not positive.
    Pairs that are rare even by chance are shrunk to 0.

    Returns:
        shape ``(head_items, size)``; columns beyond what the co-occurrence holds are 0.
    """
    together = (sketch.vectors * sketch.values.astype(np.float32)) @ sketch.vectors.T
    np.fill_diagonal(together, 0.0)
    np.maximum(together, 0.0, out=together)
    totals = together.sum(axis=1)
    found: Matrix = np.zeros((len(together), size), dtype=np.float32)
    if not totals.any():
        return found
    by_chance = np.outer(totals / totals.sum(), totals)
    # The error of an entry of the denoised matrix, from the degrees of freedom of its eigenvectors.
    error = sketch.noise_stddev * np.sqrt(2.0 * sketch.rank / len(together))
    # Some rows tell the median as well as all, without another copy of a large matrix.
    some = by_chance[:: 1 + len(together) // 500]
    shrinkage = np.float32(max(np.median(some), 2.0 * error))
    together -= by_chance
    by_chance += shrinkage
    together /= by_chance
    np.fill_diagonal(together, 0.0)
    values, vectors = largest_eigenpairs(together, size)
    found[:, : len(values)] = vectors * np.sqrt(np.maximum(values, 0.0))
    return found


class _Fit:
    """Vectors and biases on the way from a start to the released statistics.

    For a latent ``z`` and a length ``n`` the chance that item ``i`` is drawn is about ``π_i = 1 - exp(-τ exp(F_i z +
    b_i))``, with ``τ`` such that ``Σ π = n``: draws without replacement, seen as a race of exponential clocks that is
    stopped at time ``τ`` (Rosén 1997, J. Stat. Plan. Inference 62). The model's co-occurrence is the mean over users of
    ``w π πᵀ`` beside its diagonal, with ``w`` what takes the place of ``1 / n``. Its squared difference from the
    released one, pairs weighted by ``(p_i p_j)^-½``, is estimated without bias from two independent batches of latents:
    only the products of ``π`` with each other and with the released eigenvectors appear, so a step costs
    ``num_items × latents × (latents + rank)``.
    """

    def __init__(self, sketch: Sketch, vectors: Matrix, bias: Floats, seed: int) -> None:
        self._sketch, self._whole_vectors, self._whole_bias = sketch, vectors, bias
        self._rng = stream(seed, "spectral", "lengths")
        self._generator = torch_stream(seed, "spectral", "latents")
        self._lengths = _typical_lengths(sketch, len(bias))
        head = sketch.head if sketch.rank else np.arange(len(bias))
        outside = np.ones(len(bias), dtype=bool)
        outside[head] = False
        self._head = head
        # Items outside are rare and alike for every latent: what they take of a user is their mass times τ.
        self._outside = float(np.exp(bias[outside]).sum())
        self._vectors = torch.from_numpy(vectors[head])
        self._bias = torch.from_numpy(bias[head]).float()
        self._popularity = torch.from_numpy(sketch.popularity[head]).float()
        self._seen = self._popularity.clone()
        self._first, self._second = torch.zeros_like(self._vectors), torch.zeros_like(self._vectors)
        self._steps = 0
        weights = self._popularity**-0.25
        self._weights = weights / weights.square().mean().sqrt()
        self._factor = torch.from_numpy(sketch.vectors) * self._weights[:, None]
        self._strength = torch.from_numpy(sketch.values / sketch.num_users).float()
        self._diagonal = (self._factor.square() * self._strength).sum(1)

    def step(self, share_done: float) -> None:
        """One step of Adam on the vectors, and one towards the popularity on the biases.

        The step of an item is shrunk by what its running mean would have from chance (the positive part of James &
        Stein 1961): Adam alone would let the vectors of rare items walk at random, and grow.
        """
        latents, lengths = self._users(2 * _LATENTS)
        chances, slopes = self._chances(latents, lengths)
        weighted = chances * self._weights
        size = chances.sum(1, keepdim=True)
        scale = (size - 1.0 + torch.exp(-size)) / size.square() / _LATENTS
        towards = self._towards(weighted, scale) * self._weights
        # τ answers to every logit, so that the chances still add up to the length.
        mean = (slopes * towards).sum(1, keepdim=True) / slopes.sum(1, keepdim=True)
        gradient = (slopes * (towards - mean)).T @ latents
        self._steps += 1
        self._first.lerp_(gradient, 1.0 - _MOMENTUM)
        self._second.lerp_(gradient.square(), 0.01)
        first = self._first / (1.0 - _MOMENTUM**self._steps)
        second = self._second / (1.0 - 0.99**self._steps)
        # What chance alone leaves in the running mean of gradients that have nothing in common.
        by_chance = second.sum(1, keepdim=True) * (1.0 - _MOMENTUM) / (1.0 + _MOMENTUM)
        signal = (1.0 - by_chance / first.square().sum(1, keepdim=True).clamp(min=1e-30)).clamp(min=0.0)
        rate = _LEARNING_RATE * 0.5 * (1.0 + np.cos(np.pi * share_done))
        self._vectors -= rate * signal * first / (second.sqrt() + 1e-12)
        self._seen.lerp_(_mean_popularity(chances, lengths), 0.1)
        self._correct_bias(self._seen, 0.1)

    def match_popularity(self) -> None:
        """Correct the biases until popularity is right for a large batch of latents."""
        latents, lengths = self._users(_LATENTS_FOR_BIAS)
        for _ in range(_BIAS_STEPS):
            seen = torch.zeros_like(self._bias)
            for start in range(0, len(latents), _LATENTS):
                some = slice(start, start + _LATENTS)
                seen += _mean_popularity(self._chances(latents[some], lengths[some])[0], lengths[some])
            self._correct_bias(seen * (_LATENTS / len(latents)), 0.8)

    def weights(self) -> Weights:
        vectors, bias = self._whole_vectors.copy(), self._whole_bias.copy()
        vectors[self._head], bias[self._head] = self._vectors.numpy(), self._bias.numpy()
        return {"to_logits.weight": vectors, "to_logits.bias": (bias - bias.mean()).astype(np.float32)}

    def _users(self, count: int) -> tuple[Tensor, Tensor]:
        drawn = self._rng.choice(self._lengths, count, p=self._sketch.length_shares)
        latents = torch.randn(count, self._vectors.shape[1], generator=self._generator)
        return latents, torch.from_numpy(drawn).float()[:, None]

    def _chances(self, latents: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Chances of the head's items, shape ``(num_users, head_items)``, and their slopes in the logits."""
        logits = latents @ self._vectors.T + self._bias
        largest = logits.amax(1, keepdim=True)
        rates, outside = torch.exp(logits - largest), self._outside * torch.exp(-largest)
        # Newton from below on a concave function: it rises to the root and never beyond.
        time = lengths / (rates.sum(1, keepdim=True) + outside)
        for _ in range(_NEWTON_STEPS):
            left = torch.exp(-time * rates)
            missing = lengths - (1.0 - left).sum(1, keepdim=True) - time * outside
            time += missing / ((left * rates).sum(1, keepdim=True) + outside)
            if float((missing / lengths).max()) < _CLOSE_ENOUGH:
                break
        reached = time * rates
        left = torch.exp(-reached)
        return 1.0 - left, left * reached

    def _towards(self, weighted: Tensor, scale: Tensor) -> Tensor:
        """The gradient of the squared difference in ``weighted``, whose first half is one batch, the second another."""
        one, two = weighted[:_LATENTS], weighted[_LATENTS:]
        one_scale, two_scale = scale[:_LATENTS], scale[_LATENTS:]
        products = one @ two.T
        gradients = []
        for mine, my_scale, other, other_scale, joint in (
            (one, one_scale, two, two_scale, products),
            (two, two_scale, one, one_scale, products.T),
        ):
            excess = (other_scale * other.square()).sum(0) - self._diagonal
            found = (joint * other_scale.T) @ other - ((mine @ self._factor) * self._strength) @ self._factor.T
            gradients.append(2.0 * my_scale * (found - mine * excess))
        return torch.cat(gradients)

    def _correct_bias(self, seen: Tensor, share: float) -> None:
        self._bias += share * torch.log(self._popularity / seen.clamp(min=1e-12)).clamp(-1.0, 1.0)


def _mean_popularity(chances: Tensor, lengths: Tensor) -> Tensor:
    """The users' part of ``Σ x / √n`` by item, as a share of all items' total."""
    return (chances / lengths.sqrt()).sum(0) / lengths.sqrt().sum()


def _typical_lengths(sketch: Sketch, num_items: int) -> Floats:
    """The geometric middle of each bucket; the last, which has no end, is taken to be as wide as it begins."""
    edges = np.asarray(sketch.length_edges, dtype=np.float64)
    ends = np.append(edges[1:] - 1.0, 2.0 * edges[-1])
    # Nearly a whole catalogue could only be drawn with chances of nearly 1, whatever the taste.
    middles: Floats = np.minimum(np.sqrt(edges * ends), max(1.0, 0.8 * num_items))
    return middles


def _never_trained() -> InputError:
    return InputError(
        "a spectral generator is read off one released statistic and is never trained on users."
        " Use kind vae, gan or sequence to train, or generator.warm_start to begin one from the same statistic."
    )
