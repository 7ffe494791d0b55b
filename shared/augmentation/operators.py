"""Change the order or the items of histories by the classical operators of sequence augmentation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, cast, get_args

import numpy as np
import numpy.typing as npt

from shared.data.histories import Histories
from shared.errors import InputError

OperatorName = Literal["crop", "mask", "reorder", "insert", "substitute"]
IntArray = npt.NDArray[np.int64]
Neighbours = npt.NDArray[np.int32]
"""Items similar to each item, most similar first: shape ``(num_items, k)``, -1 where there are no more."""

_NAMES = get_args(OperatorName)
_SIMILAR = frozenset({"insert", "substitute"})


@dataclass(frozen=True, slots=True)
class Operators:
    """Operators, applied one after the other to every history.

    Args:
        steps: names, each with its strength: the share of a history that it drops (``crop`` at the ends, ``mask``
            anywhere), shuffles within one window (``reorder``), adds (``insert``) or replaces (``substitute``).
    Raises:
        InputError: no step, a name that is unknown, or a strength outside (0, 1].
    """

    steps: tuple[tuple[OperatorName, float], ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise InputError(f"operators: none given, so nothing would change. Choose from {', '.join(_NAMES)}.")
        for name, strength in self.steps:
            if name not in _NAMES:
                raise InputError(f"operators: unknown {name!r:.80}; choose from {', '.join(_NAMES)}.")
            if not 0 < strength <= 1:
                raise InputError(f"operators: {name} has strength {strength}; it is a share, above 0 and up to 1.")

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Self:
        """Read ``name:strength`` texts, such as ``["crop:0.4", "substitute:0.1"]``.

        Raises:
            InputError: a text is not of this form, or :class:`Operators` refuses it.
        """
        steps: list[tuple[OperatorName, float]] = []
        for text in texts:
            name, _, strength = text.partition(":")
            try:
                steps.append((cast(OperatorName, name.strip()), float(strength)))
            except ValueError:
                raise InputError(
                    f"operators: {text!r:.80} is not NAME:STRENGTH, such as mask:0.2. Strength is the share of a"
                    " history that the operator touches."
                ) from None
        return cls(tuple(steps))

    @property
    def need_neighbours(self) -> bool:
        """Whether a step puts similar items in."""
        return any(name in _SIMILAR for name, _ in self.steps)


def transform(
    histories: Histories, operators: Operators, *, rng: np.random.Generator, neighbours: Neighbours | None = None
) -> Histories:
    """One changed copy of every history.

    This is augmentation, not privacy: the result is as private as ``histories`` and ``neighbours``.

    Args:
        rng: fresh randomness; it protects nobody.
        neighbours: what ``insert`` and ``substitute`` take items from.
    Guarantee:
        A step of strength s touches s·length interactions of a history but for less than one, whose chance makes the
        mean exact. Dropping leaves each non-empty history one interaction at least; ``crop`` keeps a contiguous part.
        Adding and replacing bring only items new to the history, and fewer than s·length where it has all that are
        similar. What is not touched keeps its order. Times never decrease within a user if they did not before:
        reordered interactions swap times, an added one has the time and the behaviour of the one that it follows, and a
        replaced one keeps its own. The input is unchanged, and one state of ``rng`` gives one result.
    Raises:
        InputError: a step needs ``neighbours``, or they are not of this catalogue.
    Reference:
        Xie et al. 2022, arXiv:2010.14395 (crop, mask, reorder); Liu et al. 2021, arXiv:2108.06479 (insert, substitute).
    """
    if operators.need_neighbours:
        neighbours = _checked(neighbours, histories.num_items)
    for name, strength in operators.steps:
        amounts = np.floor(strength * histories.lengths() + rng.random(histories.num_users)).astype(np.int64)
        amounts = np.minimum(amounts, histories.lengths())
        if name == "crop":
            histories = _crop(histories, amounts, rng)
        elif name == "mask":
            histories = histories.keep(~_chosen(histories, _all_but_one(histories, amounts), rng))
        elif name == "reorder":
            histories = _reorder(histories, amounts, rng)
        else:
            assert neighbours is not None
            at = np.flatnonzero(_chosen(histories, amounts, rng))
            where, similar = _similar(histories, at, neighbours, rng)
            if name == "insert":
                histories = add_items(histories, similar, after=where)
            else:
                items = histories.items.copy()
                items[where] = similar
                histories = replace(histories, items=items)
    return histories


def add_items(histories: Histories, items: npt.NDArray[np.int32], *, after: IntArray) -> Histories:
    """``histories`` with each of ``items`` behind the interaction at its position in ``after``.

    It has the time and the behaviour of that interaction. Items added behind the same one stay in the order given.
    """
    counts = np.bincount(after, minlength=histories.num_interactions)
    source = np.repeat(np.arange(histories.num_interactions), counts + 1)
    is_new = np.ones(len(source), dtype=bool)
    is_new[np.cumsum(counts + 1) - counts - 1] = False
    longer = histories.items[source]
    longer[is_new] = items[np.argsort(after, kind="stable")]
    return replace(
        histories,
        indptr=histories.indptr + np.concatenate([[0], np.cumsum(counts)])[histories.indptr],
        items=longer,
        timestamps=None if histories.timestamps is None else histories.timestamps[source],
        behaviours=None if histories.behaviours is None else histories.behaviours[source],
    )


def _users(histories: Histories) -> IntArray:
    """Each interaction's user, shape ``(num_interactions,)``."""
    return np.repeat(np.arange(histories.num_users), histories.lengths())


