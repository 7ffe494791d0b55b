"""How long synthetic histories are."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from shared.errors import InputError

IntArray = npt.NDArray[np.int64]

_LARGEST_SHARE_ERROR = 1e-6


@dataclass(frozen=True, slots=True)
class LengthShares:
    """How long histories are, as a DP release says.

    Args:
        edges: rising lower ends of the buckets, the first from 1 on. A bucket ends before the next begins; the last
            has no end.
        shares: of users in each bucket, from 0, adding up to 1.
    Raises:
        InputError: the numbers describe no distribution.
    """

    edges: tuple[int, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in pairwise(self.edges))
        if not (self.edges and self.edges[0] >= 1 and rising and len(self.shares) == len(self.edges)):
            raise InputError(
                f"lengths: {len(self.edges)} bucket(s) with {len(self.shares)} share(s); needed are rising lower ends"
                " from 1 on, with one share each."
            )
        total = math.fsum(self.shares)
        if not (min(self.shares) >= 0 and abs(total - 1.0) <= _LARGEST_SHARE_ERROR):
            raise InputError(
                f"lengths: the shares lie from {min(self.shares):g} up and add up to {total:g}; they must not be"
                " negative, and add up to 1. Noise makes both untrue: cut at 0 and divide by the sum."
            )

    def draw(self, num_users: int, longest: int, rng: np.random.Generator) -> IntArray:
        """Lengths from 1 to ``longest``, shape ``(num_users,)``.

        Uniform inside a bucket. Of the last only its beginning is known: lengths exceed it geometrically, on average
        by as much as it begins at. What is above ``longest`` is cut to it.
        """
        shares = np.asarray(self.shares)
        bucket = rng.choice(len(shares), num_users, p=shares / shares.sum())
        first = np.asarray(self.edges)[bucket]
        ends = np.asarray([*self.edges[1:], self.edges[-1] + 1])[bucket]
        within = rng.integers(first, ends)
        beyond = rng.geometric(1.0 / (1.0 + self.edges[-1]), num_users) - 1
        lengths = np.where(bucket == len(shares) - 1, first + beyond, within)
        cut: IntArray = np.minimum(lengths, longest).astype(np.int64)
        return cut
