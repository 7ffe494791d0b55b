"""Draw the users of one step: Poisson sampling under a hard cap."""

import numpy as np
import numpy.typing as npt

from shared.dpsgd.chance import Chance
from shared.errors import InputError


def draw_users(
    num_users: int, *, sample_rate: float, max_batch: int | None, max_users: int, chance: Chance
) -> npt.NDArray[np.int64]:
    """The positions of the users drawn, ascending, shape ``(batch,)``; possibly none.

    Args:
        num_users: users that the owner holds; private.
        sample_rate: chance that a user is drawn.
        max_batch: hard cap on the batch, or None.
        max_users: the public bound on ``num_users`` that the release is priced with.
        chance: gives one uniform number per user and step, whoever is drawn.
    Guarantee:
        Each user is drawn with ``sample_rate``, independently of the other users and steps. Where more than
        ``max_batch`` are drawn, those with the smallest numbers stay. Below the rate all numbers follow one
        distribution, independently, so this is a uniformly random subset: the mechanism that
        :func:`shared.privacy.accounting.epsilon` prices.
    Raises:
        InputError: the owner holds more users than ``max_users``.
    """
    if num_users > max_users:
        raise InputError(
            f"this owner holds more users than max_users={max_users}, the bound it declared. Declare a larger"
            " privacy.max_users."
        )
    uniform = chance.uniform(num_users)
    drawn = np.flatnonzero(uniform < sample_rate)
    if max_batch is not None and len(drawn) > max_batch:
        # Never the first of them: who stands first in the data would stay in each overfull batch.
        smallest = np.argpartition(uniform[drawn], max_batch - 1)[:max_batch]
        drawn = np.sort(drawn[smallest])
    return drawn.astype(np.int64, copy=False)