def _all_but_one(histories: Histories, amounts: IntArray) -> IntArray:
    return np.minimum(amounts, np.maximum(histories.lengths() - 1, 0))


def _chosen(histories: Histories, amounts: IntArray, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """A mask of so many interactions of each user, all choices equally likely."""
    order = np.lexsort((rng.random(histories.num_interactions), _users(histories)))
    chosen = np.empty(histories.num_interactions, dtype=bool)
    chosen[order] = histories.places() < np.repeat(amounts, histories.lengths())
    return chosen


def _windows(lengths: IntArray, sizes: IntArray, rng: np.random.Generator) -> IntArray:
    """The first place of a window of each size in each length, all places equally likely."""
    return np.floor(rng.random(len(lengths)) * (lengths - sizes + 1)).astype(np.int64)


def _crop(histories: Histories, amounts: IntArray, rng: np.random.Generator) -> Histories:
    lengths, places = histories.lengths(), histories.places()
    sizes = lengths - _all_but_one(histories, amounts)
    starts = _windows(lengths, sizes, rng)
    first, end = np.repeat(starts, lengths), np.repeat(starts + sizes, lengths)
    return histories.keep((places >= first) & (places < end))


def _reorder(histories: Histories, sizes: IntArray, rng: np.random.Generator) -> Histories:
    lengths, places = histories.lengths(), histories.places()
    starts = _windows(lengths, sizes, rng)
    first, size = np.repeat(starts, lengths), np.repeat(sizes, lengths)
    within = (places >= first) & (places < first + size)
    # Inside a window a random key between its ends; outside the place itself, so that nothing else moves.
    key = np.where(within, first + size * rng.random(len(places)), places)
    order = np.lexsort((key, _users(histories)))
    return replace(
        histories,
        items=histories.items[order],
        behaviours=None if histories.behaviours is None else histories.behaviours[order],
    )


def _similar(
    histories: Histories, at: IntArray, neighbours: Neighbours, rng: np.random.Generator
) -> tuple[IntArray, npt.NDArray[np.int32]]:
    """The positions among ``at`` for which a similar item that is new to the user was found, and these items.

    Each position asks its neighbours in turn, beginning with one at random; no user is given an item twice.
    """
    num_items, width = histories.num_items, neighbours.shape[1]
    users = _users(histories)
    owned = np.sort(users * num_items + histories.items)
    first = rng.integers(width, size=len(at))
    still = np.arange(len(at))
    where, found = [at[:0]], [histories.items[:0]]
    for turn in range(width):
        candidates = neighbours[histories.items[at[still]], (first[still] + turn) % width]
        # -1 belongs to no user; without this, "no more" would be another user's last item.
        keys = np.where(candidates >= 0, users[at[still]] * num_items + candidates, -1)
        accepted = np.zeros(len(keys), dtype=bool)
        accepted[np.unique(keys, return_index=True)[1]] = True  # of two that want the same item, the earlier
        places = np.minimum(np.searchsorted(owned, keys), len(owned) - 1)
        accepted &= (keys >= 0) & (owned[places] != keys)
        where.append(at[still[accepted]])
        found.append(candidates[accepted])
        owned = np.sort(np.concatenate([owned, np.sort(keys[accepted])]), kind="stable")  # two runs, merged
        still = still[~accepted]
    return np.concatenate(where), np.concatenate(found)


def _checked(neighbours: Neighbours | None, num_items: int) -> Neighbours:
    if neighbours is None:
        raise InputError(
            "operators: insert and substitute need a table of similar items. Compute one, or leave them out."
        )
    if neighbours.ndim != 2 or neighbours.shape[0] != num_items or neighbours.shape[1] == 0:
        raise InputError(
            f"operators: the table of similar items has shape {neighbours.shape}; ({num_items}, k) is needed, one row"
            " for each item of the catalogue."
        )
    if neighbours.min() < -1 or neighbours.max() >= num_items:
        raise InputError(f"operators: similar items must lie in -1..{num_items - 1}, the public catalogue.")
    return neighbours
