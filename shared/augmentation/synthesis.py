"""Draw users from a generator's prior."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from shared.data.histories import Histories
from shared.errors import InputError
from shared.generators.bags import LatentModel, SteeredLatents, Tilt, draw_bags
from shared.generators.base import GeneratorModel
from shared.generators.lengths import LengthShares
from shared.rng import stream, torch_stream

IntArray = npt.NDArray[np.int64]

USERS_PER_BLOCK = 1 << 13
LARGEST_TAIL = 4.0
_POPULARITY_USERS = 4096
_CANDIDATES = 8
_SEGMENT_ODDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Which users to draw, in public terms; by default those that the prior has.

    Args:
        max_length: cold users, of 1 to so many items, each length as likely; None draws lengths as usual.
        tail: how far the tail is lifted: an item's odds are divided by its popularity to this power. 1 makes items
            about equally likely, 0 changes nothing.
        segment: rising positions of the items that users should favour; empty for no such wish.
    Raises:
        InputError: a number is out of its range.
    """

    max_length: int | None = None
    tail: float = 0.0
    segment: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"cold users of at most {self.max_length} items: ask for at least one item.")
        if not 0.0 <= self.tail <= LARGEST_TAIL:
            raise InputError(f"tail must lie between 0 and {LARGEST_TAIL:g}, not {self.tail!r}.")
        if any(low >= high for low, high in pairwise((-1, *self.segment))):
            raise InputError("segment: positions of items must rise, from 0 on.")


def synthesise_blocks(
    model: GeneratorModel,
    *,
    num_users: int,
    items_per_user: int,
    max_items_per_user: int,
    seed: int,
    lengths: LengthShares | None = None,
    condition: Condition | None = None,
) -> Iterator[Histories]:
    """Histories of users who never existed, :data:`USERS_PER_BLOCK` at a time.

    A user is a draw from the prior, a length, and so many different items drawn in proportion to the decoder's
    probabilities, the likeliest kinds of item first. Of ``condition``, the tail is lifted by a tilt of the logits of
    ``-tail * log(popularity)``, counted in other users that the generator draws first. A segment is favoured by the
    choice of latents (:class:`SteeredLatents`, of 8 candidates each) where the generator has them; in other generators
    the odds of the segment's items are multiplied by ten at every draw.

    Args:
        items_per_user: public mean of a geometric distribution of lengths; not read where ``lengths`` is given.
        max_items_per_user: bound at which longer histories are cut.
        seed: fresh randomness of the synthesis; it protects nobody and may be public.
        lengths: released distribution of lengths.
        condition: must have been made without looking at users.
    Guarantee:
        Reads the weights and public numbers, no user: what is true of the weights' privacy is true of the result
        (post-processing). The same seed gives the same users, with any number of threads; a block depends on its
        place and its size, not on the blocks before it.
    Raises:
        InputError: a number is below 1, the mean length is above the bound, or the segment is outside the catalogue.
    """
    condition = Condition() if condition is None else condition
    if num_users < 1 or not 1 <= items_per_user <= max_items_per_user:
        raise InputError(
            f"synthesis: {num_users} users of {items_per_user} items on average, at most {max_items_per_user}."
            " Ask for at least one user, and a mean length between 1 and the bound."
        )
    num_items = model.spec.num_items
    if condition.segment and condition.segment[-1] >= num_items:
        raise InputError(
            f"segment: item {condition.segment[-1]} is outside the generator's catalogue of {num_items} items, which"
            " are counted from 0. Give the positions of items that the generator knows."
        )
    return _blocks(
        model, num_users, _Lengths(items_per_user, min(max_items_per_user, num_items), lengths), seed, condition
    )


def synthesise_users(
    model: GeneratorModel,
    *,
    num_users: int,
    items_per_user: int,
    max_items_per_user: int,
    seed: int,
    lengths: LengthShares | None = None,
    condition: Condition | None = None,
) -> Histories:
    """The users of :func:`synthesise_blocks`, all at once."""
    return Histories.concatenate(
        list(
            synthesise_blocks(
                model,
                num_users=num_users,
                items_per_user=items_per_user,
                max_items_per_user=max_items_per_user,
                seed=seed,
                lengths=lengths,
                condition=condition,
            )
        )
    )


@dataclass(frozen=True, slots=True)
class _Lengths:
    mean: int
    longest: int
    released: LengthShares | None

    def draw(self, num_users: int, rng: np.random.Generator) -> IntArray:
        if self.released is not None:
            return self.released.draw(num_users, self.longest, rng)
        return np.minimum(rng.geometric(1.0 / self.mean, num_users), self.longest)


def _blocks(
    model: GeneratorModel, num_users: int, lengths: _Lengths, seed: int, condition: Condition
) -> Iterator[Histories]:
    tilt = _tail_tilt(model, lengths, seed, condition.tail) if condition.tail else None
    segment = np.array(condition.segment, dtype=np.int64)
    steered = None
    if len(segment) and isinstance(model, LatentModel):
        steered = SteeredLatents(model, segment, _CANDIDATES, tilt)
    elif len(segment):
        tilt = np.zeros(model.spec.num_items, np.float32) if tilt is None else tilt
        tilt[segment] += np.float32(math.log(_SEGMENT_ODDS))
    for block, start in enumerate(range(0, num_users, USERS_PER_BLOCK)):
        # A stream of its own for every block: how a generator draws one must not move the next.
        rng, generator = stream(seed, "lengths", block), torch_stream(seed, "synthesis", block)
        size = min(USERS_PER_BLOCK, num_users - start)
        if condition.max_length is None:
            wanted = lengths.draw(size, rng)
        else:
            wanted = rng.integers(1, min(condition.max_length, lengths.longest), size, endpoint=True)
        if steered is not None:
            yield draw_bags(steered, wanted, generator=generator, tilt=tilt)
        else:
            yield model.draw(wanted, generator=generator, tilt=tilt)


def _tail_tilt(model: GeneratorModel, lengths: _Lengths, seed: int, strength: float) -> Tilt:
    """``-strength * log(popularity)`` of every item in users drawn without a condition, shape ``(num_items,)``.

    Items that none of them has count as one half user, so that all of these are lifted alike.
    """
    wanted = lengths.draw(_POPULARITY_USERS, stream(seed, "popularity", "lengths"))
    drawn = model.draw(wanted, generator=torch_stream(seed, "popularity"))
    counts = np.maximum(np.bincount(drawn.items, minlength=model.spec.num_items), 0.5)
    tilt: Tilt = (-strength * np.log(counts / counts.mean())).astype(np.float32)
    return tilt
