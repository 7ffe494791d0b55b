"""Norms and clipped sums of gradients that are products of what came in and what came back."""

import torch
from torch import Tensor

# Up to so many numbers of per-user gradients are formed and kept, where that is less work than not to.
_KEPT = 1 << 24
# Numbers worked on at a time, so that they stay in a core's cache.
_CHUNK = 1 << 18


class Products:
    """The gradient ``Σ_t gradients[u, t] inputs[u, t]ᵀ`` of a weight of shape ``(out, in)``, and that of its bias.

    Args:
        bias: None where there is none.
        bias_scale: what the bias is multiplied by in the layer.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, bias_scale: float = 1.0) -> None:
        self._weight, self._bias, self._bias_scale = weight, bias, bias_scale
        self.clear()

    def clear(self) -> None:
        self._formed: Tensor | None = None
        self._summed: Tensor | None = None

    def squared_norms(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        """Of each user; ``inputs`` has shape ``(num_users, num_places, in)``, ``gradients`` ``(…, out)``."""
        num_users, num_places, width = inputs.shape
        height = gradients.shape[2]
        self._formed = None
        self._summed = gradients[:, 0] if num_places == 1 else gradients.sum(1)
        bias_square = self._bias_scale**2 if self._bias is not None else 0.0
        if num_places == 1:
            return (floored_squares(inputs[:, 0]) + bias_square) * floored_squares(self._summed)
        of_bias = squared_rows(self._summed) * bias_square
        squares = inputs.new_empty(num_users)
        if num_users * width * height <= _KEPT and 8 * width * height <= num_places**2 * (width + height):
            # Few enough numbers to form each user's gradient, and to sum those later in place of a second product.
            self._formed = inputs.new_empty(num_users, height, width)
            for chunk in _chunks(num_users, width * height):
                formed = self._formed[chunk]
                torch.bmm(gradients[chunk].transpose(1, 2), inputs[chunk], out=formed)
                squares[chunk] = squared_rows(formed.view(len(formed), -1))
            return squares + of_bias
        for chunk in _chunks(num_users, num_places**2):
            ours, theirs = gradients[chunk], inputs[chunk]
            products = torch.bmm(ours, ours.transpose(1, 2)).mul_(torch.bmm(theirs, theirs.transpose(1, 2)))
            # Places that cancel leave rounding errors of the size of the terms, and a norm too small clips too
            # little: no square counts as less than 4000 roundings of its terms, so a norm is never 0.1 % too small.
            share = 4000 * torch.finfo(inputs.dtype).eps
            terms = (floored_squares(ours, share) * floored_squares(theirs, share)).sqrt().sum(1).square()
            squares[chunk] = torch.maximum(products.sum((1, 2)), share * terms)
        return squares + of_bias

    def add_clipped(self, inputs: Tensor, gradients: Tensor, factors: Tensor) -> None:
        assert self._summed is not None
        assert self._weight.grad is not None
        if self._bias is not None and self._bias.grad is not None:
            self._bias.grad.addmv_(self._summed.t(), factors * self._bias_scale)
        if self._formed is not None:
            self._weight.grad.view(-1).addmv_(self._formed.view(len(factors), -1).t(), factors)
            return
        if inputs.shape[2] <= gradients.shape[2]:
            inputs = inputs * factors[:, None, None]
        else:
            gradients = gradients * factors[:, None, None]
        self._weight.grad.addmm_(gradients.reshape(-1, gradients.shape[2]).t(), inputs.reshape(-1, inputs.shape[2]))


def _chunks(num_users: int, numbers_per_user: int) -> list[slice]:
    size = max(1, _CHUNK // max(1, numbers_per_user))
    return [slice(start, start + size) for start in range(0, num_users, size)]


def squared_rows(values: Tensor) -> Tensor:
    """Squared L2 norm of each row, shape ``(num_rows,)``."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=1)
    return norms.square()


def floored_squares(values: Tensor, share: float = 1.0) -> Tensor:
    """Squared L2 norms over the last dimension, for factors of which ``share`` is used.

    Those so small that their squares vanish count as larger: a factor of 0 would hide the other one.
    """
    smallest = 1e4 * values.shape[-1] * torch.finfo(values.dtype).tiny / share
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return norms.square().clamp_min(smallest)
