"""Causal networks over places: what a place becomes depends on itself and on those before it."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.dpsgd.layers import GRU

Past = list[tuple[Tensor, ...]]
"""What each layer remembers of the places before, users first; empty at the start of a sequence."""

Drop = Callable[[Tensor], Tensor]


class CausalTransformer(nn.Module):
    """Blocks of attention and of two linear layers, normalised before each.

    Attention is linear layers around a function without weights, so that DP-SGD has rules for all of it.
    Source: Vaswani et al. 2017, arXiv:1706.03762; Xiong et al. 2020, arXiv:2002.04745, for the place of the norms.
    """

    def __init__(self, size: int, *, num_layers: int, num_heads: int, max_length: int) -> None:
        super().__init__()
        self.places = nn.Embedding(max_length, size)
        self.blocks = nn.ModuleList(_Block(size, num_heads) for _ in range(num_layers))

    def forward(self, inputs: Tensor, drop: Drop, past: Past) -> Tensor:
        """States of the places of ``inputs``, both of shape ``(num_users, num_places, size)``.

        Args:
            drop: applied to what enters the blocks, and to what each half of a block adds.
            past: of the places before, of which there are none unless ``inputs`` is one place; it grows by these.
        """
        remembered = list(past)
        past.clear()
        num_before = remembered[0][0].shape[2] if remembered else 0
        # For each user: of places alone, the embedding's gradient would not know whose it is.
        places = torch.arange(num_before, num_before + inputs.shape[1], device=inputs.device).repeat(len(inputs), 1)
        states: Tensor = drop(inputs + self.places(places))
        for number, block in enumerate(self.blocks):
            states, kept = block(states, drop, remembered[number] if remembered else None)
            past.append(kept)
        return states


class _Block(nn.Module):
    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_before_attention, self.norm_before_mixing = nn.LayerNorm(size), nn.LayerNorm(size)
        self.to_attention, self.from_attention = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.inner, self.outer = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(
        self, states: Tensor, drop: Drop, before: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        num_users, num_places, size = states.shape
        heads = self.to_attention(self.norm_before_attention(states)).view(num_users, num_places, 3, self.num_heads, -1)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        if before is not None:
            keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=before is None)
        states = states + drop(self.from_attention(attended.transpose(1, 2).reshape(num_users, num_places, size)))
        mixed = self.outer(F.gelu(self.inner(self.norm_before_mixing(states))))
        return states + drop(mixed), (keys, values)


class CausalRecurrent(nn.Module):
    """Layers of gated recurrent units, each on the states of the one before.

    Source: Cho et al. 2014, arXiv:1406.1078.
    """

    def __init__(self, size: int, *, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GRU(size, size) for _ in range(num_layers))

    def forward(self, inputs: Tensor, drop: Drop, past: Past) -> Tensor:
        """States of the places of ``inputs``, both of shape ``(num_users, num_places, size)``.

        Args:
            drop: applied to the inputs of each layer.
            past: the last state of each layer, which moves on by these places.
        """
        states, remembered = inputs, list(past)
        past.clear()
        for number, layer in enumerate(self.layers):
            given = drop(states)
            if remembered:
                # Torch's own forward takes a first state; ours, which DP-SGD trains, always begins at zero.
                states = nn.GRU.forward(cast(GRU, layer), given, remembered[number][0][None])[0]
            else:
                states = layer(given)
            past.append((states[:, -1],))
        return states
