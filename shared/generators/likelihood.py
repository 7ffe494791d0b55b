"""The multinomial log-likelihood of sparse histories under dense logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from shared.dpsgd.bags import Bags


def multinomial_log_likelihood(logits: Tensor, histories: Bags) -> Tensor:
    """``Σ_i log softmax(logits)[u, i]`` over the items ``i`` of each user ``u``, shape ``(num_users,)``.

    Equal to the sum over a dense multi-hot matrix, which is never made. ``logits`` has shape
    ``(num_users, num_items)`` and gets a gradient; gradients of that gradient are not supported.
    """
    lengths = histories.lengths.to(logits)
    likelihood: Tensor = _LogLikelihood.apply(logits, histories.items, histories.users, lengths)  # type: ignore[no-untyped-call]
    return likelihood


class _LogLikelihood(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, items: Tensor, users: Tensor, lengths: Tensor) -> Tensor:
        shares = torch.softmax(logits, dim=1)
        # log Σ exp, from the largest logit and its share: the one that never underflows.
        normaliser = logits.amax(1) - shares.amax(1).log()
        taken = torch.zeros_like(lengths).index_add_(0, users, logits[users, items])
        ctx.save_for_backward(shares, items, users, lengths)
        return taken - lengths * normaliser

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        shares, items, users, lengths = ctx.saved_tensors
        back = shares * (-gradient * lengths)[:, None]
        back.view(-1).index_add_(0, users * back.shape[1] + items, gradient[users])
        return back, None, None, None
