"""Small modules of every kind that engines train, with data of users."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.dpsgd.layers import GRU, ScaledBiasLinear, SparseBag
from tests.shared.dpsgd.stepping import Case


def numbers(seed: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Standard normals of a shape, from one stream."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def refilled(module: nn.Module, draw: Callable[..., Tensor]) -> nn.Module:
    """``module`` with weights of ordinary size drawn by ``draw``; padding rows stay zero."""
    module = module.to(draw(1).dtype)
    with torch.no_grad():
        for layer in module.modules():
            for parameter in layer.parameters(recurse=False):
                parameter.copy_(draw(*parameter.shape) / math.sqrt(parameter.shape[-1]))
            if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
                layer.weight[layer.padding_idx] = 0.0
    return module


def read_out(module: nn.Module, data: Tensor, out_shape: Sequence[int], draw: Callable[..., Tensor]) -> Case:
    """Losses of ``module(data[user])`` that give users gradients from far below a clip of 1 to far above it."""
    weights = draw(len(data), *out_shape)
    scales = 10.0 ** draw(len(data))

    def losses(module: nn.Module, users: Tensor) -> Tensor:
        outputs = module(data[users])
        return scales[users] * (outputs * weights[users] + 0.5 * outputs.square()).flatten(1).sum(1)

    return Case(refilled(module, draw), losses)


def bag_case(
    bags: Sequence[Sequence[tuple[int, float]]], num_items: int, size: int, draw: Callable[..., Tensor]
) -> Case:
    """A SparseBag over ``bags`` of (item, weight); items ascend."""
    weights, scales = draw(len(bags), size), 10.0 ** draw(len(bags))

    def losses(module: SparseBag, users: Tensor) -> Tensor:
        chosen = [bags[user] for user in users.tolist()]
        items = torch.tensor([item for bag in chosen for item, _ in bag], dtype=torch.int64)
        counts = torch.tensor([weight for bag in chosen for _, weight in bag]).to(module.weight)
        lengths = torch.tensor([len(bag) for bag in chosen])
        outputs = module(items, counts, lengths.cumsum(0) - lengths)
        return scales[users] * (outputs * weights[users] + 0.5 * outputs.square()).sum(1)

    return Case(refilled(SparseBag(num_items, size), draw), losses)


class Vae(nn.Module):
    """Encoder and decoder of sets of items; the latent noise belongs to the user, so that a loop can repeat it."""

    def __init__(self, num_items: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.encoder = SparseBag(num_items, hidden)
        self.to_mean, self.to_log_variance = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Linear(latent, hidden)
        self.to_logits = ScaledBiasLinear(hidden, num_items, bias_scale=3.0)

    def forward(self, rows: Tensor, latent_noise: Tensor) -> Tensor:
        users, items = rows.nonzero(as_tuple=True)
        lengths = rows.sum(1).long()
        inputs = lengths.clamp(min=1).to(latent_noise).rsqrt()[users]
        hidden = torch.tanh(self.encoder(items, inputs, lengths.cumsum(0) - lengths))
        mean, log_variance = self.to_mean(hidden), self.to_log_variance(hidden)
        latent = mean + torch.exp(0.5 * log_variance) * latent_noise
        logits = self.to_logits(torch.tanh(self.decoder(latent)))
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1)
        return divergence - (torch.log_softmax(logits, dim=1) * rows).sum(1)


class Transformer(nn.Module):
    """One causal block over item sequences; without padding where ``padding_idx`` is None."""

    def __init__(self, num_items: int, size: int, num_places: int, padding_idx: int | None) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items, size, padding_idx=padding_idx)
        self.places = nn.Embedding(num_places, size)
        self.first, self.second = nn.LayerNorm(size), nn.LayerNorm(size, bias=False)
        self.to_queries, self.to_keys, self.to_values = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.inner, self.outer = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.to_logits = nn.Linear(size, num_items)

    def forward(self, sequences: Tensor) -> Tensor:
        # A place's row for each user: an embedding of the places alone would have no user in its first dimension.
        places = torch.arange(sequences.shape[1]).repeat(len(sequences), 1)
        states = self.items(sequences) + self.places(places)
        normal = self.first(states)
        queries, keys, values = (layer(normal)[:, None] for layer in (self.to_queries, self.to_keys, self.to_values))
        states = states + F.scaled_dot_product_attention(queries, keys, values, is_causal=True)[:, 0]
        states = states + self.outer(F.gelu(self.inner(self.second(states))))
        return self.to_logits(states)


class Recurrent(nn.Module):
    """A GRU language model; without padding where ``padding_idx`` is None."""

    def __init__(self, num_items: int, size: int, padding_idx: int | None) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items, size, padding_idx=padding_idx)
        self.cell = GRU(size, size + 1)
        self.to_logits = nn.Linear(size + 1, num_items)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.to_logits(self.cell(self.items(sequences)))


def vae_case(seed: int, num_users: int, dtype: torch.dtype) -> Case:
    draw = numbers(seed, dtype)
    rows = (draw(num_users, 9) > 0.3).to(dtype)  # some users have no item at all
    noise, scales = draw(num_users, 2), 10.0 ** draw(num_users)
    return Case(refilled(Vae(9, 4, 2), draw), lambda module, users: scales[users] * module(rows[users], noise[users]))


def sequence_case(module: nn.Module, seed: int, num_users: int, num_places: int, dtype: torch.dtype) -> Case:
    """Next-item losses over sequences of items from 0 to 6; a user without any padding-free target has loss 0."""
    draw = numbers(seed, dtype)
    sequences = (draw(num_users, num_places + 1).abs() * 3).long().clamp(max=6)
    scales = 10.0 ** draw(num_users)

    def losses(module: nn.Module, users: Tensor) -> Tensor:
        inputs, targets = sequences[users, :-1], sequences[users, 1:]
        each = F.cross_entropy(module(inputs).transpose(1, 2), targets, reduction="none", ignore_index=0)
        return scales[users] * each.sum(1)

    return Case(refilled(module, draw), losses)


def model_case(name: str, seed: int, num_users: int, dtype: torch.dtype) -> Case:
    """The models by name; those called padded have an embedding with a padding row."""
    if name == "vae":
        return vae_case(seed, num_users, dtype)
    padding = 0 if name.startswith("padded") else None
    if name.endswith("transformer"):
        return sequence_case(Transformer(7, 4, 5, padding), seed, num_users, 5, dtype)
    return sequence_case(Recurrent(7, 4, padding), seed, num_users, 5, dtype)


MODELS = ("vae", "transformer", "padded transformer", "recurrent", "padded recurrent")
