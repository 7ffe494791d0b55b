"""Users as sets of items: read for training, and drawn from latents that give every item a logit."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor

from shared.data.histories import Histories
from shared.dpsgd.bags import Bags
from shared.generators.base import IntArray, Spec

_USERS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class EncodedBags:
    """Users as sparse sets of items: rows of a binary matrix of shape ``(num_users, num_items)``."""

    matrix: sp.csr_matrix

    def batch(self, drawn: IntArray) -> Bags:
        return Bags.from_rows(self.matrix, drawn)


class LatentModel(Protocol):
    """A generator whose users are a latent each, decoded to one logit per item."""

    spec: Spec

    def sample_latent(self, num_users: int, *, generator: torch.Generator) -> Tensor:
        """Draws from the prior, shape ``(num_users, latent_size)``; no user is looked at."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Item logits of shape ``(num_users, num_items)``."""
        ...


@torch.no_grad()
def draw_bags(
    model: LatentModel,
    lengths: IntArray,
    *,
    generator: torch.Generator,
    tilt: npt.NDArray[np.float32] | None = None,
) -> Histories:
    """One user for each of ``lengths``: a latent, then so many different items in proportion to the softmax of its
    logits plus ``tilt``, the likeliest kinds of item first.
    """
    parts: list[npt.NDArray[np.int32]] = []
    for start in range(0, len(lengths), _USERS_AT_ONCE):
        wanted = lengths[start : start + _USERS_AT_ONCE]
        logits = model.decode(model.sample_latent(len(wanted), generator=generator))
        if tilt is not None:
            logits = logits + torch.from_numpy(tilt)
        # The largest of logits plus Gumbel noise are draws without replacement (Kool et al. 2019, arXiv:1903.06059).
        gumbel = -torch.log(-torch.log(torch.rand(logits.shape, generator=generator).clamp(min=1e-20)))
        ranked = torch.topk(logits + gumbel, int(wanted.max()), dim=1).indices.numpy().astype(np.int32)
        parts.extend(row[:length] for row, length in zip(ranked, wanted, strict=True))
    return Histories.from_rows(parts, model.spec.num_items)
