"""The likelihood of sequences in which no event happens twice."""

from collections.abc import Sequence
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
class Taken:
    """What users have taken before each place; a pair of item and behaviour happens once at most in a sequence.

    Args:
        users, places, items: entry by entry, an item that the user has taken before that place.
        gone: whether it was taken in every behaviour, and so cannot follow; bool, one per entry.
        behaviours: bool, shape ``(num_users, num_places, num_behaviours)``: those taken before with the place's item.
    """

    users: Tensor
    places: Tensor
    items: Tensor
    gone: Tensor
    behaviours: Tensor

    @classmethod
    def before(cls, events: Events, num_behaviours: int) -> "Taken":
        """Of all places of ``events``. What did happen is never gone, even where the data repeat it."""
        items, inside = events.items, events.inside
        earlier = torch.ones(items.shape[1], items.shape[1], dtype=torch.bool, device=items.device).tril(-1)
        same = items[:, :, None] == items[:, None, :]  # [user, place, other place]
        now = F.one_hot(events.behaviours, num_behaviours) > 0
        behaviours = (same & earlier).float() @ now.float() > 0
        # With the place where an item is taken in its last behaviour, it is gone for all places behind.
        last = ((behaviours | now).all(2) & inside)[:, :, None] & same
        gone = (earlier.float() @ last.float() > 0) & ~same
        first = inside & ~(same & earlier).any(2)
        users, places, others = torch.nonzero(first[:, None, :] & inside[:, :, None] & earlier, as_tuple=True)
        return cls(users, places, items[users, others], gone[users, places, others], behaviours & ~now)


def next_item_log_likelihood(logits: Tensor, events: Events, taken: Taken, again: Tensor | None = None) -> Tensor:
    """Log-probability of each place's item among those that can follow, shape ``(num_users, num_places)``.

    Gradients of its gradient are not supported. The backward pass makes one tensor of the size of ``logits``, and
    nothing else does.

    Args:
        logits: shape ``(num_users, num_places, num_items)``.
        again: shape ``(num_users, num_places)``, added to the logits of items that were taken and are not gone.
    """
    added = torch.zeros_like(logits[:, :, 0]) if again is None else again
    added = torch.where(taken.gone, -torch.inf, added[taken.users, taken.places])
    likelihood: Tensor = _NextItem.apply(  # type: ignore[no-untyped-call]
        logits, added, events.items, taken.users, taken.places, taken.items
    )
    return likelihood


class _NextItem(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, added: Tensor, targets: Tensor, users: Tensor, places: Tensor, items: Tensor
    ) -> Tensor:
        entries = added, users, places, items
        normaliser, chosen = logits.new_empty(targets.shape), logits.new_empty(targets.shape)
        for chunk in _chunks(logits):
            possible = _add(logits[chunk].clone(), entries, chunk)
            normaliser[chunk] = possible.logsumexp(2)
            chosen[chunk] = possible.gather(2, targets[chunk][:, :, None])[:, :, 0]
        ctx.save_for_backward(logits, normaliser, targets, *entries)
        return chosen - normaliser

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, normaliser, targets, *entries = ctx.saved_tensors
        back = torch.empty_like(logits)
        for chunk in _chunks(logits):
            shares = _add(back[chunk].copy_(logits[chunk]), entries, chunk)
            shares.sub_(normaliser[chunk][:, :, None]).exp_().mul_(-gradient[chunk][:, :, None])
        back.scatter_add_(2, targets[:, :, None], gradient[:, :, None])
        _, users, places, items = entries
        return back, back[users, places, items], None, None, None, None


def _add(logits: Tensor, entries: Sequence[Tensor], chunk: slice) -> Tensor:
    """``logits`` of the users of ``chunk`` with what is added to entries of them, in place."""
    added, users, places, items = entries
    first, last = torch.searchsorted(users, torch.tensor([chunk.start, chunk.stop], device=users.device)).tolist()
    logits[users[first:last] - chunk.start, places[first:last], items[first:last]] += added[first:last]
    return logits


def _chunks(logits: Tensor) -> list[slice]:
    num_users = len(logits)
    size = num_users if logits.is_cuda else max(1, _CHUNK // max(1, logits[:1].numel()))
    return [slice(start, min(start + size, num_users)) for start in range(0, num_users, max(1, size))]
