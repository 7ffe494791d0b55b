"""Users as sets of items: read for training, and drawn from latents that give every item a logit."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numba
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor

from shared.data.histories import Histories
from shared.dpsgd.bags import Bags
from shared.errors import InputError
from shared.generators.base import IntArray, Spec

Tilt = npt.NDArray[np.float32]

# Users decoded at a time: their logits stay in a shared cache, and in memory that the allocator hands out again.
_USERS_AT_ONCE = 512
_LOGITS_AT_ONCE = 1 << 21
# Below this share of the whole, what is left of a softmax in single precision says too little of single items.
_LEAST_LEFT = 1e-20


@dataclass(frozen=True, slots=True)
class EncodedBags:
    """Users as sparse sets of items: rows of a binary matrix of shape ``(num_users, num_items)``."""

    matrix: sp.csr_matrix

    def batch(self, drawn: IntArray) -> Bags:
        return Bags.from_rows(self.matrix, drawn)


@runtime_checkable
class LatentModel(Protocol):
    """A generator whose users are a latent each, decoded to one logit per item, and drawn by :func:`draw_bags`."""

    @property
    def spec(self) -> Spec: ...

    def sample_latent(self, num_users: int, *, generator: torch.Generator) -> Tensor:
        """Draws from the prior, shape ``(num_users, latent_size)``; no user is looked at."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Item logits of shape ``(num_users, num_items)``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class SteeredLatents:
    """A latent model whose users have more of their mass on a segment of the items.

    Of ``num_candidates`` draws from the prior one stays, with chances in proportion to the softmax mass of the
    segment: the posterior of a user whose first item lies in it, by sampling-importance-resampling (Rubin 1987). That
    is exact in the limit of many candidates. With few the prior shines through, and no latent becomes more than
    ``num_candidates`` times as likely. Every user has candidates of its own, so users stay independent.

    Args:
        segment: positions of the items.
        tilt: added to the logits, as at the draws to come.
    """

    model: LatentModel
    segment: IntArray
    num_candidates: int
    tilt: Tilt | None = None

    @property
    def spec(self) -> Spec:
        return self.model.spec

    def decode(self, latent: Tensor) -> Tensor:
        return self.model.decode(latent)

    @torch.no_grad()
    def sample_latent(self, num_users: int, *, generator: torch.Generator) -> Tensor:
        candidates = self.model.sample_latent(num_users * self.num_candidates, generator=generator)
        exponential = torch.empty(num_users, self.num_candidates).exponential_(generator=generator)
        log_mass = torch.cat(
            [
                torch.logsumexp(logits[:, torch.from_numpy(self.segment)], dim=1) - torch.logsumexp(logits, dim=1)
                for _, logits in _decoded(self.model, candidates, self.tilt)
            ]
        )
        # The largest of log shares plus Gumbel noise is one draw in proportion to the shares.
        chosen = (log_mass.view(num_users, -1) - exponential.log()).argmax(dim=1)
        kept: Tensor = candidates[torch.arange(num_users) * self.num_candidates + chosen]
        return kept


@torch.no_grad()
def draw_bags(
    model: LatentModel,
    lengths: IntArray,
    *,
    generator: torch.Generator,
    tilt: Tilt | None = None,
) -> Histories:
    """One user for each of ``lengths``: a latent, then so many different items in proportion to the softmax of its
    logits plus ``tilt``, the likeliest kinds of item first.

    Items are drawn one after the other, each in proportion to the shares of those not drawn yet (Plackett 1975, Luce
    1959). The same ``generator`` gives the same users whatever the number of threads: all chance is drawn before any
    item is.

    Args:
        lengths: items of each user, shape ``(num_users,)``, from 0 to ``num_items``.
        tilt: shape ``(num_items,)``.
    Raises:
        InputError: a logit is not a finite number.
    """
    latent = model.sample_latent(len(lengths), generator=generator)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    uniforms = torch.rand(int(ends[-1]), dtype=torch.float64, generator=generator).numpy()
    items = np.empty(ends[-1], dtype=np.int32)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for start, logits in _decoded(model, latent, tilt):
            shares = torch.softmax(logits, dim=1).numpy()
            pointers = ends[start : start + len(shares) + 1]
            reached = np.empty(len(shares), dtype=np.int64)
            edges = np.linspace(0, len(shares), threads + 1).astype(np.int64)
            tasks = [
                pool.submit(_draw, shares[a:b], uniforms, pointers[a : b + 1], items, reached[a:b])
                for a, b in pairwise(edges)
            ]
            for task in tasks:
                task.result()
            for user in np.flatnonzero(reached < pointers[1:]):
                drawn, rest = items[pointers[user] : reached[user]], items[reached[user] : pointers[user + 1]]
                rest[:] = _likeliest_left(logits[user], drawn, len(rest), generator)
    return Histories(ends, items, model.spec.num_items)


