"""Draw users from a generator's prior."""

import numpy as np
import numpy.typing as npt
import torch

from shared.data.histories import Histories
from shared.errors import InputError
from shared.generators.multvae import MultVAE
from shared.rng import stream, torch_stream

_USERS_AT_ONCE = 512


def synthesise_users(
    model: MultVAE, *, num_users: int, items_per_user: int, max_items_per_user: int, seed: int
) -> Histories:
    """Histories of users who never existed.

    A user is a draw from the prior, a length from a geometric distribution around the public
    ``items_per_user`` cut at ``max_items_per_user``, and so many different items drawn in
    proportion to the decoder's probabilities, the likeliest kinds of item first.

    Args:
        seed: fresh randomness of the synthesis; it protects nobody and may be public.
    Guarantee:
        Reads the weights and public numbers, no user: what is true of the weights' privacy is
        true of the result (post-processing). The same seed gives the same users.
    Raises:
        InputError: a number is below 1, or the mean length is above the bound.
    """
    if num_users < 1 or not 1 <= items_per_user <= max_items_per_user:
        raise InputError(
            f"synthesis: {num_users} users of {items_per_user} items on average, at most {max_items_per_user}."
            " Ask for at least one user, and a mean length between 1 and the bound."
        )
    longest = min(max_items_per_user, model.spec.num_items)
    lengths = np.minimum(stream(seed, "lengths").geometric(1.0 / items_per_user, num_users), longest)
    drawing = torch_stream(seed, "synthesis")
    parts: list[npt.NDArray[np.int32]] = []
    for start in range(0, num_users, _USERS_AT_ONCE):
        wanted = lengths[start : start + _USERS_AT_ONCE]
        with torch.no_grad():
            logits = model.decode(model.sample_latent(len(wanted), generator=drawing))
            # The largest of logits plus Gumbel noise are draws without replacement
            # (Kool et al. 2019, arXiv:1903.06059).
            gumbel = -torch.log(-torch.log(torch.rand(logits.shape, generator=drawing).clamp(min=1e-20)))
            ranked = torch.topk(logits + gumbel, int(wanted.max()), dim=1).indices.numpy().astype(np.int32)
        parts.extend(row[:length] for row, length in zip(ranked, wanted, strict=True))
    return Histories.from_rows(parts, model.spec.num_items)
