"""Draw users from a generator's prior."""

import numpy as np

from shared.data.histories import Histories
from shared.errors import InputError
from shared.generators.base import GeneratorModel
from shared.rng import stream, torch_stream


def synthesise_users(
    model: GeneratorModel, *, num_users: int, items_per_user: int, max_items_per_user: int, seed: int
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
    return model.draw(lengths, generator=torch_stream(seed, "synthesis"))