def _decoded(model: LatentModel, latent: Tensor, tilt: Tilt | None) -> Iterator[tuple[int, Tensor]]:
    """Tilted logits of few users at a time, each part with the position of its first user."""
    at_once = max(1, min(_USERS_AT_ONCE, _LOGITS_AT_ONCE // model.spec.num_items))
    for start in range(0, len(latent), at_once):
        logits = model.decode(latent[start : start + at_once])
        yield start, logits if tilt is None else logits + torch.from_numpy(tilt)


def _likeliest_left(
    logits: Tensor, drawn: npt.NDArray[np.int32], count: int, generator: torch.Generator
) -> npt.NDArray[np.int32]:
    """``count`` more items, none of ``drawn``, where shares are too small to be told from zero.

    The largest of logits plus Gumbel noise are draws without replacement (Kool et al. 2019, arXiv:1903.06059).
    """
    if not torch.isfinite(logits).all():
        raise InputError(
            "the generator gives an item a logit that is not a finite number: its weights are too large to be of use."
            " Take an earlier checkpoint, or train again with a lower learning rate."
        )
    exponential = torch.empty(len(logits), dtype=torch.float64).exponential_(generator=generator)
    keys = logits.double() - exponential.log()
    keys[torch.from_numpy(drawn.astype(np.int64))] = -torch.inf
    return torch.topk(keys, count).indices.numpy().astype(np.int32)


def _draw_in_turn(shares: Any, uniforms: Any, pointers: Any, items: Any, reached: Any) -> None:
    """Draw the items of each user, without replacement, until they are enough or hardly any share is left.

    Sums of about √num_items items each lead to the drawn one. What is drawn leaves its sum, which is added up anew:
    subtracting would leave the rounding of the largest share where the small ones are.

    Args:
        shares: float32, shape ``(num_users, num_items)``; overwritten.
        uniforms: one for each item to draw, at the item's place.
        pointers: user ``u`` fills ``items[pointers[u]:pointers[u + 1]]``.
        reached: for each user the first place not filled; shape ``(num_users,)``.
    """
    num_items = shares.shape[1]
    width = int(np.sqrt(num_items)) + 1
    parts = (num_items + width - 1) // width
    sums = np.empty(parts, np.float64)
    for user in range(len(shares)):
        row = shares[user]
        total = 0.0
        for part in range(parts):
            added = 0.0
            for item in range(part * width, min((part + 1) * width, num_items)):
                added += row[item]
            sums[part] = added
            total += added
        place = pointers[user]
        while place < pointers[user + 1] and total > _LEAST_LEFT:  # false where a logit was not a number
            left = uniforms[place] * total
            part = 0
            while part < parts - 1 and left >= sums[part]:
                left -= sums[part]
                part += 1
            chosen = -1
            while chosen < 0:
                for item in range(part * width, min((part + 1) * width, num_items)):
                    if row[item] > 0.0:
                        chosen = item
                        left -= row[item]
                        if left < 0.0:
                            break
                part -= 1  # if nothing was found: rounding led past the last share
            row[chosen] = 0.0
            part = chosen // width
            added = 0.0
            for item in range(part * width, min((part + 1) * width, num_items)):
                added += row[item]
            sums[part] = added
            total = 0.0
            for part in range(parts):
                total += sums[part]
            items[place] = chosen
            place += 1
        reached[user] = place


def _compile() -> Any:
    # Sums in any order, but what is not a number must stay one.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    try:
        return numba.njit(_draw_in_turn, cache=True, **options)
    except RuntimeError:  # neither the installation nor a home can be written to: compiled anew in each process
        return numba.njit(_draw_in_turn, **options)


_draw = _compile()
