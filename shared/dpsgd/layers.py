"""Layers of generators that torch does not have, in ordinary form: DP-SGD engines know how to train them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SparseBag(nn.Module):
    """A linear layer on sparse rows: ``output[u] = Σ weights[e] · weight[items[e]] + bias`` over the entries of ``u``.

    ``weight`` has shape ``(num_items, size)``, the transpose of :class:`torch.nn.Linear`'s.
    """

    def __init__(self, num_items: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_items, size))
        self.bias = nn.Parameter(torch.zeros(size))
        nn.init.xavier_normal_(self.weight)

    def forward(self, items: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
        """Rows of shape ``(num_users, size)``.

        Args:
            items: strictly increasing within a user, shape ``(num_entries,)``.
            weights: of the entries, shape ``(num_entries,)``; they get no gradient.
            starts: where each user begins, shape ``(num_users,)``. Last, as Opacus reads the batch from there.
        """
        summed: Tensor = F.embedding_bag(items, self.weight, starts, mode="sum", per_sample_weights=weights)
        return summed + self.bias


class ScaledBiasLinear(nn.Linear):
    """A linear layer whose bias counts ``bias_scale`` times, and so takes more of a clipped gradient."""

    def __init__(self, in_features: int, out_features: int, *, bias_scale: float) -> None:
        super().__init__(in_features, out_features)
        self.bias_scale = bias_scale

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias * self.bias_scale)


class GRU(nn.GRU):
    """One recurrent layer over ``(num_users, num_steps, input_size)``, from a zero state, giving all its states.

    :class:`torch.nn.GRU` without the options that DP-SGD has no use for; weights and names are the same.
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]  # one tensor in, one out
        states: Tensor = super().forward(inputs)[0]
        return states
