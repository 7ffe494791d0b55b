"""The likelihood of sequences in which no event happens twice."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from shared.generators.sequence_events import Events

# Logits worked on at a time, so that they stay in a core's cache.
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Exclusions:
    """What cannot follow, since a pair of item and behaviour happens once at most in a user's sequence.

    Args:
        users, places, items: entry by entry, an item that the user has taken in every behaviour before that place.
        behaviours: bool, shape ``(num_users, num_places, num_behaviours)``: those taken before with the place's item.
    """

    users: Tensor
    places: Tensor
    items: Tensor
    behaviours: Tensor

    @classmethod
    def of(cls, events: Events, num_behaviours: int) -> "Exclusions":
        """Of all places of ``events``. What did happen is never excluded, even where the data repeat it."""
        items, behaviours = events.items, events.behaviours
        num_places = items.shape[1]
        earlier = torch.ones(num_places, num_places, dtype=torch.bool, device=items.device).tril(-1)
        same = (items[:, :, None] == items[:, None, :]) & earlier  # [user, place, place before]
        taken = same.float() @ F.one_hot(behaviours, num_behaviours).float() > 0
        # An item is gone from where it was taken in its last behaviour on.
        now = F.one_hot(behaviours, num_behaviours) > 0
        gone = ((taken | now).all(2) & events.inside)[:, None, :] & events.inside[:, :, None] & earlier & ~same
        users, places, before = torch.nonzero(gone, as_tuple=True)
        return cls(users, places, items[users, before], taken & ~now)


def next_item_log_likelihood(logits: Tensor, events: Events, exclusions: Exclusions) -> Tensor:
    """Log-probability of each place's item among those that can follow, shape ``(num_users, num_places)``.

    ``logits`` has shape ``(num_users, num_places, num_items)`` and gets a gradient; gradients of that gradient are not
    supported. The backward pass makes one more tensor of its size, and nothing else does.
    """
    likelihood: Tensor = _NextItem.apply(  # type: ignore[no-untyped-call]
        logits, events.items, exclusions.users, exclusions.places, exclusions.items
    )
    return likelihood


class _NextItem(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, users: Tensor, places: Tensor, items: Tensor) -> Tensor:
        normaliser = logits.new_empty(targets.shape)
        for chunk in _chunks(logits):
            possible = logits[chunk].clone()
            first, last = torch.searchsorted(users, torch.tensor([chunk.start, chunk.stop], device=users.device))
            entries = slice(int(first), int(last))
            possible[users[entries] - chunk.start, places[entries], items[entries]] = -torch.inf
            normaliser[chunk] = possible.logsumexp(2)
        ctx.save_for_backward(logits, normaliser, targets, users, places, items)
        return logits.gather(2, targets[:, :, None])[:, :, 0] - normaliser

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, normaliser, targets, users, places, items = ctx.saved_tensors
        back = torch.empty_like(logits)
        for chunk in _chunks(logits):
            torch.sub(logits[chunk], normaliser[chunk][:, :, None], out=back[chunk])
            back[chunk].exp_().mul_(-gradient[chunk][:, :, None])
        back[users, places, items] = 0.0
        back.scatter_add_(2, targets[:, :, None], gradient[:, :, None])
        return back, None, None, None, None


def _chunks(logits: Tensor) -> list[slice]:
    num_users = len(logits)
    size = num_users if logits.is_cuda else max(1, _CHUNK // max(1, logits[:1].numel()))
    return [slice(start, min(start + size, num_users)) for start in range(0, num_users, max(1, size))]
